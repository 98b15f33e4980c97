"""The batcher: when a batch closes, who is in it, who is dropped.

Jobs wait in one line; each session has a thread that takes what waits when the session is free (pull, never poll),
runs it, and hands all answers to the event loop in one crossing. Owns threads and the line; knows nothing of HTTP,
images or files.

    event loop                         session threads (one per session)
    ----------                         ---------------------------------
    submit(job) ──> [ job job job ] ──> take() ── slices of up to max_batch rows
    abandon(job) ──x                    session.run()
    _deliver(batch) <── call_soon_threadsafe ──┘

A job belongs to the event loop, except `taken`, which the line's lock guards.
"""

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from app.cpus import step_back
from app.errors import ConvoyError, DeviceLostError, InferenceError, UnavailableError
from app.families import Number
from app.metrics import ModelMetrics
from app.pages import LONG_AGO
from app.sessions import Session
from app.tensors import Array

log = logging.getLogger(__name__)

DEFAULT_URGENCY = 3
"""Of 0 (first) to 7 (last), as in the header `Priority: u=3` of RFC 9218."""
LAST_URGENCY = 7
CLOSE_TIMEOUT_S = 10.0
WORTH_SHARING_S = 0.002
"""Less work than this is not divided among sessions: waking one up and taking turns at Python costs more."""

Clock = Callable[[], float]


class Answer(Protocol):
    """Who waits for a job's rows: a future, or whoever does without a task. Used on the event loop."""

    def done(self) -> bool:
        """Tell whether nothing is waited for any more."""
        ...

    def set_result(self, outputs: tuple[Array, ...], /) -> None:
        """Take one array per output of the graph, each `[rows, …]`."""
        ...

    def set_exception(self, error: ConvoyError, /) -> None:
        """Take the error."""
        ...


class RunMarks(Protocol):
    """What a batch notes in which a sampled request has rows."""

    def end(
        self,
        started: float,
        seconds: float,
        *,
        rows: int,
        requests: int,
        model: str,
        version: str,
        provider: str,
        session: int,
    ) -> None:
        """Note that it has run; on the session's thread."""
        ...


class JobMarks(Protocol):
    """What a job notes on its way."""

    def take(self, batch: Any, taken_at: float, rows: int) -> RunMarks | None:
        """Note that a session has taken some rows, and return the marks of their batch; under the line's lock."""
        ...


class Job:
    """One request's rows on their way through the sessions.

    Attributes:
        inputs: one array per input of the graph, each `[rows, …]`.
        rows: how many there are; 1 for a request that runs whole, whatever its arrays' shapes.
        deadline: clock time after which nobody wants the answer, seconds.
        urgency: 0 (first) to 7 (last); the more urgent are taken first, whatever waits longer.
        kind: jobs of equal kinds may share a batch.
        answer: gets one array per output of the graph, each `[rows, …]`, or the job's error.
        taken: rows that a session has taken so far.
        returned: rows whose batch has come back.
        marks: what a sampled request notes for its spans; None: it is not sampled.
        parts: what came back of a job that was split, by first row.
        queued_s, infer_s: waiting time up to the first run, and longest run, seconds.
    """

    __slots__ = (
        "answer",
        "deadline",
        "infer_s",
        "inputs",
        "kind",
        "marks",
        "parts",
        "queued_at",
        "queued_s",
        "returned",
        "rows",
        "taken",
        "urgency",
    )

    def __init__(
        self,
        inputs: tuple[Array, ...],
        rows: int,
        deadline: float,
        answer: Answer,
        urgency: int = DEFAULT_URGENCY,
        kind: Hashable = None,
        marks: JobMarks | None = None,
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.deadline = deadline
        self.urgency = urgency
        self.kind = kind
        self.answer = answer
        self.marks = marks
        self.parts: dict[int, tuple[Array, ...]] | None = None
        self.taken = 0
        self.returned = 0
        self.queued_at = 0.0
        self.queued_s = 0.0
        self.infer_s = 0.0

    @property
    def waiting_rows(self) -> int:
        """Rows that no session has taken yet."""
        return self.rows - self.taken


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
    """The jobs that wait: the urgent ones first, first come first served among equals.

    The only thing that both sides touch.
    """

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


class Room(Protocol):
    """Memory for the pixels of one request, where whatever runs them reads them."""

    pixels: NDArray[np.uint8]
    """To be written before they are submitted, and not to be read after: scores may take their place."""

    def let_go(self) -> None:
        """Give it back unsubmitted; nobody may write into it any more."""
        ...


class OwnRoom:
    """Memory of this process."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.pixels = np.empty(shape, np.uint8)

    def let_go(self) -> None:
        """See `Room.let_go`: nothing has to be done."""


class Runs(Protocol):
    """What runs the rows of one model: sessions of this process, or of others."""

    parallel: int
    """How many batches run at the same time."""

    def room(self, shape: tuple[int, ...]) -> Room:
        """Return room for pixels, uint8 of that shape; call on the event loop. Submit it, or let it go.

        Raises:
            QueueFullError: there is none.
            UnavailableError: nobody is there to run them.
        """
        ...

    def submit(
        self,
        inputs: tuple[Array, ...],
        rows: int,
        deadline: float,
        urgency: int = DEFAULT_URGENCY,
        kind: Hashable = None,
        answer: Answer | None = None,
        marks: JobMarks | None = None,
        room: Room | None = None,
    ) -> Job:
        """Put rows in line, to be batched with whatever else of their kind waits. Call on the event loop.

        Args:
            inputs: one array per input of the graph, each `[rows, …]`.
            rows: how many; more than `max_batch` run as several batches.
            deadline: clock time after which the rows are not run any more, seconds.
            urgency: 0 (first) to 7 (last).
            kind: equal for rows that one run can take together; a request that must run alone, in shapes of its own,
                is one row of a kind that no other has.
            answer: who waits; None: a future, for a task to await.
            marks: of a sampled request.
            room: where the rows lie, if they do not lie just anywhere.

        Returns:
            The job; await its `answer` (one array per output, or InferenceError), and abandon it if you give up.

        Raises:
            UnavailableError: it is closed; the room is still the caller's.
        """
        ...

    def abandon(self, job: Job) -> None:
        """Forget the rows of a job that no session has taken yet; harmless when it is done."""
        ...

    @property
    def is_up(self) -> bool:
        """Whether there is somebody to run rows now."""
        ...

    @property
    def running_since(self) -> float:
        """When the longest run that a session of this process is in began, clock time; 0: none runs.

        Long ago where the device is lost: nothing will come of it any more.
        """
        ...

    def show(self) -> int:
        """Show how long the first that waits has waited, and return how many sessions this process has."""
        ...

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Finish what waits and stop; blocks, at most `timeout_s`."""
        ...


class Batcher:
    """The sessions of one model, each with its thread, fed from one line."""

    def __init__(
        self,
        sessions: Sequence[Session],
        *,
        max_batch: int,
        linger_s: float,
        loop: asyncio.AbstractEventLoop,
        metrics: ModelMetrics,
        clock: Clock = time.monotonic,
        prepare: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Start a thread for each session; returns when all of them are prepared.

        Args:
            sessions: of one graph.
            max_batch: rows of a run at most.
            linger_s: how long a batch waits to fill, seconds.
            loop: the event loop that submits.
            metrics: the model's.
            clock: that deadlines are on.
            prepare: gets each session's number, on the thread that will run it: what a GPU records in one thread is
                nothing to another.

        Raises:
            Exception: whatever `prepare` raises; no thread is left then.
        """
        self.parallel = len(sessions)
        """How many batches run at the same time."""
        self._line = Line(max_batch, linger_s, len(sessions), clock, metrics.queue_rows)
        self._arrived: list[Job] = []
        self._running_since = [0.0] * len(sessions)
        self._loop = loop
        self._metrics = metrics
        self._clock = clock
        prepared = [Future[None]() for _ in sessions]
        self._threads = [
            threading.Thread(
                target=self._begin,
                args=(session, number, prepare, prepared[number]),
                name=f"{metrics.model}-session-{number}",
                daemon=True,
            )
            for number, session in enumerate(sessions)
        ]
        for thread in self._threads:
            thread.start()
        try:
            for future in prepared:
                future.result()
        except BaseException:
            self._line.close()
            for thread in self._threads:
                thread.join()
            raise

    def room(self, shape: tuple[int, ...]) -> Room:
        """See `Runs.room`."""
        return OwnRoom(shape)

    def submit(
        self,
        inputs: tuple[Array, ...],
        rows: int,
        deadline: float,
        urgency: int = DEFAULT_URGENCY,
        kind: Hashable = None,
        answer: Answer | None = None,
        marks: JobMarks | None = None,
        room: Room | None = None,
    ) -> Job:
        """See `Runs.submit`."""
        if self._line.closed:
            raise UnavailableError("The model is being unloaded; try again.")
        answer = self._loop.create_future() if answer is None else answer
        job = Job(inputs, rows, deadline, answer, urgency, kind, marks)
        if not self._arrived:
            # One lock and one wake-up for all that arrive in this turn of the loop, and they share a batch.
            self._loop.call_soon(self._enter_line)
        self._arrived.append(job)
        return job

    def _enter_line(self) -> None:
        arrived = [job for job in self._arrived if not job.answer.done()]
        self._arrived = []
        try:
            self._line.extend(arrived)
        except UnavailableError as error:  # closed since they were submitted
            for job in arrived:
                job.answer.set_exception(error)

    def abandon(self, job: Job) -> None:
        """See `Runs.abandon`."""
        self._line.remove(job)

    @property
    def is_up(self) -> bool:
        """See `Runs.is_up`."""
        return True

    @property
    def running_since(self) -> float:
        """See `Runs.running_since`."""
        return min(filter(None, self._running_since), default=0.0)

    def show(self) -> int:
        """See `Runs.show`."""
        self._metrics.sessions.set(self.parallel)
        self._metrics.queue_age.set(self._line.oldest())
        return self.parallel

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Finish what waits and stop the threads; blocks until they have ended, at most `timeout_s`.

        A run cannot be interrupted: a thread that is stuck in one is left behind, and ends with the process.
        """
        self._line.close()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("session is stuck", extra={"session": thread.name})
        self._metrics.sessions.set(0)
        self._metrics.queue_age.set(0)

    def _begin(self, session: Session, number: int, prepare: Callable[[int], None], prepared: "Future[None]") -> None:
        step_back()
        try:
            prepare(number)
        except BaseException as error:
            prepared.set_exception(error)
            return
        prepared.set_result(None)
        self._serve_loop(session, number)

    def _serve_loop(self, session: Session, number: int) -> None:
        busy = self._metrics.busy(session.provider, number)
        copying = self._metrics.copying(session.provider, number)
        session.copied_s()  # of runs before there were requests
        while (batch := self._line.take()) is not None:
            started = self._clock()
            self._running_since[number] = self._running_since[number] or started
            _run(session, batch)
            lost = isinstance(batch.slices[0].error, DeviceLostError)
            self._running_since[number] = LONG_AGO if lost else 0.0
            batch.padding, batch.copied_s = session.padding(batch.rows), session.copied_s()
            batch.infer_s = self._clock() - started
            self._line.row_s = batch.infer_s / batch.rows
            if batch.marks is not None:
                self._end_marks(batch.marks, batch, started, session, number)
            try:
                self._loop.call_soon_threadsafe(self._deliver, batch, busy, copying)
            except RuntimeError:  # the loop is closed: nobody waits for an answer any more
                return
            # A thread that waits must not hold the last requests, and with them a model that has been replaced.
            del batch

    def _end_marks(self, marks: RunMarks, batch: Batch, started: float, session: Session, number: int) -> None:
        marks.end(
            started,
            batch.infer_s,
            rows=batch.rows,
            requests=len(batch.slices),
            model=self._metrics.model,
            version=self._metrics.version,
            provider=session.provider,
            session=number,
        )

    def _deliver(self, batch: Batch, busy: Number, copying: Number) -> None:
        """Count a batch and give every job of it its rows; runs on the event loop, which alone may count."""
        busy.inc(batch.infer_s)
        copying.inc(batch.copied_s)
        self._metrics.ran(batch.rows, batch.infer_s, batch.padding)
        for part in batch.slices:
            job = part.job
            if job.returned == 0:
                job.queued_s = batch.taken_at - job.queued_at
            job.returned += part.rows
            job.infer_s = max(job.infer_s, batch.infer_s)
            if not job.answer.done():  # done: cancelled, or another slice of it failed
                _settle(job, part)


def _settle(job: Job, part: Slice) -> None:
    if part.error is not None:
        job.answer.set_exception(part.error)
        return
    assert part.outputs is not None, "a slice that ran has outputs or an error"
    if part.rows == job.rows:
        job.answer.set_result(part.outputs)
        return
    if job.parts is None:
        job.parts = {}
    job.parts[part.start] = part.outputs
    if job.returned == job.rows:
        in_order = [job.parts[start] for start in sorted(job.parts)]
        try:
            job.answer.set_result(tuple([np.concatenate(arrays) for arrays in zip(*in_order, strict=True)]))
        except ValueError as error:
            job.answer.set_exception(
                InferenceError(f"The batches that this request was split into gave different shapes: {error}.")
            )


def _run(session: Session, batch: Batch) -> None:
    """Run a batch; where it fails, run its jobs one by one, so that only the guilty one fails."""
    parts = batch.slices
    try:
        if len(parts) == 1:
            parts[0].outputs = session.run(*parts[0].inputs)
            return
        outputs = session.run(*session.join([part.inputs for part in parts]))
        if any(len(array) != batch.rows for array in outputs):
            raise ValueError(f"for {batch.rows} rows it gave {[len(array) for array in outputs]}")
    except DeviceLostError as error:
        for part in parts:
            part.error = error
        return
    except Exception as error:  # whatever a session raises becomes the job's answer, never the thread's end
        if len(parts) == 1:
            parts[0].error = InferenceError(f"The model failed on this request: {error}")
            return
        for part in parts:
            _run(session, Batch(batch.taken_at, [part], part.rows))
        return
    row = 0
    for part in parts:
        part.outputs = tuple([array[row : row + part.rows] for array in outputs])
        row += part.rows
