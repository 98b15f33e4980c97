"""What a photo's file says beside its pixels: place, camera, hour, comments. Cut out before the file is passed on."""

import struct
from collections.abc import Iterator
from io import BytesIO

from PIL import Image

EXIF_ORIENTATION = 0x0112
TURNED = range(2, 9)

START, END, SCAN = 0xD8, 0xD9, 0xDA
RESTARTS = range(0xD0, 0xD8)
APPLICATION, COMMENT = range(0xE0, 0xF0), 0xFE
KEPT = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}
"""Applications' segments that say how to read the pixels; a segment of that number that begins otherwise is dropped."""


def without_metadata(data: bytes) -> bytes | None:
    """Return an image file without EXIF, XMP, IPTC and comments, its pixels and orientation untouched.

    A file that carries none is returned as it is. None: it carries some and is no JPEG, from which alone they can be
    cut without coding anything anew, or it is not built as a JPEG should be.
    """
    if not data.startswith(b"\xff\xd8"):
        return None if _carries_metadata(data) else data
    try:
        kept = b"".join(part for part in _parts(data) if not _is_metadata(part))
    except (IndexError, struct.error):  # it ends early
        return None
    if kept == data:
        return data
    try:
        return kept[:2] + _orientation_segment(data) + kept[2:]
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):  # Pillow's for damaged EXIF
        return None


def _carries_metadata(data: bytes) -> bool:
    with Image.open(BytesIO(data)) as image:
        # What PNG writes after its pixels is known only once they are read.
        image.load()
        texts = getattr(image, "text", {})
        return bool(texts) or bool(image.getexif()) or any(key in image.info for key in ("exif", "xmp", "comment"))


def _parts(data: bytes) -> Iterator[bytes]:
    """Yield a JPEG's segments, each scan with its coded pixels, from start to end; what follows the end is left out.

    Raises:
        IndexError, struct.error: it ends early or holds something else between two segments.
    """
    yield data[:2]
    at = 2
    while True:
        while data[at + 1] == 0xFF:
            at += 1
        if data[at] != 0xFF:
            raise IndexError(at)
        code = data[at + 1]
        if code == END:
            yield data[at : at + 2]
            return
        after = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if code == SCAN:
            after = _end_of_scan(data, after)
        yield data[at:after]
        at = after


def _end_of_scan(data: bytes, at: int) -> int:
    """Return where the next segment begins: 0xFF within coded pixels is followed by 0 or by a restart's number."""
    while True:
        at = data.find(b"\xff", at)
        if at < 0:
            raise IndexError(at)
        if data[at + 1] != 0 and data[at + 1] not in RESTARTS:
            return at
        at += 2


def _is_metadata(part: bytes) -> bool:
    code = part[1]
    if code in KEPT:
        return not part[4:].startswith(KEPT[code])
    return code == COMMENT or code in APPLICATION


def _orientation_segment(data: bytes) -> bytes:
    """Return the EXIF segment that says no more than how the picture is turned, or nothing where it is upright."""
    with Image.open(BytesIO(data)) as image:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    if orientation not in TURNED:
        return b""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    content = exif.tobytes()
    return struct.pack(">HH", 0xFFE1, len(content) + 2) + content
