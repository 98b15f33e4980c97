"""Slabs: the memory in which a front hands rows to an engine, and gets scores back in the same place.

A slab is anonymous shared memory without a name: one process makes it and gives rooms of it out, the other reads and
writes in rooms that it was told of. Its size is no more than a bound, since memory that nobody has touched costs
nothing. Which room belongs to whom only the maker knows, so there is no lock. Knows nothing of requests or sockets.

    a room     | state | arrays | datatype, dimensions, bytes of each | numbers, or texts with their lengths …
"""

import math
import mmap
import os
import struct
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from app.tensors import DATATYPES, Array

SLAB_BYTES = 8 << 30
SMALLEST_ROOM = 4096
KEPT_ROOM = 1 << 20
"""Larger rooms give their memory back when they are let go."""
MAX_DIMENSIONS = 16

_CODES = tuple(DATATYPES)
_CODE_OF = {dtype: code for code, dtype in enumerate(DATATYPES.values())}
_OBJECT = _CODES.index("BYTES")
_HEAD = struct.Struct("=II")
_ARRAY = struct.Struct("=IIQ")
_TAKEN = b"\x01\x00\x00\x00"
_ALIGNMENT = 64


class SlabFullError(Exception):
    """No room of that size is left."""


class Slab:
    """Shared memory, mapped here; whoever made it gives out rooms, which are offsets of powers of two bytes."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Map the memory behind a descriptor, which may be closed afterwards."""
        self.memory = mmap.mmap(descriptor, size)
        self._view = memoryview(self.memory)
        # Unlike `np.ndarray(buffer=…)` it keeps the memory mapped for as long as there is a view of it.
        self._bytes = np.frombuffer(self.memory, np.uint8)
        self._size = size
        self._top = 0
        self._free: dict[int, list[int]] = {}
        self._rooms: dict[int, int] = {}

    @property
    def rooms(self) -> int:
        """How many rooms are given out."""
        return len(self._rooms)

    def take(self, size: int) -> int:
        """Give out a room of at least so many bytes; returns its offset.

        Raises:
            SlabFullError: there is none.
        """
        power = max(SMALLEST_ROOM, 1 << (size - 1).bit_length())
        free = self._free.get(power)
        if free:
            offset = free.pop()  # the one let go last is still in the processor's cache
        elif self._top + power <= self._size:
            offset, self._top = self._top, self._top + power
        else:
            raise SlabFullError
        self._rooms[offset] = power
        return offset

    def room_of(self, offset: int) -> int:
        """Return how many bytes a room has that is given out."""
        return self._rooms[offset]

    def let_go(self, offset: int) -> None:
        """Take a room back."""
        power = self._rooms.pop(offset)
        self._free.setdefault(power, []).append(offset)
        if power > KEPT_ROOM and hasattr(mmap, "MADV_REMOVE"):
            with suppress(OSError):  # not every kernel can (gVisor)
                self.memory.madvise(mmap.MADV_REMOVE, offset, power)

    def lay_out(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """Prepare a room for one array of numbers, and return that array, whose numbers are yet to be written.

        Args:
            offset: the room's, which must be large enough: see `packed_bytes_of`.
            shape: the array's.
            dtype: one of numbers.
        """
        body = math.prod(shape) * dtype.itemsize
        end = self._write_heads(offset, [(shape, _CODE_OF[dtype], body)])
        return self._array(offset + _aligned(end - offset), body, shape, dtype)

    def _write_heads(self, offset: int, heads: Sequence[tuple[tuple[int, ...], int, int]]) -> int:
        """Write what is in a room, by shape, code and bytes of each array; returns where that ends."""
        view, at = self._view, offset
        _HEAD.pack_into(view, at, 0, len(heads))
        at += _HEAD.size
        for shape, code, body in heads:
            _ARRAY.pack_into(view, at, code, len(shape), body)
            at += _ARRAY.size
            struct.pack_into(f"={len(shape)}Q", view, at, *shape)
            at += 8 * len(shape)
        return at

    def pack(self, offset: int, arrays: Sequence[Array]) -> None:
        """Write arrays into a room, which must be large enough: see `packed_bytes`."""
        view, starts, heads = self._view, [], []
        for array in arrays:
            code = _CODE_OF[array.dtype]
            body = _text_bytes(array) if code == _OBJECT else array.nbytes
            heads.append((array.shape, code, body))
            starts.append(body)
        at = self._write_heads(offset, heads)
        for array, body in zip(arrays, starts, strict=True):
            at = offset + _aligned(at - offset)
            if array.dtype == object:
                _write_texts(view, at, array)
            else:
                self._array(at, body, array.shape, array.dtype)[...] = array
            at += body

    def unpack(self, offset: int, size: int) -> tuple[Array, ...]:
        """Return the arrays in a room of so many bytes: numbers as views into it, texts as copies.

        Raises:
            ValueError: what lies there is no room's content, or leads out of the room.
        """
        view, end = self._view, offset + size
        if not 0 <= offset <= end <= self._size:
            raise ValueError("the room lies outside the slab")
        try:
            _, count = _HEAD.unpack_from(view, offset)
            at = offset + _HEAD.size
            found: list[tuple[int, tuple[int, ...], int]] = []
            for _ in range(count):
                code, dimensions, body = _ARRAY.unpack_from(view, at)
                at += _ARRAY.size
                if code >= len(_CODES) or dimensions > MAX_DIMENSIONS:
                    raise ValueError("the room holds no arrays")
                found.append((code, struct.unpack_from(f"={dimensions}Q", view, at), body))
                at += 8 * dimensions
        except struct.error as error:
            raise ValueError("the room ends before its arrays") from error
        arrays: list[Array] = []
        for code, shape, body in found:
            at = offset + _aligned(at - offset)
            if at + body > end:
                raise ValueError("the room ends before its arrays")
            if code == _OBJECT:
                arrays.append(_read_texts(view, at, shape))
            else:
                dtype = DATATYPES[_CODES[code]]
                if math.prod(shape) * dtype.itemsize != body:
                    raise ValueError("an array's dimensions are not its bytes")
                arrays.append(self._array(at, body, shape, dtype))
            at += body
        return tuple(arrays)

    def mark_taken(self, offset: int) -> None:
        """Note in a room that its rows are being run."""
        self._view[offset : offset + 4] = _TAKEN

    def is_taken(self, offset: int) -> bool:
        """Tell whether that was noted."""
        return self._view[offset] == 1

    def _array(self, at: int, size: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        return self._bytes[at : at + size].view(dtype).reshape(shape)

    def close(self) -> None:
        """Unmap it; if arrays still lie in it, that happens when they are gone."""
        self._view.release()
        self._bytes = np.empty(0, np.uint8)
        with suppress(BufferError):  # the last array closes it
            self.memory.close()


def create_slab(size: int = SLAB_BYTES) -> tuple[int, Slab]:
    """Make a slab; returns a descriptor of its memory, for another process, and the slab."""
    descriptor = os.memfd_create("convoy-slab", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor, Slab(descriptor, size)


def packed_bytes(arrays: Sequence[Array]) -> int:
    """Return how many bytes arrays take in a room."""
    size = _HEAD.size + sum(_ARRAY.size + 8 * array.ndim for array in arrays)
    for array in arrays:
        size = _aligned(size) + (_text_bytes(array) if array.dtype == object else array.nbytes)
    return size


def packed_bytes_of(shapes: Sequence[tuple[tuple[int, ...], np.dtype[np.generic]]]) -> int:
    """Return the same of arrays that are yet to come: of numbers, by shapes and datatypes."""
    size = _HEAD.size + sum(_ARRAY.size + 8 * len(shape) for shape, _ in shapes)
    for shape, dtype in shapes:
        size = _aligned(size) + math.prod(shape) * dtype.itemsize
    return size


def _aligned(at: int) -> int:
    return -(-at // _ALIGNMENT) * _ALIGNMENT


def _encoded(text: object) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogateescape")


def _text_bytes(array: Array) -> int:
    return sum(8 + len(_encoded(text)) for text in array.flat)


def _write_texts(view: memoryview, at: int, array: Array) -> None:
    """Write each text behind its length, of which the lowest bit tells bytes (1) from `str` (0)."""
    for text in array.flat:
        content = _encoded(text)
        struct.pack_into("=Q", view, at, len(content) << 1 | isinstance(text, bytes))
        view[at + 8 : at + 8 + len(content)] = content
        at += 8 + len(content)


def _read_texts(view: memoryview, at: int, shape: tuple[int, ...]) -> Array:
    texts = np.empty(math.prod(shape), object)
    for index in range(len(texts)):
        (coded,) = struct.unpack_from("=Q", view, at)
        content = bytes(view[at + 8 : at + 8 + (coded >> 1)])
        texts[index] = content if coded & 1 else content.decode("utf-8", "surrogateescape")
        at += 8 + len(content)
    return texts.reshape(shape)
