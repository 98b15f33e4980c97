"""The batcher: the sessions of a model, each with its thread, fed from one line.

Jobs wait in one line; each session has a thread that takes what waits when the session is free (pull, never poll),
runs it, and hands all answers to the event loop in one crossing. Owns threads; the line is in `line.py`. Knows
nothing of HTTP, images or files.

    event loop                         session threads (one per session)
    ----------                         ---------------------------------
    submit(job) ──> [ job job job ] ──> take() ── slices of up to max_batch rows
    abandon(job) ──x                    session.run()
    _deliver(batch) <── call_soon_threadsafe ──┘

A job belongs to the event loop, except `taken`, which the line's lock guards.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future

import numpy as np

from app.cpus import step_back
from app.errors import DeviceLostError, InferenceError, UnavailableError
from app.families import Number
from app.line import Batch, Clock, Line, Slice
from app.metrics import ModelMetrics
from app.pages import LONG_AGO
from app.runs import CLOSE_TIMEOUT_S, DEFAULT_URGENCY, Answer, Job, JobMarks, OwnRoom, Room, RunMarks
from app.sessions import Session
from app.tensors import Array

log = logging.getLogger(__name__)


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
