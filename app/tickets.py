"""Tickets: one request's stay in the service, from its head to its answer.

What it holds of the admission's bounds, its deadline, and whether anybody still waits for it. Used on the event loop
only; knows nothing of HTTP, decoding or sessions.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from app.admission import Admission, Lane
from app.errors import AbandonedError, DeadlineError
from app.tracing import Marks


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
        marks: what a sampled request notes for its spans; None: it is not sampled.
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
        "marks",
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
        self.marks: Marks | None = None
        self.images = 0
        self.bytes = 0
        self.pixels = 0

    def follow(self, marks: Marks) -> None:
        """Have the stages note what they do in a sampled request's marks."""
        marks.admitted = True
        self.marks = marks

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

    def forget_deadline(self) -> None:
        """Let the stay go on when the deadline passes: it is refused, and whoever refuses it bounds its time."""
        self._admission.deadlines.remove(self)

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
