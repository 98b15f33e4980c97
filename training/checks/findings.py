"""What is wrong with a data set: every finding, its severity, and what to do.

Owns the rules: from looks, groups of duplicates and suspects to findings. Decodes nothing and draws nothing.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from training.checks.duplicates import Near
from training.checks.looks import SUFFIXES, Look, Survey
from training.data.listing import TEST, TRAIN

if TYPE_CHECKING:
    from training.checks.suspects import Suspect

Severity = Literal["error", "warning", "note"]
SMALLEST_SIDE = 16
"""Pixels; below it a picture holds less than the smallest network here looks at."""
LARGEST_ASPECT = 3.0
"""Beyond it the centre square is less than a third of the picture."""
LARGEST_SKEW = 3.0
"""Of the largest class over the smallest."""
FEW = 20
"""Images of a class; fewer tell little, whatever is trained."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding."""

    severity: Severity
    title: str
    advice: str


KINDS = {
    "layout": Kind("error", "Out of place", "Training refuses the folder until these are moved, renamed or removed."),
    "broken": Kind("error", "Cannot be decoded", "Training stops at the first of them: replace or remove them."),
    "leak": Kind(
        "error",
        "In train and in test",
        "The same picture is trained on and tested with, so the accuracy is too high: remove one of the two.",
    ),
    "contradiction": Kind(
        "error",
        "The same picture with different labels",
        "One of the labels is wrong, or the classes overlap: decide, and keep one copy.",
    ),
    "near-leak": Kind(
        "warning",
        "Nearly the same in train and in test",
        "Cropped, recoloured, mirrored or compressed anew, or of the same series: keep such pictures in one part.",
    ),
    "near-contradiction": Kind(
        "warning", "Nearly the same with different labels", "Look at both: one label may be wrong."
    ),
    "suspect": Kind(
        "warning",
        "The label may be wrong",
        "A classifier that never saw the picture is confident of another label: look at it, the surest come first.",
    ),
    "guessed": Kind(
        "warning",
        "Damaged, and decoded by guessing",
        "libjpeg filled in what is missing, often with gray: replace or remove them.",
    ),
    "suffix": Kind("warning", "The name says another format", "Decoding goes by the content; rename them."),
    "animated": Kind("warning", "Animated", "Only the first frame is used: make a still picture of the right one."),
    "blank": Kind("warning", "Of one colour", "There is nothing to learn from: remove them."),
    "tiny": Kind(
        "warning", f"Smaller than {SMALLEST_SIDE} pixels", "They are blown up for training: find larger ones."
    ),
    "skew": Kind(
        "warning", "Classes of very different size", "Train with class weights or balanced sampling, or add images."
    ),
    "few": Kind("warning", f"Fewer than {FEW} images of a class", "Add images, or begin from a trained network."),
    "duplicate": Kind("warning", "The same picture twice", "It counts double in training: keep one of each."),
    "near-duplicate": Kind("note", "Nearly the same picture twice", "Of a series, or edited: fine within one part."),
    "cmyk": Kind("note", "CMYK", "Made for printing: converted to RGB without its colour profile, colours may be off."),
    "transparent": Kind("note", "Transparent", "Transparency is dropped, and what lay hidden under it shows."),
    "aspect": Kind(
        "note",
        f"A side {LARGEST_ASPECT:g} times the other",
        "Only the centre square is used: what matters may lie outside.",
    ),
}
"""In the order of the report."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, with the pictures it is about."""

    kind: str
    sentence: str
    places: tuple[int, ...] = ()
    suggested: str = ""
    """The label that a suspect probably has."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A data set with everything found about it."""

    data: str
    classes: tuple[str, ...]
    survey: Survey
    labels: tuple[int, ...]
    parts: tuple[str, ...]
    """`train` or `test` of each picture; empty strings where the data could not be divided."""
    division: str
    """How the parts came about, for people."""
    findings: tuple[Finding, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """What was compared with what, so that the check can be repeated."""

    @property
    def is_fit(self) -> bool:
        """Whether nothing was found that forbids training."""
        return not any(KINDS[finding.kind].severity == "error" for finding in self.findings)

    def of_kind(self, kind: str) -> list[Finding]:
        """Return the findings of one kind, in order."""
        return [finding for finding in self.findings if finding.kind == kind]

    def counts(self) -> dict[str, dict[str, int]]:
        """Count the pictures of each part by class."""
        counts = Counter(zip(self.parts, self.labels, strict=True))
        return {
            part: {name: counts[part, label] for label, name in enumerate(self.classes)}
            for part in dict.fromkeys(self.parts)
        }

    def sizes(self) -> dict[str, Any]:
        """Say least, median and most of widths, heights and bytes, and the formats, of the pictures that decode."""
        looks = [self.survey.looks[place] for place in self.survey.sound.tolist()]
        return spreads_of(looks) if looks else {}

    def record(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "data": self.data,
            "images": len(self.labels),
            "classes": list(self.classes),
            "division": self.division,
            "counts": self.counts(),
            "sizes": self.sizes(),
            "settings": self.settings,
            "fit_to_train_on": self.is_fit,
            "findings": [
                {
                    "kind": name,
                    "severity": kind.severity,
                    "title": kind.title,
                    "advice": kind.advice,
                    "count": len(found),
                    "items": [self._item(finding) for finding in found],
                }
                for name, kind in KINDS.items()
                if (found := self.of_kind(name))
            ],
        }

    def _item(self, finding: Finding) -> dict[str, Any]:
        pictures = [
            {
                "name": self.survey.pictures[place].name,
                "part": self.parts[place],
                "label": self.classes[self.labels[place]],
            }
            for place in finding.places
        ]
        suggested = {"suggested": finding.suggested} if finding.suggested else {}
        return {"sentence": finding.sentence, "pictures": pictures, **suggested}


def spreads_of(looks: Sequence[Look]) -> dict[str, Any]:
    """Summarise looks: least, median, most of each size; how many of each format and colour mode."""
    spreads: dict[str, Any] = {}
    for name in ("width", "height", "size_bytes"):
        values = np.array([getattr(look, name) for look in looks])
        spreads[name] = {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
    spreads["formats"] = dict(sorted(Counter(look.kind for look in looks).items()))
    spreads["modes"] = dict(sorted(Counter(look.mode for look in looks).items()))
    return spreads


# ---------------------------------------------------------------- the rules


def about_files(survey: Survey) -> Iterator[Finding]:
    """Find what single files have against them."""
    for place, (picture, look) in enumerate(zip(survey.pictures, survey.looks, strict=True)):
        if look.fault:
            yield Finding("broken", look.fault, (place,))
            continue
        suffix = "." + picture.name.rpartition(".")[2].lower()
        if isinstance(picture.content, np.ndarray):
            pass
        elif suffix not in SUFFIXES.get(look.kind, ()):
            yield Finding("suffix", f"It ends in {suffix} and is {look.kind}.", (place,))
        if look.is_guessed:
            yield Finding("guessed", "Its data is damaged.", (place,))
        if look.frames > 1:
            yield Finding("animated", f"It has {look.frames} frames.", (place,))
        if not np.ptp(survey.thumbs[place].reshape(-1, 3), axis=0).any():
            yield Finding("blank", "All of its pixels are alike.", (place,))
        size = f"{look.width}×{look.height} pixels."
        short, long = sorted((look.width, look.height))
        if short < SMALLEST_SIDE:
            yield Finding("tiny", size, (place,))
        if long > LARGEST_ASPECT * short:
            yield Finding("aspect", size, (place,))
        if look.mode == "CMYK":
            yield Finding("cmyk", size, (place,))
        if look.mode in ("RGBA", "LA", "PA"):
            yield Finding("transparent", size, (place,))


def about_duplicates(
    files: Sequence[tuple[int, ...]],
    pixels: Sequence[tuple[int, ...]],
    nearly: Sequence[Near],
    labels: Sequence[int],
    parts: Sequence[str],
) -> Iterator[Finding]:
    """Find duplicates, leaks and contradictions among groups of duplicates.

    Args:
        files: groups of the same content.
        pixels: groups of the same pixels in different files, the first of each content.
        nearly: groups of nearly the same pictures, the first of each exact group.
        labels: of all pictures.
        parts: of all pictures.
    """
    same = merged(files, pixels)
    by_content = {place: group for group in files for place in group}
    for group in same:
        what = "The same file." if set(group) <= set(by_content.get(group[0], ())) else "The same pixels."
        is_leak, is_contradiction = _divides(group, parts), _divides(group, labels)
        if is_leak:
            yield Finding("leak", what, group)
        if is_contradiction:
            yield Finding("contradiction", what, group)
        if not is_leak and not is_contradiction:
            yield Finding("duplicate", what, group)
    for found in sorted(nearly, key=lambda near: -near.most):
        likeness = f"{found.least:.2f}" if found.least == found.most else f"{found.least:.2f} to {found.most:.2f}"
        what = f"Correlation of detail {likeness}."
        is_leak, is_contradiction = _divides(found.places, parts), _divides(found.places, labels)
        if is_leak:
            yield Finding("near-leak", what, found.places)
        if is_contradiction:
            yield Finding("near-contradiction", what, found.places)
        if not is_leak and not is_contradiction:
            yield Finding("near-duplicate", what, found.places)


def about_classes(classes: Sequence[str], labels: Sequence[int], parts: Sequence[str]) -> Iterator[Finding]:
    """Find classes that are small, or small beside others, in the part that is trained on."""
    trained = Counter(label for label, part in zip(labels, parts, strict=True) if part != TEST)
    counts = [trained[label] for label in range(len(classes))]
    for name, count in zip(classes, counts, strict=True):
        if count < FEW:
            yield Finding("few", f"{name}: {count} to train on.")
    least, most = min(counts, default=0), max(counts, default=0)
    if most > LARGEST_SKEW * max(least, 1):
        small, large = classes[counts.index(least)], classes[counts.index(most)]
        yield Finding("skew", f"{large} has {most:,} images to train on, {small} has {least:,}.")


def about_labels(suspects: "Sequence[Suspect]", places: Sequence[int], classes: Sequence[str]) -> Iterator[Finding]:
    """Turn suspects, whose places are among `places`, into findings."""
    for suspect in suspects:
        name = classes[suspect.suggested]
        sentence = (
            f"{name} with {suspect.suggested_probability:.0%}, the given label with {suspect.given_probability:.0%}."
        )
        yield Finding("suspect", sentence, (places[suspect.place],), suggested=name)


def merged(files: Sequence[tuple[int, ...]], pixels: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Join groups of the same pixels with the copies of their files."""
    copies = {group[0]: group for group in files}
    joined = [tuple(sorted(chain.from_iterable(copies.pop(place, (place,)) for place in group))) for group in pixels]
    return sorted([*joined, *copies.values()])


def parts_of(pictures: int, train: int) -> tuple[str, ...]:
    """Say the part of each picture where the first `train` are trained on."""
    return (TRAIN,) * train + (TEST,) * (pictures - train)


def _divides(group: Sequence[int], values: Sequence[Any]) -> bool:
    return len({values[place] for place in group}) > 1
