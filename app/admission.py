"""Admission: how much may be inside, and who is turned away at the door.

Images, bytes and pixels are bounded for the service; images also for each model. What a model can do is measured, so
that who cannot be served in time is told at once. Used on the event loop only; knows nothing of HTTP, decoding or
sessions.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from app.deadlines import Deadlines
from app.errors import QueueFullError
from app.metrics import Metrics, ModelMetrics
from app.runs import DEFAULT_URGENCY

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
        for resource in ("images", "bytes", "pixels"):
            metrics.inflight_limit.labels(resource).set(getattr(limits, resource))

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
        # Of a model that was forgotten, and has come back, the series are others.
        if lane is None or lane.metrics.inflight_requests is not metrics.inflight_requests:
            limit = self.limits.model_images.get(metrics.model, self.limits.images)
            lane = Lane(metrics, min(limit, self.limits.images), self.limits.queue_target_s, self._clock)
            self._lanes[metrics.model] = lane
        return lane
