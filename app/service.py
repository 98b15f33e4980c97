"""The composition root: one settings object in, a running service out. Everything is built here and handed down."""

import asyncio
import gc
import logging
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from app import runtime
from app.admission import Admission, Limits
from app.batcher import Batcher
from app.cpus import usable_cpus
from app.engine import LocalEngine
from app.errors import SettingsError
from app.http.application import create_app
from app.http.bodies import BodyLimits
from app.http.connection import Connection
from app.images import forbid_pillow_guesses
from app.manifest import Bundle
from app.metrics import Metrics, ModelMetrics
from app.repository import Repository, check_graph, warm_up
from app.sessions import OnnxSession, Session
from app.settings import Settings

log = logging.getLogger(__name__)

BACKLOG = 2048
GARBAGE_THRESHOLD = 20_000
"""Allocations between two collections of the youngest garbage; Python's 700 are one request of a few images."""


class Service:
    """Everything that lives as long as the process: metrics, models, engine, and the application over them."""

    def __init__(self, settings: Settings) -> None:
        """Build everything; nothing runs yet.

        Raises:
            SettingsError: the models directory is missing or empty.
            RuntimeMissingError: there is no usable ONNX Runtime.
        """
        runtime.check_wheels(runtime.installed_wheels())
        forbid_pillow_guesses()
        self.settings = settings
        self.cpus = usable_cpus()
        self.draining = False
        self.fault: SettingsError | None = None
        self.metrics = Metrics()
        self.repository = Repository(
            settings.models,
            self.metrics,
            default=settings.default_model,
            open_sessions=self._open_sessions,
            start=self._start_batcher,
        )
        admission = Admission(
            Limits(
                images=settings.max_inflight_images,
                bytes=settings.max_inflight_bytes,
                pixels=settings.max_inflight_pixels,
                model_images=settings.limits_of_models(self.repository.entries),
                queue_target_s=settings.queue_target_ms / 1000,
            ),
            self.metrics,
        )
        self.engine = LocalEngine(
            self.repository,
            admission,
            decode_threads=settings.decode_threads or self.cpus,
            max_image_pixels=settings.max_image_pixels,
        )
        self.app = create_app(
            engine=self.engine,
            repository=self.repository,
            metrics=self.metrics,
            why_not_ready=self.why_not_ready,
            limits=BodyLimits(
                max_body_bytes=min(settings.max_body_bytes, settings.max_inflight_bytes),
                max_images=min(settings.max_images_per_request, settings.max_inflight_images),
            ),
            request_timeout_ms=settings.request_timeout_ms,
            access_log=settings.access_log,
            lifespan=self._lifespan,
        )

    def why_not_ready(self) -> str:
        """Return why the service should get no traffic, or an empty string."""
        if self.draining:
            return "Draining: the service is about to stop."
        return self.repository.why_not_ready(self.settings.require_all_models)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Load models beside the running server, so that probes are answered meanwhile; at the end stop everything."""
        self._loop = asyncio.get_running_loop()
        loader = threading.Thread(target=self._load, name="loader", daemon=True)
        loader.start()
        yield
        await asyncio.to_thread(self.repository.close)
        self.engine.close()
        log.info("stopped")

    def _load(self) -> None:
        try:
            self.repository.load_all()
        except SettingsError as fault:  # no model can be served so: the process ends, and `serve` raises it
            self.fault = fault
            return
        # What was loaded stays: a collection that walked through it would hold up every request that is inside.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_THRESHOLD, 10, 50)
        reason = self.why_not_ready()
        if reason:
            log.error("not ready", extra={"reason": reason})
        else:
            log.info("ready", extra={"default_model": self.repository.default, "cpus": self.cpus})

    def _open_sessions(self, bundle: Bundle) -> list[Session]:
        sessions: list[Session] = []
        for _ in range(self.settings.sessions or self.cpus):
            session = OnnxSession(bundle.model_path, self.settings.device, self.settings.threads_per_session)
            check_graph(bundle, session)
            sessions.append(session)
        return sessions

    def _start_batcher(self, bundle: Bundle, sessions: list[Session], metrics: ModelMetrics) -> Batcher:
        for session in sessions:
            warm_up(bundle, session, self.settings.max_batch)
        return Batcher(
            sessions,
            max_batch=self.settings.max_batch,
            linger_s=self.settings.linger_ms / 1000,
            loop=self._loop,
            metrics=metrics,
        )


class Server(uvicorn.Server):
    """uvicorn, except that a signal drains the service and ends the process with status 0, and a fault ends it too."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def on_tick(self, counter: int) -> bool:
        """Tell, ten times a second, whether to stop."""
        return await super().on_tick(counter) or self._service.fault is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal; a second one cuts off what still runs."""
        # uvicorn would keep the signal and raise it again at the end, which kills the process it has just drained.
        if self.should_exit:
            self.force_exit = True
        self._service.draining = True
        self.should_exit = True


def listen(settings: Settings) -> socket.socket:
    """Bind the service's port.

    Raises:
        SettingsError: address or port cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise SettingsError(
            f"Cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; "
            "set --port or CONVOY_PORT, --host or CONVOY_HOST."
        ) from error


def serve(settings: Settings) -> None:
    """Serve until a signal; blocks. Returns after what was accepted has been answered.

    Raises:
        SettingsError: no models, no port, or no such device.
        RuntimeMissingError: there is no usable ONNX Runtime.
    """
    service = Service(settings)
    with listen(settings) as listener:
        host, port = listener.getsockname()[:2]
        log.info("listening", extra={"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"})
        config = uvicorn.Config(
            service.app,
            http=Connection,
            ws="none",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=settings.keep_alive_s,
            timeout_graceful_shutdown=settings.drain_timeout_s,
            backlog=BACKLOG,
        )
        Server(config, service).run(sockets=[listener])
    if service.fault is not None:
        raise service.fault
