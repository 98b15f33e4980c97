import asyncio
import math
import time

import pytest

from app.admission import BURST_S, Admission, DrainRate, Lane, Limits
from app.errors import DeadlineError, QueueFullError
from app.metrics import Metrics
from app.tickets import Ticket


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lane_of(clock: ManualClock, max_images: int = 1000, target_s: float = 0.1, rate: float = 100.0) -> Lane:
    lane = Lane(Metrics().for_model("m", "1"), max_images, target_s, clock)
    lane.rate.per_second = rate
    return lane


def admitted(lane: Lane, deadline: float = math.inf, urgency: int = 3) -> bool:
    try:
        lane.knock(2, deadline, urgency)
    except QueueFullError:
        return False
    return True


def test_the_rate_counts_busy_time_only():
    clock = ManualClock()
    rate = DrainRate(clock)
    for _ in range(300):
        rate.begin()
        clock.now += 0.1
        rate.finish(10)
        clock.now += 5  # nobody asks for anything
    assert rate.per_second == pytest.approx(100)


def test_the_rate_follows_the_last_seconds():
    clock = ManualClock()
    rate = DrainRate(clock)
    rate.begin()
    for images, seconds in ((10, 30), (5, 30)):
        for _ in range(seconds * 10):
            clock.now += 0.1
            rate.finish(images)
    assert rate.per_second == pytest.approx(50, rel=0.01)


def test_retry_after_is_the_time_that_the_queue_takes():
    lane = lane_of(ManualClock())
    lane.images = 350
    assert lane.refusal("Full.").retry_after_s == 4
    lane.rate.per_second = 0.001
    assert lane.refusal("Full.").retry_after_s == 30
    lane.images = 0
    assert lane.refusal("Full.").retry_after_s == 1


def test_who_cannot_be_served_in_time_is_turned_away_at_the_door():
    clock = ManualClock()
    lane = lane_of(clock)
    lane.images = 200
    with pytest.raises(QueueFullError, match=r"200 images are ahead, which take 2\.0 s") as refusal:
        lane.knock(2, clock.now + 1.9, 3)
    assert (refusal.value.code, refusal.value.retry_after_s) == ("too_late", 2)
    assert admitted(lane, clock.now + 2.1)


def test_before_anything_was_measured_nobody_is_turned_away():
    lane = lane_of(ManualClock(), rate=0.0)
    lane.images = 1000
    assert admitted(lane, lane._clock() + 0.001)


def test_while_sessions_have_room_nobody_is_turned_away():
    lane = lane_of(ManualClock(), rate=0.001)
    lane.images = 3
    assert admitted(lane, lane._clock() + 0.001)


def test_a_burst_is_let_in_and_a_standing_queue_is_not():
    clock = ManualClock()
    lane = lane_of(clock)
    lane.images = 200  # 2 s of work for a target of 0.1 s
    assert admitted(lane)
    clock.now += BURST_S * 0.9
    assert admitted(lane)
    clock.now += BURST_S * 0.2
    assert not admitted(lane)
    assert admitted(lane, urgency=2), "the urgent only answer to their deadline"
    lane.images = 10
    assert not admitted(lane), "at its target again, but from now on it is held short"
    lane.images = 2
    assert admitted(lane)
    clock.now += BURST_S
    lane.images = 200
    assert admitted(lane), "calm for a while: a burst is welcome again"


def test_without_a_target_only_the_limits_count():
    clock = ManualClock()
    lane = lane_of(clock, target_s=0.0)
    lane.images = 900
    for _ in range(10):
        assert admitted(lane)
        clock.now += 1


def test_a_client_that_leaves_after_the_stay_ends_nothing():
    async def stay() -> int:
        metrics = Metrics()
        admission = Admission(Limits(images=1, bytes=1, pixels=1, model_images={}, queue_target_s=0.0), metrics)
        with Ticket(admission, admission.lane(metrics.for_model("m", "1")), time.monotonic() + 60, 3) as ticket:
            pass
        ticket.abandon()
        await asyncio.sleep(0)  # where a cancellation would strike: the answer is being written
        return asyncio.current_task().cancelling()

    assert asyncio.run(stay()) == 0


def test_one_timer_ends_each_stay_at_its_own_deadline_and_no_other():
    async def stays() -> None:
        metrics = Metrics()
        admission = Admission(Limits(images=1, bytes=1, pixels=1, model_images={}, queue_target_s=0.0), metrics)
        lane = admission.lane(metrics.for_model("m", "1"))
        now, told, order = time.monotonic(), {}, (0.03, 0.01, 60.0, 0.02, -1.0, 0.01)
        tickets = [Ticket(admission, lane, now + seconds, 3) for seconds in order]
        closed = Ticket(admission, lane, now + 0.015, 3)
        for number, ticket in enumerate([*tickets, closed]):
            ticket.open(lambda number=number: told.setdefault(number, time.monotonic()))
        closed.close(finished=False)
        while len(told) < 5:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.005)
        assert sorted(told) == [0, 1, 3, 4, 5]
        assert all(told[number] >= tickets[number].deadline for number in told), "ended early"
        for ticket in tickets:
            ticket.expire()  # told once is enough
            ticket.close(finished=False)
        assert metrics.inflight_requests.labels("m").get() == 0

    asyncio.run(asyncio.wait_for(stays(), 10))


def test_a_deadline_can_be_brought_forward_and_not_put_off():
    async def stay(deadline_s: float, shortened_s: float) -> float:
        started = time.monotonic()
        lane = lane_of(ManualClock())
        admission = Admission(Limits(10, 10, 10, {}, 0), Metrics())
        with Ticket(admission, lane, started + deadline_s, 3) as ticket:
            ticket.shorten(started + shortened_s)
            await asyncio.sleep(0.05)
        return ticket.deadline - started

    with pytest.raises(DeadlineError):
        asyncio.run(stay(1000, 0.001))
    assert asyncio.run(stay(500, 1000)) == pytest.approx(500)  # a difference of two clock readings is not exact
