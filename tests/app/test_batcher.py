import asyncio
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.batcher import Batcher
from app.errors import DeviceLostError, InferenceError, UnavailableError
from app.line import Line
from app.metrics import Metrics
from app.probes import has_lost_its_device, is_stuck
from app.runs import Job, Runs
from app.sessions import PlainSession
from tests.app.engines import EngineHere, no_socket_is_left  # noqa: F401

FOREVER = float("inf")


class EchoSession(PlainSession):
    """Answers each row with its own first pixel value, so that a swapped answer shows; can be held or made to fail."""

    provider = "cpu"

    def __init__(self, fail_on: int | None = None, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.fail_on = fail_on
        self.gate = threading.Event()
        self.entered = threading.Event()
        if not held:
            self.gate.set()

    def run(self, pixels):
        self.entered.set()
        assert self.gate.wait(10)
        rows = pixels[:, 0, 0, 0].tolist()
        self.batches.append(rows)
        if self.fail_on in rows:
            raise RuntimeError(f"row {self.fail_on} is cursed")
        return (np.array([[row, 255 - row] for row in rows], np.float32),)


def rows(*values: int) -> np.ndarray:
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), 2, 2, 3))


@pytest.fixture(params=["here", "in an engine"])
def over(request, tmp_path):
    """Returns what runs rows over some sessions: the batcher itself, or through an engine that has it."""

    async def build(*sessions, max_batch=4, linger_s=0.0):
        batcher = Batcher(
            sessions,
            max_batch=max_batch,
            linger_s=linger_s,
            loop=asyncio.get_running_loop(),
            metrics=Metrics().for_model("m", "1"),
        )
        if request.param == "here":
            return batcher
        runs = (await EngineHere(tmp_path, batcher, max_batch).opened()).batcher
        runs._line = batcher._line
        return runs

    return build


async def close(runs, **options) -> None:
    await asyncio.to_thread(runs.close, **options)


async def answer(batcher: Runs, *values: int, deadline: float = FOREVER) -> list[int]:
    job = batcher.submit((rows(*values),), len(values), deadline)
    try:
        return (await job.answer)[0][:, 0].astype(int).tolist()
    finally:
        batcher.abandon(job)


async def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never became true")


async def fill(session: EchoSession, batcher: Runs) -> asyncio.Task:
    """Occupy a held session with one row of value 200, so that all else waits in line."""
    blocker = asyncio.create_task(answer(batcher, 200))
    await until(session.entered.is_set)
    return blocker


def test_waiting_jobs_share_a_batch_and_each_gets_its_own_rows(over):
    async def scenario():
        session = EchoSession(held=True)
        batcher = await over(session, max_batch=4)
        blocker = await fill(session, batcher)
        jobs = [asyncio.create_task(answer(batcher, value)) for value in range(1, 7)]
        await until(lambda: batcher._line.rows == 6)
        session.gate.set()
        assert await asyncio.gather(*jobs) == [[value] for value in range(1, 7)]
        assert await blocker == [200]
        await close(batcher)
        assert session.batches == [[200], [1, 2, 3, 4], [5, 6]]

    asyncio.run(scenario())


def test_a_large_request_is_split_and_joined_and_shares_its_last_batch(over):
    async def scenario():
        session = EchoSession(held=True)
        batcher = await over(session, max_batch=4)
        await fill(session, batcher)
        large = asyncio.create_task(answer(batcher, *range(10)))
        await asyncio.sleep(0)
        small = asyncio.create_task(answer(batcher, 77))
        await until(lambda: batcher._line.rows == 11)
        session.gate.set()
        assert await large == list(range(10))
        assert await small == [77]
        await close(batcher)
        assert session.batches[1:] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 77]]

    asyncio.run(scenario())


def test_a_failing_request_does_not_harm_its_neighbours(over):
    async def scenario():
        session = EchoSession(fail_on=3, held=True)
        batcher = await over(session, max_batch=8)
        await fill(session, batcher)
        jobs = [asyncio.create_task(answer(batcher, value)) for value in (1, 3, 5)]
        await until(lambda: batcher._line.rows == 3)
        session.gate.set()
        good, cursed, other = await asyncio.gather(*jobs, return_exceptions=True)
        assert (good, other) == ([1], [5])
        assert isinstance(cursed, InferenceError) and "row 3 is cursed" in cursed.message
        assert await answer(batcher, 9) == [9]
        await close(batcher)

    asyncio.run(scenario())


def test_an_abandoned_job_is_not_run_and_its_neighbours_are(over):
    async def scenario():
        session = EchoSession(held=True)
        batcher = await over(session)
        await fill(session, batcher)
        jobs = [asyncio.create_task(answer(batcher, value)) for value in (1, 2, 3)]
        await until(lambda: batcher._line.rows == 3)
        jobs[1].cancel()
        await until(lambda: batcher._line.rows == 2)
        session.gate.set()
        assert await jobs[0] == [1]
        assert await jobs[2] == [3]
        await close(batcher)
        assert session.batches == [[200], [1, 3]]

    asyncio.run(scenario())


def test_a_job_cancelled_while_it_runs_leaves_the_batch_whole(over):
    async def scenario():
        session = EchoSession(held=True)
        batcher = await over(session)
        running = await fill(session, batcher)
        running.cancel()
        next_job = asyncio.create_task(answer(batcher, 4))
        await asyncio.sleep(0)
        session.gate.set()
        assert await next_job == [4]
        with pytest.raises(asyncio.CancelledError):
            await running
        await close(batcher)

    asyncio.run(scenario())


def test_an_expired_job_is_not_run(over):
    async def scenario():
        session = EchoSession(held=True)
        batcher = await over(session)
        await fill(session, batcher)
        expired = batcher.submit((rows(1),), 1, time.monotonic() - 1)
        alive = asyncio.create_task(answer(batcher, 2))
        await asyncio.sleep(0)
        session.gate.set()
        assert await alive == [2]
        batcher.abandon(expired)
        await close(batcher)
        assert session.batches == [[200], [2]]

    asyncio.run(scenario())


def test_closing_finishes_what_waits_and_refuses_what_comes(over):
    async def scenario():
        session = EchoSession(held=True)
        batcher = await over(session)
        await fill(session, batcher)
        waiting = asyncio.create_task(answer(batcher, 5))
        await until(lambda: batcher._line.rows == 1)
        closing = asyncio.create_task(close(batcher))
        await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError):
            batcher.submit((rows(6),), 1, FOREVER)
        session.gate.set()
        assert await waiting == [5]
        await closing

    asyncio.run(scenario())


def test_closing_does_not_wait_for_ever_for_a_stuck_session(over):
    async def scenario():
        session = EchoSession(held=True)
        batcher = await over(session)
        stuck = await fill(session, batcher)
        await close(batcher, timeout_s=0.05)
        session.gate.set()
        assert await stuck == [200]

    asyncio.run(scenario())


def test_two_sessions_work_at_the_same_time(over):
    async def scenario():
        first, second = EchoSession(held=True), EchoSession(held=True)
        batcher = await over(first, second, max_batch=1)
        jobs = [asyncio.create_task(answer(batcher, value)) for value in (1, 2)]
        await until(lambda: first.entered.is_set() and second.entered.is_set())
        first.gate.set()
        second.gate.set()
        assert await asyncio.gather(*jobs) == [[1], [2]]
        await close(batcher)

    asyncio.run(scenario())


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def job_of(count: int, deadline: float = FOREVER) -> Job:
    return Job((rows(*range(count)),), count, deadline, answer=None)


def test_linger_starts_at_the_oldest_job_and_ends_when_the_batch_is_full():
    clock = ManualClock()
    line = Line(max_batch=4, linger_s=0.5, clock=clock)
    line.extend([job_of(1)])
    clock.now += 0.3
    line.extend([job_of(1)])
    assert line._patience(clock.now) == pytest.approx(0.2)
    line.extend([job_of(2)])
    assert line._patience(clock.now) == 0
    assert line.take().rows == 4


@pytest.mark.parametrize("step_s", [0.0, 0.3, 0.6, 0.9])
def test_a_job_that_expires_while_a_batch_is_formed_does_not_leave_it_empty(step_s):
    """An empty batch once ended a session's thread for good."""
    clock = ManualClock()
    line = Line(max_batch=4, linger_s=0, clock=clock)
    line.extend([job_of(2, deadline=clock.now + 1.0)])

    def advancing() -> float:
        clock.now += step_s
        return clock.now

    line._clock = advancing
    assert line.take().rows == 2


def test_sessions_share_slow_rows_and_leave_fast_ones_together(over):
    async def scenario(row_s: float) -> list[int]:
        sessions = [EchoSession(held=True), EchoSession(held=True)]
        batcher = await over(*sessions, max_batch=8)
        batcher._line.row_s = row_s
        job = asyncio.create_task(answer(batcher, *range(8)))
        await until(lambda: sum(session.entered.is_set() for session in sessions) == (2 if row_s > 0.001 else 1))
        for session in sessions:
            session.gate.set()
        assert await job == list(range(8))
        await close(batcher)
        return sorted(len(batch) for session in sessions for batch in session.batches)

    assert max(asyncio.run(scenario(row_s=0.01))) == 4
    assert asyncio.run(scenario(row_s=0.00001)) == [8]


def test_without_linger_nothing_waits():
    line = Line(max_batch=4, linger_s=0, clock=ManualClock())
    line.extend([job_of(1)])
    assert line.take().rows == 1


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_are_counted_and_taken_exactly_once(data):
    """Any order of arrivals, abandonments, expiries and takes: no row twice, none lost, the count always true."""
    clock = ManualClock()
    line = Line(max_batch=5, linger_s=0, clock=clock)
    alive: list[Job] = []
    taken: dict[Job, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from(["arrive", "abandon", "take", "wait"])):
            case "arrive":
                job = job_of(data.draw(st.integers(1, 12)), clock.now + data.draw(st.integers(1, 5)))
                line.extend([job])
                alive.append(job)
            case "abandon" if alive:
                job = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
                line.remove(job)
            case "take" if any(job.deadline > clock.now for job in alive):
                batch = line.take()
                assert 1 <= batch.rows <= 5
                assert sum(part.stop - part.start for part in batch.slices) == batch.rows
                for part in batch.slices:
                    assert part.job in alive and part.job.deadline > clock.now
                    taken.setdefault(part.job, []).extend(range(part.start, part.stop))
            case "wait":
                clock.now += 1
        alive = [job for job in alive if job in line._queues[job.urgency]]
        assert line.rows == sum(job.waiting_rows for job in alive)
    for job, found in taken.items():
        assert found == list(range(job.taken))


def test_many_clients_with_cancellations_each_get_their_own_answer_once(over):
    """Real threads: 400 requests of random size over two sessions, a fifth of them cancelled at random moments."""

    async def scenario():
        rng = np.random.default_rng(5)
        batcher = await over(EchoSession(), EchoSession(), max_batch=7)

        async def client(number: int) -> None:
            values = rng.integers(0, 256, rng.integers(1, 12)).tolist()
            await asyncio.sleep(float(rng.random()) * 0.05)
            task = asyncio.create_task(answer(batcher, *values))
            if number % 5 == 0:
                await asyncio.sleep(float(rng.random()) * 0.002)
                task.cancel()
            try:
                assert await task == values
            except asyncio.CancelledError:
                assert number % 5 == 0

        await asyncio.gather(*(client(number) for number in range(400)))
        await until(lambda: batcher._line.rows == 0)
        await close(batcher)

    asyncio.run(scenario())


class LostSession(PlainSession):
    """A device that breaks for ever when it sees a certain row."""

    provider = "cuda"

    def __init__(self) -> None:
        self.lost = False
        self.runs = 0

    def run(self, pixels):
        self.runs += 1
        self.lost = self.lost or 13 in pixels[:, 0, 0, 0]
        if self.lost:
            raise DeviceLostError("The GPU has failed.")
        return (np.array([[row] for row in pixels[:, 0, 0, 0].tolist()], np.float32),)


def test_a_lost_device_is_told_at_once_and_makes_the_process_one_that_cannot_go_on(over):
    async def scenario():
        session = LostSession()
        runs = await over(session, max_batch=4)
        assert await answer(runs, 1) == [1]
        told = await asyncio.gather(*(answer(runs, value) for value in (2, 13, 3)), return_exceptions=True)
        assert {type(error) for error in told} <= {DeviceLostError, UnavailableError}
        assert session.runs == 2, "what a device that is lost has been asked is not asked again"
        with pytest.raises(UnavailableError):
            await answer(runs, 4)
        await close(runs)

    asyncio.run(scenario())


def test_a_lost_device_is_a_run_without_an_end():
    async def scenario():
        batcher = Batcher(
            [LostSession()],
            max_batch=4,
            linger_s=0,
            loop=asyncio.get_running_loop(),
            metrics=Metrics().for_model("m", "1"),
        )
        await answer(batcher, 1)
        assert batcher.running_since == 0
        for _ in range(2):
            with pytest.raises(DeviceLostError):
                await answer(batcher, 13)
            assert has_lost_its_device(time.monotonic() - batcher.running_since)
        assert is_stuck(time.monotonic() - batcher.running_since, 0.0)
        assert not is_stuck(1e6, 0.0)
        await close(batcher)

    asyncio.run(scenario())


def test_each_session_is_prepared_on_the_thread_that_runs_it_before_there_is_work():
    class Threaded(EchoSession):
        thread = ""

        def run(self, pixels):
            assert threading.current_thread().name == self.thread
            return super().run(pixels)

    async def scenario():
        sessions = [Threaded(), Threaded()]

        def prepare(number):
            time.sleep(0.02)
            sessions[number].thread = threading.current_thread().name

        batcher = Batcher(
            sessions,
            max_batch=4,
            linger_s=0,
            loop=asyncio.get_running_loop(),
            metrics=Metrics().for_model("m", "1"),
            prepare=prepare,
        )
        assert {session.thread for session in sessions} == {"m-session-0", "m-session-1"}
        assert await asyncio.gather(*(answer(batcher, value) for value in range(8))) == [[value] for value in range(8)]
        await close(batcher)

    asyncio.run(scenario())


def test_what_goes_wrong_in_preparing_is_raised_and_leaves_no_thread():
    async def scenario():
        def prepare(number):
            if number == 1:
                raise ValueError("it does not give its golden answers")
            time.sleep(0.1)

        before = threading.active_count()
        with pytest.raises(ValueError, match="golden"):
            Batcher(
                [EchoSession(), EchoSession(), EchoSession()],
                max_batch=4,
                linger_s=0,
                loop=asyncio.get_running_loop(),
                metrics=Metrics().for_model("m", "1"),
                prepare=prepare,
            )
        assert threading.active_count() == before

    asyncio.run(scenario())
