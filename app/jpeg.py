"""The common JPEG straight from libjpeg-turbo: the same pixels as Pillow's, without what Pillow does around them.

Owns the walk over a file's markers, which decides whether a file is common enough, and the one call of the decoder.
It refuses nothing and explains nothing: whatever is unusual, damaged or merely suspicious gives None, and Pillow is
the judge. Knows nothing of recipes, limits or errors.
"""

import struct
import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

MAX_PIXELS = 2_000_000
"""Three bytes each, once for every thread that decodes. Pillow decodes most larger photos at reduced scale."""
MAX_START_BYTES = 1024
"""Starts of files that are remembered: quantization and Huffman tables take 600, metadata may take much more."""

_THREAD = threading.local()

# 0xFF and the marker's code, then the length of its segment, which counts itself.
_SEGMENT = struct.Struct(">HH")
# Precision, height, width, components; then identifier, sampling factors and quantization table of each.
_GRAY_FRAME = struct.Struct(">BHHBBBx")
_COLOUR_FRAME = struct.Struct(">BHHBBBxBBxBBx")

_SOI = b"\xff\xd8"
_DHT, _SOS = 0xFFC4, 0xFFDA
_SOS_BYTES, _SOS_SIZE = b"\xff\xda", 14  # the segment of a scan of three components, its marker included
_FRAMES = frozenset({0xFFC0, 0xFFC1})  # baseline and extended sequential, Huffman-coded
_PASSED_OVER = frozenset({0xFFDB, 0xFFDD, 0xFFFE})  # DQT, DRI, COM: Pillow and libjpeg read them alike
_APP0, _APP2, _APP14, _APP15 = 0xFFE0, 0xFFE2, 0xFFEE, 0xFFEF
_TAKEN_APART = frozenset({0xFFE1, 0xFFED})  # Exif and XMP; Photoshop's resources
_ICC = b"ICC_PROFILE\0"
_LUMA_SAMPLING = frozenset({0x11, 0x21, 0x12, 0x22, 0x41})  # 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1


class Header(NamedTuple):
    """What the markers before the first scan say.

    Attributes:
        width: pixels, at least 1.
        height: pixels, at least 1.
        plain: whether there is nothing that only Pillow reads, as Exif, XMP or a second picture (MPO).
    """

    width: int
    height: int
    plain: bool


def read_header(data: bytes) -> Header | None:
    """Walk the markers up to the first scan.

    Returns:
        None unless the file is a Huffman-coded JPEG of one scan with 8 bits, gray or YCbCr, in a usual subsampling,
        with no more than `MAX_PIXELS`. Progressive files are none: they gain little and can bring scans without end.
    """
    start = data[: data.find(_SOS_BYTES) + _SOS_SIZE]
    return (_walk_start(start) if len(start) <= MAX_START_BYTES else None) or _walk(data)


def decode(data: bytes, header: Header) -> NDArray[np.uint8] | None:
    """Decode a file whose header `read_header` gave, to the very pixels that Pillow gives. The GIL is released.

    Returns:
        uint8 `[height, width, 3]`, RGB; None if libjpeg reports an error or as much as a warning.
    """
    return _decode(data, header, None)


def decode_for_now(data: bytes, header: Header) -> NDArray[np.uint8] | None:
    """Do what `decode` does, in memory that the same thread's next call writes over.

    Fresh memory for a photo costs 9 % of its decoding and resizing in page faults.
    """
    if not hasattr(_THREAD, "room"):
        _THREAD.room = np.empty(3 * MAX_PIXELS, np.uint8)
    return _decode(data, header, _THREAD.room)


def _decode(data: bytes, header: Header, room: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    try:
        # The exact DCT and the smooth upsampling are Pillow's; strict makes an error of a warning.
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, "RGB", fastdct=False, fastupsample=False, buffer=room, strict=True
        )
    except (ValueError, RuntimeError, MemoryError):
        return None
    return pixels if pixels.shape[:2] == (header.height, header.width) else None


@lru_cache(maxsize=256)
def _walk_start(start: bytes) -> Header | None:
    """Walk the start of a file, up to its first scan; what it says there does not depend on what comes after.

    Files of one encoder and size start alike: the 10,000 test images of CIFAR-10, as JPEGs, with the same 623 bytes.
    """
    return _walk(start)


def _walk(data: bytes) -> Header | None:
    if data[:2] != _SOI:
        return None
    try:
        return _walk_segments(data)
    except (struct.error, IndexError):  # the file ends before its first scan
        return None


def _walk_segments(data: bytes) -> Header | None:
    size: tuple[int, int] | None = None
    components = 0
    has_huffman_tables, plain = False, True
    position = 2
    while True:
        marker, length = _SEGMENT.unpack_from(data, position)
        body = position + 4
        position += 2 + length
        if length < 2 or position > len(data):
            return None
        if marker == _DHT:
            has_huffman_tables = True
        elif marker in _PASSED_OVER:
            pass
        elif marker in _FRAMES:
            if size is not None:
                return None
            components = data[body + 5]
            size = _size(data, body, length, components)
            if size is None:
                return None
        elif marker == _SOS:
            # Fewer components than the frame has: further scans follow, which libjpeg treats otherwise.
            if size is None or not has_huffman_tables or data[body] != components:
                return None
            return Header(size[0], size[1], plain)
        elif _APP0 <= marker <= _APP15:
            if not _is_harmless(data, marker, body, length):
                return None
            plain = plain and not _is_for_pillow(data, marker, body)
        else:
            return None


def _size(data: bytes, body: int, length: int, components: int) -> tuple[int, int] | None:
    """Width and height, if the frame is gray or YCbCr of 8 bits in one of the usual subsamplings."""
    if components == 3 and length == 17:
        bits, height, width, _, one, luma, two, blue, three, red = _COLOUR_FRAME.unpack_from(data, body)
        # Identifiers may spell RGB, or be a camera's invention that libjpeg must guess from.
        if (one, two, three) != (1, 2, 3) or blue != 0x11 or red != 0x11 or luma not in _LUMA_SAMPLING:
            return None
    elif components == 1 and length == 11:
        bits, height, width, _, _, luma = _GRAY_FRAME.unpack_from(data, body)
        if luma != 0x11:
            return None
    else:
        return None
    return (width, height) if bits == 8 and 0 < width * height <= MAX_PIXELS else None


def _is_harmless(data: bytes, marker: int, body: int, length: int) -> bool:
    """Whether neither Pillow stumbles over an application segment nor libjpeg takes other colours for it."""
    if marker == _APP0:
        return length >= 16 or not data.startswith(b"JFIF", body)
    if marker == _APP2:
        return length >= 16 or not data.startswith(_ICC, body)
    if marker == _APP14 and data.startswith(b"Adobe", body):
        return length >= 14 and data[body + 11] == 1
    return True


def _is_for_pillow(data: bytes, marker: int, body: int) -> bool:
    """Whether a segment may turn the picture (Exif, XMP), name further ones (MPO) or be one that Pillow takes apart."""
    return marker in _TAKEN_APART or (marker == _APP2 and not data.startswith(_ICC, body))
