"""One engine, as a front has it: the connection, the slab that rows and scores lie in, and what is on its way.

What has failed in the engine, or died with it, is told to whoever waits. Knows nothing of HTTP, images or sessions, nor
which engine is chosen.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from app.cluster.slab import Slab, SlabFullError, create_slab
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
from app.errors import InferenceError, QueueFullError, UnavailableError
from app.metrics import ModelMetrics
from app.pages import SILENT_S, Page
from app.runs import Job, RunMarks
from app.tensors import Array

log = logging.getLogger(__name__)

PIXELS = np.dtype(np.uint8)
KNOWN_BATCHES = 256
"""Batches that are remembered, so that requests which shared one are linked to the same span."""


class Sender(Protocol):
    """Whose rows are on their way."""

    metrics: ModelMetrics
    provider: str

    def ended(self) -> None:
        """Hear that a request of its has ended, however."""
        ...


class _Pending:
    """A request that an engine has."""

    __slots__ = ("given_up", "job", "large", "room", "sender")

    def __init__(self, sender: Sender, job: Job, room: int) -> None:
        self.sender, self.job, self.room = sender, job, room
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

    def __init__(
        self,
        number: int,
        connection: socket.socket,
        page: Page | None,
        most_rows: int,
        lost: "Callable[[Link], None]",
    ) -> None:
        """Say hello.

        Args:
            number: the engine's.
            connection: with it; owned from now on.
            page: the engine's; None: it has none.
            most_rows: while it has more of them, given up or not, it gets none.
            lost: called when it has ended, or died, before those are told who wait for it.
        """
        self.number = number
        self.rows = 0
        """Rows that the engine has, and has not answered."""
        self._page, self._most_rows, self._tell_lost = page, most_rows, lost
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
        room = SlabRoom(self, offset := self._taken(size), self.slab.lay_out(offset, shape, PIXELS))
        self.rows += room.rows
        return room

    def let_go(self, room: SlabRoom) -> None:
        """Take a room back that was not sent."""
        if self._packets.is_open:
            self.slab.let_go(room.offset)
            self.rows -= room.rows

    def submit(self, token: int, sender: Sender, job: Job, size: int, room: SlabRoom | None) -> None:
        """Send a job's rows, with all others of this turn of the loop.

        Args:
            token: the model's.
            sender: whose job it is.
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
        self._pending[number] = _Pending(sender, job, offset)
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
            if self.rows <= self._most_rows:
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

    def oldest(self, sender: Sender) -> float:
        """Return when the first of a model's requests that wait for a session came, `time.monotonic()`; 0: none."""
        for pending in self._pending.values():
            if pending.sender is sender and not (pending.given_up or self.slab.is_taken(pending.room)):
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
            pending.sender.ended()

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
        new: dict[int, tuple[RunMarks, Share, Sender]] = {}
        for share in shares:
            pending = self._pending.get(share.number)
            if pending is None or pending.job.marks is None:
                continue
            known = self._batches.get(share.batch)
            batch = pending.job.marks.take(known, share.taken_at, share.rows)
            if known is None and batch is not None:
                self._batches[share.batch] = batch
                new[share.batch] = batch, share, pending.sender
        for batch, share, sender in new.values():
            batch.end(
                share.started,
                share.infer_s,
                rows=share.batch_rows,
                requests=share.batch_requests,
                model=sender.metrics.model,
                version=sender.metrics.version,
                provider=sender.provider,
                session=share.session,
            )
        while len(self._batches) > KNOWN_BATCHES:
            del self._batches[next(iter(self._batches))]

    def _lost(self) -> None:
        """The engine has ended, or died: whoever waits for it is told so."""
        self._tell_lost(self)
        pending, self._pending = self._pending, {}
        self._number_of.clear()
        opening, self._opening = self._opening, {}
        for asked in opening.values():
            for told in asked:
                told(None)
        for request in pending.values():
            request.sender.ended()
            if not request.job.answer.done():
                request.job.answer.set_exception(
                    UnavailableError("The engine that had this request has died; try again.", code="engine_lost")
                )
        self.slab.close()
