"""The direct way: endpoints that speak ASGI themselves, past FastAPI's stack, and what they have in common."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.admission import Ticket
from app.engine import Engine, Stages
from app.errors import AbandonedError, ConvoyError
from app.http.bodies import Head
from app.http.connection import Connection, connection_of
from app.http.errors import send_error
from app.http.observe import trace_of
from app.loading import LoadedModel

Answer = Callable[[Scope, Receive, Connection], Awaitable[None]]


async def answer_directly(answer: Answer, scope: Scope, receive: Receive, send: Send) -> None:
    """Have `answer` read a request and answer it over its connection; turn its faults into answers."""
    connection = connection_of(scope)
    try:
        await answer(scope, receive, connection)
    except ConvoyError as fault:
        # Who asked before sending the body, and is refused, may send it or not: what comes next cannot be told.
        asked = any(name == b"expect" for name, _ in scope["headers"])
        await send_error(fault, trace_of(scope), send, closes=asked)
    except AbandonedError:
        return
    finally:
        connection.on_leave = None


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
