"""Admission: how much may be inside, who is turned away at the door, and how long a request may stay.

Images, bytes and pixels are bounded for the service; images also for each model. What a model can do is measured, so
that who cannot be served in time is told at once. A `Ticket` is a request's stay: what it holds, its deadline, and
whether anybody still waits for it. Used on the event loop only; knows nothing of HTTP, decoding or sessions.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from app.batcher import DEFAULT_URGENCY
from app.errors import AbandonedError, DeadlineError, QueueFullError
from app.metrics import Metrics, ModelMetrics

Clock = Callable[[], float]

BURST_S = 0.25
"""How long a model may be above its queue target before anybody is turned away for that."""
HELD_S = 0.02
"""What the queue of an overloaded model may take, seconds: little, but enough to fill the batches of a fast one."""
RATE_STEP_S = 0.05
RISE_S, FALL_S = 0.2, 2.0
"""Time constants of the measured rate. A few requests cannot show what many could have: what was reached counts for a
while, so that the first after a quiet time are not turned away for it."""
MAX_RETRY_AFTER_S = 30


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be inside at once.

    Attributes:
        images, bytes, pixels: for the service: images admitted, bytes of bodies, pixels waiting to be decoded.
        model_images: images of one model, for the models that have a limit of their own.
        queue_target_s: waiting time that a new request may find under lasting overload; 0: no such rule.
    """

    images: int
    bytes: int
    pixels: int
    model_images: Mapping[str, int]
    queue_target_s: float


class DrainRate:
    """Images finished per second *while there was work*: what a model can do here, not what it is asked for."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.per_second = 0.0
        """0 until something was measured."""
        self._clock = clock
        self._finished = 0
        self._busy_s = 0.0
        self._busy_since = 0.0

    def begin(self) -> None:
        """Count time from now: there is work."""
        self._busy_since = self._clock()

    def finish(self, images: int) -> None:
        """Count the time since then, and images that were just finished."""
        now = self._clock()
        self._busy_s += now - self._busy_since
        self._busy_since = now
        self._finished += images
        if self._busy_s >= RATE_STEP_S and self._finished:
            measured = self._finished / self._busy_s
            window_s = RISE_S if measured > self.per_second else FALL_S
            weight = 1 - math.exp(-self._busy_s / window_s) if self.per_second else 1.0
            self.per_second += weight * (measured - self.per_second)
            self._finished, self._busy_s = 0, 0.0


class Lane:
    """One model's part of the admission: its images, how fast they drain, and whether it is overloaded."""

    def __init__(self, metrics: ModelMetrics, max_images: int, target_s: float, clock: Clock = time.monotonic) -> None:
        self.metrics = metrics
        self.images = 0
        self.max_images = max_images
        self.rate = DrainRate(clock)
        self._target_s = target_s
        self._clock = clock
        self._above_since: float | None = None
        self._refused_at = -math.inf

    def wait_s(self) -> float:
        """Return how long what is inside takes at the measured rate, seconds; 0 before anything was measured."""
        return self.images / self.rate.per_second if self.rate.per_second else 0.0

    def knock(self, parallel: int, deadline: float, urgency: int) -> None:
        """Turn a new request away if it could not be served in time, or if the model has been overloaded for a while.

        Args:
            parallel: sessions of the model; twice as many images are always let in, to keep the sessions busy.
            deadline: clock time after which the answer is worthless, seconds.
            urgency: those above the default are not asked to wait for others: only their deadline counts.

        Raises:
            QueueFullError: come back later.
        """
        if self.images < 2 * parallel:
            return
        now, wait_s = self._clock(), self.wait_s()
        if now + wait_s > deadline:
            raise self.refusal(
                f"The deadline cannot be met: {self.images} images are ahead, which take {wait_s:.1f} s.", "too_late"
            )
        if self._is_overloaded(now, wait_s) and urgency >= DEFAULT_URGENCY:
            self._refused_at = now
            raise self.refusal(
                f"The service is overloaded: {self.images} images are ahead, which take {wait_s:.1f} s.", "overloaded"
            )

    def _is_overloaded(self, now: float, wait_s: float) -> bool:
        """Tell a standing queue from a burst, and from clients that each wait for their answer.

        A queue that stays above the target is an overload. From then on it is held short, so that those who are let in
        are served about as fast as ever, until for a while nobody had to be turned away.
        """
        if now - self._refused_at < BURST_S:
            self._above_since = None
            return wait_s > min(HELD_S, self._target_s)
        if not self._target_s or wait_s <= self._target_s:
            self._above_since = None
            return False
        if self._above_since is None:
            self._above_since = now
        return now - self._above_since >= BURST_S

    def hold(self, images: int) -> None:
        """Count images that came in."""
        if not self.images:
            self.rate.begin()
        self.images += images

    def let_go(self, images: int, finished: int = 0) -> None:
        """Count images that left, `finished` of them with an answer."""
        self.images -= images
        self.rate.finish(finished)

    def refusal(self, sentence: str, code: str | None = None) -> QueueFullError:
        """Return the error for a request that is turned away; it says when to come back, 1 to 30 seconds."""
        seconds = min(MAX_RETRY_AFTER_S, max(1, math.ceil(self.wait_s())))
        return QueueFullError(sentence, code=code, retry_after_s=seconds)


class Admission:
    """The bounded resources of the service, and a lane for every model."""

    def __init__(self, limits: Limits, metrics: Metrics, clock: Clock = time.monotonic) -> None:
        self.limits = limits
        self.images = 0
        self.bytes = 0
        self.pixels = 0
        self.deadlines = Deadlines()
        self._clock = clock
        self._lanes: dict[str, Lane] = {}
        self._metrics = metrics

    def add_images(self, count: int) -> None:
        """Count images that come in, or leave (negative)."""
        self.images += count
        self._metrics.inflight_images.set(self.images)

    def add_bytes(self, count: int) -> None:
        """Count bytes of bodies that come in, or leave (negative)."""
        self.bytes += count
        self._metrics.inflight_bytes.set(self.bytes)

    def add_pixels(self, count: int) -> None:
        """Count pixels that begin to wait for their decoding, or are decoded (negative)."""
        self.pixels += count
        self._metrics.inflight_pixels.set(self.pixels)

    def lane(self, metrics: ModelMetrics) -> Lane:
        """Return the lane of the model that `metrics` belongs to; its versions share one."""
        lane = self._lanes.get(metrics.model)
        if lane is None:
            limit = self.limits.model_images.get(metrics.model, self.limits.images)
            lane = Lane(metrics, min(limit, self.limits.images), self.limits.queue_target_s, self._clock)
            self._lanes[metrics.model] = lane
        return lane


class Deadlines:
    """Ends the stays whose deadline passes, with one timer for all instead of one that is set and unset a request.

    Most requests have the same time to live, so the timer is set anew about once in that time.
    """

    def __init__(self) -> None:
        self._stays: set[Ticket] = set()
        self._next = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stay: "Ticket") -> None:
        """Watch a stay."""
        self._stays.add(stay)
        if stay.deadline < self._next:
            self._set(stay.deadline)

    def remove(self, stay: "Ticket") -> None:
        """Watch it no longer; without any, the timer stays as it is, for the next ones."""
        self._stays.discard(stay)

    def _set(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = deadline
        # Never early: the loop rounds to whole milliseconds.
        wait_s = max(0.0, deadline - time.monotonic()) + 0.001
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._ring)

    def _ring(self) -> None:
        now = time.monotonic()
        late = [stay for stay in self._stays if stay.deadline <= now]
        self._stays.difference_update(late)
        self._next, self._timer = math.inf, None
        if self._stays:
            self._set(min(stay.deadline for stay in self._stays))
        for stay in late:
            stay.expire()


class Ticket:
    """One request's stay: what it holds, and until when it may hold it.

    In a request's task it is used in a `with` block: when the deadline passes, or `abandon` is called, whatever the
    task awaits is cancelled, and the block ends with DeadlineError or AbandonedError. Without a task, `open` says who
    is told instead. The drop is counted under the stage that the request was in. What it held is given back in every
    case.

    Attributes:
        deadline: `time.monotonic()` after which the answer is worthless, seconds.
        urgency: 0 (first) to 7 (last).
        stage: body, decode, queue or infer.
    """

    __slots__ = (
        "_admission",
        "_cancelling",
        "_lane",
        "_reason",
        "_task",
        "_tell",
        "bytes",
        "deadline",
        "images",
        "pixels",
        "stage",
        "urgency",
    )

    def __init__(self, admission: Admission, lane: Lane, deadline: float, urgency: int) -> None:
        self._admission = admission
        self._lane = lane
        self._reason = ""
        self._tell: Callable[[], object] | None = None
        self.deadline = deadline
        self.urgency = urgency
        self.stage = "body"
        self.images = 0
        self.bytes = 0
        self.pixels = 0

    def expect_bytes(self, count: int) -> None:
        """Check that `count` more bytes of body would fit now, without holding them: announced is not sent.

        Raises:
            QueueFullError: they do not fit.
        """
        admission = self._admission
        if admission.bytes + count > admission.limits.bytes:
            raise self._lane.refusal("The service is full: it holds as many bytes of images as it may.")

    def hold_bytes(self, count: int) -> None:
        """Hold `count` more bytes of body.

        Raises:
            QueueFullError: they do not fit.
        """
        self.expect_bytes(count)
        self._admission.add_bytes(count)
        self.bytes += count

    def hold_images(self, count: int) -> None:
        """Hold `count` images.

        Raises:
            QueueFullError: they do not fit into the service, or into what their model may hold of it.
        """
        admission, lane = self._admission, self._lane
        if admission.images + count > admission.limits.images:
            raise lane.refusal(
                f"The service is full: {admission.images} images are inside, {admission.limits.images} may be."
            )
        if lane.images + count > lane.max_images:
            raise lane.refusal(
                f"Model '{lane.metrics.model}' is full: {lane.images} of its images are inside, "
                f"{lane.max_images} may be."
            )
        admission.add_images(count)
        lane.hold(count)
        self.images += count

    def hold_pixels(self, count: int) -> None:
        """Hold `count` pixels that are about to be decoded; whoever comes when none are held may bring any number.

        Raises:
            QueueFullError: they do not fit.
        """
        admission = self._admission
        if admission.pixels and admission.pixels + count > admission.limits.pixels:
            raise self._lane.refusal(
                f"The service is full: {admission.pixels:,} pixels wait to be decoded, {admission.limits.pixels:,} may."
            )
        admission.add_pixels(count)
        self.pixels += count

    def give_back_pixels(self) -> None:
        """Let go of all pixels: they are decoded."""
        self._admission.add_pixels(-self.pixels)
        self.pixels = 0

    def lend_image(self) -> Callable[[], None]:
        """Hold one more image beyond the ticket's own end; returns what gives it back, to be called on the loop."""
        admission, lane = self._admission, self._lane
        admission.add_images(1)
        lane.hold(1)

        def give_back() -> None:
            admission.add_images(-1)
            lane.let_go(1)

        return give_back

    def shorten(self, deadline: float) -> None:
        """Bring the deadline forward; one that is later than the present one changes nothing. Only while it is open."""
        if deadline < self.deadline:
            self.deadline = deadline
            self._admission.deadlines.add(self)

    def open(self, tell: Callable[[], object]) -> None:
        """Begin the stay; `tell` is called, at most once, when it must end before it is closed."""
        self._tell = tell
        self._admission.deadlines.add(self)
        self._lane.metrics.inflight_requests.inc()

    def close(self, *, finished: bool) -> None:
        """End the stay and give back what it held; `finished`: its images have their answer."""
        self._tell = None  # from now on nothing has to be ended
        admission, lane = self._admission, self._lane
        admission.deadlines.remove(self)
        lane.metrics.inflight_requests.inc(-1)
        if self.bytes:
            admission.add_bytes(-self.bytes)
        if self.pixels:
            admission.add_pixels(-self.pixels)
        if self.images:
            admission.add_images(-self.images)
            lane.let_go(self.images, self.images if finished else 0)

    def drop(self) -> Exception:
        """Count that the stay was ended before its answer was there, and return why, as an error."""
        self._lane.metrics.dropped(self.stage, self._reason or "draining")
        if self._reason == "disconnected":
            return AbandonedError()
        if self.stage == "body":
            return DeadlineError("The deadline passed before the whole body had arrived.")
        return DeadlineError(f"The deadline passed in the stage '{self.stage}'.")

    def abandon(self) -> None:
        """End the stay: nobody waits for the answer any more."""
        self._end("disconnected")

    def expire(self) -> None:
        """End the stay: its deadline has passed."""
        self._end("deadline")

    def cancelled_for(self, reason: str) -> None:
        """Say why others have cancelled the task: `disconnected` or `deadline`; it is counted and told so."""
        self._reason = self._reason or reason
        self._tell = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a ticket belongs to a task"
        self._task = task
        self._cancelling = task.cancelling()
        self.open(task.cancel)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(finished=kind is None)
        if kind is None:
            return
        if issubclass(kind, asyncio.CancelledError):
            failure = self.drop()
            try:
                if self._reason and self._task.uncancel() <= self._cancelling:  # the cancellation was ours, ends here
                    raise failure from None
            finally:
                # An error and the frame that it is named in hold each other, and with it body and model, until garbage
                # is collected, which is seldom: a hot swap waited for that.
                del failure
        elif issubclass(kind, AbandonedError):
            self._lane.metrics.dropped(self.stage, "disconnected")

    def _end(self, reason: str) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            self._reason = reason
            tell()
