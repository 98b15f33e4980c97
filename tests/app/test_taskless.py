"""Predictions without a task: each ends once, whoever ends it, and leaves nothing behind."""

import asyncio
import gc
import time
from types import SimpleNamespace

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from app.admission import Admission, Limits
from app.engine import Prediction, Stages
from app.errors import BadImageError, InferenceError
from app.http.connection import Connection
from app.http.observe import Observe
from app.http.taskless import TasklessPrediction
from app.journal import Journal
from app.metrics import Metrics
from app.tickets import Ticket
from tests.app.test_connection import Transport, request

HEAD_AND_BODY = request(b"an image", "/predict", "X-Request-Id: mine")


class Bench:
    """One connection to an application whose engine does what the test says."""

    def __init__(self, timeout_s: float = 60, error: Exception | None = None) -> None:
        self.timeout_s, self.error = timeout_s, error
        self.metrics = Metrics()
        limits = Limits(images=1, bytes=100, pixels=1, model_images={}, queue_target_s=0.0)
        self.admission = Admission(limits, self.metrics)
        self.model = SimpleNamespace(metrics=self.metrics.for_model("m", "1"))
        self.given_up = 0
        self.by_asgi = 0
        self.tell = None
        app = Observe(self.asgi, self.let_in, Journal(self.metrics, True))
        config = Config(app, http=Connection, log_config=None, proxy_headers=False)
        config.load()
        self.server = ServerState()
        self.connection = Connection(config, self.server, {}, asyncio.get_running_loop())
        self.transport = Transport()
        self.connection.connection_made(self.transport)

    async def asgi(self, scope, receive, send) -> None:
        assert (await receive())["body"] == b"an image"
        self.by_asgi += 1
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def let_in(self, request, trace, record) -> bool:
        lane = self.admission.lane(self.model.metrics)
        ticket = Ticket(self.admission, lane, time.monotonic() + self.timeout_s, 3)
        trace.route, trace.model, trace.version = "/predict", "m", "1"
        TasklessPrediction(request, ticket, trace, record, self, 1).begin(self, self.model)
        return True

    def begin(self, model, image, ticket, tell):
        ticket.hold_images(1)
        if self.error is not None:
            raise self.error
        ticket.stage, self.tell = "queue", tell
        return self.give_up

    def give_up(self) -> None:
        self.given_up += 1

    def fill(self, prediction, k, request_id) -> tuple[bytes, bytes]:
        if prediction.probabilities is None:
            raise TypeError("nothing to write")
        return b"x-request-id: " + request_id.encode() + b"\r\n", b"done"

    def answer(self, probabilities=(1.0,)) -> None:
        self.tell(Prediction(self.model, probabilities, Stages()))

    def counted(self, code: int) -> float:
        return self.metrics.requests.labels("m", "1", "/predict", code).get()

    def is_empty(self) -> bool:
        admission = self.admission
        inside = admission.images, admission.bytes, admission.pixels
        return inside == (0, 0, 0) and not self.server.tasks and self.connection.on_leave is None


def on_a_bench(scenario):
    """Run a scenario on a loop."""

    async def run() -> None:
        await asyncio.wait_for(scenario(), 10)

    asyncio.run(run())


def test_an_answer_is_sent_once_and_nothing_is_left():
    async def scenario() -> None:
        bench = Bench()
        for number in range(1, 4):
            bench.connection.data_received(HEAD_AND_BODY)
            assert (bench.admission.images, bench.admission.bytes) == (1, 8)
            assert len(bench.server.tasks) == 1 and len(asyncio.all_tasks()) == 2, "a task was made"
            bench.answer()
            assert bench.transport.written.count(b"HTTP/1.1 200 OK") == bench.counted(200) == number
            assert bench.is_empty()
        assert bench.transport.written.count(b"x-request-id: mine") == 3
        bench.connection.connection_lost(None)
        assert (bench.given_up, bench.by_asgi, bench.counted(499)) == (0, 0, 0)

    on_a_bench(scenario)


@pytest.mark.parametrize("ending", ["deadline", "leaves", "drain"])
def test_who_is_ended_early_is_told_so_once_and_given_up(ending):
    async def scenario() -> None:
        bench = Bench(timeout_s=0.005 if ending == "deadline" else 60)
        bench.connection.data_received(HEAD_AND_BODY)
        if ending == "leaves":
            bench.connection.connection_lost(None)
        elif ending == "drain":
            for task in bench.server.tasks:  # as uvicorn does
                task.cancel(msg="the drain is over")
        while not bench.given_up:
            await asyncio.sleep(0.001)
        status, reason = {"deadline": (504, "deadline"), "leaves": (499, "disconnected"), "drain": (503, "draining")}[
            ending
        ]
        assert bench.counted(status) == 1
        dropped = bench.metrics.dropped.labels("m", "queue", reason)
        assert dropped.get() == 1
        assert bench.is_empty()
        written = bench.transport.written
        if ending == "leaves":
            assert not written
        else:
            assert written.startswith(b"HTTP/1.1 %d " % status) and written.count(b"HTTP/1.1") == 1
            assert b'"code": "%s"' % reason.encode() in written and b"x-request-id: mine" in written
            bench.connection.connection_lost(None)
        await asyncio.sleep(0)
        assert bench.given_up == 1 and bench.counted(status) == 1

    on_a_bench(scenario)


def test_an_answer_that_comes_between_cancellation_and_its_effect_is_the_answer():
    async def scenario() -> None:
        bench = Bench()
        bench.connection.data_received(HEAD_AND_BODY)
        next(iter(bench.server.tasks)).cancel()
        bench.answer()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert bench.counted(200) == 1 and bench.counted(503) == 0
        assert bench.transport.written.count(b"HTTP/1.1") == 1

    on_a_bench(scenario)


@pytest.mark.parametrize(
    ("probabilities", "error", "code"),
    [(None, InferenceError("The model failed on this request: x."), InferenceError.code), (None, None, "internal")],
    ids=["the-model", "the-form"],
)
def test_what_fails_later_is_a_500_with_its_reason_and_the_connection_goes_on(probabilities, error, code):
    async def scenario() -> None:
        bench = Bench()
        bench.connection.data_received(HEAD_AND_BODY)
        if error is not None:
            bench.tell(error)
        else:
            bench.answer(probabilities)
        assert bench.transport.written.startswith(b"HTTP/1.1 500 ")
        assert b'"code": "%s"' % code.encode() in bench.transport.written
        assert bench.is_empty() and bench.counted(500) == 1
        bench.connection.data_received(HEAD_AND_BODY)
        bench.answer()
        assert bench.counted(200) == 1

    on_a_bench(scenario)


@pytest.mark.parametrize("error", [BadImageError("It is none."), ZeroDivisionError()])
def test_what_cannot_begin_goes_asgi_s_way_and_holds_nothing(error):
    async def scenario() -> None:
        bench = Bench(error=error)
        for number in range(1, 3):
            bench.connection.data_received(HEAD_AND_BODY)
            assert (bench.admission.images, bench.admission.bytes) == (0, 0)
            while bench.server.tasks:
                await asyncio.sleep(0)
            assert bench.by_asgi == number
        assert bench.transport.written.count(b"HTTP/1.1 418 ") == 2

    on_a_bench(scenario)


def test_who_does_not_read_its_answers_waits_for_that_in_a_task():
    async def scenario() -> None:
        bench = Bench()
        bench.connection.pause_writing()
        bench.connection.data_received(HEAD_AND_BODY)
        for _ in range(5):
            await asyncio.sleep(0)
        assert bench.tell is None and not bench.transport.written
        bench.connection.resume_writing()
        while bench.server.tasks:
            await asyncio.sleep(0)
        assert bench.transport.written.startswith(b"HTTP/1.1 418 ")

    on_a_bench(scenario)


def test_nothing_is_left_to_the_garbage_collector():
    async def scenario() -> None:
        bench = Bench()
        gc.collect()
        gc.disable()
        for _ in range(20):
            bench.connection.data_received(HEAD_AND_BODY)
            bench.answer()
        assert gc.collect() == 0

    try:
        on_a_bench(scenario)
    finally:
        gc.enable()
