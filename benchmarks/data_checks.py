"""What `convoy-train check` finds, held against what is known: planted copies, planted wrong labels, and the time.

    python -m benchmarks.data_checks --data data/cifar10 --model models/imagenet/1 --images 5000

`--data` has train/<class>/ and test/<class>/. Copies of test images are altered in known ways, and counted as found if
a pair of copy and original is. Labels are flipped in a sample of the training images, evenly over classes; "right" is
a suspect that was flipped, so the data's own wrong labels count against the precision.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from app.images import decode
from training.checks.duplicates import DETAIL, LAYOUT, near, same_files, same_pixels
from training.checks.features import features_of
from training.checks.findings import about_duplicates, parts_of
from training.checks.looks import PIXELS, Survey, shrink, survey
from training.checks.suspects import FOLDS, PENALTY, find_suspects, out_of_fold
from training.commands.flags import DATA_HELP
from training.data.arrays import read_listing
from training.data.listing import Listing, Picture, labels_of

RESULTS = Path(__file__).parent / "results" / "data-checks.json"
COPIED = 1000
FLIPPED = 0.02
SEEDS = 3
COMPARE = """
import sys, numpy
from cleanlab.filter import find_label_issues
held = numpy.load(sys.argv[1])
found = find_label_issues(held["labels"], held["probabilities"], filter_by="confident_learning", n_jobs=1)
numpy.save(sys.argv[1] + ".npy", found)
"""


def encode(image: Image.Image, quality: int = 90) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def crop(image: Image.Image, pixels: int) -> Image.Image:
    return image.crop((pixels, pixels, image.width, image.height)).resize(image.size, Image.Resampling.BICUBIC)


ALTERATIONS: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG quality 50": lambda image: encode(image, 50),
    "JPEG quality 20": lambda image: encode(image, 20),
    "three times as large": lambda image: encode(image.resize((96, 96), Image.Resampling.BICUBIC)),
    "mirrored": lambda image: encode(ImageOps.mirror(image)),
    "brightness 1.3": lambda image: encode(ImageEnhance.Brightness(image).enhance(1.3)),
    "contrast 0.6": lambda image: encode(ImageEnhance.Contrast(image).enhance(0.6)),
    "gray": lambda image: encode(image.convert("L")),
    "1 pixel cropped from two sides": lambda image: encode(crop(image, 1)),
    "2 pixels cropped from two sides": lambda image: encode(crop(image, 2)),
}


def measure_duplicates(listing: Listing) -> dict[str, object]:
    """Look at all images and compare all pairs."""
    pictures = listing.part("all")
    began = time.perf_counter()
    surveyed = survey(pictures)
    looked = time.perf_counter()
    files, pixels = same_files(surveyed), same_pixels(surveyed)
    nearly = near(surveyed, surveyed.sound.tolist())
    compared = time.perf_counter()
    labels, parts = labels_of(pictures).tolist(), parts_of(len(pictures), len(listing.train))
    kinds: dict[str, int] = {}
    leaked: set[int] = set()
    for finding in about_duplicates(files, pixels, nearly, labels, parts):
        kinds[finding.kind] = kinds.get(finding.kind, 0) + 1
        if finding.kind == "near-leak":
            leaked |= {place for place in finding.places if parts[place] == "test"}
    return {
        "images": len(pictures),
        "seconds": {"look": round(looked - began, 1), "compare": round(compared - looked, 1)},
        "groups_by_kind": kinds,
        "test_images_nearly_in_train": len(leaked),
        "share_of_test": round(len(leaked) / max(1, len(pictures) - len(listing.train)), 4),
        "found_images": sum(len(found.places) for found in nearly),
        "copies_found": measure_recall(surveyed, len(listing.train)),
    }


def measure_recall(surveyed: Survey, start: int) -> dict[str, float]:
    """Alter some test images, and count how many copies are found beside their originals."""
    places = np.linspace(start, len(surveyed.pictures) - 1, COPIED).round().astype(int)
    found = {}
    for name, alter in ALTERATIONS.items():
        thumbs = []
        for place in places:
            image = Image.open(BytesIO(surveyed.pictures[place].encoded())).convert("RGB")
            thumbs.append(shrink(decode(alter(image), PIXELS)))
        both = replace(surveyed, thumbs=np.concatenate([surveyed.thumbs[places], np.stack(thumbs)]))
        pairs = near(both, range(2 * COPIED))
        hits = sum(place + COPIED in group.places for group in pairs for place in group.places if place < COPIED)
        found[name] = round(hits / COPIED, 4)
    return found


def measure_labels(listing: Listing, model: Path, images: int, cleanlab: str | None) -> dict[str, object]:
    """Flip labels of a sample and look for them."""
    pictures = sample(listing.train, images, len(listing.classes))
    began = time.perf_counter()
    features = features_of(pictures, model)
    seen = time.perf_counter()
    runs = []
    for seed in range(SEEDS):
        runs.append(find_flipped(features, labels_of(pictures), len(listing.classes), seed, cleanlab))
    judged = time.perf_counter()
    return {
        "model": str(model),
        "images": len(pictures),
        "flipped": FLIPPED,
        "folds": FOLDS,
        "l2": PENALTY,
        "seconds": {"features": round(seen - began, 1), "judge_once": round((judged - seen) / SEEDS, 1)},
        "runs": runs,
    }


def sample(pictures: tuple[Picture, ...], images: int, classes: int) -> list[Picture]:
    labels = labels_of(pictures)
    chosen: list[Picture] = []
    for label in range(classes):
        members = np.random.default_rng([7, label]).permutation(np.flatnonzero(labels == label))
        chosen += [pictures[place] for place in members[: images // classes].tolist()]
    return chosen


def find_flipped(
    features: np.ndarray, truth: np.ndarray, classes: int, seed: int, cleanlab: str | None
) -> dict[str, object]:
    random = np.random.default_rng(seed)
    flipped = random.choice(len(truth), round(FLIPPED * len(truth)), replace=False)
    labels = truth.copy()
    labels[flipped] = (truth[flipped] + random.integers(1, classes, len(flipped))) % classes
    probabilities = out_of_fold(features, labels, np.arange(len(labels)), classes)
    suspects = find_suspects(probabilities, labels)
    places = [suspect.place for suspect in suspects]
    is_right = np.isin(places, flipped)
    first = is_right[: len(flipped)]
    named = [truth[suspect.place] == suspect.suggested for suspect in suspects if suspect.place in set(flipped)]
    record = {
        "seed": seed,
        "head_accuracy_out_of_fold": round(float((probabilities.argmax(axis=1) == truth).mean()), 4),
        "flipped": len(flipped),
        "suspects": len(suspects),
        "precision": round(float(is_right.mean()), 4),
        "recall": round(float(is_right.sum() / len(flipped)), 4),
        "precision_of_first_as_many_as_flipped": round(float(first.mean()), 4),
        "precision_of_first_half_as_many": round(float(is_right[: len(flipped) // 2].mean()), 4),
        "true_label_suggested": round(float(np.mean(named)), 4),
    }
    if cleanlab is not None:
        with tempfile.TemporaryDirectory() as scratch:
            held = Path(scratch) / "held.npz"
            np.savez(held, labels=labels, probabilities=probabilities)
            subprocess.run([cleanlab, "-c", COMPARE, str(held)], check=True)
            theirs = set(np.flatnonzero(np.load(f"{held}.npy")).tolist())
        record["cleanlab"] = {"suspects": len(theirs), "of_both": len(theirs & set(places))}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    parser.add_argument("--model", type=Path, action="append", default=[], help="bundle or run; may be repeated")
    parser.add_argument("--images", type=int, default=5000, help="sample whose labels are flipped (%(default)s)")
    parser.add_argument("--no-duplicates", action="store_true", help="measure labels only")
    parser.add_argument("--cleanlab", help="a Python that has cleanlab, to compare suspects with")
    parser.add_argument("--write", type=Path, default=RESULTS, help="file for the figures; earlier ones are kept")
    options = parser.parse_args()
    listing = read_listing(options.data).split(test_fraction=0.2, seed=0)
    record = json.loads(options.write.read_text()) if options.write.exists() else {}
    record["data"] = options.data.name
    record["near"] = {"layout": LAYOUT, "detail": DETAIL}
    if not options.no_duplicates:
        record["duplicates"] = measure_duplicates(listing)
    for model in options.model:
        found = measure_labels(listing, model, options.images, options.cleanlab)
        record.setdefault("labels", {})[str(model)] = found
        print(json.dumps(found, indent=1))
    options.write.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
