"""The direct way: endpoints that speak ASGI themselves, past FastAPI's stack, and what they have in common."""

from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.errors import AbandonedError, ConvoyError
from app.http.connection import Connection, connection_of
from app.http.errors import send_error
from app.http.observe import trace_of

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


class Direct(Response):
    """What a route's function returns to have `answer` answer by itself."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request that the route got."""
        await answer_directly(self._answer, scope, receive, send)
