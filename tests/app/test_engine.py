import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from app.admission import Admission, Limits
from app.batcher import Batcher
from app.engine import LocalEngine, Prediction
from app.errors import (
    AbandonedError,
    BadImageError,
    ConvoyError,
    DeadlineError,
    InferenceError,
    QueueFullError,
    TooLargeError,
    UnavailableError,
)
from app.images import decode_into
from app.loading import LoadedModel
from app.metrics import Metrics
from app.sessions import PlainSession
from app.tickets import Ticket
from tests.app.engines import EngineHere, no_socket_is_left  # noqa: F401
from tests.app.test_batcher import until
from tests.bundles import COLOURS, encode, make_bundle, noise_image, plain_image


class HeldSession(PlainSession):
    """Runs only when its gate is open; answers with the mean of each row, so that order shows."""

    provider = "cpu"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.rows_run = 0

    def run(self, pixels):
        self.entered.set()
        assert self.gate.wait(10)
        self.rows_run += len(pixels)
        scores = np.zeros((len(pixels), len(COLOURS)), np.float32)
        scores[:, 0] = pixels.mean(axis=(1, 2, 3))
        return (scores,)


def limits_of(images=8, bytes=100_000, pixels=1_000_000, model_images=None, queue_target_s=0.0) -> Limits:
    return Limits(images, bytes, pixels, model_images or {}, queue_target_s)


class Bench:
    """An engine over one held session."""

    def __init__(self, tmp_path, **limits) -> None:
        self.metrics = Metrics()
        self.tickets: list[Ticket] = []
        self.links = []
        self.session = HeldSession()
        model_metrics = self.metrics.for_model("colours", "1")
        batcher = Batcher(
            [self.session], max_batch=4, linger_s=0, loop=asyncio.get_running_loop(), metrics=model_metrics
        )
        self.model = LoadedModel(
            name="colours",
            version="1",
            digest="",
            provider="cpu",
            inputs=(),
            outputs=(),
            max_batch=4,
            unbatched_why="",
            manifest=make_bundle(tmp_path / "models").manifest,
            tensor_manifest=None,
            batcher=batcher,
            metrics=model_metrics,
        )
        self.admission = Admission(limits_of(**limits), self.metrics)
        self.engine = LocalEngine(None, self.admission, decode_threads=2, max_image_pixels=1_000_000)

    async def classify(self, *images: bytes, timeout_s: float = 10) -> np.ndarray:
        with self.engine.admit(self.model, time.monotonic() + timeout_s) as ticket:
            self.tickets.append(ticket)
            prediction = await self.engine.classify(self.model, images, ticket)
        return prediction.probabilities

    async def occupy(self) -> asyncio.Task:
        """Let one request into the held session, so that whatever comes next waits in line."""
        stuck = asyncio.create_task(self.classify(plain_image("red")))
        while not self.session.entered.is_set():
            await asyncio.sleep(0.005)
        return stuck

    def dropped(self, stage: str, reason: str) -> float:
        return self.metrics.dropped.labels("colours", stage, reason).get()

    async def move_out(self, directory) -> None:
        """Have the session in an engine from now on."""
        line = self.model.batcher._line
        here = EngineHere(directory, self.model.batcher, outputs=len(COLOURS))
        front = here.front()
        self.links = front._links
        self.model = replace(self.model, batcher=(await here.opened(front)).batcher)
        self.model.batcher._line = line

    async def close(self) -> None:
        self.session.gate.set()
        await asyncio.to_thread(self.model.batcher.close)
        self.engine.close()


@pytest.fixture(params=["here", "in an engine"])
def with_bench(request, tmp_path):
    """Runs a scenario over sessions in this place, and sees that nothing is kept of it."""

    def run(scenario, **limits) -> None:
        async def whole():
            bench = Bench(tmp_path, **limits)
            if request.param == "in an engine":
                await bench.move_out(tmp_path)
            try:
                await scenario(bench)
                held = bench.admission
                assert (held.images, held.bytes, held.pixels) == (0, 0, 0), "a ticket was not given back"
                assert held.lane(bench.model.metrics).images == 0
                assert bench.model.metrics.inflight_requests.get() == 0
                bench.session.gate.set()
                for link in bench.links:
                    await until(lambda link=link: link.slab.rooms == link.rows == 0)
            finally:
                await bench.close()

        asyncio.run(whole())

    return run


def test_images_come_back_in_order(with_bench):
    async def scenario(bench):
        bench.session.gate.set()
        found = await bench.classify(*(plain_image(colour) for colour in COLOURS))
        means = [np.mean(rgb) for rgb in COLOURS.values()]
        assert found[:, 0] == pytest.approx(means, abs=0.5)

    with_bench(scenario)


def test_the_deadline_frees_the_client_while_the_session_is_stuck(with_bench):
    async def scenario(bench):
        stuck = await bench.occupy()
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="'queue'"):
            await bench.classify(plain_image("red"), timeout_s=0.1)
        assert time.monotonic() - started < 5
        assert bench.dropped("queue", "deadline") == 1
        bench.session.gate.set()
        await stuck
        assert bench.session.rows_run == 1, "a row that nobody waited for was run"

    with_bench(scenario)


def test_an_abandoned_request_in_line_is_counted_and_not_run(with_bench):
    async def scenario(bench):
        stuck = await bench.occupy()
        leaving = asyncio.create_task(bench.classify(plain_image("red"), plain_image("blue")))
        while bench.model.batcher._line.rows < 2:
            await asyncio.sleep(0.005)
        bench.tickets[-1].abandon()
        with pytest.raises(AbandonedError):
            await leaving
        assert leaving.cancelling() == 0, "the cancellation ends with the ticket"
        await until(lambda: bench.model.batcher._line.rows == 0)  # an engine hears of it a moment later
        assert bench.dropped("queue", "disconnected") == 1
        bench.session.gate.set()
        await stuck
        assert bench.session.rows_run == 1

    with_bench(scenario)


def test_a_request_that_is_cancelled_from_outside_stays_cancelled(with_bench):
    async def scenario(bench):
        stuck = await bench.occupy()
        cut_off = asyncio.create_task(bench.classify(plain_image("red")))
        while bench.model.batcher._line.rows < 1:
            await asyncio.sleep(0.005)
        cut_off.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cut_off
        assert bench.dropped("queue", "draining") == 1
        bench.session.gate.set()
        await stuck

    with_bench(scenario)


def test_beyond_the_limit_of_images_a_request_is_refused_before_it_is_decoded(with_bench):
    async def scenario(bench):
        inside = [asyncio.create_task(bench.classify(plain_image("red"), plain_image("blue"))) for _ in range(4)]
        while bench.admission.images < 8:
            await asyncio.sleep(0.005)
        with pytest.raises(QueueFullError, match="8 images are inside") as refusal:
            await bench.classify(b"this would be a bad image")
        assert 1 <= refusal.value.retry_after_s <= 30
        bench.session.gate.set()
        await asyncio.gather(*inside)
        await bench.classify(plain_image("red"))

    with_bench(scenario)


def test_a_decode_that_nobody_waits_for_still_counts(with_bench, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr("app.engine.decode_into", lambda *_: gate.wait(10))

    async def scenario(bench):
        with pytest.raises(DeadlineError, match="'decode'"):
            await bench.classify(*[plain_image("red")] * 5, timeout_s=0.05)
        assert bench.admission.images == 2, "two threads decode, three images never began"
        with pytest.raises(DeadlineError, match="'decode'"):
            await bench.classify(*[plain_image("red")] * 3, timeout_s=0.05)
        assert bench.admission.images == 2, "none of these has begun"
        gate.set()
        while bench.admission.images:
            await asyncio.sleep(0.005)

    with_bench(scenario)


def test_bytes_are_bounded_too(with_bench):
    async def scenario(bench):
        deadline = time.monotonic() + 10
        with bench.engine.admit(bench.model, deadline) as first, bench.engine.admit(bench.model, deadline) as second:
            first.hold_bytes(600)
            with pytest.raises(QueueFullError):
                second.hold_bytes(500)
            second.hold_bytes(400)

    with_bench(scenario, bytes=1000)


def test_a_bad_image_is_named_by_its_index_and_refuses_the_whole_request(with_bench):
    async def scenario(bench):
        with pytest.raises(BadImageError, match=r"^images\[1\]: "):
            await bench.classify(plain_image("red"), b"nonsense", plain_image("blue"), b"more nonsense")
        with pytest.raises(BadImageError, match=r"^The data is not"):
            await bench.classify(b"nonsense")
        assert bench.session.rows_run == 0

    with_bench(scenario)


def test_pixels_are_bounded_by_the_header_before_anything_is_decoded(with_bench, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr("app.engine.decode_into", lambda *_, **__: gate.wait(10))
    large = encode(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))

    async def scenario(bench):
        alone = asyncio.create_task(bench.classify(large))
        while not bench.admission.pixels:
            await asyncio.sleep(0.005)
        assert bench.admission.pixels == 400 * 300
        with pytest.raises(QueueFullError, match="120,000 pixels wait to be decoded, 200,000 may"):
            await bench.classify(large)
        alone.cancel()
        gate.set()
        while bench.admission.images:
            await asyncio.sleep(0.005)

    with_bench(scenario, pixels=200_000)


def test_a_model_with_a_limit_of_its_own_leaves_room_for_others(with_bench):
    async def scenario(bench):
        stuck = await bench.occupy()
        with pytest.raises(QueueFullError, match="Model 'colours' is full: 1 of its images are inside, 2 may be"):
            await bench.classify(plain_image("red"), plain_image("red"))
        bench.session.gate.set()
        await stuck

    with_bench(scenario, model_images={"colours": 2})


def test_the_urgent_go_first(with_bench):
    async def scenario(bench):
        async def ask(urgency: int) -> int:
            with bench.engine.admit(bench.model, time.monotonic() + 10, urgency) as ticket:
                await bench.engine.classify(bench.model, [plain_image("red")] * 4, ticket)
            return urgency

        stuck = await bench.occupy()
        waiting = [asyncio.create_task(ask(urgency)) for urgency in (3, 7, 0)]
        while bench.model.batcher._line.rows < 12:
            await asyncio.sleep(0.005)
        bench.session.gate.set()
        assert [await task for task in asyncio.as_completed(waiting)] == [0, 3, 7]
        await stuck

    with_bench(scenario, images=100)


def test_requests_in_progress_are_counted_also_when_they_fail(with_bench):
    async def scenario(bench):
        with pytest.raises(ValueError, match="inside"), bench.engine.admit(bench.model, time.monotonic() + 10):
            assert bench.model.metrics.inflight_requests.get() == 1
            raise ValueError("inside")
        assert bench.model.metrics.inflight_requests.get() == 0

    with_bench(scenario)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage is collected, as in a service that has been asked little."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    ("fault", "image", "timeout_s"),
    [
        (DeadlineError, plain_image("red"), 0.05),
        (AbandonedError, plain_image("red"), 10),
        (BadImageError, noise_image(5, "JPEG", (400, 400))[:-3000], 10),
        (InferenceError, plain_image("red"), 10),
    ],
)
def test_a_request_that_failed_holds_nothing(with_bench, fault, image, timeout_s):
    """A model that is replaced ends with the last request that holds it, and so does the memory of a body."""

    async def fail(bench: Bench, model: LoadedModel) -> type[ConvoyError]:
        try:
            with bench.engine.admit(model, time.monotonic() + timeout_s) as ticket:
                if fault is AbandonedError:
                    asyncio.get_running_loop().call_later(0.02, ticket.abandon)
                if fault is InferenceError:
                    bench.session.run = None
                    bench.session.gate.set()
                await bench.engine.classify(model, [image], ticket)
        except (ConvoyError, AbandonedError) as error:
            return type(error)
        raise AssertionError("it did not fail")

    async def scenario(bench):
        model = replace(bench.model)
        witness = weakref.ref(model)
        failing = asyncio.create_task(fail(bench, model))
        del model
        assert await failing is fault
        del failing
        for _ in range(100):  # a thread may still be on its way out of the call
            await asyncio.sleep(0.01)
            if witness() is None:
                break
        assert witness() is None

    with_bench(scenario)


# ---------------------------------------------------------------- without a task

PHOTO = noise_image(5, "JPEG", (400, 400))


class Waiting:
    """Who has begun a request without a task: its ticket, and what it was told."""

    def __init__(self, bench: Bench, model: LoadedModel, image: bytes) -> None:
        self.told: list[Prediction | type[Exception]] = []
        self.ticket = bench.engine.admit(model, time.monotonic() + 10)
        self.ticket.open(lambda: None)
        self.give_up = bench.engine.begin(model, image, self.ticket, self.tell)

    def tell(self, result: Prediction | Exception) -> None:
        # An error that is kept holds the frames that it came through, and whoever they tell.
        self.told.append(result if isinstance(result, Prediction) else type(result))

    def close(self) -> None:
        self.ticket.close(finished=True)

    async def answer(self) -> Prediction | type[Exception]:
        for _ in range(1000):
            if self.told:
                self.close()
                return self.told[0]
            await asyncio.sleep(0.01)
        raise AssertionError("nobody was told anything")


@pytest.mark.parametrize("image", [plain_image("red"), PHOTO], ids=["small", "photo"])
def test_without_a_task_the_answer_is_the_same(with_bench, image):
    async def scenario(bench):
        bench.session.gate.set()
        waiting = Waiting(bench, bench.model, image)
        assert not waiting.told
        prediction = await waiting.answer()
        np.testing.assert_array_equal(prediction.probabilities, await bench.classify(image))
        assert prediction.stages.decode_s > 0 and len(waiting.told) == 1
        assert bench.metrics.images.labels("colours", "1").get() == 2

    with_bench(scenario)


def test_without_a_task_a_photo_may_be_given_up_in_every_stage(with_bench, monkeypatch):
    gate, entered = threading.Event(), threading.Semaphore(0)

    def held_decode(*arguments, **named):
        entered.release()
        assert gate.wait(10)
        return decode_into(*arguments, **named)

    monkeypatch.setattr("app.engine.decode_into", held_decode)
    monkeypatch.setattr("app.engine.INLINE_BYTES", 0)

    async def scenario(bench):
        decoding = [Waiting(bench, bench.model, PHOTO) for _ in range(2)]
        for _ in decoding:
            await asyncio.to_thread(entered.acquire)
        waits, stays = Waiting(bench, bench.model, PHOTO), Waiting(bench, bench.model, PHOTO)
        assert (bench.admission.images, bench.admission.pixels) == (4, 4 * 400 * 400)
        for each in (decoding[0], waits):
            each.give_up()
            each.close()
        assert bench.admission.images == 3, "what is being decoded still counts, what waited for that does not"
        gate.set()
        while not bench.session.entered.is_set():
            await asyncio.sleep(0.005)
        while stays.ticket.stage != "queue":
            await asyncio.sleep(0.005)
        assert (bench.admission.images, bench.admission.pixels) == (2, 0)
        stays.give_up()
        stays.close()
        bench.session.gate.set()
        assert isinstance(await decoding[1].answer(), Prediction)
        assert not (decoding[0].told or waits.told or stays.told)
        while bench.session.rows_run == 0:
            await asyncio.sleep(0.005)

    with_bench(scenario)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    ("fault", "image"),
    [(None, PHOTO), (BadImageError, PHOTO[:-3000]), (InferenceError, PHOTO), (UnavailableError, PHOTO)],
)
def test_without_a_task_a_photo_holds_nothing_afterwards(with_bench, fault, image):
    async def scenario(bench):
        if fault is InferenceError:
            bench.session.run = None
        bench.session.gate.set()
        model = replace(bench.model)
        witness = weakref.ref(model)
        waiting = Waiting(bench, model, image)
        if fault is UnavailableError:
            bench.model.batcher.close()
        answer = await waiting.answer()
        assert isinstance(answer, Prediction) if fault is None else answer is fault
        del model, waiting, answer
        for _ in range(100):  # a thread may still be on its way out of the call
            await asyncio.sleep(0.01)
            if witness() is None:
                break
        assert witness() is None

    with_bench(scenario)


def test_without_a_task_a_photo_with_too_many_pixels_is_refused_at_once(with_bench):
    async def scenario(bench):
        with (
            bench.engine.admit(bench.model, time.monotonic() + 10) as ticket,
            pytest.raises(TooLargeError, match="1100×1100"),
        ):
            bench.engine.begin(bench.model, encode(np.zeros((1100, 1100, 3), np.uint8)), ticket, pytest.fail)

    with_bench(scenario)


@pytest.mark.parametrize("count", [1, 2])
def test_an_engine_that_dies_while_a_photo_for_it_is_decoded_is_told_of(tmp_path, monkeypatch, count):
    gate, entered = threading.Event(), threading.Event()

    def held_decode(row, *arguments):
        entered.set()
        assert gate.wait(10)
        row[...] = 1

    monkeypatch.setattr("app.engine.decode_into", held_decode)

    async def scenario():
        bench = Bench(tmp_path)
        await bench.move_out(tmp_path)
        asking = asyncio.create_task(bench.classify(*[PHOTO] * count))
        await asyncio.to_thread(entered.wait)
        [link] = bench.links
        link.hang_up()
        gate.set()
        with pytest.raises(UnavailableError, match="has died"):
            await asking
        assert bench.admission.images == 0
        await bench.close()

    asyncio.run(scenario())


def test_what_a_sampled_photo_looks_like_is_not_read_where_its_scores_are(with_bench, monkeypatch):
    looked_at = []

    class Sampler:
        def take(self, now):
            return True

        def look(self, pixels, probabilities, images):
            looked_at.append((pixels.shape, float(pixels.mean()), float(probabilities[0, 0])))

    monkeypatch.setattr("app.engine.INLINE_BYTES", 0)

    async def scenario(bench):
        bench.session.gate.set()
        bench.model = replace(bench.model, sampler=Sampler())
        await bench.classify(plain_image("red"), plain_image("red"))
        assert isinstance(await Waiting(bench, bench.model, plain_image("red")).answer(), Prediction)
        shape, mean, score = looked_at[0]
        assert (shape[0], mean) == (2, pytest.approx(score, abs=0.01))
        assert looked_at[1] == ((1, *shape[1:]), mean, score)

    with_bench(scenario)
