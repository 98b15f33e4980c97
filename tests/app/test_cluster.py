"""Fronts and engines: the memory and the wire between them, in one process; deaths and truth, with real ones."""

import asyncio
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from app.batcher import Batcher
from app.cluster.engine import EngineProcess, _Run
from app.cluster.front import Links
from app.cluster.slab import SMALLEST_ROOM, SlabFullError, create_slab, packed_bytes, packed_bytes_of
from app.cluster.wire import NUMBER, PACKET_BYTES, SHARE, Kind, Packets, Share, recorded, records_of
from app.errors import (
    BundleError,
    DeviceLostError,
    InferenceError,
    QueueFullError,
    SettingsError,
    UnavailableError,
)
from app.metrics import Metrics
from app.sessions import PlainSession
from app.tensors import DATATYPES, TensorSpec
from app.tracing import Tracer
from app.workers import gpu_of
from tests.app.engines import EngineHere, connected, no_socket_is_left  # noqa: F401
from tests.app.test_batcher import FOREVER, EchoSession, answer, close, fill, rows, until

NUMBERS = [dtype for name, dtype in DATATYPES.items() if name != "BYTES"]


@pytest.fixture
def slab():
    descriptor, slab = create_slab(1 << 20)
    os.close(descriptor)
    yield slab
    slab.close()


texts = st.one_of(st.text(max_size=20), st.binary(max_size=20))
anything = st.one_of(
    st.sampled_from(NUMBERS).flatmap(
        lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    ),
    arrays.arrays(object, arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4), elements=texts),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(anything, max_size=4))
def test_what_is_packed_comes_out(found):
    descriptor, slab = create_slab(1 << 20)
    os.close(descriptor)
    size = packed_bytes(found)
    room = slab.take(size)
    slab.pack(room, found)
    again = slab.unpack(room, size)
    for one, other in zip(found, again, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if one.dtype == object:
            assert [(type(text), text) for text in one.flat] == [(type(text), text) for text in other.flat]
        else:
            assert one.tobytes() == other.tobytes()
    numbers = [array for array in found if array.dtype != object]
    assert packed_bytes_of([(array.shape, array.dtype) for array in numbers]) == packed_bytes(numbers)
    del again
    slab.close()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_what_was_never_packed_is_refused_and_never_read_beyond_its_room(content, size):
    descriptor, slab = create_slab(SMALLEST_ROOM)
    os.close(descriptor)
    slab.memory[: len(content)] = content
    try:
        for array in slab.unpack(0, size):
            assert array.dtype == object or array.nbytes <= size
    except (ValueError, UnicodeDecodeError):
        pass
    slab.close()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 100_000), st.none()), max_size=60))
def test_rooms_never_overlap_and_are_given_out_again(steps):
    descriptor, slab = create_slab(1 << 20)
    os.close(descriptor)
    taken: dict[int, int] = {}
    for step in steps:
        if step is None:
            if taken:
                slab.let_go(taken.popitem()[0])
            continue
        try:
            room = slab.take(step)
        except SlabFullError:
            continue
        size = slab.room_of(room)
        assert size >= step and room + size <= 1 << 20
        assert all(room + size <= other or other + length <= room for other, length in taken.items())
        taken[room] = size
    assert slab.rooms == len(taken)
    slab.close()


def test_a_large_room_gives_its_memory_back(slab):
    def resident() -> int:
        return os.fstat(descriptor).st_blocks * 512

    descriptor, large = create_slab(64 << 20)
    room = large.take(32 << 20)
    large.memory[room : room + (32 << 20)] = b"x" * (32 << 20)
    assert resident() >= 32 << 20
    large.let_go(room)
    assert resident() < 1 << 20
    assert large.take(32 << 20) == room
    os.close(descriptor)
    large.close()


def test_packets_arrive_whole_and_in_order_whatever_the_reader_does():
    async def scenario():
        ours, theirs = connected()
        got: list[int] = []
        lost: list[str] = []
        sender = Packets(ours, lambda *_: None, lambda: lost.append("sender"))
        records = [(number,) for number in range(200_000)]
        packets = list(recorded(Kind.GIVE_UP, NUMBER, records))
        assert len(packets) > 10 and max(map(len, packets)) <= PACKET_BYTES + 1
        for packet in packets:
            sender.send(packet)  # far more than the socket holds, before anybody reads
        receiver = Packets(
            theirs,
            lambda kind, packet, _: got.extend(number for (number,) in records_of(NUMBER, packet)),
            lambda: lost.append("receiver"),
        )
        await until(lambda: len(got) == len(records))
        assert got == list(range(200_000))
        sender.close()
        await until(lambda: lost == ["receiver"])
        receiver.close()

    asyncio.run(scenario())


def test_nonsense_on_the_wire_ends_the_connection():
    async def scenario():
        ours, theirs = connected()
        lost: list[str] = []
        Packets(theirs, lambda *_: None, lambda: lost.append("it"))
        ours.send(b"\xff nonsense")
        await until(lambda: bool(lost))
        ours.close()

    asyncio.run(scenario())


def batcher_of(*sessions, max_batch=4, metrics=None) -> Batcher:
    metrics = metrics or Metrics()
    loop = asyncio.get_running_loop()
    return Batcher(sessions, max_batch=max_batch, linger_s=0, loop=loop, metrics=metrics.for_model("m", "1"))


def test_fronts_share_a_model_and_its_batches_and_the_last_one_closes_it(tmp_path):
    async def scenario():
        session = EchoSession(held=True)
        here = EngineHere(tmp_path, batcher_of(session))
        fronts = [here.front(), here.front()]
        one, other = [(await here.opened(links)).batcher for links in fronts]
        assert here.loads == 1
        await fill(session, one)
        jobs = [asyncio.create_task(answer(runs, value)) for runs, value in ((one, 1), (other, 2), (one, 3))]
        await until(lambda: here.batcher._line.rows == 3)
        session.gate.set()
        assert await asyncio.gather(*jobs) == [[1], [2], [3]]
        assert sorted(session.batches[1]) == [1, 2, 3]
        await close(one)
        assert await answer(other, 4) == [4]
        await close(other)
        await until(lambda: here.batcher._line.closed)

    asyncio.run(scenario())


def test_an_engine_shows_the_last_few_of_the_models_that_are_closed(tmp_path):
    async def scenario():
        here = EngineHere(tmp_path, batcher_of(EchoSession()))
        for number in range(8):
            opened, _, _ = await here.engine.open(f"m{number}", "1", str(tmp_path))
            here.engine.let_go(opened)
        assert set(here.metrics.models()) == {"m3", "m4", "m5", "m6", "m7"}
        opened, _, _ = await here.engine.open("m3", "1", str(tmp_path))
        for number in range(10, 18):
            here.engine.let_go((await here.engine.open(f"m{number}", "1", str(tmp_path)))[0])
        assert set(here.metrics.models()) == {"m3", "m13", "m14", "m15", "m16", "m17"}
        here.engine.let_go(opened)

    asyncio.run(scenario())


def test_who_waits_for_an_engine_that_dies_is_told_and_the_next_one_has_its_models(tmp_path):
    async def scenario():
        held = EchoSession(held=True)
        first = EngineHere(tmp_path, batcher_of(held))
        links = first.front()
        runs = (await first.opened(links)).batcher
        waiting = [asyncio.create_task(answer(runs, value)) for value in (1, 2)]
        await until(held.entered.is_set)
        assert runs.is_up
        [front] = first.engine._fronts
        front._packets.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [error.code for error in results] == ["engine_lost"] * 2
        assert not runs.is_up and links.count == 0
        with pytest.raises(UnavailableError):
            runs.submit((rows(1),), 1, FOREVER)
        second = EngineHere(tmp_path, batcher_of(EchoSession()))
        second.front(links)
        await until(lambda: runs.is_up)
        assert await answer(runs, 7) == [7]
        held.gate.set()
        await close(runs)

    asyncio.run(scenario())


def test_what_a_dead_front_had_waiting_is_not_run(tmp_path):
    async def scenario():
        session = EchoSession(held=True)
        here = EngineHere(tmp_path, batcher_of(session))
        dying, living = here.front(), here.front()
        runs = (await here.opened(dying)).batcher
        other = (await here.opened(living)).batcher
        await fill(session, runs)
        lost = [asyncio.create_task(answer(runs, value)) for value in (1, 2)]
        kept = asyncio.create_task(answer(other, 3))
        await until(lambda: here.batcher._line.rows == 3)
        dying.close()
        await until(lambda: here.batcher._line.rows == 1)
        session.gate.set()
        assert await kept == [3]
        assert session.batches == [[200], [3]]
        assert len(here.engine._fronts) == 1
        await asyncio.gather(*lost, return_exceptions=True)
        await close(other)

    asyncio.run(scenario())


def test_rooms_come_back_from_every_kind_of_end(tmp_path):
    async def scenario():
        session = EchoSession(fail_on=13)
        here = EngineHere(tmp_path, batcher_of(session, max_batch=3))
        links = here.front()
        runs = (await here.opened(links)).batcher
        [link] = links._links
        rng = np.random.default_rng(3)

        async def client(number: int) -> None:
            values = rng.integers(0, 20, rng.integers(1, 9)).tolist()
            await asyncio.sleep(float(rng.random()) * 0.1)
            deadline = FOREVER if number % 3 else time.monotonic() + 0.001
            task = asyncio.create_task(asyncio.wait_for(answer(runs, *values, deadline=deadline), 0.3))
            if number % 4 == 0:
                await asyncio.sleep(float(rng.random()) * 0.004)
                task.cancel()
            [result] = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(result, BaseException) or result == values

        await asyncio.gather(*(client(number) for number in range(300)))
        await until(lambda: link.slab.rooms == 0)
        assert link.pending == link.rows == 0
        [front] = here.engine._fronts
        assert not front._answers
        await close(runs)

    asyncio.run(scenario())


def test_a_room_counts_for_its_engine_until_it_is_let_go_or_answered(tmp_path):
    async def scenario():
        here, there = (EngineHere(tmp_path, batcher_of(EchoSession())) for _ in range(2))
        links = there.front(here.front())
        runs = (await here.opened(links)).batcher
        rooms = [runs.room((2, 2, 2, 3)) for _ in range(4)]
        assert sorted(link.rows for link in links._links) == [4, 4], "the least loaded one has the next"
        for value, room in enumerate(rooms[:3]):
            room.pixels[...] = value
        jobs = [runs.submit((room.pixels,), 2, FOREVER, room=room) for room in rooms[:3]]
        rooms[3].let_go()
        for value, job in enumerate(jobs):
            [scores] = await job.answer
            assert scores[:, 0].tolist() == [value, value]
        assert [(link.rows, link.slab.rooms) for link in links._links] == [(0, 0), (0, 0)]
        with pytest.raises(QueueFullError):
            runs.room((1 << 20, 2, 2, 1 << 20))
        kept = runs.room((1, 2, 2, 3))
        await close(runs)
        with pytest.raises(UnavailableError, match="unloaded"):
            runs.submit((kept.pixels,), 1, FOREVER, room=kept)
        kept.let_go()

    asyncio.run(scenario())


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class WideSession(PlainSession):
    provider = "cpu"

    def run(self, pixels):
        return (np.repeat(pixels[:, :1, 0, 0].astype(np.float32), 50_000, axis=1),)


def test_scores_that_do_not_fit_into_their_room_come_in_memory_of_their_own(tmp_path):
    async def scenario():
        here = EngineHere(tmp_path, batcher_of(WideSession()))
        runs = (await here.opened()).batcher
        before = descriptors()
        for value in range(5):
            job = runs.submit((rows(value, value + 1),), 2, FOREVER)
            [scores] = await job.answer
            assert scores.shape == (2, 50_000)
            assert (scores[0] == value).all() and (scores[1] == value + 1).all()
        del job, scores
        await until(lambda: descriptors() == before)
        await close(runs)

    asyncio.run(scenario())


def test_a_model_that_is_asked_for_twice_at_once_is_opened_once(tmp_path):
    async def scenario():
        here = EngineHere(tmp_path, batcher_of(EchoSession()))
        links = here.front()
        [link] = links._links
        told: list[str] = []
        for name in ("one", "other"):
            link.open(77, "m", "1", tmp_path, lambda said, name=name: told.append(f"{name}: {said['provider']}"))
        await until(lambda: len(told) == 2)
        assert told == ["one: cpu", "other: cpu"]
        [opened] = here.engine._models.values()
        assert opened.users == 1
        link.close_model(77)
        await until(lambda: not here.engine._models)
        links.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", [BundleError("it is broken"), SettingsError("no such device"), RuntimeError("odd")])
def test_why_a_model_cannot_be_opened_is_told_as_in_one_process(tmp_path, fault):
    async def scenario():
        here = EngineHere(tmp_path, None, fault=fault)
        kind = SettingsError if isinstance(fault, SettingsError) else BundleError
        with pytest.raises(kind, match=str(fault)):
            await here.opened()
        here._fault, here.batcher = None, batcher_of(EchoSession())
        runs = (await here.opened()).batcher
        assert await answer(runs, 5) == [5]
        await close(runs)

    asyncio.run(scenario())


def test_a_slab_without_room_is_an_overload(tmp_path, monkeypatch):
    async def scenario():
        monkeypatch.setattr("app.cluster.link.create_slab", lambda: create_slab(2 * SMALLEST_ROOM))
        session = EchoSession(held=True)
        here = EngineHere(tmp_path, batcher_of(session))
        runs = (await here.opened()).batcher
        jobs = [asyncio.create_task(answer(runs, value)) for value in (1, 2)]
        await until(session.entered.is_set)
        with pytest.raises(QueueFullError):
            runs.submit((rows(3),), 1, FOREVER)
        session.gate.set()
        assert await asyncio.gather(*jobs) == [[1], [2]]
        await close(runs)

    asyncio.run(scenario())


class TalkativeSession(PlainSession):
    provider = "cpu"

    def run(self, pixels):
        if 13 in pixels[:, 0, 0, 0]:
            raise RuntimeError("ü" * 100_000)
        return (pixels[:, 0, 0, :1].astype(np.float32),)


def test_a_long_reason_stays_within_its_room(tmp_path):
    async def scenario():
        here = EngineHere(tmp_path, batcher_of(TalkativeSession(), max_batch=1))
        runs = (await here.opened()).batcher
        values = [1, 13, 2, 13, 3]
        found = await asyncio.gather(*(answer(runs, value) for value in values), return_exceptions=True)
        for value, result in zip(values, found, strict=True):
            if value == 13:
                assert isinstance(result, InferenceError) and result.message.endswith("ü" * 100)
                assert len(result.message.encode()) < SMALLEST_ROOM
            else:
                assert result == [value]
        await close(runs)

    asyncio.run(scenario())


class KeepingSink:
    def send(self, over) -> bool:
        return True

    def close(self) -> None:
        pass


def test_a_sampled_request_is_told_of_its_batches(tmp_path):
    async def scenario():
        here = EngineHere(tmp_path, batcher_of(EchoSession(), max_batch=2))
        runs = (await here.opened()).batcher
        tracer = Tracer(KeepingSink(), 1.0)
        _, marks = tracer.sample(None, None)
        job = runs.submit((rows(1, 2, 3),), 3, FOREVER, marks=marks)
        await job.answer
        assert [stay.rows for stay in marks.stays] == [2, 1]
        batches = [stay.batch for stay in marks.stays]
        assert [(batch.rows, batch.requests, batch.model, batch.provider) for batch in batches] == [
            (2, 1, "m", "cpu"),
            (1, 1, "m", "cpu"),
        ]
        assert all(batch.ended >= batch.started >= batch.taken_at > 0 for batch in batches)
        await close(runs)

    asyncio.run(scenario())


def test_the_engine_with_the_least_to_do_gets_the_next_request(tmp_path):
    async def scenario():
        busy, idle = EchoSession(held=True), EchoSession(held=True)
        engines = [EngineHere(tmp_path, batcher_of(session)) for session in (busy, idle)]
        links = engines[1].front(engines[0].front())
        runs = (await engines[0].opened(links)).batcher
        assert runs.parallel == 2
        jobs = [asyncio.create_task(answer(runs, value)) for value in (1, 2, 3, 4)]
        await until(lambda: busy.entered.is_set() and idle.entered.is_set())
        assert sorted(link.rows for link in links._links) == [2, 2]
        busy.gate.set()
        idle.gate.set()
        assert await asyncio.gather(*jobs) == [[1], [2], [3], [4]]
        await close(runs)

    asyncio.run(scenario())


def test_an_engine_that_is_told_to_stop_ends_with_its_last_front():
    async def scenario():
        class NoVitals:
            def start(self) -> None: ...
            def show(self) -> None: ...

        engine = EngineProcess(Metrics(), lambda *_: None)
        ours, theirs = connected()
        engine.meet(1, theirs)
        running = asyncio.create_task(engine.run(NoVitals()))
        engine.stop()
        await asyncio.sleep(0.2)
        assert not running.done()
        ours.close()
        await asyncio.wait_for(running, 5)

    asyncio.run(scenario())


def test_each_of_several_engines_sees_a_gpu_of_its_own():
    assert gpu_of(0, 1, {}) == {}
    assert [gpu_of(place, 2, {}) for place in (0, 1)] == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    environment = {"CUDA_VISIBLE_DEVICES": "GPU-aa, GPU-bb"}
    found = [gpu_of(place, 3, environment)["CUDA_VISIBLE_DEVICES"] for place in range(3)]
    assert found == ["GPU-aa", "GPU-bb", "GPU-aa"]


# ---------------------------------------------------------------- what goes wrong between them


async def no_hang(waiting, seconds=5):
    return await asyncio.wait_for(waiting, seconds)


def test_an_engine_that_was_dead_when_it_was_met_holds_nobody_up(tmp_path):
    async def scenario():
        here = EngineHere(tmp_path, batcher_of(EchoSession()))
        links = Links(Metrics())
        ours, theirs = connected()
        theirs.close()
        links.meet(1, ours)
        here.front(links)
        runs = (await no_hang(here.opened(links))).batcher
        assert await answer(runs, 5) == [5]
        assert links.count == 1
        await close(runs)

    asyncio.run(scenario())


def test_an_engine_that_dies_in_the_turn_in_which_all_are_asked_hides_none_of_the_others(tmp_path, monkeypatch):
    async def scenario():
        here = EngineHere(tmp_path, batcher_of(EchoSession()))
        links = Links(Metrics())
        ours, theirs = connected()
        links.meet(1, ours)
        here.front(links)
        ask = links._ask

        def ask_as_one_dies(*arguments):
            theirs.close()
            ask(*arguments)

        monkeypatch.setattr(links, "_ask", ask_as_one_dies)
        runs = (await no_hang(here.opened(links))).batcher
        assert await answer(runs, 5) == [5]
        await close(runs)

    asyncio.run(scenario())


async def lose_engine(here: EngineHere) -> None:
    for front in list(here.engine._fronts):
        front._packets.close()
    await asyncio.sleep(0.05)


def test_an_engine_that_could_not_open_a_model_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("app.cluster.remote_batcher.FIRST_PAUSE_S", 0.05)

    async def scenario():
        first = EngineHere(tmp_path, batcher_of(EchoSession()))
        links = first.front()
        runs = (await first.opened(links)).batcher
        await lose_engine(first)
        full = BundleError("the memory of the dead one is not free yet")
        second = EngineHere(tmp_path, batcher_of(EchoSession()), fault=full)
        second.front(links)
        await until(lambda: second.loads >= 2)
        assert not runs.is_up
        second._fault = None
        await until(lambda: runs.is_up)
        assert await answer(runs, 6) == [6]
        await close(runs)

    asyncio.run(scenario())


class Changed(EngineHere):
    digest = "another"

    def _load(self, *arguments):
        model, difference = super()._load(*arguments)
        return replace(model, digest=self.digest), difference


def test_engines_that_do_not_agree_at_first_are_a_fault(tmp_path):
    async def scenario():
        here, there = (kind(tmp_path, batcher_of(EchoSession())) for kind in (EngineHere, Changed))
        links = there.front(here.front())
        with pytest.raises(BundleError, match="The engines do not agree on its digest: "):
            await no_hang(here.opened(links))
        await until(lambda: not (here.engine._models or there.engine._models))

    asyncio.run(scenario())


def test_an_engine_that_failed_before_another_had_opened_the_model_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("app.cluster.remote_batcher.FIRST_PAUSE_S", 0.05)
    gate = threading.Event()

    class Slow(EngineHere):
        def _load(self, *arguments):
            assert gate.wait(10)
            return super()._load(*arguments)

    async def scenario():
        slow = Slow(tmp_path, batcher_of(EchoSession()))
        links = slow.front()
        opening = asyncio.create_task(slow.opened(links))
        await until(lambda: bool(links._batchers))
        faulty = EngineHere(tmp_path, batcher_of(EchoSession()), fault=BundleError("no memory yet"))
        faulty.front(links)
        await until(lambda: faulty.loads >= 1)
        gate.set()
        runs = (await no_hang(opening)).batcher
        faulty._fault = None
        await until(lambda: len(runs._ready) == 2)
        await close(runs)

    asyncio.run(scenario())


def test_an_engine_that_found_something_else_runs_nothing_until_it_finds_the_same(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("app.cluster.remote_batcher.FIRST_PAUSE_S", 0.05)

    async def scenario():
        first = EngineHere(tmp_path, batcher_of(EchoSession()))
        links = first.front()
        model = await first.opened(links)
        await lose_engine(first)
        second = Changed(tmp_path, batcher_of(EchoSession()))
        second.front(links)
        await until(lambda: "something else than what is served" in caplog.text)
        [told] = {str(record.differs) for record in caplog.records if hasattr(record, "differs")}
        assert told == "{'digest': ['digest', 'another']}"
        assert not model.batcher.is_up
        with pytest.raises(UnavailableError):
            model.batcher.submit((rows(1),), 1, FOREVER)
        await until(lambda: second.loads >= 2)
        second.digest = "digest"  # as it was again
        await until(lambda: model.batcher.is_up)
        await close(model.batcher)

    asyncio.run(scenario())


def test_a_model_that_was_asked_for_twice_by_one_front_is_closed_once(tmp_path):
    async def scenario():
        here = EngineHere(tmp_path, batcher_of(EchoSession()))
        links = here.front()
        [link] = links._links
        said: list[object] = []
        for _ in range(2):
            link.open(77, "m", "1", tmp_path, said.append)
            await until(lambda: len(said) > 0)
            said.clear()
        [opened] = here.engine._models.values()
        assert opened.users == 1
        link.close_model(77)
        await until(lambda: not here.engine._models)

    asyncio.run(scenario())


def test_one_answer_that_cannot_be_handed_over_fails_alone(tmp_path, monkeypatch):
    made = []

    def seldom(size):
        made.append(size)
        if len(made) == 1:
            raise OSError(24, "Too many open files")
        return create_slab(size)

    async def scenario():
        here = EngineHere(tmp_path, batcher_of(WideSession()))
        links = here.front()
        runs = (await here.opened(links)).batcher
        monkeypatch.setattr("app.cluster.engine.create_slab", seldom)
        jobs = [runs.submit((rows(value),), 1, FOREVER) for value in range(4)]
        results = await no_hang(asyncio.gather(*(job.answer for job in jobs), return_exceptions=True))
        assert [type(result) for result in results] == [InferenceError, tuple, tuple, tuple]
        assert "could not be handed over" in results[0].message
        [link] = links._links
        assert (link.slab.rooms, link.rows, runs._waiting) == (0, 0, 0)
        await close(runs)

    asyncio.run(scenario())


def test_large_scores_that_do_not_arrive_fail_their_request_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("app.cluster.link._unpacked", lambda *_: ())

    async def scenario():
        here = EngineHere(tmp_path, batcher_of(WideSession()))
        runs = (await here.opened()).batcher
        with pytest.raises(InferenceError, match="large scores did not arrive"):
            await no_hang(runs.submit((rows(1),), 1, FOREVER).answer)
        await close(runs)

    asyncio.run(scenario())


def test_an_answer_whose_taker_fails_is_no_reason_to_keep_others_waiting(tmp_path):
    class Broken:
        def done(self):
            return False

        def set_result(self, outputs):
            raise RuntimeError("broken")

        def set_exception(self, error):
            self.error = error

    async def scenario():
        session = EchoSession(held=True)
        here = EngineHere(tmp_path, batcher_of(session))
        links = here.front()
        runs = (await here.opened(links)).batcher
        blocker = await fill(session, runs)
        broken = Broken()
        runs.submit((rows(1),), 1, FOREVER, answer=broken)
        others = [asyncio.create_task(answer(runs, value)) for value in (2, 3)]
        await until(lambda: here.batcher._line.rows == 3)
        session.gate.set()
        assert await no_hang(asyncio.gather(*others)) == [[2], [3]]
        await blocker
        assert "broken" in broken.error.message
        [link] = links._links
        assert (link.slab.rooms, link.rows) == (0, 0)
        await close(runs)

    asyncio.run(scenario())


def test_a_description_that_is_too_long_is_a_fault_and_not_a_silence(tmp_path):
    class Verbose(EngineHere):
        def _load(self, *arguments):
            model, difference = super()._load(*arguments)
            outputs = tuple(
                TensorSpec(f"/model/layers.{i}/present.key_values.{i}", "FP32", (-1, 8)) for i in range(1500)
            )
            return replace(model, outputs=outputs), difference

    async def scenario():
        here = Verbose(tmp_path, batcher_of(EchoSession()))
        with pytest.raises(BundleError, match="names and shapes take"):
            await no_hang(here.opened())
        await until(lambda: not here.engine._models)

    asyncio.run(scenario())


def test_an_engine_whose_device_is_lost_while_it_opens_says_nothing_and_asks_to_be_replaced(tmp_path):
    async def scenario():
        here = EngineHere(tmp_path, None, fault=DeviceLostError("CUDA failure 700"))
        links = here.front()
        opening = asyncio.create_task(here.opened(links))
        await until(lambda: here.engine._device_lost)
        await lose_engine(here)  # the supervisor kills it
        healthy = EngineHere(tmp_path, batcher_of(EchoSession()))
        healthy.front(links)
        runs = (await no_hang(opening)).batcher
        assert await answer(runs, 4) == [4]
        await close(runs)

    asyncio.run(scenario())


def test_who_stands_still_is_not_up_and_is_asked_last(tmp_path):
    async def scenario():
        here, there = (EngineHere(tmp_path, batcher_of(EchoSession())) for _ in range(2))
        links = there.front(here.front())
        runs = (await here.opened(links)).batcher
        first, second = runs._ready
        first._page = SimpleNamespace(silent_s=60.0)
        second.rows = 10
        assert runs.is_up and runs._least_loaded() is second
        second.rows, second._page = 0, first._page
        assert not runs.is_up
        await close(runs)

    asyncio.run(scenario())


def test_an_engine_that_answers_nothing_gets_no_more_than_twice_what_may_be_inside(tmp_path):
    async def scenario():
        session = EchoSession(held=True)
        here = EngineHere(tmp_path, batcher_of(session))
        links = here.front(Links(Metrics(), most_rows=20))
        runs = (await here.opened(links)).batcher
        [front] = here.engine._fronts
        asyncio.get_running_loop().remove_reader(front._packets._connection)
        sent = 0
        with pytest.raises(QueueFullError):
            while sent < 100:
                runs.abandon(runs.submit((rows(1, 2),), 2, FOREVER))
                sent += 1
        assert sent == 11
        session.gate.set()

    asyncio.run(scenario())


def test_a_kernel_that_cannot_take_memory_back_is_no_reason_to_keep_a_room(slab):
    class Unable:
        def madvise(self, *_):
            raise OSError(38, "Function not implemented")

    room = slab.take(slab._size)
    memory, slab.memory = slab.memory, Unable()
    slab.let_go(room)
    slab.memory = memory
    assert slab.rooms == 0


def test_numbers_of_batches_go_on_beyond_what_a_record_holds():
    shares: list[Share] = []
    batch = _Run(2**32 + 5, 0.0)
    batch.add(SimpleNamespace(number=1, shares=shares), 1)
    batch.end(0.0, 0.1, rows=1, requests=1, session=0)
    [packet] = recorded(Kind.BATCHES, SHARE, shares)
    assert [Share(*record).batch for record in records_of(SHARE, packet)] == [5]


def test_a_packet_without_its_descriptor_ends_the_connection(monkeypatch):
    async def scenario():
        ours, theirs = connected()
        lost: list[str] = []
        taken: list[Kind] = []
        Packets(theirs, lambda kind, *_: taken.append(kind), lambda: lost.append("it"))
        receive = socket.recv_fds

        def without_room_for_it(*arguments):
            packet, descriptors, _, address = receive(*arguments)
            return packet, descriptors, socket.MSG_CTRUNC, address

        monkeypatch.setattr("app.cluster.wire.socket.recv_fds", without_room_for_it)
        ours.send(bytes([Kind.HELLO]) + b"\0\0\0\0{}")
        await until(lambda: bool(lost))
        assert not taken

    asyncio.run(scenario())
