"""Each request gets its own answer or its own error, exactly once: any order of events, by a clock that is told."""

import asyncio
from dataclasses import dataclass, field

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from app.batcher import Batcher, _run
from app.errors import InferenceError
from app.line import Batch
from app.metrics import Metrics
from app.runs import Job
from app.sessions import PlainSession

MAX_BATCH = 5
CURSED = 255
"""A row that no session can run."""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class EchoSession(PlainSession):
    """Answers each row with its own number; a batch with a cursed row fails as a whole."""

    provider = "cpu"

    def run(self, pixels):
        values = pixels[:, 0, 0, 0]
        if (values == CURSED).any():
            raise RuntimeError("cursed")
        return (values[:, None].astype(np.float32),)


@dataclass
class Client:
    """A request, as who sent it sees it."""

    job: Job
    values: list[int]
    left: bool = False
    outcomes: list[object] = field(default_factory=list)


class World:
    """A batcher without threads: the test takes batches, and gives them back in whatever order it likes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.batcher = Batcher(
            [],
            max_batch=MAX_BATCH,
            linger_s=0.0,
            loop=asyncio.get_running_loop(),
            metrics=Metrics().for_model("m", "1"),
            clock=self.clock,
        )
        self.busy = self.batcher._metrics.busy("cpu", 0)
        self.clients: list[Client] = []
        self.running: list[Batch] = []

    def arrive(self, values: list[int], patience: float, urgency: int, width: int = 1) -> None:
        pixels = np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 1, width, 3), np.uint8)
        job = self.batcher.submit((pixels,), len(values), self.clock.now + patience, urgency, kind=width)
        client = Client(job, values)
        job.answer.add_done_callback(lambda future: client.outcomes.append(_outcome(future)))
        self.clients.append(client)

    def leave(self, client: Client) -> None:
        """What a ticket's end does: nobody awaits the answer, and rows that wait are forgotten."""
        client.left = True
        client.job.answer.cancel()
        self.batcher.abandon(client.job)

    def expire(self) -> None:
        for client in self.clients:
            if not client.job.answer.done() and client.job.deadline <= self.clock.now:
                self.leave(client)

    def take(self) -> None:
        line = self.batcher._line
        if not any(job.deadline > self.clock.now for queue in line._queues for job in queue):
            return  # a session would wait
        batch = line.take()
        assert 1 <= batch.rows == sum(part.stop - part.start for part in batch.slices) <= MAX_BATCH
        urgencies = [part.job.urgency for part in batch.slices]
        assert urgencies == sorted(urgencies), "the urgent go first"
        assert len({part.job.kind for part in batch.slices}) == 1, "shapes that cannot be joined were taken together"
        for part in batch.slices:
            assert part.job.deadline > self.clock.now, "work that expired was taken"
            assert not part.job.answer.cancelled(), "work that was abandoned was taken"
        self.running.append(batch)

    def finish(self, batch: Batch) -> None:
        self.running.remove(batch)
        _run(EchoSession(), batch)
        self.batcher._deliver(batch, self.busy, self.busy)
        for part in batch.slices:
            if part.job.answer.done() and part.job.waiting_rows:  # as whoever awaits it does
                self.batcher.abandon(part.job)

    def check(self) -> None:
        for client in self.clients:
            assert len(client.outcomes) == 1, "answered exactly once"
            (outcome,) = client.outcomes
            if client.left:
                assert outcome == "left"
            elif CURSED in client.values:
                assert isinstance(outcome, InferenceError), "its own error"
            else:
                assert outcome == client.values, "its own answer, in order"
        assert self.batcher._line.rows == 0
        assert not any(self.batcher._line._queues)


def _outcome(future: asyncio.Future) -> object:
    if future.cancelled():
        return "left"
    return future.exception() or future.result()[0][:, 0].astype(int).tolist()


ROWS = st.lists(st.integers(0, 250) | st.just(CURSED), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_each_request_gets_its_own_answer_or_its_own_error_exactly_once(data):
    async def scenario() -> None:
        world = World()
        for _ in range(data.draw(st.integers(1, 40), label="steps")):
            match data.draw(st.sampled_from(["arrive", "arrive", "turn", "take", "take", "finish", "leave", "wait"])):
                case "arrive":
                    patience = data.draw(st.sampled_from([0.5, 1.5, 3.0, 1000.0]))
                    urgency, width = data.draw(st.sampled_from([0, 3, 3, 7])), data.draw(st.sampled_from([1, 1, 2]))
                    world.arrive(data.draw(ROWS), patience, urgency, width)
                case "turn":
                    await asyncio.sleep(0)
                case "take":
                    world.take()
                case "finish" if world.running:
                    world.finish(data.draw(st.sampled_from(world.running)))
                case "leave":
                    waiting = [client for client in world.clients if not client.job.answer.done()]
                    if waiting:
                        event("somebody left")
                        world.leave(data.draw(st.sampled_from(waiting)))
                case "wait":
                    world.clock.now += 1.0
                    world.expire()
        await asyncio.sleep(0)
        while world.running or world.batcher._line.rows:
            world.take()
            for batch in list(world.running):
                world.finish(batch)
            world.clock.now += 0.01
            world.expire()
        await asyncio.sleep(0)
        world.check()

    asyncio.run(scenario())


def test_the_property_would_see_a_swapped_answer():
    """The test itself is tested: two answers of one batch in the wrong order are found."""

    async def scenario() -> bool:
        world = World()
        for value in (1, 2):
            world.arrive([value], 1000.0, 3)
        await asyncio.sleep(0)
        world.take()
        (batch,) = world.running
        _run(EchoSession(), batch)
        first, second = batch.slices
        first.job, second.job = second.job, first.job
        world.batcher._deliver(batch, world.busy, world.busy)
        world.running.clear()
        await asyncio.sleep(0)
        try:
            world.check()
        except AssertionError:
            return True
        return False

    assert asyncio.run(scenario())
