"""The jobs that wait, and the batches that they become: when one closes, who is in it, who is dropped.

The only thing that the event loop and the sessions' threads both touch.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from app.errors import ConvoyError, UnavailableError
from app.families import Number
from app.runs import LAST_URGENCY, Job, RunMarks
from app.tensors import Array

WORTH_SHARING_S = 0.002
"""Less work than this is not divided among sessions: waking one up and taking turns at Python costs more."""

Clock = Callable[[], float]


@dataclass(slots=True)
class Slice:
    """Rows `start` to `stop` of one job, in one batch; `outputs` or `error` once they ran."""

    job: Job
    start: int
    stop: int
    outputs: tuple[Array, ...] | None = None
    error: ConvoyError | None = None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.stop - self.start

    @property
    def inputs(self) -> tuple[Array, ...]:
        """This slice's rows of each input."""
        job = self.job
        if self.rows == job.rows:
            return job.inputs
        return tuple([array[self.start : self.stop] for array in job.inputs])


@dataclass(slots=True)
class Batch:
    """What one session runs at once."""

    taken_at: float
    slices: list[Slice] = field(default_factory=list)
    rows: int = 0
    infer_s: float = 0.0
    padding: int = 0
    copied_s: float = 0.0
    marks: RunMarks | None = None

    def add(self, job: Job, rows: int) -> None:
        """Take the next `rows` rows of `job`."""
        if job.marks is not None:
            self.marks = job.marks.take(self.marks, self.taken_at, rows)
        self.slices.append(Slice(job, job.taken, job.taken + rows))
        job.taken += rows
        self.rows += rows


class Line:
    """The jobs that wait: the urgent ones first, first come first served among equals."""

    def __init__(
        self,
        max_batch: int,
        linger_s: float,
        takers: int = 1,
        clock: Clock = time.monotonic,
        shown: Number | None = None,
    ) -> None:
        self._max_batch = max_batch
        self._takers = takers
        self._linger_s = linger_s
        self._clock = clock
        self._queues: list[OrderedDict[Job, None]] = [OrderedDict() for _ in range(LAST_URGENCY + 1)]
        self._changed = threading.Condition()
        self.closed = False
        self._rows = 0
        self._shown = shown
        self.row_s = 0.0
        """What a row costs to run, seconds, as last measured; the sessions write it."""

    @property
    def rows(self) -> int:
        """Rows that wait; whoever changes it holds the lock, which makes the gauge's writers one at a time."""
        return self._rows

    @rows.setter
    def rows(self, rows: int) -> None:
        self._rows = rows
        if self._shown is not None:
            self._shown.set(rows)

    def oldest(self) -> float:
        """Return when the first of the jobs that wait came, clock time; 0: none waits."""
        with self._changed:
            return min((next(iter(queue)).queued_at for queue in self._queues if queue), default=0.0)

    def extend(self, jobs: Sequence[Job]) -> None:
        """Put jobs at the end.

        Raises:
            UnavailableError: the line is closed.
        """
        with self._changed:
            if self.closed:
                raise UnavailableError("The model is being unloaded; try again.")
            now = self._clock()
            for job in jobs:
                job.queued_at = now
                self._queues[job.urgency][job] = None
                self.rows += job.waiting_rows
            self._changed.notify()

    def remove(self, job: Job) -> None:
        """Take a job out, if it waits; its rows that a session already has still run."""
        with self._changed:
            self._remove(job)

    def take(self) -> Batch | None:
        """Wait for work and return the next batch; None when the line is closed and empty.

        Blocks the calling thread. With a linger, a batch that is not full waits until its oldest job has been here
        for that long.
        """
        with self._changed:
            while True:
                # One time for the whole decision: a job that expires meanwhile must not leave an empty batch.
                now = self._clock()
                head = self._head(now)
                if head is None:
                    if self.closed:
                        return None
                    self._changed.wait()
                elif (patience := self._patience(now)) > 0:
                    self._changed.wait(patience)
                else:
                    return self._next_batch(now)

    def close(self) -> None:
        """Refuse new jobs; takers finish what waits, then get None."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _head(self, now: float) -> Job | None:
        """Return the first job that is still wanted; expired ones before it are forgotten.

        Whoever awaits an expired job has a timer of its own, so nothing has to be told.
        """
        for queue in self._queues:
            while queue:
                job = next(iter(queue))
                if job.deadline > now:
                    return job
                self._remove(job)
        return None

    def _fitting(self, kind: Hashable, now: float) -> Job | None:
        """Return the first job of a kind that is still wanted."""
        job = self._head(now)
        if job is None or job.kind == kind:
            return job
        for queue in self._queues:
            for job in queue:
                if job.kind == kind and job.deadline > now:
                    return job
        return None

    def _patience(self, now: float) -> float:
        """Seconds that the next batch may still wait to fill up."""
        if not self._linger_s or self.closed or self.rows >= self._max_batch:
            return 0.0
        oldest = min(next(iter(queue)).queued_at for queue in self._queues if queue)
        return oldest + self._linger_s - now

    def _next_batch(self, now: float) -> Batch:
        batch = Batch(taken_at=now)
        limit = self._fair_share()
        job = self._head(now)
        while job is not None:
            rows = min(job.waiting_rows, limit - batch.rows)
            batch.add(job, rows)
            self.rows -= rows
            if not job.waiting_rows:
                del self._queues[job.urgency][job]
            job = self._fitting(job.kind, now) if batch.rows < limit else None
        if self.rows:
            self._changed.notify()
        return batch

    def _fair_share(self) -> int:
        """Return how many rows one session takes: all that fit, but of slow ones only its share.

        A session that takes sixteen slow rows leaves nothing to the one that is free a moment later: the photo model
        under 16 clients then keeps one of two sessions busy. Fast rows are done before another session has woken up.
        """
        if self.rows * self.row_s < WORTH_SHARING_S:
            return self._max_batch
        return min(self._max_batch, math.ceil(self.rows / self._takers))

    def _remove(self, job: Job) -> None:
        queue = self._queues[job.urgency]
        if job in queue:
            del queue[job]
            self.rows -= job.waiting_rows
