"""Encoded image in, uint8 pixels out: the half of preprocessing that is not in the graph.

Owns decoding, orientation, resize and crop, to the letter of a bundle's `PixelRecipe`; training evaluates through
the same function. Knows nothing of requests, models' weights or threads.
"""

import struct
import warnings
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from app.errors import BadImageError, TooLargeError
from app.manifest import PixelRecipe

FORMATS = ("JPEG", "PNG", "WEBP")
DEFAULT_MAX_PIXELS = 50_000_000
MAX_SIDE = 32_768
MAX_SCANS = 200
"""A progressive JPEG has about ten. Each costs 5 ms at 50 megapixels, and empty ones 75 bytes: 9,000 fit in 800 kB."""

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# What Pillow raises on damaged files, beside UnidentifiedImageError (a subclass of OSError).
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    MemoryError,
)


def decode(data: bytes, recipe: PixelRecipe, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image and bring it to the size that the graph takes.

    Args:
        data: a JPEG, PNG or WebP file; of an animation the first frame is taken.
        recipe: the bundle's pixel recipe.
        max_pixels: refuse more pixels than this, judged by the header, before anything is decoded.

    Returns:
        uint8 `[height, width, 3]`, RGB. Transparency is dropped, not blended, as training loaders do.

    Raises:
        BadImageError: not one of the formats, or damaged.
        TooLargeError: more than `max_pixels`, or a side above 32,768.
    """
    with _open(data, max_pixels) as image:
        if image.format == "JPEG":
            _refuse_scan_bomb(data)
        try:
            _reduce_while_decoding(image, recipe)
            return _fit(_to_rgb(_upright(image, recipe)), recipe)
        except Image.DecompressionBombError as error:
            raise TooLargeError(f"The image is too large: {error}.", code="image_too_large") from error
        except _DAMAGE as error:
            raise BadImageError(f"The {image.format} image is damaged or incomplete: {_sentence(error)}.") from error


def count_pixels(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> int:
    """Return how many pixels an image has, by its header.

    Raises:
        BadImageError, TooLargeError: as `decode` would.
    """
    with _open(data, max_pixels) as image:
        return image.width * image.height


def forbid_pillow_guesses() -> None:
    """Switch off Pillow's own pixel limit, and its remarks on odd files, which any client could fill a log with.

    `decode` judges every image by its header before it decodes; Pillow's limit warns at 89 megapixels and refuses at
    twice that, whatever the service's own limit says.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _refuse_scan_bomb(data: bytes) -> None:
    # In entropy-coded data 0xFF is followed by 0x00, so this counts the scans, and a few bytes of metadata by chance.
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise BadImageError(f"The JPEG image has {scans} scans; at most {MAX_SCANS} are decoded.")


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImageError("The image is empty.")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImageError("The data is not a JPEG, PNG or WebP image.") from None
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"The image is too large: {error}.", code="image_too_large") from error
    except _DAMAGE as error:
        raise BadImageError(f"The image's header is damaged: {_sentence(error)}.") from error
    width, height = image.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise TooLargeError(
            f"The image has {width}×{height} pixels; at most {max_pixels:,} in all and {MAX_SIDE:,} a side are taken.",
            code="image_too_large",
        )
    return image


def _reduce_while_decoding(image: Image.Image, recipe: PixelRecipe) -> None:
    """Let libjpeg decode at 1/2, 1/4 or 1/8 scale where the recipe allows it.

    A photo of 12 megapixels costs 94 ms in full and 27 ms so, on one core (benchmarks/results/costs.json).
    """
    if image.format != "JPEG" or not recipe.min_decode_ratio:
        return
    ratio = recipe.min_decode_ratio * recipe.resize_short_side / min(image.size)
    if ratio < 1:
        # draft() takes the largest reduction whose result is not below the size asked for on either side.
        image.draft(None, (round(image.width * ratio), round(image.height * ratio)))


def _upright(image: Image.Image, recipe: PixelRecipe) -> Image.Image:
    return ImageOps.exif_transpose(image) if recipe.exif == "apply" else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit gray to 255 on conversion: keep the high byte instead.
        gray = (np.asarray(image) >> 8).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _fit(image: Image.Image, recipe: PixelRecipe) -> NDArray[np.uint8]:
    """Resize the short side and crop the centre in one step: only pixels that survive the crop are computed.

    The box is the crop in source coordinates, from the *rounded* size that resize-then-crop would have had, which
    keeps every pixel within one level of that (tests/app/test_images.py).
    """
    width, height = image.size
    scale = recipe.resize_short_side / min(width, height)
    resized_width, resized_height = round(width * scale), round(height * scale)
    if (resized_width, resized_height) == (width, height) == (recipe.width, recipe.height):
        return np.asarray(image)
    left, top = (resized_width - recipe.width) // 2, (resized_height - recipe.height) // 2
    per_column, per_row = width / resized_width, height / resized_height
    box = (
        left * per_column,
        top * per_row,
        min((left + recipe.width) * per_column, width),
        min((top + recipe.height) * per_row, height),
    )
    fitted = image.resize((recipe.width, recipe.height), _RESAMPLING[recipe.interpolation], box=box)
    return np.asarray(fitted)


def _sentence(error: BaseException) -> str:
    return str(error).rstrip(".") or type(error).__name__
