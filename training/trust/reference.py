"""What a model's inputs and answers look like when all is well: histograms that traffic can be compared with.

Arrays and encoded pictures in, the manifest's record out. Knows no model.
"""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.trust import Histogram, Reference
from training.data.listing import Picture
from training.data.metadata import EXIF_ORIENTATION
from training.trust.calibration import Floats

SHARES = np.linspace(0, 1, 21)
LEVELS = np.linspace(0, 256, 33)
DEVIATIONS = np.linspace(0, 128, 33)
SIDES = np.round(2 ** np.arange(3, 14.5, 0.5), 1)
"""Pixels, 8 to 11,585: two bins an octave."""
SIZES = 2.0 ** np.arange(8, 26)
"""Bytes, 256 to 33 million: a bin an octave."""
LUMA = np.array([0.299, 0.587, 0.114])
PART = 500
_ON_ITS_SIDE = (5, 6, 7, 8)


def describe(
    probabilities: Floats, images: NDArray[np.uint8], pictures: Sequence[Picture], classes: int, data: str
) -> Reference:
    """Count what the manifest's reference holds.

    Args:
        probabilities: `[n, classes]`, at the graph's temperature.
        images: uint8 `[n, height, width, 3]`, as the graph takes them.
        pictures: the files that they were decoded from; may be out of an archive of pixels.
        classes: how many labels there are.
        data: which images these are, for people.
    """
    brightness, contrast = luma_of(images)
    widths, heights, sizes = sizes_of(pictures)
    return Reference(
        data=data,
        images=len(images),
        confidence=histogram(probabilities.max(axis=1), SHARES),
        entropy=histogram(entropy_of(probabilities), SHARES),
        predicted=tuple(np.bincount(probabilities.argmax(axis=1), minlength=classes).tolist()),
        brightness=histogram(brightness, LEVELS),
        contrast=histogram(contrast, DEVIATIONS),
        width=histogram(widths, SIDES),
        height=histogram(heights, SIDES),
        size_bytes=histogram(sizes, SIZES) if len(sizes) else None,
    )


def histogram(values: Floats | NDArray[np.int64], edges: Floats) -> Histogram:
    """Count values between rising edges; what lies beyond the outer edges goes into the outer bins."""
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(places, minlength=len(edges) - 1)
    return Histogram(edges=tuple(np.round(edges, 6).tolist()), counts=tuple(counts.tolist()))


def entropy_of(probabilities: Floats) -> NDArray[np.float64]:
    """Return the entropy of each row as a share of the largest there can be, log(classes): `[n]`, 0-1."""
    exact = probabilities.astype(np.float64)
    logs = np.log(exact, where=exact > 0, out=np.zeros_like(exact))
    return np.asarray(-(exact * logs).sum(axis=1) / np.log(exact.shape[1]))


def luma_of(images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of the luma of each of the images, uint8 `[n, h, w, 3]`: each `[n]`."""
    means, deviations = [], []
    for start in range(0, len(images), PART):
        luma = np.asarray(images[start : start + PART]) @ LUMA
        means.append(luma.mean(axis=(1, 2)))
        deviations.append(luma.std(axis=(1, 2)))
    return np.concatenate(means), np.concatenate(deviations)


def sizes_of(pictures: Sequence[Picture]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return upright width and height of each picture, pixels, and the bytes of those that are files."""
    sides, sizes = [], []
    for picture in pictures:
        if isinstance(picture.content, np.ndarray):
            sides.append((picture.content.shape[1], picture.content.shape[0]))
            continue
        data = picture.encoded()
        sizes.append(len(data))
        with Image.open(BytesIO(data)) as image:
            lies = image.getexif().get(EXIF_ORIENTATION) in _ON_ITS_SIDE
            sides.append(image.size[::-1] if lies else image.size)
    widths, heights = np.array(sides, np.int64).reshape(-1, 2).T
    return widths, heights, np.array(sizes, np.int64)
