"""The listening socket: bound once, and shared fairly by the processes that accept from it.

Left alone, whichever process wakes up first takes every connection that waits, and keeps it: of two workers one can
hold all 32 keep-alive connections of a load balancer. So each tells its connections in its page, and one that holds
more than the least busy stands back. Knows nothing of HTTP.
"""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from app.errors import SettingsError
from app.pages import Page, WriterState
from app.settings import Settings, flag_of, variable_of
from app.tls import options

log = logging.getLogger(__name__)

BACKLOG = 2048
STEP_S = 0.001
"""Shortest pause that uvloop knows: it counts whole milliseconds."""
PATIENCE_S = 0.004
"""Longest that a connection waits for a less busy worker; then whoever is free takes it."""
UNREADY_STEP_S = 0.02
SILENT_S = 1.0
"""A neighbour whose event loop has not turned for this long is not waited for."""
EXHAUSTED_S = 0.5
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

ProtocolFactory = Callable[[], asyncio.Protocol]


def listen(host: str, port: int, setting: str = "port") -> socket.socket:
    """Bind a port.

    Args:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        setting: name of the setting that `port` comes from, for the sentence.

    Raises:
        SettingsError: address or port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise SettingsError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}; "
            f"set {flag_of(setting)} or {variable_of(setting)}, --host or CONVOY_HOST."
        ) from error


def listen_for_probes(settings: Settings) -> socket.socket | None:
    """Bind the port for probes, if there is to be one.

    Raises:
        SettingsError: it cannot be had.
    """
    return listen(settings.host, settings.probe_port, "probe_port") if settings.probe_port else None


@contextmanager
def reserve_for_grpc(settings: Settings) -> Iterator[None]:
    """Hold the port for gRPC, if there is to be one, so that nobody else's workers share it; they bind it themselves.

    Raises:
        SettingsError: it cannot be had.
    """
    if not settings.grpc_port:
        yield
        return
    with listen(settings.host, settings.grpc_port, "grpc_port") as first:
        address = first.getsockname()
    with socket.socket(first.family) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)  # and never listens: connections go to those who do
        yield


def url_of(listener: socket.socket, *, secure: bool) -> str:
    """Return the address of a listening socket as a URL; `secure`: it speaks TLS."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if secure else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


class Connections(set[asyncio.Protocol]):
    """A server's open connections, counted down in its page as they close."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self._page = page

    def discard(self, connection: object) -> None:
        """Forget a connection."""
        if connection in self:
            self._page.connections -= 1
        super().discard(connection)


class Acceptor:
    """Accepts for one of several workers, one connection at a time; for any worker what waits at the end.

    Used on the event loop only. One that was not started accepts nothing before `close`: another does meanwhile.
    """

    def __init__(
        self,
        listener: socket.socket,
        protocol: ProtocolFactory,
        own: Page,
        pages: Sequence[Page],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._tls = options(tls)
        self._listener = listener
        self._protocol = protocol
        self._own = own
        self._others = [page for page in pages if page is not own]
        self._loop = asyncio.get_running_loop()
        self._greeting: set[asyncio.Task[None]] = set()
        self._resume: asyncio.TimerHandle | None = None
        self._patience_s = PATIENCE_S
        self._started = False
        self._closed = False
        listener.setblocking(False)

    def start(self) -> None:
        """Begin to accept."""
        self._started = True
        self._loop.add_reader(self._listener, self._wake)

    @property
    def greeting(self) -> int:
        """Connections that were accepted, and have no protocol yet."""
        return len(self._greeting)

    def close(self) -> None:
        """Take what waits already, so that it is not cut off, and accept nothing more."""
        self._closed = True
        if self._started:
            self._loop.remove_reader(self._listener)
        if self._resume is not None:
            self._resume.cancel()
        for _ in range(BACKLOG):
            if not self._accept():
                break

    def _wake(self) -> None:
        """Take one connection, or stand back."""
        pause = self._pause()
        if pause == 0.0:
            self._accept()
        else:
            self._stand_back(pause)

    def _pause(self) -> float:
        """Return how long to leave a waiting connection to the others, seconds."""
        awake = [page for page in self._others if page.pid and page.silent_s < SILENT_S]
        ready = [page.connections for page in awake if page.state is WriterState.READY]
        if self._own.state is not WriterState.READY:
            # Whoever is still loading would answer 503 where a neighbour can answer.
            return UNREADY_STEP_S if ready else 0.0
        # An eighth more is fair too: nobody stands back over a handful among hundreds.
        if not ready or self._own.connections <= (least := min(ready)) + least // 8:
            return 0.0
        return STEP_S if self._patience_s > 0 else 0.0

    def _stand_back(self, pause: float) -> None:
        if self._closed:
            return
        self._loop.remove_reader(self._listener)
        self._patience_s -= pause
        self._resume = self._loop.call_later(pause, self._come_back)

    def _come_back(self) -> None:
        """See whether the others have caught up; take what they left."""
        pause = self._pause()
        if pause:
            self._stand_back(pause)
            return
        self._resume = None
        self._patience_s = PATIENCE_S
        self._accept()
        if self._resume is None:  # else there was no descriptor left
            self._loop.add_reader(self._listener, self._wake)

    def _accept(self) -> bool:
        """Accept one connection; False: none was left."""
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                return True  # that client has left while it waited
            log.error("cannot accept connections", extra={"reason": error.strerror})
            self._stand_back(EXHAUSTED_S)
            return False
        connection.setblocking(False)
        self._own.connections += 1
        greeting = self._loop.create_task(self._greet(connection))
        self._greeting.add(greeting)
        greeting.add_done_callback(self._greeting.discard)
        return True

    async def _greet(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection, **self._tls)
        except OSError as error:  # it was reset meanwhile, or there was no handshake
            self._own.connections -= 1
            log.debug("connection lost at once", extra={"reason": str(error)})
            connection.close()
