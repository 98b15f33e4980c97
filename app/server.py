"""A service on its port, by uvicorn: connections in, what a signal does, ten looks a second, and the drain at the end.

What a request is, it leaves to the application.
"""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, cast

import uvicorn

from app import logs
from app.accept import BACKLOG, Acceptor, Connections
from app.errors import ConvoyError, SettingsError
from app.http.connection import Connection
from app.pages import WriterState
from app.probes import ProbePort
from app.service import Service
from app.tls import options

log = logging.getLogger(__name__)

TICKS_A_SECOND = 10
LAST_REQUEST_S = 0.5
"""How long an idle connection may still bring a request when the process drains.

Closed at once, it would cross with a request that its client is just sending, and nobody would answer that one.
"""
_CLOSE = (b"connection", b"close")


class Server(uvicorn.Server):
    """uvicorn, except that a signal drains the service and ends the process with status 0, and a fault ends it too."""

    def __init__(self, service: Service, probe_port: socket.socket | None = None) -> None:
        settings = service.settings
        certificate = service.certificate
        super().__init__(
            uvicorn.Config(
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
                ssl_context_factory=(lambda *_: certificate.context) if certificate else None,
            )
        )
        self.service = service
        self._acceptors: list[Acceptor] = []
        self._probe_port = ProbePort(service.probes, probe_port)
        self._grpc_started = service.grpc is None
        self._is_to_look_again = False
        service.is_cut_off = lambda: self.force_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the service, and accept connections."""
        if hasattr(signal, "SIGHUP"):
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, self.hang_up)
            loop.add_signal_handler(signal.SIGUSR1, logs.change_level, 1)
            loop.add_signal_handler(signal.SIGUSR2, logs.change_level, -1)
            if self._is_to_look_again:
                self.hang_up()
        self.service.show()
        await self._probe_port.__aenter__()
        await super().startup(sockets=[])
        # uvicorn would give a TLS handshake a minute, and half a minute to the end of a connection.
        loop, tls = asyncio.get_running_loop(), options(self.config.ssl)
        for listener in sockets or []:
            self.servers.append(await loop.create_server(self._new_connection, sock=listener, backlog=BACKLOG, **tls))
            self._accept_from(listener)

    def _accept_from(self, listener: socket.socket) -> Acceptor:
        page, pages = self.service.page, self.service.metrics.pages
        acceptor = Acceptor(listener, self._new_connection, page, pages, self.config.ssl)
        self._acceptors.append(acceptor)
        return acceptor

    def _new_connection(self) -> asyncio.Protocol:
        protocol: Any = self.config.http_protocol_class
        connection: asyncio.Protocol = protocol(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )
        return connection

    async def on_tick(self, counter: int) -> bool:
        """Tell, ten times a second, whether to stop."""
        self.service.show()
        self.service.operations.look()
        if not self._grpc_started and self._grpc_may_start():
            self._grpc_started = True
            await self._start_grpc()
        if counter % TICKS_A_SECOND == 0:
            self.service.keyring.refresh()
            if self.service.certificate is not None:
                self.service.certificate.refresh()
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                cast(Connection, connection).close_if_idle(now)
        return await super().on_tick(counter) or self.service.fault is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, answer what was accepted, and stop the service."""
        showing = asyncio.create_task(self._keep_showing())
        if (grpc := self.service.grpc) is not None:
            grpc.drain(self.service.settings.drain_timeout_s)
        self._stop_accepting(sockets or [])
        await self._last_requests()
        await super().shutdown(sockets)
        if self.force_exit:
            # The lifespan is cut off as well, which uvicorn would tell at length.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            if grpc is not None:
                await grpc.cut_off()
        await self._probe_port.__aexit__()
        showing.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal; a second one cuts off what still runs."""
        # uvicorn would keep the signal and raise it again at the end, which kills the process it has just drained.
        if self.should_exit:
            self.force_exit = True
        self.service.draining = True
        self.should_exit = True

    def heed_signals_early(self) -> None:
        """Let signals that ask for something only ask for it, until a loop heeds them: else they end the process."""
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGHUP, self._hang_up_later)
            signal.signal(signal.SIGUSR1, lambda *_: logs.change_level(1))
            signal.signal(signal.SIGUSR2, lambda *_: logs.change_level(-1))

    def _hang_up_later(self, sig: int, frame: FrameType | None) -> None:
        self._is_to_look_again = True

    def hang_up(self) -> None:
        """Look at the models directory again."""
        self._rescan = asyncio.get_running_loop().create_task(self._look_again())

    async def _look_again(self) -> None:
        log.info("reloading")
        try:
            await self.service.operations.rescan()
        except ConvoyError as fault:
            log.error("not all is reloaded", extra={"reason": fault.message})
        else:
            log.info("reloaded")

    def _grpc_may_start(self) -> bool:
        return True

    async def _start_grpc(self) -> None:
        try:
            if self.service.grpc is not None:
                await self.service.grpc.start()
                self.service.grpc_is_open = True
        except SettingsError as fault:
            self.service.fault = fault

    def _stop_accepting(self, sockets: Sequence[socket.socket]) -> None:
        for acceptor in self._acceptors:
            acceptor.close()
        for server in self.servers:
            server.close()
        for listener in sockets:
            listener.close()

    async def _keep_showing(self) -> None:
        """Go on showing that the event loop turns: the ticks have ended, and a drain may take long."""
        while True:
            self.service.show()
            await asyncio.sleep(0.1)

    async def _last_requests(self) -> None:
        """Answer one more request on each connection, and close it with the answer."""
        self.server_state.default_headers = [*self.server_state.default_headers, _CLOSE]
        loop = asyncio.get_running_loop()
        until = loop.time() + LAST_REQUEST_S
        while self._open_connections() and loop.time() < until and not self.force_exit:
            await asyncio.sleep(0.01)

    def _open_connections(self) -> int:
        return len(self.server_state.connections) + sum(acceptor.greeting for acceptor in self._acceptors)


class SharingServer(Server):
    """The server of one worker among several, on a listening socket that they share."""

    def __init__(self, service: Service, listener: socket.socket, lifeline: int) -> None:
        """Serve one worker's part.

        Args:
            service: this worker's own.
            listener: the socket that all accept from.
            lifeline: a pipe's end that is closed when the supervisor is gone.
        """
        super().__init__(service)
        self._listener = listener
        self._lifeline = lifeline
        service.on_change = self._keep_or_close
        connections: Any = Connections(service.page)
        self.server_state.connections = connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the service, and accept connections in turn with the other workers."""
        await super().startup(sockets=[])
        self._accept_from(self._listener).start()
        asyncio.get_running_loop().add_reader(self._lifeline, self._supervisor_is_gone)

    def _keep_or_close(self) -> None:
        """While loading, keep no connection: the next request may find a worker that is ready."""
        if self.should_exit:  # the drain says by itself which connections close
            return
        headers = [header for header in self.server_state.default_headers if header != _CLOSE]
        if self.service.page.state is WriterState.LOADING:
            headers.append(_CLOSE)
        self.server_state.default_headers = headers

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on SIGTERM, however often it comes: a service manager signals every process. SIGINT then cuts off."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.service.draining = True
        self.should_exit = True

    def hang_up(self) -> None:
        """Leave SIGHUP to the supervisor."""

    def _supervisor_is_gone(self) -> None:
        asyncio.get_running_loop().remove_reader(self._lifeline)
        log.error("the supervisor is gone: draining")
        self.handle_exit(signal.SIGTERM, None)

    def _grpc_may_start(self) -> bool:
        # Whoever is still loading would answer UNAVAILABLE where a neighbour can answer.
        return not self.service.is_loading

    def _stop_accepting(self, sockets: Sequence[socket.socket]) -> None:
        super()._stop_accepting([self._listener])
