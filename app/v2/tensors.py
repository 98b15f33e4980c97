"""Tensors as the protocol carries them: a shape and its elements, as bytes or as values, become an array, and back.

Little-endian, row-major; elements of BYTES are a 4-byte length and their bytes. Nothing is allocated for a shape before
the data was found to be of its size. Pure functions; the sentences name the tensor, so that a client finds it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np

from app.errors import BadRequestError
from app.tensors import DATATYPES, Array

Data = bytes | bytearray | memoryview | Sequence[Any]
"""Elements as they came: a buffer in the protocol's binary form, or a sequence of values, flat or nested."""

MAX_STRINGS = 250_000
"""Elements of one BYTES tensor. An empty one takes 4 bytes on the wire, and ten times as much as an object."""
AT_ONCE = 65_536
_LENGTH = 4
_NUMBERS: dict[str, frozenset[type]] = {
    "b": frozenset({bool}),
    "i": frozenset({int}),
    "u": frozenset({int}),
    "f": frozenset({int, float}),
}


@dataclass(slots=True)
class Tensor:
    """One tensor with its elements.

    Attributes:
        name, datatype: as in the protocol.
        array: of the datatype's dtype, in the tensor's shape; BYTES: objects, each a `bytes`.
    """

    name: str
    datatype: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's dimensions."""
        return self.array.shape


def to_array(name: str, datatype: str, shape: tuple[int, ...], data: Data) -> Array:
    """Return the numbers that came for a tensor, as an array of its datatype and shape.

    Args:
        name: the tensor's, for the sentence of an error.
        datatype: a key of `DATATYPES`, not BYTES.
        shape: dimensions of at least 0.
        data: a buffer, of which the array is a view where it can be one, or a sequence of values.

    Returns:
        The array, which may be read-only.

    Raises:
        BadRequestError: number or size of the elements is not the shape's, or one of them is not of the datatype.
    """
    if isinstance(data, bytes | bytearray | memoryview):
        return _numbers_of(name, datatype, math.prod(shape), data).reshape(shape)
    return _numbers_in(name, datatype, _flatten(name, shape, data)).reshape(shape)


def to_strings(name: str, shape: tuple[int, ...], data: Data) -> list[bytes]:
    """Return the elements that came for a tensor of BYTES, in row-major order.

    Raises:
        BadRequestError: as `to_array`, or there are more than `MAX_STRINGS`.
    """
    count = math.prod(shape)
    if count > MAX_STRINGS:
        raise BadRequestError(
            f"Input '{name}' has {_shown(count)} elements of BYTES, of which at most {MAX_STRINGS:,} are taken."
        )
    if isinstance(data, bytes | bytearray | memoryview):
        return _strings_of(name, count, data)
    flat = _flatten(name, shape, data)
    _refuse_others(name, "BYTES", set(map(type, flat)), frozenset({str, bytes}))
    return [value if isinstance(value, bytes) else _encoded(name, value) for value in flat]


def to_bytes(array: Array) -> bytes:
    """Return an array's elements in the binary form; objects are `bytes` or `str`."""
    if array.dtype != np.object_:
        return array.tobytes()
    pieces: list[bytes] = []
    for element in array.ravel().tolist():
        encoded = element.encode() if isinstance(element, str) else element
        pieces += (len(encoded).to_bytes(_LENGTH, "little"), encoded)
    return b"".join(pieces)


def to_values(name: str, array: Array) -> list[Any]:
    """Return an array's elements as a flat list of values that JSON can hold.

    Raises:
        BadRequestError: JSON cannot hold them: FP16, NaN and infinity, bytes that are no UTF-8.
    """
    if array.dtype == np.float16:
        raise BadRequestError(f"Output '{name}' is FP16, which JSON does not carry: ask for it with binary_data.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadRequestError(f"Output '{name}' holds NaN or infinity, which JSON lacks: ask for it with binary_data.")
    values: list[Any] = array.ravel().tolist()
    if array.dtype != np.object_:
        return values
    try:
        return [value if isinstance(value, str) else value.decode() for value in values]
    except UnicodeDecodeError:
        raise BadRequestError(f"Output '{name}' holds bytes that are no UTF-8: ask for it with binary_data.") from None


def to_objects(elements: Sequence[object]) -> Array:
    """Return elements as an array of objects, `[n]`, whatever they are: NumPy would look into strings and lists."""
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array


def _numbers_of(name: str, datatype: str, count: int, data: bytes | bytearray | memoryview) -> Array:
    dtype = DATATYPES[datatype]
    if len(data) != count * dtype.itemsize:
        raise BadRequestError(
            f"Input '{name}' has {len(data):,} bytes of data, but its shape and datatype {datatype} make "
            f"{_shown(count * dtype.itemsize)}."
        )
    array = np.frombuffer(data, dtype)
    if dtype.kind == "b" and count and array.view(np.uint8).max() > 1:
        raise BadRequestError(f"Input '{name}' is BOOL, but has bytes that are neither 0 nor 1.")
    # A tensor may begin anywhere in a body, but not every kernel loads from everywhere.
    return array if array.flags.aligned else array.copy()


def _strings_of(name: str, count: int, data: bytes | bytearray | memoryview) -> list[bytes]:
    """Split elements, each led by its length."""
    size = len(data)
    elements, at = [], 0
    for index in range(count):
        start = at + _LENGTH
        at = start + int.from_bytes(data[at:start], "little")
        if start > size or at > size:
            raise BadRequestError(
                f"Input '{name}' has {size:,} bytes of data, but element {index} of {count:,} would end beyond them: "
                "each is a 4-byte little-endian length and so many bytes."
            )
        elements.append(bytes(data[start:at]))
    if at != size:
        raise BadRequestError(
            f"Input '{name}' has {size:,} bytes of data, but its {count:,} elements end after {at:,}."
        )
    return elements


def _numbers_in(name: str, datatype: str, flat: Sequence[Any]) -> Array:
    """Check and convert values without letting NumPy guess: of one long string and many numbers it makes gigabytes."""
    if datatype == "FP16":
        raise BadRequestError(f"Input '{name}' is FP16, which is taken in binary form only: send binary_data_size.")
    dtype = DATATYPES[datatype]
    kinds = set(map(type, flat))
    if dtype.kind in "iu" and float in kinds:
        flat = _whole_numbers(name, datatype, flat)
        kinds.discard(float)
    _refuse_others(name, datatype, kinds, _NUMBERS[dtype.kind])
    array = np.empty(len(flat), dtype)
    try:
        with np.errstate(over="ignore"):
            for start in range(0, len(flat), AT_ONCE):  # NumPy holds the interpreter's lock while it converts
                array[start : start + AT_ONCE] = flat[start : start + AT_ONCE]
    except OverflowError:
        raise BadRequestError(f"Input '{name}' has a number beyond the range of {datatype}.") from None
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise BadRequestError(f"Input '{name}' has a number beyond the range of {datatype}.")
    return array


def _whole_numbers(name: str, datatype: str, flat: Sequence[Any]) -> Sequence[Any]:
    """Return values with those like 220.0 as integers: clients generated from the protocol's document send them so."""
    for value in flat:
        if type(value) is float and not value.is_integer():
            raise BadRequestError(f"Input '{name}' is {datatype}, but has {value!r} in it, which is no whole number.")
    return [int(value) if type(value) is float else value for value in flat]


def _flatten(name: str, shape: tuple[int, ...], data: Sequence[Any]) -> Sequence[Any]:
    """Return the values of a sequence that is flat already, or nested as the shape says."""
    flat, depth = data, 0
    while len(flat) and isinstance(flat[0], list):
        depth += 1
        if depth >= len(shape) or set(map(type, flat)) != {list} or set(map(len, flat)) != {shape[depth]}:
            raise BadRequestError(f"Input '{name}' has data that is nested otherwise than its shape {list(shape)}.")
        flat = list(chain.from_iterable(cast(Sequence[list[Any]], flat)))
    count = math.prod(shape)
    if len(flat) != count or (depth and (depth != len(shape) - 1 or len(data) != shape[0])):
        raise BadRequestError(
            f"Input '{name}' has {len(flat):,} values, but its shape {list(shape)} makes {_shown(count)}."
        )
    return flat


def _refuse_others(name: str, datatype: str, kinds: set[type], taken: frozenset[type]) -> None:
    if others := kinds - taken:
        found = {bool: "true or false", str: "a string", list: "a list", dict: "an object", type(None): "null"}
        kind = min(others, key=lambda kind: kind.__name__)
        raise BadRequestError(f"Input '{name}' is {datatype}, but has {found.get(kind, 'a ' + kind.__name__)} in it.")


def _encoded(name: str, value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise BadRequestError(
            f"Input '{name}' has a string that is no Unicode text: half of a pair stands alone."
        ) from None


def _shown(count: int) -> str:
    """Return a number for a sentence; one that a shape of huge dimensions makes is cut short."""
    return f"{count:,}" if count < 10**18 else "more than any request holds"
