"""How a model runs rows, whoever does it: what is submitted (`Job`), and what takes it (`Runs`).

The seam between the way through the stages and what computes: sessions of this process (`batcher.py`), or engines
(`cluster/`). Knows nothing of HTTP, images or files.
"""

from collections.abc import Hashable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from app.errors import ConvoyError
from app.tensors import Array

DEFAULT_URGENCY = 3
"""Of 0 (first) to 7 (last), as in the header `Priority: u=3` of RFC 9218."""
LAST_URGENCY = 7
CLOSE_TIMEOUT_S = 10.0


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
