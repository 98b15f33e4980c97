"""The check of a data set from top to bottom: list, divide, look, compare, judge.

Owns the order of the steps, and what is done where one is not possible.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.checks.duplicates import DETAIL, LAYOUT, near, same_files, same_pixels
from training.checks.findings import (
    Checked,
    Finding,
    about_classes,
    about_duplicates,
    about_files,
    about_labels,
    merged,
    parts_of,
)
from training.checks.looks import Survey, survey
from training.data.arrays import read_listing
from training.data.listing import TEST, TRAIN, Listing
from training.errors import DataError, SurgeryError


def check(data: Path, model: Path | None, test_fraction: float, seed: int, *, with_near: bool = True) -> Checked:
    """Check a data set.

    Args:
        data: a folder of class folders, or a CIFAR-10 archive.
        model: run or bundle whose features the labels are judged by; None: they are not judged.
        test_fraction: share that training will hold out, where the data has no test part.
        seed: what training will draw that share from.
        with_near: whether to compare every picture with every other.

    Raises:
        DataError: there is no data set to check.
        ConvoyError: the model cannot be used.
    """
    faults: list[DataError] = []
    listing = read_listing(data, faults)
    divided, division = _divide(listing, test_fraction, seed, faults)
    pictures = divided.train + (divided.test or ())
    parts = parts_of(len(pictures), len(divided.train))
    labels = tuple(picture.label for picture in pictures)
    surveyed = survey(pictures)
    files, pixels = same_files(surveyed), same_pixels(surveyed)
    same = merged(files, pixels)
    settings: dict[str, object] = {}
    findings = [Finding("layout", fault.message) for fault in faults]
    findings += about_files(surveyed)
    copies = {place for group in same for place in group[1:]}
    firsts = [place for place in surveyed.sound.tolist() if place not in copies]
    nearly = near(surveyed, firsts) if with_near and len(firsts) > 1 else []
    if with_near:
        settings["near"] = {"layout": LAYOUT, "detail": DETAIL, "pairs": len(firsts) * (len(firsts) - 1) // 2}
    findings += about_duplicates(files, pixels, nearly, labels, parts)
    findings += about_classes(divided.classes, labels, parts)
    if model is not None:
        together = [*(found.places for found in nearly), *same]
        suspects, settings["labels"] = _judge_labels(surveyed, labels, together, divided.classes, model)
        findings += suspects
    return Checked(str(data), divided.classes, surveyed, labels, parts, division, tuple(findings), settings)


def _divide(listing: Listing, test_fraction: float, seed: int, faults: list[DataError]) -> tuple[Listing, str]:
    if listing.test is not None:
        return listing, f"its own {TRAIN} and {TEST}"
    try:
        divided = listing.split(test_fraction, seed)
    except DataError as fault:
        faults.append(fault)
        return listing, "not divided"
    return divided, f"drawn as training draws it: {test_fraction:.0%} of every class held out, seed {seed}"


def _judge_labels(
    surveyed: Survey,
    labels: Sequence[int],
    together: Sequence[tuple[int, ...]],
    classes: Sequence[str],
    model: Path,
) -> tuple[list[Finding], dict[str, object]]:
    """Judge the labels of the classes that are large enough to be divided into folds.

    Returns:
        The suspects, and how they were found.

    Raises:
        DataError: fewer than two classes are large enough.
        SurgeryError: the model gives no features.
    """
    # They bring PyTorch along, which nothing else here needs.
    from training.checks.features import features_of
    from training.checks.suspects import FOLDS, PENALTY, Suspect, find_suspects, groups_of, out_of_fold

    sound = surveyed.sound
    given = np.array(labels, np.int64)
    counts = np.bincount(given[sound], minlength=len(classes))
    large = np.flatnonzero(counts >= FOLDS)
    if len(large) < 2:
        raise DataError(
            f"Labels are judged by classes of at least {FOLDS} images, and the data has {len(large)}: add images, or "
            "leave --model out."
        )
    places = sound[np.isin(given[sound], large)]
    features = features_of([surveyed.pictures[place] for place in places.tolist()], model)
    if not np.isfinite(features).all():
        raise SurgeryError(f"{model} gives features that are not numbers: choose another model.")
    groups = groups_of(len(labels), together)[places]
    numbered = np.searchsorted(large, given[places])
    suspects = find_suspects(out_of_fold(features, numbered, groups, len(large)), numbered)
    named = [
        Suspect(found.place, int(large[found.suggested]), found.given_probability, found.suggested_probability)
        for found in suspects
    ]
    about = {"model": str(model), "judged": len(places), "folds": FOLDS, "l2": PENALTY}
    return list(about_labels(named, places.tolist(), classes)), about
