"""Data: what `--data` names, as pixels with labels.

Owns the choice between folders and archives, and the decoded arrays with their cache. Every file goes through
`app.images.decode`, the service's own decoder. Knows nothing of networks.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from app.cpus import usable_cpus
from app.errors import ConvoyError
from app.images import decode
from app.manifest import PixelRecipe
from training.atomic import replacing
from training.data.cifar import is_cifar, read_cifar
from training.data.listing import Listing, Picture, labels_of
from training.data.trees import read_tree
from training.errors import DataError
from training.progress import counting


@dataclass(frozen=True, slots=True)
class Split:
    """Decoded pictures: images uint8 `[n, height, width, 3]`, labels int64 `[n]`, and where each came from."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    pictures: tuple[Picture, ...]


def read_listing(path: Path, faults: list[DataError] | None = None) -> Listing:
    """List the data set at `path`: a folder of class folders, a CIFAR-10 archive, or such an archive unpacked.

    Args:
        path: where it is.
        faults: takes what single files of a folder have against them, which are then left out; without it the first
            such fault is raised.

    Raises:
        DataError: there is nothing, or it breaks a rule of its format.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: give --data a folder of class folders or a CIFAR-10 archive.")
    if is_cifar(path):
        return read_cifar(path)
    if not path.is_dir():
        raise DataError(f"{path} is neither a folder of class folders nor a CIFAR-10 archive (.tar.gz).")
    return read_tree(path, faults)


def load_split(pictures: Sequence[Picture], pixels: PixelRecipe, cache: Path) -> Split:
    """Decode pictures, or take the array that an earlier start left in `cache`.

    50,000 files of 32×32 take seconds to decode on two cores, and the array's header a millisecond to map.

    Raises:
        DataError: a picture cannot be decoded (the sentence names it), or the cache cannot be written.
    """
    labels = labels_of(pictures)
    if all(isinstance(picture.content, np.ndarray) and fits(picture.content, pixels) for picture in pictures):
        return Split(np.stack([np.asarray(picture.content) for picture in pictures]), labels, tuple(pictures))
    path = cache / f"{_key(pictures, pixels)}.npy"
    if not path.is_file():
        try:
            _check_writable(cache)
        except OSError as error:
            raise _unwritable(cache, error) from error
        images = _decode_all(pictures, pixels)
        try:
            with replacing(path) as file:
                np.save(file, images)
        except OSError as error:
            raise _unwritable(path, error) from error
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged: delete it, and the images are decoded again.") from error
    return Split(images, labels, tuple(pictures))


def fits(image: NDArray[np.uint8], pixels: PixelRecipe) -> bool:
    """Say whether `decode` would return the pixels as they are."""
    return image.shape[:2] == (pixels.height, pixels.width) == (pixels.resize_short_side,) * 2


def _check_writable(folder: Path) -> None:
    """Make the folder and a file in it, which vanishes: what cannot be kept need not be decoded."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be written ({error.strerror}): name another folder by --cache-dir.")


def _key(pictures: Sequence[Picture], pixels: PixelRecipe) -> str:
    """Digest everything that the array depends on: names, contents, recipe and decoder."""
    digest = hashlib.sha256(f"{pixels.model_dump_json()} pillow {PIL.__version__}".encode())
    for picture in pictures:
        digest.update(f"\n{picture.name}\0{picture.stamp}".encode())
    return digest.hexdigest()[:32]


def _decode_all(pictures: Sequence[Picture], pixels: PixelRecipe) -> NDArray[np.uint8]:
    """Decode on all cores: Pillow lets go of the interpreter while it works."""
    images = np.empty((len(pictures), pixels.height, pixels.width, 3), np.uint8)

    def decode_one(index: int) -> None:
        images[index] = decode_picture(pictures[index], pixels)

    with ThreadPoolExecutor(usable_cpus()) as pool, counting("Decoding", len(pictures)) as advance:
        try:
            for _ in pool.map(decode_one, range(len(pictures))):
                advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return images


def decode_picture(picture: Picture, pixels: PixelRecipe) -> NDArray[np.uint8]:
    """Decode one picture to uint8 `[height, width, 3]`.

    Raises:
        DataError: it cannot be decoded; the sentence names it.
    """
    try:
        data = picture.encoded()
    except OSError as error:
        raise DataError(f"{picture.content} cannot be read: {error.strerror}.") from error
    return decode_file(data, picture, pixels)


def decode_file(data: bytes, picture: Picture, pixels: PixelRecipe) -> NDArray[np.uint8]:
    """Decode the encoded bytes of a picture to uint8 `[height, width, 3]`.

    Raises:
        DataError: they cannot be decoded; the sentence names the picture.
    """
    try:
        return decode(data, pixels)
    except ConvoyError as error:
        name = picture.content if isinstance(picture.content, Path) else picture.name
        raise DataError(f"{name}: {error.message} Replace or remove it.") from error
