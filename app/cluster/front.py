"""A front's side of its engines: which there are, what they have opened, and what is on its way to them.

`RemoteBatcher` runs rows as the batcher does, but in an engine: it writes them into the slab of the engine that has the
least to do, and what has failed there, or died with it, is told to whoever waits. An engine that is replaced is given
the same models again. Knows nothing of HTTP, images or sessions.
"""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from app.batcher import CLOSE_TIMEOUT_S, DEFAULT_URGENCY, Answer, Job, JobMarks, Room, RunMarks
from app.cluster.slab import Slab, SlabFullError, create_slab, packed_bytes, packed_bytes_of
from app.cluster.wire import (
    NUMBER,
    REPLY,
    REQUEST,
    SHARE,
    Kind,
    Packets,
    Reply,
    Request,
    Share,
    Status,
    heard,
    recorded,
    records_of,
    spoken,
)
from app.drift import Sampler
from app.errors import BundleError, InferenceError, QueueFullError, SettingsError, UnavailableError
from app.loading import LoadedModel, manifest_of
from app.manifest import Manifest
from app.metrics import Metrics, ModelMetrics
from app.pages import SILENT_S, Page
from app.progress import Progress
from app.tensors import VARIABLE, Array, TensorSpec

log = logging.getLogger(__name__)

_PIXELS = np.dtype(np.uint8)
_SAME_EVERYWHERE = ("digest", "provider", "inputs", "outputs", "max_batch", "unbatched_why")
LARGEST_SCORES = 64 << 20
"""Bytes that a room has for scores beyond its rows, at most."""
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 30.0
"""Between attempts of an engine to open what it could not."""
KNOWN_BATCHES = 256
"""Batches that are remembered, so that requests which shared one are linked to the same span."""


class _Pending:
    """A request that an engine has."""

    __slots__ = ("batcher", "given_up", "job", "large", "room")

    def __init__(self, batcher: "RemoteBatcher", job: Job, room: int) -> None:
        self.batcher, self.job, self.room = batcher, job, room
        self.given_up = False
        self.large: tuple[Array, ...] | None = None


def _unpacked(descriptors: list[int], size: int) -> tuple[Array, ...]:
    """Return what lies in memory that an engine has made for it; nothing if it cannot be had."""
    try:
        extra = Slab(descriptors[0], size)
        arrays = extra.unpack(0, size)
        extra.close()
    except (OSError, ValueError, IndexError):
        log.exception("large scores could not be read")
        return ()
    return arrays


class SlabRoom:
    """A room in the slab of one engine, into which pixels are decoded before they are sent."""

    __slots__ = ("link", "offset", "pixels", "rows")

    def __init__(self, link: "Link", offset: int, pixels: Array) -> None:
        self.link, self.offset = link, offset
        self.pixels = cast("NDArray[np.uint8]", pixels)
        self.rows = len(pixels)

    def let_go(self) -> None:
        """See `Room.let_go`."""
        self.link.let_go(self)


class Link:
    """The connection with one engine, and its slab.

    A slab belongs to one connection: an engine that lives on after it writes where nobody reads.
    """

    def __init__(self, links: "Links", number: int, connection: socket.socket) -> None:
        self.number = number
        self.rows = 0
        """Rows that the engine has, and has not answered."""
        self._links = links
        self._page = links.page_of(number)
        self._loop = asyncio.get_running_loop()
        self._numbers = count(1)
        self._pending: dict[int, _Pending] = {}
        self._number_of: dict[Job, int] = {}
        self._requests: list[Request] = []
        self._given_up: list[tuple[int]] = []
        self._flushing = False
        self._opening: dict[int, list[Callable[[Any], None]]] = {}
        self._batches: dict[int, RunMarks] = {}
        descriptor, self.slab = create_slab()
        self._packets = Packets(connection, self._take, self._lost)
        self._packets.send(spoken(Kind.HELLO, 0, len(self.slab.memory)), descriptor)

    @property
    def pending(self) -> int:
        """How many requests the engine has."""
        return len(self._pending)

    @property
    def is_silent(self) -> bool:
        """Whether the engine's event loop stands still; it may go on, or be replaced."""
        return self._page is not None and self._page.silent_s > SILENT_S

    def open(self, token: int, name: str, version: str, directory: Path, told: Callable[[Any], None]) -> None:
        """Have the engine open a version; `told` gets what it says, or None when it is gone."""
        asked = self._opening.setdefault(token, [])
        asked.append(told)
        if len(asked) == 1:  # else it does so already: an engine may come while a model is asked for again
            self._packets.send(spoken(Kind.OPEN, token, [name, version, str(directory)]))

    def close_model(self, token: int) -> None:
        """Have the engine close a version."""
        self._packets.send(spoken(Kind.CLOSE, token, None))

    def room(self, shape: tuple[int, ...], size: int) -> SlabRoom:
        """Give out a room for pixels, whose rows count from now on as the engine's.

        Args:
            shape: of the pixels.
            size: bytes of the room, for them and then for their scores.

        Raises:
            QueueFullError: the slab has no such room.
        """
        room = SlabRoom(self, offset := self._taken(size), self.slab.lay_out(offset, shape, _PIXELS))
        self.rows += room.rows
        return room

    def let_go(self, room: SlabRoom) -> None:
        """Take a room back that was not sent."""
        if self._packets.is_open:
            self.slab.let_go(room.offset)
            self.rows -= room.rows

    def submit(self, token: int, batcher: "RemoteBatcher", job: Job, size: int, room: SlabRoom | None) -> None:
        """Send a job's rows, with all others of this turn of the loop.

        Args:
            token: the model's.
            batcher: whose job it is.
            job: it.
            size: bytes of the room that it needs, for its rows and then for its scores.
            room: where the rows lie; None: not in the slab, into which they are written first.

        Raises:
            QueueFullError: the slab has no such room.
        """
        if room is None:
            offset = self._taken(size)
            self.slab.pack(offset, job.inputs)
            self.rows += job.rows
        else:
            offset = room.offset
        job.queued_at = time.monotonic()
        number = next(self._numbers) & 0xFFFFFFFF
        self._pending[number] = _Pending(batcher, job, offset)
        self._number_of[job] = number
        self._requests.append(
            Request(
                number,
                token,
                offset,
                self.slab.room_of(offset),
                job.rows,
                job.urgency,
                job.marks is not None,
                job.deadline,
            )
        )
        self._flush_soon()

    def _taken(self, size: int) -> int:
        # What nobody waits for any more still has its room, while the engine does not answer.
        try:
            if self.rows <= self._links.most_rows:
                return self.slab.take(size)
        except SlabFullError:
            pass
        raise QueueFullError("The service is full: there is no room for this request on its way.")

    def give_up(self, job: Job) -> None:
        """Tell the engine that nobody waits; the room stays taken until it says that it needs it no more."""
        number = self._number_of.get(job)
        if number is None:
            return
        pending = self._pending[number]
        pending.given_up = True
        if self.slab.is_taken(pending.room):
            job.taken = job.rows
        self._given_up.append((number,))
        self._flush_soon()

    def oldest(self, batcher: "RemoteBatcher") -> float:
        """Return when the first of a model's requests that wait for a session came, `time.monotonic()`; 0: none."""
        for pending in self._pending.values():
            if pending.batcher is batcher and not (pending.given_up or self.slab.is_taken(pending.room)):
                return pending.job.queued_at
        return 0.0

    def hang_up(self) -> None:
        """End the connection."""
        self._packets.close()
        self._lost()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        requests, self._requests = self._requests, []
        given_up, self._given_up = self._given_up, []
        for packet in recorded(Kind.JOBS, REQUEST, requests):
            self._packets.send(packet)
        for packet in recorded(Kind.GIVE_UP, NUMBER, given_up):
            self._packets.send(packet)

    def _take(self, kind: Kind, packet: bytes, descriptors: list[int]) -> None:
        match kind:
            case Kind.ANSWERS:
                for record in records_of(REPLY, packet):
                    self._answer(Reply(*record))
            case Kind.BATCHES:
                self._note([Share(*record) for record in records_of(SHARE, packet)])
            case Kind.OPENED:
                token, said = heard(packet)
                for told in self._opening.pop(token, []):
                    told(said)
            case Kind.LARGE:
                number, size = heard(packet)
                self._pending[number].large = _unpacked(descriptors, size)
            case _:
                log.error("an engine speaks out of turn", extra={"engine": self.number, "kind": kind.name})
        for descriptor in descriptors:
            os.close(descriptor)

    def _answer(self, reply: Reply) -> None:
        pending = self._pending.pop(reply.number)
        job = pending.job
        del self._number_of[job]
        self.rows -= job.rows
        job.taken = job.returned = job.rows
        job.queued_s, job.infer_s = reply.queued_s, reply.infer_s
        try:
            if not job.answer.done():
                self._tell(pending, Status(reply.status))
        except Exception as error:  # others are waiting in the same packet
            log.exception("an answer could not be told", extra={"engine": self.number})
            if not job.answer.done():
                job.answer.set_exception(InferenceError(f"The engine's answer could not be read: {error}."))
        finally:
            self.slab.let_go(pending.room)
            pending.batcher.ended()

    def _tell(self, pending: _Pending, status: Status) -> None:
        job = pending.job
        if status is Status.DROPPED:  # for its deadline, of which whoever waits has a timer of its own
            return
        outputs = pending.large
        if outputs is None:
            lying = self.slab.unpack(pending.room, self.slab.room_of(pending.room))
            outputs = tuple([array.copy() for array in lying])
        if not outputs:
            raise ValueError("large scores did not arrive")
        if status is Status.DONE:
            job.answer.set_result(outputs)
            return
        reason = str(outputs[0][0])
        job.answer.set_exception(InferenceError(reason) if status is Status.FAILED else UnavailableError(reason))

    def _note(self, shares: Sequence[Share]) -> None:
        """Tell sampled requests of the batches that they had rows in."""
        new: dict[int, tuple[RunMarks, Share, RemoteBatcher]] = {}
        for share in shares:
            pending = self._pending.get(share.number)
            if pending is None or pending.job.marks is None:
                continue
            known = self._batches.get(share.batch)
            batch = pending.job.marks.take(known, share.taken_at, share.rows)
            if known is None and batch is not None:
                self._batches[share.batch] = batch
                new[share.batch] = batch, share, pending.batcher
        for batch, share, batcher in new.values():
            batch.end(
                share.started,
                share.infer_s,
                rows=share.batch_rows,
                requests=share.batch_requests,
                model=batcher.metrics.model,
                version=batcher.metrics.version,
                provider=batcher.provider,
                session=share.session,
            )
        while len(self._batches) > KNOWN_BATCHES:
            del self._batches[next(iter(self._batches))]

    def _lost(self) -> None:
        """The engine has ended, or died: whoever waits for it is told so."""
        self._links.lose(self)
        pending, self._pending = self._pending, {}
        self._number_of.clear()
        opening, self._opening = self._opening, {}
        for asked in opening.values():
            for told in asked:
                told(None)
        for request in pending.values():
            request.batcher.ended()
            if not request.job.answer.done():
                request.job.answer.set_exception(
                    UnavailableError("The engine that had this request has died; try again.", code="engine_lost")
                )
        self.slab.close()


class Links:
    """The engines that there are now, and what they are to have opened."""

    def __init__(self, metrics: Metrics, *, renames: bool = False, most_rows: int = sys.maxsize) -> None:
        """Begin without any; see `meet`.

        Args:
            metrics: where models count, and the engines' pages.
            renames: a model is called what it is asked for by, whatever name its manifest has.
            most_rows: an engine that has more of them, given up or not, gets none.
        """
        self.most_rows = most_rows
        self._metrics = metrics
        self.progress = Progress()
        """Of this process's part in opening a version; the engines show theirs."""
        self._renames = renames
        self._links: list[Link] = []
        self._batchers: set[RemoteBatcher] = set()
        self._tokens = count(1)
        self._met = threading.Event()
        self._stopping = False

    @property
    def count(self) -> int:
        """How many engines there are."""
        return len(self._links)

    def page_of(self, number: int) -> Page | None:
        """Return an engine's page, by its number; None: it has none."""
        return next((page for page in self._metrics.engines if page.number == number), None)

    def meet(self, number: int, connection: socket.socket) -> None:
        """Have one more engine, which is given every model that the others have."""
        link = Link(self, number, connection)
        self._links.append(link)
        self._met.set()
        for batcher in self._batchers:
            batcher.join(link)

    def lose(self, link: Link) -> None:
        """Have one engine less."""
        if link not in self._links:
            return
        self._links.remove(link)
        if not self._stopping:
            log.error("engine lost", extra={"engine": link.number, "requests": link.pending})
        for batcher in self._batchers:
            batcher.part(link)

    def close(self) -> None:
        """End every connection; on the loop."""
        self._stopping = True
        for link in list(self._links):
            link.hang_up()

    def load(
        self, name: str, version: str, directory: Path, loop: asyncio.AbstractEventLoop
    ) -> tuple[LoadedModel, float | None]:
        """Have every engine open a version, and return it as `Loader.load` does; blocks, on a thread.

        Raises:
            BundleError: it is incomplete, altered, or does not reproduce its golden answers.
            SettingsError: a setting makes every model impossible (a device that is not there).
        """
        manifest = manifest_of(name, version, directory, self._renames)
        metrics = self._metrics.for_model(name, version)
        batcher = RemoteBatcher(self._links, next(self._tokens), name, version, directory, loop, metrics)
        with self.progress.step(f"{name} {version}: waiting for the engines"):
            while (said := self._opened(batcher, loop)) is None:
                pass
        if "fault" in said:
            loop.call_soon_threadsafe(self._forget, batcher)
            raise {"settings": SettingsError}.get(said["fault"], BundleError)(said["reason"])
        if manifest is not None and manifest.model.sha256 != said["digest"]:
            loop.call_soon_threadsafe(self._forget, batcher)
            raise BundleError(f"{directory} was changed while it was opened: have it looked at again.")
        batcher.on_end(lambda: self._forget(batcher))
        classifier = manifest if isinstance(manifest, Manifest) else None
        model = LoadedModel(
            name,
            version,
            said["digest"],
            said["provider"],
            batcher.inputs,
            batcher.outputs,
            said["max_batch"],
            said["unbatched_why"],
            classifier,
            None if isinstance(manifest, Manifest) else manifest,
            batcher,
            metrics,
            Sampler(classifier, self._metrics) if classifier is not None else None,
        )
        return model, said["difference"]

    def _opened(self, batcher: "RemoteBatcher", loop: asyncio.AbstractEventLoop) -> Any:
        """Return what the engines say of a model: a fault if one of them has found any; None: they all went away."""
        self._met.wait()
        said: Future[Any] = Future()
        loop.call_soon_threadsafe(self._ask, batcher, said)
        return said.result()

    def _ask(self, batcher: "RemoteBatcher", said: "Future[Any]") -> None:
        if not self._links:
            self._met.clear()
            said.set_result(None)
            return
        self._batchers.add(batcher)
        waiting, answers = set(self._links), list[Any]()

        def told(link: Link, answer: Any) -> None:
            waiting.discard(link)
            if answer is not None:
                answers.append(answer)
            if not waiting and not said.done():
                faults = [answer for answer in answers if "fault" in answer]
                found = next(iter(faults or answers), None)
                if found is not None and not faults:
                    batcher.describe(found)
                said.set_result(found)

        for link in list(self._links):
            batcher.join(link, lambda answer, link=link: told(link, answer))  # type: ignore[misc]

    def _forget(self, batcher: "RemoteBatcher") -> None:
        self._batchers.discard(batcher)
        batcher.leave()


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
        self._known = {key: said[key] for key in _SAME_EVERYWHERE}
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
                if self._known is not None:  # it could be opened once: what is wrong may pass
                    pause = self._pauses[link] = min(2 * self._pauses.get(link, FIRST_PAUSE_S / 2), LAST_PAUSE_S)
                    self._loop.call_later(pause, self._again, link)
            elif said is not None and self._left:
                link.close_model(self.token)
            elif said is not None and self._known is None:
                self._found[link] = said
            elif said is not None:
                self._take_in(link, said)
            told(said)

        link.open(self.token, *self._asked, opened)

    def _again(self, link: Link) -> None:
        if link in self._links and not self._left:
            self.join(link)

    def _take_in(self, link: Link, said: dict[str, Any]) -> None:
        """Have an engine run rows from now on, if it has opened the same."""
        if {key: said[key] for key in _SAME_EVERYWHERE} != self._known:
            log.error(
                "an engine has opened other files than those that are served: have them looked at again",
                extra={"model": self._asked[0], "version": self._asked[1], "engine": link.number},
            )
            link.close_model(self.token)
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
        size = max(packed_bytes_of([(shape, _PIXELS)]), self._score_bytes(shape[0]))
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
