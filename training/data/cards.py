"""The data card: `data.json` beside a bundle says what it was trained on, so that the run can be repeated elsewhere.

Owns the card's fields, writing one, and saying whether some data is the data of a card. Digests are of contents, not
paths: the same files are the same data wherever they lie. Knows nothing of networks.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import PIL
import simplejpeg
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.cpus import usable_cpus
from app.manifest import PixelRecipe
from training.checks.findings import spreads_of
from training.checks.looks import Look, look_at_file
from training.data.listing import ALL, TEST, TRAIN, Listing, Picture
from training.errors import DataError
from training.progress import counting

UNKNOWN = "not stated"
MEASURED = "measured"
MOST_SAID = 20
"""Sentences about differences; a card of a thousand classes would fill the screen."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClassCard(_Record):
    """The images of one class in one part."""

    images: int
    sha256: Sha256 = Field(description="Of the images' digests, sorted: names and order do not matter.")


class Spread(_Record):
    """The least, the median and the most of a size."""

    min: int
    median: float
    max: int


class PartCard(_Record):
    """One part of the data."""

    images: int
    sha256: Sha256 = Field(description="Of the classes' digests with their labels: the same images, however named.")
    listing: Sha256 = Field(
        description="Of names, labels and images' digests in order: with this one too, a run repeats itself exactly."
    )
    classes: dict[str, ClassCard]
    width: Spread
    height: Spread
    size_bytes: Spread
    formats: dict[str, int]
    modes: dict[str, int]


class Division(_Record):
    """How train and test came about."""

    by: Literal["data", "draw", "none"] = Field(
        description="data: it has both; draw: held out of every class; none: it was only measured on."
    )
    test_fraction: float | None = None
    seed: int | None = None


class DataCard(_Record):
    """`data.json`: source, terms, parts and digests of the data that a model comes from."""

    schema_version: Literal[1] = 1
    name: str
    source: str
    licence: str = Field(description="Terms of the data; those of the weights are in the manifest.")
    division: Division
    parts: dict[str, PartCard] = Field(description="train and test; measured: what a model was only measured on.")
    pixels: PixelRecipe = Field(description="How the images were decoded and brought to size.")
    decoder: str = Field(description="By which versions.")
    unknown: tuple[str, ...] = Field(default=(), description="What is not known, a sentence each.")
    command: str
    created: str

    def encoded(self) -> bytes:
        """Return the card as the bytes of its file."""
        return (self.model_dump_json(indent=1, exclude_none=True) + "\n").encode()


def describe(
    listing: Listing,
    pixels: PixelRecipe,
    *,
    name: str,
    source: str,
    command: str,
    licence: str = UNKNOWN,
    drawn: tuple[float, int] | None = None,
    is_trained_on: bool = True,
    unknown: Sequence[str] = (),
) -> DataCard:
    """Describe the data of a training, or what a model was only measured on.

    Args:
        listing: divided as for the training.
        pixels: how its images are brought to size.
        name: what people call the data.
        source: where it comes from.
        command: what writes the card.
        licence: the data's terms.
        drawn: test fraction and seed, where the test part was drawn.
        is_trained_on: False where a model was only measured on it.
        unknown: what is not known, a sentence each.

    Raises:
        DataError: an image cannot be read.
    """
    parts = {TRAIN: listing.train, TEST: listing.part(TEST)} if is_trained_on else {MEASURED: listing.part(ALL)}
    by = "none" if not is_trained_on else "data" if drawn is None else "draw"
    fraction, seed = (None, None) if drawn is None else drawn
    stated = {"Where the data comes from": source, "On which terms the data may be used": licence}
    missing = [f"{what} is not stated." for what, said in stated.items() if said == UNKNOWN]
    return DataCard(
        name=name,
        source=source,
        licence=licence,
        division=Division.model_validate({"by": by, "test_fraction": fraction, "seed": seed}),
        parts={part: _describe_part(listing.classes, pictures) for part, pictures in parts.items()},
        pixels=pixels,
        decoder=f"Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}",
        unknown=(*unknown, *missing),
        command=command,
        created=datetime.now(UTC).date().isoformat(),
    )


def read_card(path: Path) -> DataCard:
    """Read a card.

    Raises:
        DataError: it is missing or no card.
    """
    try:
        return DataCard.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(step) for step in problem["loc"])
        raise DataError(f"{path} is no data card: {where or 'it'}: {problem['msg']}.") from error


@dataclass(frozen=True, slots=True)
class Compared:
    """Whether data is that of a card."""

    is_same: bool
    """Every image and its label."""
    is_exact: bool
    """Their names and order too."""
    sentences: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"same_images": self.is_same, "same_names": self.is_exact, "sentences": list(self.sentences)}


def compare(card: DataCard, listing: Listing, data: Path) -> Compared:
    """Say whether a listing is the data of a card, and where it differs.

    Raises:
        DataError: an image cannot be read, or the data cannot be divided as the card says.
    """
    if not card.parts:
        return Compared(False, False, ("The card has no digests, so nothing can be compared.",))
    found = _divided(card, listing)
    differences: list[str] = []
    is_exact = True
    for name, part in card.parts.items():
        if name not in found:
            differences.append(f"{name}: the card has {part.images:,} images, the data has no such part.")
            continue
        now = _describe_part(listing.classes, found[name])
        is_exact = is_exact and now.listing == part.listing
        if now.sha256 != part.sha256:
            differences += _differences(name, part, now)
    differences += [f"{name}: the data has it, the card does not." for name in found if name not in card.parts]
    if differences:
        left = len(differences) - MOST_SAID
        more = [f"and {left} more differences."] if left > 0 else []
        return Compared(False, False, (f"{data} is not the data of the card.", *differences[:MOST_SAID], *more))
    words = "and names: a run repeats itself on it" if is_exact else "under other names or in another order"
    return Compared(True, is_exact, (f"{data} is the data of the card: the same images and labels, {words}.",))


def _divided(card: DataCard, listing: Listing) -> dict[str, tuple[Picture, ...]]:
    if card.division.by == "none":
        return {MEASURED: listing.part(ALL)}
    if card.division.by == "draw" and listing.test is None:
        listing = listing.split(card.division.test_fraction or 0.0, card.division.seed or 0)
    return {TRAIN: listing.train} | ({} if listing.test is None else {TEST: listing.test})


def _differences(name: str, card: PartCard, now: PartCard) -> list[str]:
    sentences = []
    nothing = ClassCard(images=0, sha256="0" * 64)
    for label in dict.fromkeys([*card.classes, *now.classes]):
        then, here = card.classes.get(label, nothing), now.classes.get(label, nothing)
        if then.images != here.images:
            sentences.append(f"{name}/{label}: {here.images:,} images, in the card {then.images:,}.")
        elif then.sha256 != here.sha256:
            sentences.append(f"{name}/{label}: as many images as in the card, {then.images:,}, but others.")
    return sentences


def _describe_part(classes: Sequence[str], pictures: Sequence[Picture]) -> PartCard:
    looks = _looks(pictures)
    by_label: dict[str, list[bytes]] = {}
    listing = hashlib.sha256()
    for picture, look in zip(pictures, looks, strict=True):
        label = classes[picture.label]
        by_label.setdefault(label, []).append(look.content)
        listing.update(f"{picture.name}\0{label}\0{look.content.hex()}\n".encode())
    cards = {
        label: ClassCard(images=len(contents), sha256=hashlib.sha256(b"".join(sorted(contents))).hexdigest())
        for label, contents in sorted(by_label.items())
    }
    whole = "".join(f"{label}\0{card.images}\0{card.sha256}\n" for label, card in cards.items())
    return PartCard(
        images=len(pictures),
        sha256=hashlib.sha256(whole.encode()).hexdigest(),
        listing=listing.hexdigest(),
        classes=cards,
        **spreads_of(looks),
    )


def _looks(pictures: Sequence[Picture]) -> list[Look]:
    looks = []
    with ThreadPoolExecutor(usable_cpus()) as pool, counting("Describing", len(pictures)) as advance:
        try:
            for look, picture in zip(pool.map(look_at_file, pictures), pictures, strict=True):
                if look.fault:
                    raise DataError(f"{picture.content}: {look.fault}")
                looks.append(look)
                advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return looks
