"""Whatever a caller has becomes encoded images, and a list of them becomes parts that fit into one request each.

Owns reading, encoding and splitting. Loads neither NumPy nor Pillow: who hands over an object of theirs has done so.
"""

import io
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, Union

from convoy.errors import BadImageError, ConvoyError

if TYPE_CHECKING:  # at run time they are the caller's to load
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

ImageLike: TypeAlias = Union[
    str, os.PathLike[str], bytes, bytearray, memoryview, BinaryIO, "Image", "NDArray[np.uint8]"
]
"""An image file by its path; encoded bytes (JPEG, PNG, WebP); a file open for reading them; a Pillow image; or pixels,
uint8 `[height, width, 3]` in RGB or `[height, width]` in gray."""

_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
_ORIENTATION = 0x0112
_QUICK = 1
"""zlib level: pixels are sent once, so little time is worth more than few bytes."""


@dataclass(slots=True)
class Part:
    """Images for one request, each with its place in the call, and those that could not be read."""

    images: list[tuple[int, bytes]] = field(default_factory=list)
    faults: dict[int, ConvoyError] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images) + len(self.faults)


def split(
    images: Iterable[ImageLike], max_images: int, max_bytes: int, overhead: int, *, keep_faults: bool
) -> Iterator[Part]:
    """Yield the images in parts, in order, each read only when its part is asked for.

    Args:
        images: as `encoded` takes them.
        max_images: images of a part at most.
        max_bytes: of a part, unless it is of one image: what is too large alone is the service's to refuse.
        overhead: bytes that go with each image.
        keep_faults: an image that cannot be read becomes a fault of its part.

    Raises:
        BadImageError: one cannot be read, and faults are not kept.
        TypeError: one is nothing that can be an image.
    """
    part, size = Part(), 0
    for index, image in enumerate(images):
        try:
            data = encoded(image)
        except BadImageError as fault:
            placed = fault.of_image(index, among=True)
            if not keep_faults:
                raise placed from fault
            part.faults[index] = placed
        else:
            if part.images and size + len(data) + overhead > max_bytes:
                yield part
                part, size = Part(), 0
            part.images.append((index, data))
            size += len(data) + overhead
        if len(part) >= max_images:
            yield part
            part, size = Part(), 0
    if len(part):
        yield part


def is_single(images: object) -> bool:
    """Return whether this is one image by mistake, though it could be iterated: over characters, lines, rows."""
    single = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike) or hasattr(images, "read")
    return single or getattr(images, "ndim", 4) != 4


def encoded(image: ImageLike) -> bytes:
    """Return an image as an encoded file; pixels become a PNG, which loses nothing.

    Raises:
        BadImageError: it cannot be read, is empty, or its pixels are not of the shape and type that is taken.
        TypeError: it is nothing that can be an image.
    """
    data = _encoded(image)
    if not data:
        raise BadImageError("The image is empty.", code="bad_image")
    return data


def _encoded(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return _file(Path(image))
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(image, pil.Image):
        return _png(image)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(image, numpy.ndarray):
        return _png_of_pixels(image)
    if hasattr(image, "read"):
        data = image.read()
        if isinstance(data, bytes):
            return data
        raise TypeError("A file with an image is opened in binary mode: open(path, 'rb').")
    raise TypeError(f"An object of type {type(image).__name__} is no image: {_TAKEN}.")


_TAKEN = "give a path, bytes, a binary file, a Pillow image or a uint8 array"


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        sentence = f"The file {path} cannot be read: {error.strerror}."
        raise BadImageError(sentence, code="unreadable") from error


def _png_of_pixels(pixels: Any) -> bytes:
    is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if pixels.dtype != "uint8" or not is_image or not pixels.size:
        shape = ", ".join(map(str, pixels.shape))
        raise BadImageError(
            f"An array of {pixels.dtype} [{shape}] is no image: give uint8 [height, width, 3] in RGB.",
            code="bad_image",
        )
    from PIL import Image

    return _png(Image.fromarray(pixels))


def _png(image: "Image") -> bytes:
    """Return a Pillow image as a PNG, with its orientation: whether that counts is the model's recipe to say."""
    from PIL import Image

    buffer = io.BytesIO()
    exif = Image.Exif()
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
        if orientation != 1:
            exif[_ORIENTATION] = orientation
        if image.mode not in _PNG_MODES:
            image = image.convert("I;16" if image.mode == "I" else "RGB")
        image.save(buffer, "PNG", compress_level=_QUICK, exif=exif.tobytes() if orientation != 1 else b"")
    except (OSError, ValueError, SyntaxError) as error:
        sentence = f"The Pillow image cannot be encoded: {str(error).rstrip('.')}."
        raise BadImageError(sentence, code="bad_image") from error
    return buffer.getvalue()
