"""The run's curves as TensorBoard reads them: `tensorboard --logdir runs` shows every run by its name.

Owns the event file's format: records framed by lengths and CRC-32C (TensorFlow's `record_writer.h`), each an `Event`
message (`event.proto`, `summary.proto`), of which a scalar needs five fields. TensorBoard itself is not needed to write
it, and is a large package.
"""

import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from training.runs import Epoch

PATTERN = "events.out.tfevents.*"
VERSION = "brain.Event:2"
PARTS = ("train_", "test_")


class Events:
    """The event file of a run: it begins with all epochs that are finished, so a resumed run has one curve."""

    def __init__(self, directory: Path, history: Sequence[Epoch] = ()) -> None:
        self._directory, self._history = directory, list(history)
        self._path: Path | None = None

    def append(self, epoch: Epoch) -> None:
        """Add an epoch that has just ended; the first one takes the place of an earlier start's file."""
        now = time.time()
        if self._path is None:
            earlier = list(self._directory.glob(PATTERN))
            self._path = self._directory / PATTERN.replace("*", f"{time.time_ns() // 1_000_000}.convoy")
            self._path.write_bytes(_record(_double(1, now) + _bytes(3, VERSION.encode())) + self._so_far(now, epoch))
            for path in earlier:
                path.unlink()
        with self._path.open("ab") as file:
            file.write(_record(_event(now, epoch)))

    def _so_far(self, now: float, running: Epoch) -> bytes:
        """Return the events of earlier starts, as if they had ended just before this one began."""
        ended, records = now - running.seconds, b""
        for epoch in reversed(self._history):
            records = _record(_event(ended, epoch)) + records
            ended -= epoch.seconds
        return records


def scalars(epoch: Epoch) -> Iterator[tuple[str, float]]:
    """Yield tags and values of an epoch: `loss/train` and `loss/test` share a chart in TensorBoard."""
    for name, value in asdict(epoch).items():
        part = next((part for part in PARTS if name.startswith(part)), "")
        if name != "epoch" and isinstance(value, int | float):
            yield f"{name.removeprefix(part)}/{part.rstrip('_')}" if part else name, value


# ---------------------------------------------------------------- the messages


def _event(wall_time: float, epoch: Epoch) -> bytes:
    values = b"".join(_bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in scalars(epoch))
    return _double(1, wall_time) + _tag(2, 0) + _varint(epoch.epoch) + _bytes(5, values)


def _tag(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _varint(number: int) -> bytes:
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    return bytes([*written, number])


def _double(field: int, value: float) -> bytes:
    return _tag(field, 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _tag(field, 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(value)) + value


# ---------------------------------------------------------------- the frame


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    """Return the checksum as records carry it: rotated and moved, for a checksum of checksums would be weak."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720, B.4); zlib's is of another polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def _table_entry(number: int) -> int:
    for _ in range(8):
        number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
    return number


_TABLE = tuple(_table_entry(number) for number in range(256))
