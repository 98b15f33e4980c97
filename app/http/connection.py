"""The connection under a prediction: uvicorn's HTTP/1.1, and what ASGI has no cheap word for.

In ASGI a task must wait for the news that a client left, and an answer goes out in two writes, each a system call: here
the news is a callback, and the answer one write. A prediction that arrives whole in one read, as small images do, gets
its body without waiting for it. All else is uvicorn's.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

EXTENSION: Final = "convoy.exchange"


class Connection(HttpToolsProtocol):
    """One client's connection; every request's scope gets its `Exchange`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.on_leave: Callable[[], None] | None = None
        """Called when the client goes away."""
        self._pieces: list[bytes] | None = None
        """The body so far of a request that may arrive whole; None: the request is uvicorn's."""

    def data_received(self, data: bytes) -> None:
        """Take what was read; a request that is not all there is handed to uvicorn."""
        super().data_received(data)
        if self._pieces is not None:
            pieces, self._pieces = self._pieces, None
            if not self.transport.is_closing():  # else it was no HTTP, and has been told so
                self._start_waiting()
                for piece in pieces:
                    super().on_body(piece)

    def on_headers_complete(self) -> None:
        """Start a request, or wait whether it arrives whole."""
        if self._may_be_whole():
            self._pieces = []
        else:
            self._start_waiting()
        self.headers = []  # trailers go here: a header that comes after the body says nothing about the request

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        if self._pieces is None:
            super().on_body(body)
        else:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        """Start a request that has arrived whole."""
        if self._pieces is None:
            super().on_message_complete()
            return
        pieces, self._pieces = self._pieces, None
        whole = _WholeRequest(self, pieces[0] if len(pieces) == 1 else b"".join(pieces))
        cast(Any, self).cycle = whole
        # Scope and URL now: when the task runs, they may be those of the next request in the same read.
        task = self.loop.create_task(whole.run(cast(ASGIApp, self.app), cast(Scope, self.scope), self.url))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever works for this client."""
        super().connection_lost(exc)
        if self.on_leave is not None:
            self.on_leave()

    def _may_be_whole(self) -> bool:
        """Tell whether this is a prediction that nothing stands in the way of: no request before it, no handshake."""
        url = self.url
        return (
            url.partition(b"?")[0].endswith(b"/predict")
            and url[0] == 0x2F  # /
            and not (b"%" in url or b"#" in url or self.expect_100_continue or self.parser.should_upgrade())
            and (self.cycle is None or self.cycle.response_complete)
            and self.parser.get_method() == b"POST"
        )

    def _start_waiting(self) -> None:
        """Start a request as uvicorn does; its task runs later, and finds the exchange in its scope."""
        super().on_headers_complete()
        cast(dict[str, Any], self.scope)[EXTENSION] = Exchange(self, self.cycle)


class _Nobody:
    """Whom uvicorn tells that something has happened, where nobody waits for it."""

    def set(self) -> None:
        """Tell nobody."""


class _WholeRequest:
    """What uvicorn's cycle is, for a request that lies there with all its body."""

    message_event = _Nobody()

    __slots__ = ("_answer", "_body", "_connection", "disconnected", "keep_alive", "response_complete")

    def __init__(self, connection: Connection, body: bytes) -> None:
        self._connection = connection
        self._body: bytes | None = body
        self._answer: tuple[int, list[tuple[bytes, bytes]], bytes] | None = None
        parser = connection.parser
        self.keep_alive = parser.get_http_version() == "1.1" and parser.should_keep_alive()
        self.disconnected = False
        self.response_complete = False

    async def run(self, app: ASGIApp, scope: Scope, url: bytes) -> None:
        """Have the application answer; it turns every fault into an answer itself."""
        path, _, query = url.partition(b"?")
        scope["method"] = "POST"
        scope["path"] = path.decode("ascii")
        scope["raw_path"] = path
        scope["query_string"] = query
        scope[EXTENSION] = Exchange(self._connection, self)
        await app(scope, self.receive, self.send)

    async def receive(self) -> Message:
        """Return the body; after it there is only the end."""
        body, self._body = self._body, None
        if body is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Send an answer that comes as ASGI messages, once it is complete."""
        if message["type"] == "http.response.start":
            self._answer = message["status"], list(message.get("headers", ())), b""
            return
        assert self._answer is not None, "a body comes after its start"
        status, headers, body = self._answer
        body += message.get("body", b"")
        if message.get("more_body", False):
            self._answer = status, headers, body
            return
        lines: list[bytes] = []
        for name, value in headers:
            if name == b"connection":
                self.keep_alive = False
            elif name != b"content-length":
                lines += (name, b": ", value, b"\r\n")
        await Exchange(self._connection, self).answer(status, b"".join(lines), body)


class Exchange:
    """One request and its answer, on their connection."""

    __slots__ = ("_connection", "_cycle")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle | _WholeRequest) -> None:
        self._connection = connection
        self._cycle = cycle

    def on_leave(self, tell: Callable[[], None] | None) -> None:
        """Have `tell` called when the client goes away; None: nobody wants to know any more."""
        self._connection.on_leave = tell

    async def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """Send a whole answer; `headers` are lines that end in CRLF, without Content-Length and Date."""
        connection, cycle = self._connection, self._cycle
        if connection.flow.write_paused and not cycle.disconnected:
            await connection.flow.drain()
        if cycle.disconnected:
            return
        lines = [STATUS_LINE[status]]
        for name, value in connection.server_state.default_headers:
            if name == b"connection":  # the service drains, and closes each connection with its answer
                cycle.keep_alive = False
            else:
                lines += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        lines += (headers, b"content-length: %d\r\n\r\n" % len(body), body)
        if isinstance(cycle, RequestResponseCycle):
            cycle.response_started = True
        cycle.response_complete = True
        transport: asyncio.Transport = connection.transport
        transport.write(b"".join(lines))
        cycle.message_event.set()
        if not cycle.keep_alive:
            transport.close()
        connection.on_response_complete()


def exchange_of(scope: Scope) -> Exchange:
    """Return the exchange that the connection put into a request's scope."""
    return cast(Exchange, scope[EXTENSION])
