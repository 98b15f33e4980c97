"""The direct way: endpoints that speak ASGI themselves, past FastAPI's stack, and what they have in common."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.engine import Engine, Stages
from app.errors import AbandonedError, ConvoyError
from app.http.bodies import Head
from app.http.connection import Connection, connection_of
from app.http.errors import send_error
from app.http.observe import trace_of
from app.loading import LoadedModel
from app.tickets import Ticket

Answer = Callable[[Scope, Receive, Connection], Awaitable[None]]
"""Reads a request and answers it."""
Asked = tuple[str | None, str | None]
"""A model's name and version; None: the default model, the active version."""
DEFAULT: Asked = (None, None)
Way = Callable[[str], tuple[str, Asked] | None]
"""Path → its route, and what the path asks for; None: it is another's."""


async def answer_directly(answer: Answer, scope: Scope, receive: Receive, send: Send) -> None:
    """Have `answer` read a request and answer it over its connection; turn its faults into answers."""
    connection = connection_of(scope)
    try:
        await answer(scope, receive, connection)
    except ConvoyError as fault:
        await send_error(fault, scope, send)
    except AbandonedError:
        return
    finally:
        connection.on_leave = None


class Front:
    """The application as the server sees it: some requests go straight to their endpoint, all else to FastAPI.

    On 32×32 JPEGs FastAPI's stack took half of the event loop's time of a request.
    """

    def __init__(self, app: ASGIApp, ways: Sequence[tuple[Way, Answer]]) -> None:
        """Stand before an application.

        Args:
            app: FastAPI's.
            ways: for POST: what tells from a path which route it is, if it is one of them, and who answers then.
        """
        self._app = app
        self._ways = ways

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] == "http" and scope["method"] == "POST":
            for way_of, answer in self._ways:
                if way := way_of(scope["path"]):
                    trace_of(scope).route = way[0]
                    await answer_directly(answer, scope, receive, send)
                    return
        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._head(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer HEAD as GET, which load balancers expect of a probe; the server leaves the body out."""
        as_get = {**scope, "method": "GET"}
        await self._app(as_get, receive, send)
        scope["route"] = as_get.get("route")


@contextmanager
def admitted(
    engine: Engine, model: LoadedModel, scope: Scope, connection: Connection, timeout_ms: int
) -> Iterator[tuple[Head, Ticket]]:
    """Let a request for a model in, for as long as a `with` block runs: gives its head and its ticket.

    Args:
        engine: admits it.
        model: that it asks for.
        scope: the request's.
        connection: that it came by; when the client leaves, the block ends.
        timeout_ms: the server's deadline, which the request may bring forward.

    Raises:
        BadRequestError: a header is malformed.
        QueueFullError: it could not be served in time.
    """
    trace = trace_of(scope)
    trace.model, trace.version = model.name, model.version
    head = Head.of(scope["headers"])
    if head.timeout_ms is not None:
        timeout_ms = min(head.timeout_ms, timeout_ms)
    with engine.admit(model, trace.started + timeout_ms / 1000, head.urgency) as ticket:
        if trace.marks is not None:
            ticket.follow(trace.marks)
        connection.on_leave = ticket.abandon
        yield head, ticket


async def answer_json(
    scope: Scope, connection: Connection, model: LoadedModel, stages: Stages, body: bytes, encoding: str = ""
) -> None:
    """Send a model's answer; `encoding`: how the body is compressed."""
    trace = trace_of(scope)
    headers = (
        f"content-type: application/json\r\nx-model-digest: {model.digest}\r\nx-provider: {model.provider}\r\n"
        f"x-request-id: {trace.request_id}\r\nserver-timing: decode;dur={stages.decode_s * 1000:.2f}, "
        f"queue;dur={stages.queue_s * 1000:.2f}, infer;dur={stages.infer_s * 1000:.2f}\r\n"
    )
    if encoding:
        headers += f"content-encoding: {encoding}\r\nvary: accept-encoding\r\n"
    trace.status = HTTPStatus.OK
    await connection.answer(HTTPStatus.OK, headers.encode(), body)


class Direct(Response):
    """What a route's function returns to have `answer` answer by itself."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request that the route got."""
        await answer_directly(self._answer, scope, receive, send)
