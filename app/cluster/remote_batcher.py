"""The sessions of one model, in engines: what `batcher.py` is inside one process.

Rows go to the engine that has the least to do. Which engines have the model open, and that all of them have opened the
same, is kept here. Knows nothing of HTTP, images or the wire.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.cluster.link import PIXELS, Link, SlabRoom
from app.cluster.slab import packed_bytes, packed_bytes_of
from app.errors import UnavailableError
from app.metrics import ModelMetrics
from app.runs import CLOSE_TIMEOUT_S, DEFAULT_URGENCY, Answer, Job, JobMarks, Room
from app.tensors import VARIABLE, Array, TensorSpec

log = logging.getLogger(__name__)

SAME_EVERYWHERE = ("digest", "provider", "inputs", "outputs", "max_batch", "unbatched_why")
"""What every engine must find of a model."""
LARGEST_SCORES = 64 << 20
"""Bytes that a room has for scores beyond its rows, at most."""
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 30.0
"""Between attempts of an engine to open what it could not."""


class RemoteBatcher:
    """The sessions of one model, in engines; what `Batcher` is inside one process."""

    provider = ""

    def __init__(
        self,
        links: Sequence[Link],
        token: int,
        name: str,
        version: str,
        directory: Path,
        loop: asyncio.AbstractEventLoop,
        metrics: ModelMetrics,
    ) -> None:
        self._links = links
        self.token = token
        self.parallel = 1
        """How many batches run at the same time, in all engines."""
        self.metrics = metrics
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self._asked = name, version, directory
        self._loop = loop
        self._ready: dict[Link, int] = {}
        """The engines that have it open, and how many sessions each has."""
        self._known: dict[str, Any] | None = None
        """What it was described by; None: it is being opened for the first time."""
        self._found: dict[Link, dict[str, Any]] = {}
        """The engines that have opened it before it was described, and what they found."""
        self._pauses: dict[Link, float] = {}
        """Seconds until engines that could not open it are asked again."""
        self._known_score_bytes: dict[int, int] = {}
        self._waiting = 0
        self._closed = self._left = False
        self._idle = threading.Event()
        self._idle.set()
        self._on_end: Callable[[], None] = lambda: None

    def describe(self, said: dict[str, Any]) -> None:
        """Take what an engine has found out; one that finds other things later is not asked to run anything."""
        self._known = {key: said[key] for key in SAME_EVERYWHERE}
        for link, other in self._found.items():
            self._take_in(link, other)
        self._found.clear()
        self.provider = said["provider"]
        self.inputs, self.outputs = (
            tuple(TensorSpec(name, datatype, tuple(shape)) for name, datatype, shape in said[which])
            for which in ("inputs", "outputs")
        )

    def on_end(self, told: Callable[[], None]) -> None:
        """Have `told` called on the loop when this is closed."""
        self._on_end = told

    def join(self, link: Link, told: Callable[[Any], None] = lambda _: None) -> None:
        """Have one more engine open it."""

        def opened(said: Any) -> None:
            if said is not None and "fault" in said:
                log.error("an engine cannot open a model", extra={"model": self._asked[0], **said})
                self._ask_again(link)
            elif said is not None and self._left:
                link.close_model(self.token)
            elif said is not None and self._known is None:
                self._found[link] = said
            elif said is not None:
                self._take_in(link, said)
            told(said)

        link.open(self.token, *self._asked, opened)

    def _ask_again(self, link: Link) -> None:
        """Have an engine open it once more, later: what is wrong may pass."""
        pause = self._pauses[link] = min(2 * self._pauses.get(link, FIRST_PAUSE_S / 2), LAST_PAUSE_S)
        self._loop.call_later(pause, self._again, link)

    def _again(self, link: Link) -> None:
        if link in self._links and not self._left:
            self.join(link)

    def _take_in(self, link: Link, said: dict[str, Any]) -> None:
        """Have an engine run rows from now on, if it has opened the same."""
        others = [key for key in SAME_EVERYWHERE if self._known is not None and said[key] != self._known[key]]
        if others:
            log.error(
                "an engine has opened something else than what is served: it is asked again, and runs nothing of it",
                extra={
                    "model": self._asked[0],
                    "version": self._asked[1],
                    "engine": link.number,
                    "differs": {key: [self._known[key], said[key]] for key in others if self._known is not None},
                },
            )
            link.close_model(self.token)
            self._ask_again(link)
            return
        self._pauses.pop(link, None)
        self._ready[link] = said["parallel"]
        self.parallel = sum(self._ready.values())

    def part(self, link: Link) -> None:
        """Do without an engine."""
        for those in (self._ready, self._found, self._pauses):
            those.pop(link, None)
        self.parallel = sum(self._ready.values()) or self.parallel

    def leave(self) -> None:
        """Have every engine close it; on the loop."""
        self._left = True
        for link in [*self._ready, *self._found]:
            link.close_model(self.token)
        self._ready.clear()
        self._found.clear()

    def room(self, shape: tuple[int, ...]) -> SlabRoom:
        """See `Runs.room`: in the slab of the engine that has the least to do."""
        size = max(packed_bytes_of([(shape, PIXELS)]), self._score_bytes(shape[0]))
        return self._least_loaded().room(shape, size)

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
        """See `Runs.submit`.

        Raises:
            QueueFullError: there is no room for the rows on their way.
            UnavailableError: it is closed, there is no engine at the moment, or the one that has the room has died.
        """
        if self._closed:
            raise UnavailableError("The model is being unloaded; try again.")
        own = room if isinstance(room, SlabRoom) else None
        link = own.link if own is not None else self._least_loaded()
        if link not in self._ready:
            raise UnavailableError("The engine that was to run this request has died; try again.", code="engine_lost")
        job = Job(inputs, rows, deadline, answer or self._loop.create_future(), urgency, kind, marks)
        link.submit(self.token, self, job, max(packed_bytes(inputs), self._score_bytes(rows)), own)
        self._waiting += 1
        self._idle.clear()
        return job

    def abandon(self, job: Job) -> None:
        """See `Runs.abandon`."""
        for link in self._links:
            link.give_up(job)

    def ended(self) -> None:
        """Count that a request has ended, however."""
        self._waiting -= 1
        if not self._waiting:
            self._idle.set()

    @property
    def is_up(self) -> bool:
        """See `Runs.is_up`."""
        return any(not link.is_silent for link in self._ready)

    @property
    def running_since(self) -> float:
        """Always 0: the engine shows in its own page how long its sessions run."""
        return 0.0

    def show(self) -> int:
        """See `Runs.show`: no session runs here, and engines show their lines, but for one that stands still."""
        self.metrics.queue_age.set(min(filter(None, (link.oldest(self) for link in self._links)), default=0.0))
        return 0

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """See `Runs.close`."""
        self._closed = True
        if not self._idle.wait(timeout_s):
            log.warning("requests are stuck", extra={"model": self._asked[0], "requests": self._waiting})
        self.metrics.queue_age.set(0)
        with suppress(RuntimeError):  # the loop is closed, and with it every connection
            self._loop.call_soon_threadsafe(self._on_end)

    def _least_loaded(self) -> Link:
        if not self._ready:
            raise UnavailableError("There is no engine at the moment; try again.", code="engine_lost")
        if len(self._ready) == 1:
            return next(iter(self._ready))
        return min(self._ready, key=lambda link: (link.is_silent, link.rows))

    def _score_bytes(self, rows: int) -> int:
        """Return how many bytes the scores of so many rows take; what is variable beyond the rows counts as one."""
        known = self._known_score_bytes.get(rows)
        if known is None:
            shapes = []
            for spec in self.outputs:
                own = [1 if size == VARIABLE else size for size in spec.shape[1:]]
                shapes.append(((rows, *own), spec.dtype))
            # Larger ones come in memory of their own.
            known = self._known_score_bytes[rows] = min(packed_bytes_of(shapes), LARGEST_SCORES)
        return known
