"""Pages: the numbers of one process, in memory that the others can read.

A page is a fixed region that one process writes and any may read: a header (who writes it, in which state it is), a
note (one JSON object), a directory of series, and an array of float64 slots. It outlives its writer:
the next one takes it over and goes on counting where the last one was killed. Knows nothing of metrics' kinds, HTTP or
models.

    0         1 KiB            128 KiB                      2 MiB                      4 MiB
    | header  | note           | directory: a JSON line     | slots                    |
    | slots   |                | for each series            |                          |

Each slot has one writer at a time (the event loop, or whoever holds the lock that guards it): an addition is a read and
a write, and two writers would lose one. Readers need no lock: an aligned double is read whole. Memory that nobody has
touched costs nothing, so the size is no more than a bound: some 200 models.
"""

import gc
import json
import logging
import math
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

PAGE_BYTES = 4 << 20
MAX_WIDTH = 128
"""Slots of one series at most."""
NO_VALUE = math.nan
"""What a gauge holds while it is not shown."""
LONG_AGO = -1e9
"""When a run began that cannot end, because its device is lost; before any clock began."""
SILENT_S = 5.0
"""A writer whose event loop has not turned for this long gets no trust."""

_SLOT = 8
_NOTE, _DIRECTORY, _SLOTS = 1 << 10, 128 << 10, 2 << 20
_PID, _STATE, _HEARTBEAT, _CONNECTIONS, _DIRECTORY_USED, _SLOTS_USED, _NOTE_VERSION, _NOTE_BYTES = range(8)
_EPOCH = 8
"""Of the directory's lines: odd while one is rewritten, another number afterwards."""
_LINE = 32
"""Lines are multiples of it, so that one which is free fits the next series of its kind."""
_RUNNING_SINCE = 9
_COLLECTIONS = 16
# The first slots are a waste bin: what finds no room, or is forgotten, is written there, and nobody reads it.
WASTE = _SLOTS // _SLOT
_FIRST = WASTE + MAX_WIDTH


class WriterState(IntEnum):
    """Where the process that writes a page is between its start and its end; FREE: there is none."""

    FREE = 0
    STARTING = 1
    LOADING = 2
    READY = 3
    FAILED = 4
    DRAINING = 5


class Series(NamedTuple):
    """One line of the directory: a series and where its slots are."""

    name: str
    labels: tuple[str, ...]
    width: int
    gauge: bool
    first: int


class Page:
    """One page; `number` is its place among its siblings, from 1."""

    def __init__(self, memory: memoryview, number: int) -> None:
        self.number = number
        self.slots: memoryview[float] = memory.cast("d")
        self._memory = memory
        self._series: dict[tuple[str, tuple[str, ...], int], Series] = {}
        self._directory_read = 0
        self._epoch_read = 0.0
        self._places: dict[tuple[str, tuple[str, ...], int], tuple[int, int]] = {}
        """Of each series' line: its start and its length, in bytes."""
        self._free: list[tuple[int, int, int, int]] = []
        """Of each free line: its start and length, and width and first slot of the series that was there."""
        self.lock = threading.RLock()
        """Held while series are entered, looked up or forgotten."""
        self._full = False

    @property
    def pid(self) -> int:
        """The writer's process id; 0: there is none."""
        return int(self.slots[_PID])

    @property
    def state(self) -> WriterState:
        """What the writer says of itself."""
        return WriterState(int(self.slots[_STATE]))

    @property
    def connections(self) -> int:
        """Connections that the writer holds."""
        return int(self.slots[_CONNECTIONS])

    @connections.setter
    def connections(self, count: int) -> None:
        self.slots[_CONNECTIONS] = count

    @property
    def silent_s(self) -> float:
        """How long ago the writer last showed that its event loop turns, seconds."""
        return time.monotonic() - self.slots[_HEARTBEAT]

    @property
    def is_ready(self) -> bool:
        """Whether there is a writer that wants traffic, and turns."""
        return bool(self.pid) and self.state is WriterState.READY and self.silent_s <= SILENT_S

    @property
    def heartbeat(self) -> float:
        """When the writer last did, on the machine's monotonic clock, seconds."""
        return self.slots[_HEARTBEAT]

    @property
    def run_s(self) -> float:
        """How long the longest run that a session of the writer is in has taken so far, seconds; 0: none runs."""
        since = self.slots[_RUNNING_SINCE]
        return time.monotonic() - since if since else 0.0

    def show_run(self, since: float) -> None:
        """Show when the longest run that a session is in began, on the machine's monotonic clock; 0: none runs."""
        self.slots[_RUNNING_SINCE] = since

    @property
    def note(self) -> dict[str, Any]:
        """The writer's note; empty where there is none, or it is being written."""
        for _ in range(3):
            version = self.slots[_NOTE_VERSION]
            text = bytes(self._memory[_NOTE : _NOTE + int(self.slots[_NOTE_BYTES])])
            if text and version % 2 == 0 and version == self.slots[_NOTE_VERSION]:
                with suppress(ValueError):
                    note: dict[str, Any] = json.loads(text)
                    return note
        return {}

    @property
    def collections(self) -> list[tuple[float, float, float]]:
        """The writer's garbage collection by generation: objects collected, uncollectable ones, runs."""
        slots = self.slots
        return [(slots[at], slots[at + 1], slots[at + 2]) for at in range(_COLLECTIONS, _COLLECTIONS + 9, 3)]

    def take_over(self, pid: int) -> None:
        """Enter a writer: counters go on, all else starts anew."""
        self.release()
        self.slots[_PID] = pid
        self.slots[_STATE] = WriterState.STARTING
        self.slots[_HEARTBEAT] = time.monotonic()

    def release(self) -> None:
        """Leave the page to the next writer: gauges and whatever else speaks of this one's presence are wiped."""
        for field in (_PID, _STATE, _CONNECTIONS, _RUNNING_SINCE, *range(_COLLECTIONS, _COLLECTIONS + 9)):
            self.slots[field] = 0
        self._write_note(b"")
        self.slots[_EPOCH] += self.slots[_EPOCH] % 2  # odd: it was killed while it rewrote a line
        for series in self.series():
            if series.gauge:
                self.slots[series.first] = NO_VALUE

    def beat(self) -> None:
        """Show that the event loop turns."""
        self.slots[_HEARTBEAT] = time.monotonic()
        for generation, stats in enumerate(gc.get_stats()):
            at = _COLLECTIONS + 3 * generation
            for offset, what in enumerate(("collected", "uncollectable", "collections")):
                self.slots[at + offset] = stats[what]

    def tell(self, state: WriterState, note: dict[str, Any]) -> None:
        """Say in which state the writer is, with a note; one that is too long is left out."""
        if not self.write_note(note):
            self._write_note(b"")
        self.slots[_STATE] = state

    def write_note(self, note: dict[str, Any]) -> bool:
        """Replace the note; False: it is too long, and the old one stays."""
        text = json.dumps(note, ensure_ascii=True).encode()
        if len(text) > _DIRECTORY - _NOTE:
            return False
        self._write_note(text)
        return True

    def series(self) -> list[Series]:
        """Return every series that has been entered so far."""
        with self.lock:
            self._read_directory()
            return list(self._series.values())

    def place(self, name: str, labels: tuple[str, ...], width: int, *, gauge: bool = False) -> int:
        """Return the index of a series' first slot; a new one is entered, with zeros.

        Where the page is full, that is said once, and the series is written where nobody reads it: a service that
        runs on without some number is better than one that fails for it.
        """
        assert 0 < width <= MAX_WIDTH, f"{name} is {width} slots wide"
        with self.lock:
            self._read_directory()
            known = self._series.get((name, labels, width))
            return self._enter(name, labels, width, gauge) if known is None else known.first

    def forget(self, gone: Sequence[Series]) -> None:
        """Take series off the directory; their places are given to others. Only the writer may."""
        with self.lock, self._rewriting():
            for name, labels, width, _, first in gone:
                start, length = self._places.pop((name, labels, width))
                self._write_line(start, length, [None, [], width, False, first])
                del self._series[name, labels, width]
                self._free.append((start, length, width, first))

    def _enter(self, name: str, labels: tuple[str, ...], width: int, gauge: bool) -> int:
        first = _FIRST + int(self.slots[_SLOTS_USED])
        text = json.dumps([name, labels, width, gauge, first], ensure_ascii=True)
        length = -(-(len(text) + 1) // _LINE) * _LINE
        fitting = [free for free in self._free if free[2] == width and free[1] >= length]
        if fitting:
            # The shortest: long lines are left to long labels.
            return self._reuse(min(fitting, key=lambda free: free[1]), name, labels, gauge)
        end = self._directory_read + length
        if end > _SLOTS - _DIRECTORY or first + width > len(self.slots):
            if not self._full:
                log.error("metrics page is full: new series are not shown", extra={"series": name, "page": self.number})
                self._full = True
            return WASTE
        self._write_line(self._directory_read, length, [name, labels, width, gauge, first])
        self.slots[_SLOTS_USED] += width
        # Last: a reader takes only what is within this length.
        self.slots[_DIRECTORY_USED] = end
        self._read_directory()
        return first

    def _reuse(self, free: tuple[int, int, int, int], name: str, labels: tuple[str, ...], gauge: bool) -> int:
        start, length, width, first = free
        for slot in range(first, first + width):
            self.slots[slot] = 0
        with self._rewriting():
            self._write_line(start, length, [name, labels, width, gauge, first])
            self._free.remove(free)
            self._series[name, labels, width] = Series(name, labels, width, gauge, first)
            self._places[name, labels, width] = start, length
        return first

    @contextmanager
    def _rewriting(self) -> Iterator[None]:
        """Change lines that readers have read, and read all of again; this process notes the changes itself."""
        before = self.slots[_EPOCH]
        epoch = int(before) | 1  # odd: a line is being rewritten, or its writer was killed in the middle
        self.slots[_EPOCH] = epoch
        try:
            yield
            if self._epoch_read == before:
                self._epoch_read = epoch + 1.0
        finally:
            self.slots[_EPOCH] = epoch + 1
            self._read_directory()

    def _write_line(self, start: int, length: int, content: list[Any]) -> None:
        line = json.dumps(content, ensure_ascii=True).encode().ljust(length - 1) + b"\n"
        self._memory[_DIRECTORY + start : _DIRECTORY + start + length] = line

    def _read_directory(self) -> None:
        """Read the lines that came since, or all where one has changed; holds the lock."""
        epoch = self.slots[_EPOCH]
        if epoch != self._epoch_read:
            self._series, self._places, self._free, self._directory_read = {}, {}, [], 0
        used = int(self.slots[_DIRECTORY_USED])
        if used == self._directory_read:
            return
        start = self._directory_read
        lines = bytes(self._memory[_DIRECTORY + start : _DIRECTORY + used])
        readable = True
        for line in lines.splitlines(keepends=True):
            try:
                name, labels, width, gauge, first = json.loads(line)
            except ValueError:
                # The length was seen before the line, as some processors may, or it is just rewritten: next time it is
                # there. Unless its writer was killed in the middle: the others are.
                readable = False
            else:
                if name is None:
                    self._free.append((start, len(line), width, first))
                else:
                    key = name, tuple(labels), width
                    self._series[key] = Series(name, tuple(labels), width, gauge, first)
                    self._places[key] = start, len(line)
            start += len(line)
        self._directory_read = start
        # Anything but this epoch has all lines read again.
        self._epoch_read = epoch if readable and epoch % 2 == 0 and epoch == self.slots[_EPOCH] else -1.0

    def _write_note(self, text: bytes) -> None:
        version = int(self.slots[_NOTE_VERSION]) | 1  # odd: it is being written, or its writer was killed in the middle
        self.slots[_NOTE_VERSION] = version
        self._memory[_NOTE : _NOTE + len(text)] = text
        self.slots[_NOTE_BYTES] = len(text)
        self.slots[_NOTE_VERSION] = version + 1


def private_page() -> Page:
    """Return a page of this process's own, taken over by it."""
    page = Page(memoryview(mmap.mmap(-1, PAGE_BYTES)), 1)
    page.take_over(os.getpid())
    return page


def create_shared(count: int, engines: int = 0) -> int:
    """Return a descriptor of memory for `count` pages of processes that answer, and some of processes that only run.

    It is for `open_shared` and the others, here and in processes that inherit it.
    """
    descriptor = os.memfd_create("convoy-pages")
    os.ftruncate(descriptor, (count + engines + 1) * PAGE_BYTES)
    return descriptor


def open_shared(descriptor: int, engines: int = 0) -> Sequence[Page]:
    """Return the pages behind a descriptor, one for each process that answers."""
    return _all_shared(descriptor)[: -1 - engines]


def open_engines(descriptor: int, engines: int) -> Sequence[Page]:
    """Return the pages behind a descriptor of the processes that only run, so many of them."""
    return _all_shared(descriptor)[-1 - engines : -1]


def open_common(descriptor: int) -> Page:
    """Return the page behind a descriptor that belongs to no process, but to all."""
    return _all_shared(descriptor)[-1]


def _all_shared(descriptor: int) -> Sequence[Page]:
    memory = memoryview(mmap.mmap(descriptor, 0))
    starts = range(0, len(memory), PAGE_BYTES)
    return [Page(memory[start : start + PAGE_BYTES], number) for number, start in enumerate(starts, 1)]
