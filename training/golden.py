"""The golden set of a bundle: a few images whose answers change when anything about the service is wrong.

Some are the data set's own files. The others are made from it so that each field of the pixel recipe matters to one of
them; which pictures they are made from is searched, for the ones whose answer changes most under a wrong recipe.
Knows nothing of graphs or manifests: it asks a function for probabilities.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.golden import Run
from app.images import decode
from app.manifest import PixelRecipe
from training.data.arrays import decode_file, decode_picture
from training.data.listing import Picture
from training.data.metadata import EXIF_ORIENTATION, without_metadata

FILE_LIMIT_BYTES = 34_000
LARGE_LIMIT_BYTES = 60_000
"""Of the one that is large in pixels; with seven others the set stays below 300 kB."""
VERBATIM = 3
TRIED = 12
"""Sources tried for each image that is made."""
QUALITIES = (92, 85, 75, 60, 45, 30, 20, 12)
ROTATED = 6
SAFE_MARGIN = 0.05
"""Least distance of the likeliest label from the next, so that noise within the tolerance cannot change the label."""

Photo = Image.Image


@dataclass(frozen=True, slots=True)
class GoldenAnswers:
    """The chosen images, in order, with the probabilities that they give."""

    images: dict[str, bytes]
    probabilities: NDArray[np.float32]
    detects: dict[str, float]
    """For each wrong recipe, the largest change of a probability that it causes."""


def choose_golden(pictures: Sequence[Picture], pixels: PixelRecipe, run: Run, seed: int = 0) -> GoldenAnswers:
    """Choose about eight images, at most 300 kB in all.

    Raises:
        DataError: a picture cannot be read or decoded; the sentence names it.
    """
    order = np.random.default_rng(seed).permutation(len(pictures)).tolist()
    images = _verbatim([pictures[index] for index in order], pixels, run)
    sources = [_photo(pictures[index], pixels) for index in order[: TRIED * 2]]
    for name, make in _MAKERS.items():
        tried = [make(_turned(sources, start), pixels) for start in range(min(TRIED, len(sources)))]
        images[name] = max(tried, key=lambda data: _sensitivity(data, pixels, run))
    encoded = list(images.values())
    right = run(_decode(encoded, pixels))
    return GoldenAnswers(images, right, detected(encoded, pixels, right, run))


def detected(encoded: Sequence[bytes], pixels: PixelRecipe, right: NDArray[np.float32], run: Run) -> dict[str, float]:
    """Return, for each wrong recipe, the largest change that it causes of the probabilities `right` of these images."""
    return {name: float(np.abs(run(_decode(encoded, wrong)) - right).max()) for name, wrong in wrong_recipes(pixels)}


def wrong_recipes(pixels: PixelRecipe) -> Iterator[tuple[str, PixelRecipe]]:
    """Yield the mistakes that a golden set should detect, each a recipe that differs in one field."""
    short, ratio = pixels.resize_short_side, pixels.min_decode_ratio
    other_shorts = {short + max(1, short // 8), max(pixels.height, pixels.width)} - {short}
    changes: list[dict[str, object]] = [{"resize_short_side": other} for other in sorted(other_shorts)]
    changes += [
        {"interpolation": other} for other in ("bilinear", "bicubic", "lanczos") if other != pixels.interpolation
    ]
    changes.append({"exif": "ignore" if pixels.exif == "apply" else "apply"})
    changes += [{"min_decode_ratio": other} for other in ((0.0, ratio / 2, ratio * 2) if ratio else (2.0,))]
    for change in changes:
        ((field, value),) = change.items()
        yield f"{field}={value}", pixels.model_copy(update=change)


# ---------------------------------------------------------------- the images


def _verbatim(pictures: Sequence[Picture], pixels: PixelRecipe, run: Run) -> dict[str, bytes]:
    """Take files as they are but for their metadata: a bundle is passed on, and where a photo was taken is not ours.

    The surest answers among the first, of different labels as far as there are.
    """
    small = [(picture, data) for picture in pictures[: TRIED * 8] if (data := _small_file(picture, pixels))]
    if not small:
        return {}
    rows = run(np.stack([decode_file(data, picture, pixels) for picture, data in small]))
    surest = np.argsort(-_margins(rows), kind="stable")
    _, first_of_label = np.unique(rows[surest].argmax(axis=1), return_index=True)
    ordered = [*np.sort(first_of_label), *np.setdiff1d(np.arange(len(surest)), first_of_label)]
    chosen = [small[surest[place]][1] for place in ordered[:VERBATIM]]
    return {f"verbatim-{number}.{_suffix(data)}": data for number, data in enumerate(chosen, 1)}


def _small_file(picture: Picture, pixels: PixelRecipe) -> bytes | None:
    """Return a picture's file, without metadata; None where it is too large, or its metadata cannot be cut out."""
    data = picture.encoded()
    if len(data) > FILE_LIMIT_BYTES:
        return None
    decode_file(data, picture, pixels)
    return without_metadata(data)


def _as_png(sources: Sequence[Photo], pixels: PixelRecipe) -> bytes:
    photo = sources[0]
    while len(data := _encode(photo, "PNG")) > FILE_LIMIT_BYTES:
        photo = photo.resize((max(1, photo.width * 3 // 4), max(1, photo.height * 3 // 4)))
    return data


def _odd(sources: Sequence[Photo], pixels: PixelRecipe) -> bytes:
    """Make both sides odd, unequal, and larger than the resize: resize, interpolation and crop all matter."""
    short = pixels.resize_short_side * 5 // 4 | 1
    return _small_jpeg(sources[0].resize((short * 3 // 2 | 1, short)))


def _rotated(sources: Sequence[Photo], pixels: PixelRecipe) -> bytes:
    """Lay the picture on its side, with the tag that sets it upright again."""
    short = pixels.resize_short_side
    upright = sources[0].resize((short, short * 5 // 4))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = ROTATED
    return _small_jpeg(upright.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes())


def _gray(sources: Sequence[Photo], pixels: PixelRecipe) -> bytes:
    return _small_jpeg(sources[0].convert("L"))


def _large(sources: Sequence[Photo], pixels: PixelRecipe) -> bytes:
    """Tile pictures into one so large that a JPEG decoder may reduce it: tiles keep the detail that upscaling lacks."""
    short = pixels.resize_short_side
    reduction = 4 if short <= 64 else 2
    height = round(reduction * short * (pixels.min_decode_ratio or 2.0)) + 3
    width = height * 9 // 8
    rows = min(max(1, round(height / min(sources[0].size))), math.isqrt(len(sources)))
    sheet = Image.new("RGB", (width, height))
    for index in range(rows * rows):
        left, right = (width * column // rows for column in (index % rows, index % rows + 1))
        top, bottom = (height * row // rows for row in (index // rows, index // rows + 1))
        sheet.paste(sources[index].resize((right - left, bottom - top)), (left, top))
    return _small_jpeg(sheet, limit_bytes=LARGE_LIMIT_BYTES)


_MAKERS: dict[str, Callable[[Sequence[Photo], PixelRecipe], bytes]] = {
    "png.png": _as_png,
    "odd.jpg": _odd,
    "rotated.jpg": _rotated,
    "large.jpg": _large,
    "gray.jpg": _gray,
}


def _photo(picture: Picture, pixels: PixelRecipe) -> Photo:
    """Return a picture to make others from: its pixels alone, for Pillow would write its comment into them."""
    decode_picture(picture, pixels)
    photo = Image.open(BytesIO(picture.encoded())).convert("RGB")
    photo.info.clear()
    return photo


def _turned(sources: Sequence[Photo], start: int) -> Sequence[Photo]:
    return [*sources[start:], *sources[:start]]


def _small_jpeg(photo: Photo, exif: bytes = b"", limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
    """Encode at the best quality that fits, or at the worst there is."""
    for quality in QUALITIES:
        data = _encode(photo, "JPEG", quality=quality, exif=exif)
        if len(data) <= limit_bytes:
            break
    return data


def _encode(photo: Photo, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    photo.save(buffer, kind, **options)
    return buffer.getvalue()


def _suffix(data: bytes) -> str:
    return {b"\xff\xd8": "jpg", b"\x89P": "png"}.get(data[:2], "webp")


# ---------------------------------------------------------------- how much an image shows


def _sensitivity(data: bytes, pixels: PixelRecipe, run: Run) -> float:
    """Return the least change of a probability under those wrong recipes that change the image's pixels at all.

    An image whose label is in doubt would fail on harmless noise, so its margin, where small, counts instead.
    """
    right = decode(data, pixels)
    wrong = [decode(data, recipe) for _, recipe in wrong_recipes(pixels)]
    rows = run(np.stack([right, *(image for image in wrong if not np.array_equal(image, right))]))
    margin = float(_margins(rows[:1])[0])
    changes = np.abs(rows[1:] - rows[0]).max(axis=1, initial=0)
    if margin < SAFE_MARGIN:
        return margin - 1
    return float(changes.min(initial=1))


def _margins(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the distance between the two likeliest labels of each row."""
    ordered = np.sort(rows, axis=1)
    margins: NDArray[np.float32] = ordered[:, -1] - ordered[:, -2]
    return margins


def _decode(encoded: Sequence[bytes], pixels: PixelRecipe) -> NDArray[np.uint8]:
    return np.stack([decode(data, pixels) for data in encoded])
