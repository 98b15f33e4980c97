"""What a data set holds before anything is decoded: named pictures, their labels, and how they are split.

Pure records and the arithmetic of the split; reads nothing from disk but one picture's own bytes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.errors import DataError

TRAIN, TEST = "train", "test"
ALL = "all"


@dataclass(frozen=True, slots=True)
class Picture:
    """One labelled picture: an encoded file, or pixels out of an archive."""

    name: str
    """Unique in its data set, and what a sentence calls it: `test/cat/0001.jpg`."""
    label: int
    stamp: str
    """Changes when the content does: size and time of a file, digest of pixels."""
    content: Path | NDArray[np.uint8]
    """The file, or uint8 `[height, width, 3]`."""

    def encoded(self) -> bytes:
        """Return the picture as a file: its own bytes, or its pixels as PNG, which loses nothing."""
        if isinstance(self.content, Path):
            return self.content.read_bytes()
        buffer = BytesIO()
        Image.fromarray(self.content).save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Origin:
    """What a model was trained on, and how test images were kept from it where the data has no test part."""

    data: str = ""
    """The path as it was given; empty where it is not known."""
    digest: str = ""
    """The digest of the listing, divided as it was; empty where it is not known."""
    test_fraction: float = 0.2
    seed: int = 0
    validation_fraction: float = 0.0


@dataclass(frozen=True, slots=True)
class Listing:
    """The classes and the pictures of a data set; `test` is None where the data does not say which are for test."""

    classes: tuple[str, ...]
    train: tuple[Picture, ...]
    test: tuple[Picture, ...] | None

    @property
    def digest(self) -> str:
        """Identify the data set by its classes, names and labels, wherever it lies."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for picture in self.part(ALL):
            digest.update(f"\n{picture.name}\0{picture.label}".encode())
        return digest.hexdigest()

    def part(self, name: str) -> tuple[Picture, ...]:
        """Return the pictures of `train`, `test` or `all`."""
        if name == ALL:
            return self.train + (self.test or ())
        return self.train if name == TRAIN else (self.test or ())

    def relabelled(self, labels: tuple[str, ...]) -> "Listing":
        """Number the classes as a model does; the data may lack some of its labels.

        Raises:
            DataError: the model does not know one of the classes.
        """
        for name in self.classes:
            if name not in labels:
                raise DataError(
                    f"The model has no label '{name}', which the data has: rename or remove that class folder."
                )
        places = [labels.index(name) for name in self.classes]
        train, test = (
            tuple(replace(picture, label=places[picture.label]) for picture in part)
            for part in (self.train, self.test or ())
        )
        return Listing(labels, train, None if self.test is None else test)

    def split(self, test_fraction: float, seed: int) -> "Listing":
        """Hold out the same share of every class, drawn from `seed`; a listing with its own test part stays as it is.

        Raises:
            DataError: a class has a single picture, which cannot be both trained on and tested.
        """
        if self.test is not None:
            return self
        held_out: set[int] = set()
        labels = np.array([picture.label for picture in self.train])
        for label, name in enumerate(self.classes):
            members = np.flatnonzero(labels == label)
            if len(members) == 1:
                raise DataError(
                    f"The class '{name}' has one image, and needs two to be split into train and test: add images, "
                    "or give the data a train/ and a test/ folder."
                )
            count = min(max(1, round(len(members) * test_fraction)), max(0, len(members) - 1))
            held_out |= set(np.random.default_rng([seed, label]).permutation(members)[:count].tolist())
        return Listing(
            self.classes,
            train=tuple(picture for index, picture in enumerate(self.train) if index not in held_out),
            test=tuple(self.train[index] for index in sorted(held_out)),
        )

    def hold_out(self, fraction: float, seed: int) -> "tuple[Listing, tuple[Picture, ...]]":
        """Cut a validation part from train, the same share of every class, drawn from `seed`; test stays as it is.

        Take the digest before: it tells of all the images, this of some. A class keeps at least one image to train
        on, and one with a single image gives none.

        Returns:
            The listing that is left to train and test on, and the pictures held out.

        Raises:
            DataError: every class has a single image, so there is none to hold out.
        """
        held_out: set[int] = set()
        labels = np.array([picture.label for picture in self.train])
        for label in range(len(self.classes)) if fraction else ():
            members = np.flatnonzero(labels == label)
            count = min(max(1, round(len(members) * fraction)), max(0, len(members) - 1))
            # A number more than split() draws with: else the first to be held out would be those that came next there.
            held_out |= set(np.random.default_rng([seed, label, 1]).permutation(members)[:count].tolist())
        if fraction and not held_out:
            raise DataError(
                "No class has two images to train on, so none can be held out: add images, or leave "
                "--validation-fraction out."
            )
        rest = replace(self, train=tuple(self.train[index] for index in range(len(labels)) if index not in held_out))
        return rest, tuple(self.train[index] for index in sorted(held_out))


def validation_of(listing: Listing, data: Path, origin: Origin) -> tuple[Picture, ...]:
    """Return the pictures that were held out from a training's train part, for calibration; none where none were.

    Raises:
        DataError: its images are not those of the training, so that the draw would give images trained on.
    """
    if not origin.validation_fraction:
        return ()
    divided = _divided(listing, origin)
    if divided is None or divided.digest != origin.digest:
        raise DataError(
            f"{data} does not hold the very images that the model was trained on, so which were held out for "
            "validation cannot be told: restore it, or train anew."
        )
    return divided.hold_out(origin.validation_fraction, origin.seed)[1]


def kept_from_training(listing: Listing, data: Path, origin: Origin) -> Listing:
    """Divide a listing as it was divided for training; one with its own test part stays as it is.

    Raises:
        DataError: its images are not those of the training, so that the draw would give others: trained images would
            be measured as if they were new.
    """
    if listing.test is not None:
        return listing
    divided = _divided(listing, origin)
    if divided is None or divided.digest != origin.digest:
        raise DataError(
            f"{data} does not hold the very images that the model was trained on, so which were kept from training "
            "cannot be told: restore it, train anew, or give --data a folder with train/ and test/."
        )
    return divided


def choose_part(
    listing: Listing, data: Path, origin: Origin, wanted: str | None = None
) -> tuple[str, tuple[Picture, ...], str]:
    """Choose what to measure a model on.

    By default the data's own test part; else what was held out, if this is the data of the training; else, for the
    model has seen none of it, everything.

    Args:
        listing: numbered as the model numbers its labels.
        data: the listing's path.
        origin: what the model was trained on.
        wanted: `train`, `test` or `all`, where someone asked for it.

    Returns:
        The part's name, its pictures, and words for both.

    Raises:
        DataError: the data of the training has changed since, so its parts cannot be told.
    """
    count = len(listing.part(ALL))
    if listing.test is not None:
        name = wanted or TEST
        words = "all images" if name == ALL else f"the {name} part: {len(listing.part(name)):,} of {count:,} images"
        return name, listing.part(name), words
    divided = _divided(listing, origin)
    is_own = divided is not None and divided.digest == origin.digest
    is_changed = not is_own and origin.data != "" and Path(origin.data).resolve() == data.resolve()
    name = wanted or (TEST if is_own or is_changed else ALL)
    if name == ALL:
        return name, listing.part(ALL), "all images"
    divided = (
        kept_from_training(listing, data, origin) if is_changed else listing.split(origin.test_fraction, origin.seed)
    )
    pictures = divided.part(name)
    share = (
        f"a held-out {origin.test_fraction:.0%}" if name == TEST else f"all but a held-out {origin.test_fraction:.0%}"
    )
    return name, pictures, f"{share}: {len(pictures):,} of {count:,} images"


def _divided(listing: Listing, origin: Origin) -> Listing | None:
    """Divide a listing as for training, or return None where it is too small to have been trained on."""
    try:
        return listing.split(origin.test_fraction, origin.seed)
    except DataError:
        return None


def labels_of(pictures: Sequence[Picture]) -> NDArray[np.int64]:
    """Return the labels, int64 `[n]`."""
    return np.array([picture.label for picture in pictures], dtype=np.int64)
