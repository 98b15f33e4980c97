"""One pass over the files: what each is, whether it decodes, and the little of its pixels that is kept.

Owns what is known of a single file. Every file goes through `app.images.decode`, as in training and serving; of its
pixels only a digest and a thumbnail of 768 bytes stay. Never compares two files.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from app.cpus import usable_cpus
from app.errors import ConvoyError
from app.images import FORMATS, decode
from app.manifest import PixelRecipe
from training.data.listing import Picture
from training.progress import counting

SIDE = 32
THUMB = 16
PIXELS = PixelRecipe(height=SIDE, width=SIDE, resize_short_side=SIDE)
"""A file is judged on its centre square at this size."""
SUFFIXES = {"JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",)}
STILL = ("JPEG", "MPO")
"""Formats without animation; the further pictures of an MPO are previews or the other eye's."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one file is."""

    content: bytes
    """SHA-256 of the file, or of the pixels of a picture out of an archive."""
    size_bytes: int
    kind: str = ""
    """Pillow's name of the format, by the content; empty where it is none that Pillow knows."""
    mode: str = ""
    width: int = 0
    height: int = 0
    frames: int = 1
    fault: str = ""
    """Why it cannot be decoded, a sentence; empty where it can."""
    is_guessed: bool = False
    """libjpeg found the data damaged and filled in what was missing."""
    seen: bytes = b""
    """SHA-256 of size and centre square: pictures of the same pixels agree in it."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Every file of a data set, looked at."""

    pictures: tuple[Picture, ...]
    looks: tuple[Look, ...]
    thumbs: NDArray[np.uint8]
    """`[n, 16, 16, 3]`, zeros where a file does not decode."""

    @property
    def sound(self) -> NDArray[np.int64]:
        """The places of the pictures that decode, int64 `[m]`."""
        return np.array([place for place, look in enumerate(self.looks) if not look.fault], np.int64)


def survey(pictures: Sequence[Picture]) -> Survey:
    """Read and decode every picture once, on all cores."""
    thumbs = np.zeros((len(pictures), THUMB, THUMB, 3), np.uint8)
    looks: list[Look] = []

    def look_at(place: int) -> Look:
        look, square = examine(pictures[place])
        if square is not None:
            thumbs[place] = shrink(square)
        return look

    with ThreadPoolExecutor(usable_cpus()) as pool, counting("Looking", len(pictures)) as advance:
        try:
            for look in pool.map(look_at, range(len(pictures))):
                looks.append(look)
                advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Survey(tuple(pictures), tuple(looks), thumbs)


def examine(picture: Picture) -> tuple[Look, NDArray[np.uint8] | None]:
    """Look at one picture; its centre square, uint8 `[32, 32, 3]`, or None where it does not decode."""
    look, data = _read(picture)
    if look.fault:
        return look, None
    try:
        square = decode(data, PIXELS)
    except ConvoyError as error:
        return replace(look, fault=error.message), None
    seen = hashlib.sha256(f"{look.width} {look.height} ".encode() + square.tobytes()).digest()
    return replace(look, seen=seen, is_guessed=look.kind in STILL and _is_guessed(data, look.mode)), square


def look_at_file(picture: Picture) -> Look:
    """Read a picture's file and its header, without decoding it."""
    return _read(picture)[0]


def _read(picture: Picture) -> tuple[Look, bytes]:
    try:
        data = picture.encoded()
    except OSError as error:
        return Look(b"", 0, fault=f"The file cannot be read: {error.strerror}."), b""
    own = data if isinstance(picture.content, Path) else picture.content.tobytes()
    return Look(hashlib.sha256(own).digest(), len(own), *_header(data)), data


def shrink(square: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average 2×2 pixels: uint8 `[32, 32, 3]` → `[16, 16, 3]`."""
    step = SIDE // THUMB
    small: NDArray[np.uint8] = square.reshape(THUMB, step, THUMB, step, 3).mean((1, 3)).round().astype(np.uint8)
    return small


def whole_pixels(picture: Picture) -> bytes:
    """Return the digest of all pixels at full size, upright and as RGB; for a picture that decodes."""
    with Image.open(BytesIO(picture.encoded()), formats=FORMATS) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return hashlib.sha256(f"{upright.size} ".encode() + upright.tobytes()).digest()


def _header(data: bytes) -> tuple[str, str, int, int, int]:
    """Return format, mode, width, height and frames, as far as Pillow can tell."""
    try:
        with Image.open(BytesIO(data)) as image:
            frames = 1 if image.format in STILL else getattr(image, "n_frames", 1)
            return image.format or "", image.mode, image.width, image.height, frames
    except Exception:  # a damaged file of any of Pillow's formats, each with exceptions of its own
        return "", "", 0, 0, 1


def _is_guessed(data: bytes, mode: str) -> bool:
    """Ask libjpeg, which Pillow lets pass over damage in silence, at the smallest scale it can decode at."""
    if mode not in ("RGB", "L"):
        return False
    try:
        simplejpeg.decode_jpeg(data, "RGB" if mode == "RGB" else "GRAY", min_height=1, min_width=1, strict=True)
    except (ValueError, RuntimeError):
        return True
    return False
