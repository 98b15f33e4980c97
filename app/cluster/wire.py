"""The wire between a front and an engine: packets on a Unix socket that keeps order and boundaries.

The kernel gives what a protocol else needs code for: wake-up, back-pressure, and notice of a death. Requests and
answers are fixed records, many to a packet; rows and scores lie in the front's slab. Knows nothing of models.

    front  → engine   HELLO (with the slab)   OPEN   CLOSE   JOBS   GIVE_UP
    engine → front    OPENED   ANSWERS   BATCHES   LARGE (with memory of its own)
"""

import asyncio
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any, NamedTuple

PACKET_BYTES = 64 << 10
"""Of one packet at most: a quarter of what a socket holds by default."""
REASON_LENGTH = 4000
"""Characters of a fault that is told."""
READ_AT_ONCE = 32
"""Packets that are read before others have their turn."""


class Kind(IntEnum):
    """What a packet is: its first byte."""

    HELLO = 1
    OPEN = 2
    CLOSE = 3
    JOBS = 4
    GIVE_UP = 5
    OPENED = 6
    ANSWERS = 7
    BATCHES = 8
    LARGE = 9


class Request(NamedTuple):
    """Rows that want to run: where they lie, of which model, and for how long anybody waits.

    Attributes:
        number: what the answer is told by.
        model: as in OPEN.
        room, size: where in the slab, bytes.
        rows: how many.
        urgency: 0 (first) to 7 (last).
        sampled: whether its batches are to be told of.
        deadline: on the machine's monotonic clock, seconds.
    """

    number: int
    model: int
    room: int
    size: int
    rows: int
    urgency: int
    sampled: int
    deadline: float


class Status(IntEnum):
    """How a request has ended."""

    DONE = 0
    FAILED = 1
    CLOSED = 2
    DROPPED = 3


class Reply(NamedTuple):
    """One request's end; scores, or the reason, lie in its room.

    Attributes:
        number: the request's.
        status: a `Status`.
        queued_s, infer_s: waiting time up to the first run, and longest run, seconds.
    """

    number: int
    status: int
    queued_s: float
    infer_s: float


class Share(NamedTuple):
    """A sampled request's part of a batch that has run.

    Attributes:
        number: the request's.
        batch: tells batches apart.
        session: which of the engine's sessions ran it.
        rows: the request's rows in it.
        batch_rows, batch_requests: all that were in it.
        taken_at, started: on the machine's monotonic clock, seconds.
        infer_s: how long the run took.
    """

    number: int
    batch: int
    session: int
    rows: int
    batch_rows: int
    batch_requests: int
    taken_at: float
    started: float
    infer_s: float


REQUEST = struct.Struct("=IIQQIBBxxd")
REPLY = struct.Struct("=IBxxxdd")
SHARE = struct.Struct("=IIIIIIddd")
NUMBER = struct.Struct("=I")


def spoken(kind: Kind, number: int, content: Any) -> bytes:
    """Return a packet of the seldom kinds: a number and JSON."""
    return bytes([kind]) + NUMBER.pack(number) + json.dumps(content).encode()


def heard(packet: bytes) -> tuple[int, Any]:
    """Return what a packet of the seldom kinds holds."""
    return NUMBER.unpack_from(packet, 1)[0], json.loads(packet[1 + NUMBER.size :])


def recorded(kind: Kind, layout: struct.Struct, records: Sequence[Iterable[Any]]) -> Iterator[bytes]:
    """Return packets of records, as many to a packet as fit."""
    step = PACKET_BYTES // layout.size
    for start in range(0, len(records), step):
        yield bytes([kind]) + b"".join([layout.pack(*record) for record in records[start : start + step]])


def records_of(layout: struct.Struct, packet: bytes) -> Iterator[tuple[Any, ...]]:
    """Return the records of a packet."""
    return layout.iter_unpack(memoryview(packet)[1:])


class Packets:
    """One end of a connection on the running loop: packets go out in order, whatever the other end is doing."""

    def __init__(
        self,
        connection: socket.socket,
        take: Callable[[Kind, bytes, list[int]], None],
        lost: Callable[[], None],
    ) -> None:
        """Begin to read.

        Args:
            connection: `SOCK_SEQPACKET`; owned from now on.
            take: gets each packet, its kind and the descriptors that came with it, which it has to close.
            lost: called once when the other end is gone, or has sent what is no packet; not after `close`.
        """
        self._connection = connection
        self._take = take
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[bytes, int]] = deque()
        self.is_open = True
        connection.setblocking(False)
        self._loop.add_reader(connection, self._read)

    def send(self, packet: bytes, descriptor: int = -1) -> None:
        """Send a packet, perhaps later; with it a descriptor, which is closed here when it has gone."""
        if not self.is_open:
            if descriptor >= 0:
                os.close(descriptor)
            return
        self._waiting.append((packet, descriptor))
        if len(self._waiting) == 1:
            self._write()

    def close(self) -> None:
        """Hang up."""
        if self.is_open:
            self.is_open = False
            self._loop.remove_reader(self._connection)
            self._loop.remove_writer(self._connection)
            for _, descriptor in self._waiting:
                if descriptor >= 0:
                    os.close(descriptor)
            self._waiting.clear()
            self._connection.close()

    def _write(self) -> None:
        while self._waiting:
            packet, descriptor = self._waiting[0]
            try:
                if descriptor >= 0:
                    socket.send_fds(self._connection, [packet], [descriptor])
                else:
                    self._connection.send(packet)
            except BlockingIOError:
                self._loop.add_writer(self._connection, self._write)
                return
            except OSError:
                # Not at once: whoever sends is in the middle of something, perhaps of becoming known.
                self._loop.call_soon(self._end)
                return
            self._waiting.popleft()
            if descriptor >= 0:
                os.close(descriptor)
        self._loop.remove_writer(self._connection)

    def _read(self) -> None:
        for _ in range(READ_AT_ONCE):
            try:
                packet, descriptors, flags, _ = socket.recv_fds(self._connection, PACKET_BYTES + 1024, 4)
            except BlockingIOError:
                return
            except OSError:
                packet, descriptors, flags = b"", [], 0
            if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):  # no descriptor was left here, or the packet is too long
                packet = b""
            try:
                kind = Kind(packet[0])
            except (IndexError, ValueError):  # the end, or nonsense
                for descriptor in descriptors:
                    os.close(descriptor)
                self._end()
                return
            self._take(kind, packet, descriptors)
            if not self.is_open:
                return

    def _end(self) -> None:
        if self.is_open:
            self.close()
            self._lost()


def hand_over(mailbox: socket.socket, number: int, connection: socket.socket) -> None:
    """Give a process one end of a connection, and the number of who is at the other; one that is gone gets nothing."""
    with suppress(OSError):
        socket.send_fds(mailbox, [NUMBER.pack(number)], [connection.fileno()])
    connection.close()


def introduce(one: tuple[socket.socket, int], other: tuple[socket.socket, int]) -> None:
    """Connect two processes, each given by its mailbox and its number."""
    to_one, to_other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    hand_over(one[0], other[1], to_one)
    hand_over(other[0], one[1], to_other)


class Mailbox:
    """A process's end of its connection with the supervisor, through which it is introduced to others."""

    def __init__(self, connection: socket.socket, met: Callable[[int, socket.socket], None]) -> None:
        """Begin to read on the running loop.

        Args:
            connection: `SOCK_SEQPACKET`; owned from now on.
            met: gets the other's number and a connection with it.
        """
        self._connection, self._met = connection, met
        self._loop = asyncio.get_running_loop()
        connection.setblocking(False)
        self._loop.add_reader(connection, self._read)

    def close(self) -> None:
        """Meet nobody more."""
        self._loop.remove_reader(self._connection)
        self._connection.close()

    def _read(self) -> None:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._connection, NUMBER.size, 1)
        except BlockingIOError:
            return
        except OSError:
            packet, descriptors = b"", []
        if not packet:  # the supervisor is gone, which is seen by the lifeline
            self._loop.remove_reader(self._connection)
            return
        for descriptor in descriptors:
            self._met(NUMBER.unpack(packet)[0], socket.socket(fileno=descriptor))
