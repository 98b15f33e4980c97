"""The connection under a prediction: uvicorn's HTTP/1.1, and what ASGI has no cheap word for.

In ASGI a task must wait for the news that a client left, and an answer goes out in two writes, each a system call: here
the news is a callback, and the answer one write. A prediction that arrives whole in one read gets its body without
waiting for it, and is offered to the application before a task is made for it. A head that came before is not parsed
again. All else is uvicorn's.
"""

import asyncio
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

EXTENSION: Final = "convoy.connection"
MAX_WAITING = 8
"""Pipelined requests of one client that may wait for their turn while more is read."""
MAX_HEAD_BYTES, MAX_HEADS = 2048, 512
"""Heads that are kept: a client sends the same one again and again, perhaps but for the Content-Length."""
MAX_FRUITLESS_BYTES = 65536
"""What a client may send on end that is neither body nor the end of a head: the parser would keep any length of it."""
_TOO_LONG = b'{"error": "The head of the request is too long.", "code": "head_too_large"}'
_NO_HTTP = b'{"error": "What arrived is no HTTP/1.1 request.", "code": "bad_request"}'
_HEAD_END = b"\r\n\r\n"
_AROUND_URL = len(b"  HTTP/1.1\r\n\r\n")


@dataclass(eq=False, slots=True)
class RequestHead:
    """What comes before the body of a prediction that arrives whole.

    Attributes:
        path: in ASCII, without anything encoded.
        query: what comes after the question mark.
        headers: names in lower case, and values.
        body_bytes: size of the body.
        plan: what the application makes of the head, for the next request that has it; None at first.
    """

    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body_bytes: int
    plan: Any = None


class Heads:
    """The heads that an application has seen, by their bytes."""

    def __init__(self) -> None:
        self._heads: dict[bytes, RequestHead] = {}

    def split(self, data: bytes) -> tuple[RequestHead, bytes] | None:
        """Return head and body, if `data` is one whole request whose head is known."""
        start = data[: data.find(_HEAD_END) + len(_HEAD_END)]
        head = self._heads.get(start)
        if head is None or len(start) + head.body_bytes != len(data):
            return None
        return head, data[len(start) :]

    def learn(self, data: bytes, head: RequestHead) -> None:
        """Keep a head that was parsed from `data`, if there is nothing in it but the head and its body."""
        start = data[: data.find(_HEAD_END) + len(_HEAD_END)]
        if len(start) + head.body_bytes == len(data) and len(start) <= MAX_HEAD_BYTES:
            if len(self._heads) >= MAX_HEADS:
                del self._heads[next(iter(self._heads))]
            self._heads[start] = head


class TasklessApplication(Protocol):
    """An application that can answer a request that is all there without a task."""

    heads: Heads

    def begin(self, request: "WholeRequest") -> bool:
        """Begin to answer, by callbacks. False: not this one; nothing has happened, and ASGI's way is open."""
        ...


class Connection(HttpToolsProtocol):
    """One client's connection, which answers one request after another; every request finds it in its scope."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.on_leave: Callable[[], None] | None = None
        """Called when the client goes away; whoever sets it takes it back with its answer."""
        self._answering: RequestResponseCycle | WholeRequest | None = None
        """Whose turn it is; uvicorn's `cycle` is the last request that came. None: nobody's, or the client left."""
        self._pieces: list[bytes] | None = None
        """The body so far of a request that may arrive whole; None: the request is uvicorn's."""
        self._idle_since = self.loop.time()
        self._application = cast(TasklessApplication, self.app) if hasattr(self.app, "begin") else None
        self._between = True
        """Whether the next byte is the first of a request."""
        self._data = b""
        """What is being read, if it starts with a request."""
        self._fruitless_bytes = 0
        """Read since a head, a piece of a body or a request last was complete."""
        self._longest_head = 0
        """The head that is being read has no more bytes; what else was complete in its first read counts too."""
        self._is_over = False
        """What came last is no HTTP: that is said when those before it are answered, and nothing is read any more."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to read."""
        super().connection_made(cast(asyncio.Transport, transport))
        self.flow = _Flow(self.transport, self.pipeline)

    def data_received(self, data: bytes) -> None:
        """Take what was read; a request that is not all there is handed to uvicorn."""
        if self._is_over:
            return
        if self._between and self._application is not None and self._is_free():
            known = self._application.heads.split(data)
            if known is not None:
                self._begin(WholeRequest(self, *known, keep_alive=True))
                return
        self._data = data if self._between else b""
        self._fruitless_bytes += len(data)
        self._longest_head += len(data)
        self._parse(data)
        self._data = b""
        if not self._fruitless_bytes:
            self._longest_head = len(data)
        if self._fruitless_bytes > MAX_FRUITLESS_BYTES and not self.transport.is_closing():
            self._refuse(431, _TOO_LONG)
        if self._pieces is not None:
            pieces, self._pieces = self._pieces, None
            if not self.transport.is_closing():  # else it was no HTTP, and has been told so
                self._start_waiting()
                for piece in pieces:
                    super().on_body(piece)

    def on_message_begin(self) -> None:
        """Start a request."""
        self._between = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start a request, or wait whether it arrives whole."""
        if self._longest_head > MAX_FRUITLESS_BYTES and self._head_bytes() > MAX_FRUITLESS_BYTES:
            self._refuse(431, _TOO_LONG)
            raise HttpParserError("nothing of it is read any more")
        self._fruitless_bytes = 0
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            return  # to be parsed again without that
        if self._may_be_whole():
            self._pieces = []
        else:
            self._start_waiting()
        self.headers = []  # trailers go here: a header that comes after the body says nothing about the request

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._fruitless_bytes = 0
        if self._pieces is None:
            super().on_body(body)
        else:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        """Start a request that has arrived whole."""
        self._fruitless_bytes = 0
        self._between = not self.parser.should_upgrade()  # at which the parser stops
        if not self._between and self.parser.get_method() != b"CONNECT":
            return
        if self._pieces is None:
            super().on_message_complete()
            return
        pieces, self._pieces = self._pieces, None
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        path, _, query = self.url.partition(b"?")
        head = RequestHead(path.decode("ascii"), query, cast(Any, self.scope["headers"]), len(body))
        keep_alive = self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive()
        if keep_alive and self._data and self._application is not None:
            self._application.heads.learn(self._data, head)
        self._begin(WholeRequest(self, head, body, keep_alive=keep_alive))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever works for this client, and hold on to nothing that holds on to this connection."""
        super().connection_lost(exc)
        answering, self._answering = self._answering, None
        if answering is not None and not answering.response_complete:
            answering.disconnected = True  # uvicorn tells only the last request that came
            answering.message_event.set()
        cast(Any, self).cycle = cast(Any, self).scope = None
        self.pipeline.clear()
        if self.on_leave is not None:
            self.on_leave()

    def on_response_complete(self) -> None:
        """Go on with the next request; without one, idle time begins, which `close_if_idle` ends instead of a timer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._is_over:
            self._say_last(400, _NO_HTTP)
        else:
            self._idle_since = self.loop.time()

    def close_if_idle(self, now: float) -> None:
        """Close the connection if for the keep-alive time there was no request, or no more than a part of its head."""
        if self._is_free() and now - self._idle_since > self.timeout_keep_alive:
            self.transport.close()

    async def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """Send the whole answer to the request whose turn it is, unless the client left.

        Args:
            status: HTTP status.
            headers: lines that end in CRLF, without Content-Length and Date.
            body: all of it.
        """
        if self.flow.write_paused:
            await self.flow.drain()
        self.answer_now(status, headers, body)

    def answer_now(self, status: int, headers: bytes, body: bytes) -> None:
        """Do what `answer` does without waiting until the client has read what was sent before."""
        cycle = self._answering
        if cycle is None:
            return
        lines = [STATUS_LINE[status]]
        for name, value in self.server_state.default_headers:
            if name == b"connection":  # the service drains, and closes each connection with its last answer
                cycle.keep_alive = cycle.keep_alive and bool(self.pipeline)
            else:
                lines += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        lines += (headers, b"content-length: %d\r\n\r\n" % len(body), body)
        if isinstance(cycle, RequestResponseCycle):
            cycle.response_started = True
        cycle.response_complete = True
        self._answering = None
        self.transport.write(b"".join(lines))
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def scope_of(self, head: RequestHead) -> Scope:
        """Return the ASGI scope of a request."""
        super().on_message_begin()  # which makes one
        return {
            **cast(Scope, self.scope),
            "method": "POST",
            "path": head.path,
            "raw_path": head.path.encode("ascii"),
            "query_string": head.query,
            "headers": list(head.headers),
            EXTENSION: self,
        }

    def _begin(self, request: "WholeRequest") -> None:
        """Have the application answer a request that is all there."""
        cast(Any, self).cycle = self._answering = request
        # Who does not read the answers to what was sent before is made to wait for that, in a task.
        if self._application is None or self.flow.write_paused or not self._application.begin(request):
            request.start(cast(ASGIApp, self.app))

    def _parse(self, data: bytes) -> None:
        """Have the parser tell what is in `data`; what it cannot read ends the connection."""
        unread: bytes | memoryview = data
        try:
            while True:
                try:
                    self.parser.feed_data(unread)
                    return
                except HttpParserUpgrade as stop:
                    unread = memoryview(unread)[stop.args[0] :]
                if self.parser.get_method() == b"CONNECT":
                    return
                head = self._head_without_upgrade()
                self._start_parser()
                self.parser.feed_data(head)
        except HttpParserError:
            if not self.transport.is_closing():  # else what is wrong has been said
                self.logger.warning("Invalid HTTP request received.")
                if self._awaits_answers_alone():
                    self._is_over = True
                else:
                    self._say_last(400, _NO_HTTP)

    def _start_parser(self) -> None:
        """Have a parser that has read nothing: the one before may have been told that its request is the last."""
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's

    def _head_without_upgrade(self) -> bytes:
        """Return the head that has just been parsed as that of a plain request, which a server may take it for.

        The parser stops at a header Upgrade, which asks for a protocol that is not spoken here, and takes the body for
        that protocol's; RFC 9110, 7.8, lets a server pass over it and answer by HTTP/1.1.
        """
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join(lines) + _HEAD_END

    def _head_bytes(self) -> int:
        """Return the length of the head that has just been parsed, without the blanks around its values."""
        line = len(self.parser.get_method()) + len(self.url) + _AROUND_URL
        return line + sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)

    def _refuse(self, status: int, body: bytes) -> None:
        """Read no further, and say why, if that cannot be taken for the answer to a request before it."""
        if self._is_free():
            self._say_last(status, body)
        else:
            self.transport.close()

    def _say_last(self, status: int, body: bytes) -> None:
        """Answer what is no request, and close the connection."""
        headers = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + headers % len(body) + body)
        self.transport.close()

    def _is_free(self) -> bool:
        """Tell whether every request that has come is answered."""
        return self.cycle is None or self.cycle.response_complete

    def _awaits_answers_alone(self) -> bool:
        """Tell whether what came before is whole, and not all of it answered: who sent it takes 400 for its answer."""
        last: Any = self.cycle
        return not self._is_free() and (isinstance(last, WholeRequest) or not last.more_body)

    def _may_be_whole(self) -> bool:
        """Tell whether this is a prediction that nothing stands in the way of, as a request before it would."""
        url = self.url
        return (
            url.partition(b"?")[0].endswith((b"/predict", b"/infer"))
            and url[0] == 0x2F  # /
            and not (b"%" in url or b"#" in url or self.expect_100_continue)
            and self._is_free()
            and self.parser.get_method() == b"POST"
        )

    def _start_waiting(self) -> None:
        """Start a request as uvicorn does, or have it wait for its turn."""
        cast(dict[str, Any], self.scope)[EXTENSION] = self
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Start a request whose turn it is."""
        self._answering = cycle
        super()._start_asgi_task(cycle, app)


class _Flow(FlowControl):
    """Reads no further while many requests wait for their turn.

    uvicorn reads on with every answer: a client that sends small requests faster than they are answered then fills the
    memory with them.
    """

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        """Read on, unless enough is there; asked again with every answer."""
        if len(self._waiting) <= MAX_WAITING:
            super().resume_reading()


class _Nobody:
    """Whom uvicorn tells that something has happened, where nobody waits for it."""

    def set(self) -> None:
        """Tell nobody."""


class WholeRequest:
    """What uvicorn's cycle is, for a prediction that lies there with all its body."""

    message_event = _Nobody()

    __slots__ = ("_answer", "_body", "_task", "connection", "disconnected", "head", "keep_alive", "response_complete")

    def __init__(self, connection: Connection, head: RequestHead, body: bytes, *, keep_alive: bool) -> None:
        self.connection = connection
        self.head = head
        self._body: bytes | None = body
        self._answer: tuple[int, list[tuple[bytes, bytes]], bytes] | None = None
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False

    @property
    def body(self) -> bytes:
        """The body, if it was not taken."""
        return self._body or b""

    def start(self, app: ASGIApp) -> None:
        """Have the application answer in ASGI's way, in a task that the server knows of until it is done."""
        connection = self.connection
        self._task = connection.loop.create_task(self._run(app, connection.scope_of(self.head)))
        connection.tasks.add(self._task)

    def take_body(self) -> bytes | None:
        """Return the body; None when it was taken before, or the client left."""
        body, self._body = self._body, None
        return None if self.disconnected else body

    async def receive(self) -> Message:
        """Return the body; after it there is only the end."""
        body = self.take_body()
        if body is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self.receive, self.send)  # which turns every fault into an answer itself
        finally:
            self.connection.tasks.discard(self._task)
            del self._task

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
        await self.connection.answer(status, self._lines(headers), body)

    def send_now(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        """Send an answer, whether the client has read those before or not."""
        self.connection.answer_now(status, self._lines(headers), body)

    def _lines(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        lines: list[bytes] = []
        for name, value in headers:
            if name == b"connection":
                self.keep_alive = False
            elif name != b"content-length":
                lines += (name, b": ", value, b"\r\n")
        return b"".join(lines)


def connection_of(scope: Scope) -> Connection:
    """Return the connection that a request came by."""
    return cast(Connection, scope[EXTENSION])
