"""Encoded image in, uint8 pixels out: the half of preprocessing that is not in the graph.

Owns decoding, orientation, resize and crop, to the letter of a bundle's `PixelRecipe`; training evaluates through
the same function. Knows nothing of requests, models' weights or threads.
"""

import struct
import warnings
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from app import jpeg
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
_ON_ITS_SIDE = (5, 6, 7, 8)
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
    pixels = decode_directly(data, recipe, max_pixels)
    return decode_with_pillow(data, recipe, max_pixels) if pixels is None else pixels


def decode_into(row: NDArray[np.uint8], data: bytes, recipe: PixelRecipe, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
    """Do what `decode` does, and leave the pixels in `row`, uint8 `[height, width, 3]`."""
    row[...] = decode(data, recipe, max_pixels)


def decode_with_pillow(data: bytes, recipe: PixelRecipe, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """Do what `decode` promises through Pillow alone, which reads every format and judges what is damaged."""
    with _open(data, max_pixels) as image:
        if image.format == "JPEG":
            _refuse_scan_bomb(data)
        try:
            _reduce_while_decoding(image, recipe)
            if recipe.exif == "apply":
                ImageOps.exif_transpose(image, in_place=True)
            return _fit(_to_rgb(image), recipe)
        except Image.DecompressionBombError as error:
            raise TooLargeError(f"The image is too large: {error}.", code="image_too_large") from error
        except _DAMAGE as error:
            raise BadImageError(f"The {image.format} image is damaged or incomplete: {_sentence(error)}.") from error


def decode_directly(data: bytes, recipe: PixelRecipe, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8] | None:
    """Do what `decode` promises for an ordinary, sound JPEG, without Pillow's file handling.

    Returns:
        The array that `decode_with_pillow` would return, bit for bit; None for whatever is not ordinary, too large
        or damaged. Scans need no counting here: an ordinary JPEG has one, and libjpeg reports a second as an error.

    Raises:
        BadImageError, TooLargeError: as `decode_with_pillow` would, for a header that Pillow has to read.
    """
    header = jpeg.read_header(data)
    if header is None:
        return None
    width, height, plain = header
    if width * height > max_pixels or max(width, height) > MAX_SIDE or _is_reduced(width, height, recipe):
        return None
    if plain and width == recipe.width and height == recipe.height and min(width, height) == recipe.resize_short_side:
        return jpeg.decode(data, header)
    try:
        orientation = 1 if plain else _orientation(data, recipe, max_pixels)
        if orientation is None or (pixels := jpeg.decode_for_now(data, header)) is None:
            return None
        image = Image.frombytes("RGB", (width, height), pixels)
        if orientation != 1:
            image.getexif()[ExifTags.Base.Orientation] = orientation
            ImageOps.exif_transpose(image, in_place=True)
        return _fit(image, recipe)
    except _DAMAGE:
        return None


def count_pixels(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> int:
    """Return how many pixels an image has, by its header.

    Raises:
        BadImageError, TooLargeError: as `decode` would.
    """
    header = jpeg.read_header(data)
    if header is not None and header.width * header.height <= max_pixels and max(header[:2]) <= MAX_SIDE:
        return header.width * header.height
    with _open(data, max_pixels) as image:
        return image.width * image.height


def upright_size(data: bytes) -> tuple[int, int]:
    """Return width and height of an image that has been decoded, as it is looked at, pixels."""
    header = jpeg.read_header(data)
    if header is not None and header.plain:
        return header.width, header.height
    with _open(data, MAX_SIDE**2) as image:
        lies = image.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE
        return (image.height, image.width) if lies else image.size


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
    if image.format != "JPEG":
        return
    if wanted := _wanted_size(image.width, image.height, recipe):
        # draft() takes the largest reduction whose result is not below the size asked for on either side.
        image.draft(None, wanted)


def _wanted_size(width: int, height: int, recipe: PixelRecipe) -> tuple[int, int] | None:
    """Width and height that the recipe lets a JPEG be reduced to; None if it must be decoded in full."""
    ratio = recipe.min_decode_ratio * recipe.resize_short_side / min(width, height)
    return (round(width * ratio), round(height * ratio)) if 0 < ratio < 1 else None


def _is_reduced(width: int, height: int, recipe: PixelRecipe) -> bool:
    wanted = _wanted_size(width, height, recipe)
    return wanted is not None and width >= 2 * wanted[0] and height >= 2 * wanted[1]


def _orientation(data: bytes, recipe: PixelRecipe, max_pixels: int) -> int | None:
    """Return the orientation as Pillow finds it in Exif or XMP; None if the file is not what its start says (MPO)."""
    with _open(data, max_pixels) as image:
        if image.format != "JPEG":
            return None
        orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1) if recipe.exif == "apply" else 1
        return orientation


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
