"""A prediction without a task: one image that came whole, from its decoding to its answer by callbacks.

A task, its wake-up and the coroutines in it were a third of the event loop's time of a small image. Whatever is not so
simple, or goes wrong at once, is `predict.py`'s, in ASGI's way; here a request has been let in, and waits.
"""

import logging
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol, cast

from app.engine import GiveUp, Prediction, Tell
from app.errors import AbandonedError, ConvoyError, UnavailableError
from app.http.connection import WholeRequest
from app.http.direct import DEFAULT, Asked
from app.http.errors import answer_to
from app.http.observe import CUT_OFF, Record
from app.journal import BROKEN, Trace
from app.loading import LoadedModel
from app.runs import DEFAULT_URGENCY
from app.tickets import Ticket

log = logging.getLogger(__name__)


class Form(Protocol):
    """Writes a model's answers."""

    def fill(self, prediction: Prediction, k: int, request_id: str) -> tuple[bytes, bytes]:
        """Return the headers, lines that end in CRLF, and the body of an answer."""
        ...


class Starter(Protocol):
    """Has a request run: the engine, or who knows more of the request."""

    def begin(self, model: LoadedModel, image: bytes, ticket: Ticket, tell: Tell) -> GiveUp:
        """See `Engine.begin`."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What the head of a request says, which is the same for all that have it.

    Attributes:
        is_taskless: nothing in it speaks against answering without a task.
        route: the route's template.
        asked: the model and version in its path.
        timeout_ms: the deadline that it asks for, milliseconds; None: the server's.
        urgency: 0 (first) to 7 (last).
    """

    is_taskless: bool
    route: str = ""
    asked: Asked = DEFAULT
    timeout_ms: int | None = None
    urgency: int = DEFAULT_URGENCY


class TasklessPrediction:
    """One request that waits, and ends once: by the engine's word, its ticket's, or the server's.

    To the server it is one of the tasks that a drain waits for, and may cancel.
    """

    __slots__ = ("_form", "_give_up", "_k", "_record", "_request", "_ticket", "_trace")

    def __init__(self, request: WholeRequest, ticket: Ticket, trace: Trace, record: Record, form: Form, k: int) -> None:
        self._request = request
        self._ticket = ticket
        self._trace = trace
        self._record = record
        self._form = form
        self._k = k
        self._give_up: GiveUp | None = None

    def begin(self, engine: Starter, model: LoadedModel) -> None:
        """Have the image decoded and put in line; where that fails at once, nothing is held."""
        request, ticket = self._request, self._ticket
        ticket.open(self._leave)
        try:
            ticket.hold_bytes(len(request.body))
            self._give_up = engine.begin(model, request.body, ticket, self._end)
        finally:
            if self._give_up is None:
                ticket.close(finished=False)
        request.take_body()
        request.connection.on_leave = ticket.abandon
        request.connection.tasks.add(cast(Any, self))

    def cancel(self, msg: str = "") -> None:
        """End it soon, as a task would: the drain is over."""
        self._request.connection.loop.call_soon(self._cut_off)

    def _end(self, result: Prediction | Exception) -> None:
        """Send the answer, or say what went wrong."""
        self._close(finished=isinstance(result, Prediction))
        if isinstance(result, Prediction):
            self._answer(result)
        else:
            self._fail(result)
        self._record(self._trace, "POST", self._request.head.path)

    def _leave(self) -> None:
        """End because the deadline passed, or the client left."""
        self._give_up_for(None)

    def _cut_off(self) -> None:
        """End because the server does."""
        self._give_up_for(UnavailableError(CUT_OFF, code="draining"))

    def _give_up_for(self, fault: ConvoyError | None) -> None:
        if self._give_up is None:  # it has ended since
            return
        self._give_up()
        self._close(finished=False)
        failure = self._ticket.drop()
        self._fail(fault or failure)
        self._record(self._trace, "POST", self._request.head.path)

    def _close(self, *, finished: bool) -> None:
        self._give_up = None
        self._ticket.close(finished=finished)
        connection = self._request.connection
        connection.on_leave = None
        connection.tasks.discard(cast(Any, self))

    def _answer(self, prediction: Prediction) -> None:
        started = time.monotonic()
        try:
            headers, body = self._form.fill(prediction, self._k, self._trace.request_id)
        except Exception as error:  # the batcher, which told, has other requests to tell
            self._fail(error)
            return
        self._trace.wrote(prediction.model.metrics, started)
        self._trace.status = HTTPStatus.OK
        self._request.connection.answer_now(HTTPStatus.OK, headers, body)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, AbandonedError):
            return
        trace = self._trace
        if not isinstance(error, ConvoyError):
            log.error("request failed", extra=trace.ids, exc_info=error)
            error = ConvoyError(BROKEN)
        trace.code = error.code
        trace.status, headers, body = answer_to(error)
        self._request.send_now(trace.status, [*headers, (b"x-request-id", trace.request_id.encode())], body)
