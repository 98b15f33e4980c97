"""The connection under a prediction: uvicorn's HTTP/1.1, and the two things that ASGI has no cheap word for.

In ASGI a task must wait for the news that a client left, and an answer goes out in two writes, each a system call.
Here the news is a callback and the answer one write. Owns nothing else of HTTP, and idle connections.
"""

from collections.abc import Callable
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

EXTENSION = "convoy.exchange"


class Connection(HttpToolsProtocol):
    """One client's connection; every request's scope gets its `Exchange`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.on_leave: Callable[[], None] | None = None
        """Called when the client goes away."""

    def on_headers_complete(self) -> None:
        """Start the request, as uvicorn does; its task runs later, and finds the exchange in its scope."""
        super().on_headers_complete()
        cast(dict[str, Any], self.scope)[EXTENSION] = Exchange(self, self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever works for this client."""
        super().connection_lost(exc)
        if self.on_leave is not None:
            self.on_leave()


class Exchange:
    """One request and its answer, on their connection."""

    __slots__ = ("_connection", "_cycle")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle

    def on_leave(self, tell: Callable[[], None] | None) -> None:
        """Have `tell` called when the client goes away; None: nobody wants to know any more."""
        self._connection.on_leave = tell

    async def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """Send a whole answer; `headers` are lines that end in CRLF, without Content-Length and Date."""
        cycle = self._cycle
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if cycle.disconnected:
            return
        lines = [STATUS_LINE[status]]
        for name, value in cycle.default_headers:
            if name == b"connection":  # the service drains, and closes each connection with its answer
                cycle.keep_alive = False
            else:
                lines += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        lines += (headers, b"content-length: %d\r\n\r\n" % len(body), body)
        cycle.response_started = cycle.response_complete = True
        cycle.transport.write(b"".join(lines))
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()


def exchange_of(scope: Scope) -> Exchange:
    """Return the exchange that the connection put into a request's scope."""
    return cast(Exchange, scope[EXTENSION])
