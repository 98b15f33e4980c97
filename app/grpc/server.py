"""The gRPC server of one process: its port, its limits, health and reflection, and how it ends.

Every worker binds the port for itself (SO_REUSEPORT), and the kernel deals connections out among them; gRPC's core
accepts by itself, so that the workers cannot do it in turn as they do for HTTP.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from app.engine import Engine
from app.errors import SettingsError
from app.grpc.calls import Calls
from app.grpc.entry import credentials_of, doorkeeper
from app.grpc.methods import SERVICE, CallLimits, Methods
from app.journal import Journal
from app.keys import Keyring
from app.metrics import Metrics
from app.operations import Operations
from app.repository import Repository
from app.settings import Settings
from app.tls import Certificate

log = logging.getLogger(__name__)

MAX_STREAMS = 256
"""Calls of one connection at once; further ones wait at their client."""
MIN_PING_INTERVAL_MS = 10_000
LAST_REQUEST_S = 0.5
"""How long a call may still come in when the process drains: as over HTTP, one may be on its way."""
STEP_S = 0.02
MAX_STEPS = 10
SEND_S = 0.5
"""How long an answer may be on its way when everything else has ended."""


def create_front(
    *,
    engine: Engine,
    repository: Repository,
    metrics: Metrics,
    journal: Journal,
    keyring: Keyring,
    certificate: Certificate | None,
    why_not_ready: Callable[[], str],
    operations: Operations,
    settings: Settings,
) -> "Front":
    """Return the front over an engine and a repository, as the settings want it.

    Raises:
        SettingsError: the certificate's key is encrypted.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
    client_ca = Path(settings.tls_client_ca).read_bytes() if settings.tls_client_ca else None
    calls = Calls(journal, enter=doorkeeper(keyring))
    limits = CallLimits(
        rows=min(settings.max_images_per_request, settings.max_inflight_images), timeout_ms=settings.request_timeout_ms
    )
    return Front(
        Methods(engine, repository, metrics, calls, limits, why_not_ready, operations),
        calls,
        host=settings.host,
        port=settings.grpc_port,
        max_message_bytes=min(settings.max_body_bytes, settings.max_inflight_bytes),
        idle_s=settings.keep_alive_s,
        credentials=None if certificate is None else credentials_of(certificate, client_ca),
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a record of gRPC's core is worth a line: not that a call was over before its answer was sent.

    A deadline of the client's own, mostly. The call is counted and logged like any other.
    """
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, grpc.aio.InternalError)


class Front:
    """Serves calls from its start to its drain."""

    def __init__(
        self,
        methods: Methods,
        calls: Calls,
        *,
        host: str,
        port: int,
        max_message_bytes: int,
        idle_s: int,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """Prepare; nothing is bound yet.

        Args:
            methods: the service.
            calls: what it counts its calls by.
            host: address to listen on.
            port: port to listen on, which other workers may listen on too.
            max_message_bytes: largest request; gRPC itself refuses a larger one, compressed or not.
            idle_s: a connection without calls is closed after this time; its client opens another when it has one.
            credentials: for TLS; None: without.
        """
        self._methods = methods
        self._calls = calls
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._credentials = credentials
        self._options = (
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.max_connection_idle_ms", idle_s * 1000),
            # Clients of the field ping more often than the five minutes that gRPC allows, and would be cut off.
            ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
            ("grpc.keepalive_permit_without_calls", 1),
        )
        self._server: grpc.aio.Server | None = None
        self._health = HealthServicer()
        self._ready: bool | None = None
        self._telling: asyncio.Future[None] | None = None
        self._ending: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Bind the port and serve.

        Raises:
            SettingsError: the port cannot be had.
        """
        server = grpc.aio.server(handlers=(self._methods,), options=self._options)
        add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), server)
        try:
            if self._credentials is None:
                server.add_insecure_port(self._address)
            else:
                server.add_secure_port(self._address, self._credentials)
        except RuntimeError:  # all that gRPC says; its reasons are in a log of its own
            raise SettingsError(f"Cannot listen on {self._address} for gRPC: set --grpc-port, --host.") from None
        await server.start()
        self._server = server
        log.info("listening for gRPC", extra={"address": self._address})

    def show(self, ready: bool) -> None:
        """Tell who asks or watches `grpc.health.v1` whether to send calls here."""
        if self._server is not None and ready is not self._ready:
            self._ready = ready
            status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
            self._telling = asyncio.ensure_future(self._tell(status))

    def drain(self, grace_s: float) -> None:
        """Begin to accept nothing more, answer what is inside, and end; what then still runs is cut off."""
        if self._server is not None and self._ending is None:
            self._ending = asyncio.ensure_future(self._end(self._server, grace_s))

    @property
    def is_over(self) -> bool:
        """Whether nothing is served any more: the drain is over, or nothing was ever begun."""
        return self._server is None or (self._ending is not None and self._ending.done())

    async def cut_off(self) -> None:
        """End at once."""
        self._calls.cutting_off = True
        if self._server is not None:
            await self._server.stop(None)

    async def _end(self, server: grpc.aio.Server, grace_s: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + grace_s
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(min(LAST_REQUEST_S, grace_s))
        # A call that gRPC has and we do not when it is told to stop is CANCELLED, which no client tries again. So it is
        # told when there is none: whoever is owed an answer sends nothing, and reads "elsewhere" before the answer.
        self._calls.hold_answers()
        for _ in range(MAX_STEPS):
            begun = self._calls.begun
            await asyncio.sleep(STEP_S)
            if begun == self._calls.begun:
                break
        # Longer than it will be: what is cut off below is to be known as that.
        refusing = asyncio.ensure_future(server.stop(2 * grace_s + 1))
        await asyncio.sleep(STEP_S)
        self._calls.let_answers_go()
        self._calls.stop_reading()
        while self._calls.inside and loop.time() < until:
            await asyncio.sleep(STEP_S)
        # What is left is watchers of the health and open reflections, which would wait for ever; or it is too late.
        self._calls.cutting_off = True
        await server.stop(max(min(SEND_S, until - loop.time()), 0))
        await refusing

    async def _tell(self, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)
