import asyncio
import threading
import time

import numpy as np
import pytest

from app.batcher import Batcher
from app.engine import Admission, DrainRate, LocalEngine
from app.errors import BadImageError, DeadlineError, QueueFullError
from app.metrics import Metrics
from app.repository import LoadedModel
from tests.bundles import COLOURS, make_bundle, plain_image


class HeldSession:
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
        return scores


class Bench:
    """An engine over one held session."""

    def __init__(self, tmp_path, max_images=8, max_bytes=100_000) -> None:
        self.metrics = Metrics()
        self.session = HeldSession()
        model_metrics = self.metrics.for_model("colours", "1")
        batcher = Batcher(
            [self.session], max_batch=4, linger_s=0, loop=asyncio.get_running_loop(), metrics=model_metrics
        )
        self.model = LoadedModel(make_bundle(tmp_path / "models"), "cpu", batcher, model_metrics)
        self.admission = Admission(max_images, max_bytes, self.metrics)
        self.engine = LocalEngine(None, self.admission, decode_threads=2, max_image_pixels=1_000_000)

    async def classify(self, *images: bytes, timeout_s: float = 10) -> np.ndarray:
        with self.engine.admit() as ticket:
            prediction = await self.engine.classify(self.model, images, time.monotonic() + timeout_s, ticket)
        return prediction.probabilities

    async def occupy(self) -> asyncio.Task:
        """Let one request into the held session, so that whatever comes next waits in line."""
        stuck = asyncio.create_task(self.classify(plain_image("red")))
        while not self.session.entered.is_set():
            await asyncio.sleep(0.005)
        return stuck

    def dropped(self, stage: str, reason: str) -> float:
        return self.metrics.dropped.labels("colours", stage, reason).get()

    def close(self) -> None:
        self.session.gate.set()
        self.model.batcher.close()
        self.engine.close()


def with_bench(tmp_path, scenario, **limits):
    async def run():
        bench = Bench(tmp_path, **limits)
        try:
            await scenario(bench)
            assert (bench.admission.images, bench.admission.bytes) == (0, 0), "a ticket was not given back"
        finally:
            bench.close()

    asyncio.run(run())


def test_images_come_back_in_order(tmp_path):
    async def scenario(bench):
        bench.session.gate.set()
        found = await bench.classify(*(plain_image(colour) for colour in COLOURS))
        means = [np.mean(rgb) for rgb in COLOURS.values()]
        assert found[:, 0] == pytest.approx(means, abs=0.5)

    with_bench(tmp_path, scenario)


def test_the_deadline_frees_the_client_while_the_session_is_stuck(tmp_path):
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

    with_bench(tmp_path, scenario)


def test_a_cancelled_request_in_line_is_counted_and_not_run(tmp_path):
    async def scenario(bench):
        stuck = await bench.occupy()
        leaving = asyncio.create_task(bench.classify(plain_image("red"), plain_image("blue")))
        while bench.model.batcher._line.rows < 2:
            await asyncio.sleep(0.005)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert bench.model.batcher._line.rows == 0
        assert bench.dropped("queue", "disconnected") == 1
        bench.session.gate.set()
        await stuck
        assert bench.session.rows_run == 1

    with_bench(tmp_path, scenario)


def test_beyond_the_limit_of_images_a_request_is_refused_before_it_is_decoded(tmp_path):
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

    with_bench(tmp_path, scenario)


def test_a_decode_that_nobody_waits_for_still_counts(tmp_path, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr("app.engine.decode", lambda *_: gate.wait(10))

    async def scenario(bench):
        with pytest.raises(DeadlineError, match="'decode'"):
            await bench.classify(*[plain_image("red")] * 5, timeout_s=0.05)
        assert bench.admission.images == 2, "two threads decode, three images never began"
        gate.set()
        while bench.admission.images:
            await asyncio.sleep(0.005)

    with_bench(tmp_path, scenario)


def test_bytes_are_bounded_too(tmp_path):
    async def scenario(bench):
        with bench.engine.admit() as first, bench.engine.admit() as second:
            first.hold_bytes(600)
            with pytest.raises(QueueFullError):
                second.hold_bytes(500)
            second.hold_bytes(400)

    with_bench(tmp_path, scenario, max_bytes=1000)


def test_a_bad_image_is_named_by_its_index_and_refuses_the_whole_request(tmp_path):
    async def scenario(bench):
        with pytest.raises(BadImageError, match=r"^images\[1\]: "):
            await bench.classify(plain_image("red"), b"nonsense", plain_image("blue"), b"more nonsense")
        with pytest.raises(BadImageError, match=r"^The data is not"):
            await bench.classify(b"nonsense")
        assert bench.session.rows_run == 0

    with_bench(tmp_path, scenario)


def test_retry_after_follows_the_measured_rate(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("app.engine.time.monotonic", lambda: now[0])
    rate = DrainRate()
    for _ in range(300):  # 100 images a second for 30 s
        now[0] += 0.1
        rate.add(10)
    assert rate.per_second() == pytest.approx(100, rel=0.05)
    admission = Admission(1000, 1000, Metrics())
    admission.rate = rate
    admission.images = 350
    assert admission.retry_after_s() == 4
    for silence_s in (60, 3600, 1e6):
        now[0] += silence_s
        assert admission.retry_after_s() in (1, 30), "nothing drains any more"
