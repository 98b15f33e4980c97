"""What a few images of new classes are worth: heads on a photo model's features, fine-tuning, and from scratch.

python -m benchmarks.fewshot --cifar data/cifar10     # tables, and benchmarks/results/few-shot.json; needs scikit-learn

Every draw is of other training images; all are tested on the same ones. A draw that the file of results already has
is not computed again, so that the hour that all of them take may be taken in parts.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from app.cpus import machine
from app.manifest import PixelRecipe
from training.commands.train import FINE_TUNING
from training.data.arrays import Split, load_split, read_listing
from training.data.listing import Picture
from training.learning.devices import describe
from training.nets import build
from training.recipes import Recipe, make_recipe
from training.train import fit, measure
from training.transfer.backbones import begun, read_beginning
from training.transfer.fewshot import Backbone, open_backbone
from training.transfer.heads import HEADS, Features

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/few-shot.json"
BUNDLE = ROOT / "models/imagenet/1"
DRAWS = 5
SHOTS = (5, 20)
FINE_TUNED_SHOTS = (20,)
CIFAR_TESTED = 200
"""Test images of each class, of 1,000: a network of 224×224 pixels answers 2,000 of them in half a minute."""
SCRATCH_EPOCHS = 200
FINE_TUNING_EPOCHS = 10
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Data:
    """A data set that the photo model was not trained on."""

    name: str
    pool: Sequence[Picture]
    """Training images to draw from, 100 of each class, class by class in random order."""
    test: Sequence[Picture]
    upright: bool
    """Whether a mirrored image is another class' or none's."""

    def draw(self, shots: int, number: int) -> list[Picture]:
        """Return draw `number`: no image is in two draws of as many shots."""
        labels = np.array([picture.label for picture in self.pool])
        places = [np.flatnonzero(labels == label)[number * shots : (number + 1) * shots] for label in np.unique(labels)]
        return [self.pool[place] for place in np.concatenate(places)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cifar", type=Path, required=True, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to try (all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results (%(default)s)")
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {"draws": []}
    with tempfile.TemporaryDirectory() as scratch:
        backbone = open_backbone(BUNDLE)
        for data in (digits(Path(scratch) / "digits"), cifar(options.cifar)):
            for way in options.ways:
                for found in WAYS[way](data, backbone, Path(scratch) / "cache", done(kept, data.name, way)):
                    print(json.dumps(found))
                    kept["draws"].append({"data": data.name, "way": way, **found})
                    keep(kept, options.out)
    print(table(kept["draws"]))


def done(kept: dict, data: str, way: str) -> set[tuple[int, int]]:
    return {(row["shots"], row["draw"]) for row in kept["draws"] if (row["data"], row["way"]) == (data, way)}


def keep(kept: dict, path: Path) -> None:
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "hardware": describe(CPU),
        "bundle": BUNDLE.relative_to(ROOT).as_posix(),
        "seconds": "processor seconds of all threads: other work shared the machine",
        "summary": summary(kept["draws"]),
        "draws": kept["draws"],
    }
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- the data


def digits(folder: Path) -> Data:
    """Return scikit-learn's 1,797 handwritten digits of 8×8 pixels (Alpaydin & Kaynak 1998), as PNG files."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    for number, (image, label) in enumerate(zip(loaded.images, loaded.target, strict=True)):
        path = folder / f"digit-{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(path)
    pictures = shuffled(read_listing(folder).part("all"))
    pool = first(pictures, DRAWS * max(SHOTS))
    taken = {picture.name for picture in pool}
    return Data("digits", pool, [picture for picture in pictures if picture.name not in taken], upright=True)


def cifar(folder: Path) -> Data:
    """Return ten CIFAR classes: training images to draw from, and 2,000 of the test images."""
    listing = read_listing(folder)
    pool = first(shuffled(listing.part("train")), DRAWS * max(SHOTS))
    return Data("cifar10", pool, first(shuffled(listing.part("test")), CIFAR_TESTED), upright=False)


def shuffled(pictures: Sequence[Picture]) -> list[Picture]:
    """Order by class, and each class at random."""
    order = np.random.default_rng(0).permutation(len(pictures))
    return sorted((pictures[place] for place in order), key=lambda picture: picture.label)


def first(pictures: Sequence[Picture], count: int) -> list[Picture]:
    """Return the first of each class."""
    labels = np.array([picture.label for picture in pictures])
    places = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return [pictures[place] for place in np.concatenate(places)]


# ---------------------------------------------------------------- the ways

Found = Iterator[dict[str, float]]


def head_of(kind: str) -> Callable[[Data, Backbone, Path, set[tuple[int, int]]], Found]:
    """Return the way of a head on frozen features; seconds are of the features and of the fit."""

    def way(data: Data, backbone: Backbone, cache: Path, done: set[tuple[int, int]]) -> Found:
        test: tuple[Split, Features] | None = None
        for shots, number in missing(SHOTS, done):
            pixels = backbone.bundle.manifest.pixels
            if test is None:
                test = tested(data, backbone, pixels, cache)
            split = load_split(data.draw(shots, number), pixels, cache)
            begun_at = time.process_time()
            features = backbone.features(split)
            head = HEADS[kind](features, split.labels, len(np.unique(split.labels)))
            seconds = time.process_time() - begun_at
            right = head.probabilities(test[1]).argmax(axis=1) == test[0].labels
            yield row(shots, number, float(right.mean()), seconds)

    return way


_TESTED: dict[str, tuple[Split, Features]] = {}


def tested(data: Data, backbone: Backbone, pixels: PixelRecipe, cache: Path) -> tuple[Split, Features]:
    """Return the test images and their features, computed once for both heads."""
    if data.name not in _TESTED:
        split = load_split(data.test, pixels, cache)
        _TESTED[data.name] = split, backbone.features(split)
    return _TESTED[data.name]


def fine_tuning(data: Data, backbone: Backbone, cache: Path, done: set[tuple[int, int]]) -> Found:
    """Train as `convoy-train train --from` does."""
    beginning = read_beginning(backbone.bundle.directory, {})
    for shots, number in missing(FINE_TUNED_SHOTS, done):
        knobs = FINE_TUNING | dict(beginning.knobs)
        recipe = make_recipe(**knobs, epochs=FINE_TUNING_EPOCHS, seed=number, flip=not data.upright, dropout=0.2)
        train_split = load_split(data.draw(shots, number), recipe.pixels, cache)
        classes = len(np.unique(train_split.labels))
        network = build(recipe.network, classes=classes, size=recipe.size, dropout=recipe.dropout)
        network.load_state_dict(begun(beginning, recipe, classes))
        yield trained(network, recipe, data, train_split, shots, number, cache)


def from_scratch(data: Data, backbone: Backbone, cache: Path, done: set[tuple[int, int]]) -> Found:
    """Train the article's network by the article's recipe, for as many epochs as it needs to know these images."""
    for shots, number in missing(SHOTS, done):
        recipe = make_recipe(epochs=SCRATCH_EPOCHS, seed=number, flip=not data.upright)
        train_split = load_split(data.draw(shots, number), recipe.pixels, cache)
        torch.manual_seed(number)
        network = build(
            recipe.network, classes=len(np.unique(train_split.labels)), size=recipe.size, dropout=recipe.dropout
        )
        yield trained(network, recipe, data, train_split, shots, number, cache)


def trained(
    network: torch.nn.Module, recipe: Recipe, data: Data, train_split: Split, shots: int, number: int, cache: Path
) -> dict[str, float]:
    """Train, then measure once: the test images are ten times as many."""
    few = Split(train_split.images[:1], train_split.labels[:1], train_split.pictures[:1])
    begun_at = time.process_time()
    for _ in fit(network, len(np.unique(train_split.labels)), recipe, train_split, few, CPU):
        pass
    seconds = time.process_time() - begun_at
    _, accuracy = measure(network, load_split(data.test, recipe.pixels, cache), recipe, CPU)
    return row(shots, number, accuracy, seconds)


def missing(shots: Sequence[int], done: set[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(count, number) for count in shots for number in range(DRAWS) if (count, number) not in done]


def row(shots: int, number: int, accuracy: float, seconds: float) -> dict[str, float]:
    return {"shots": shots, "draw": number, "accuracy": round(accuracy, 4), "seconds": round(seconds, 2)}


WAYS: dict[str, Callable[[Data, Backbone, Path, set[tuple[int, int]]], Found]] = {
    "cosine head": head_of("cosine"),
    "logistic head": head_of("logistic"),
    "from scratch": from_scratch,
    "fine-tuning": fine_tuning,
}


# ---------------------------------------------------------------- what is shown


def summary(draws: list[dict]) -> list[dict]:
    """Return mean and deviation of each data set, number of shots and way."""
    groups: dict[tuple[str, int, str], list[dict]] = {}
    for found in draws:
        groups.setdefault((found["data"], found["shots"], found["way"]), []).append(found)
    rows = []
    for (data, shots, way), found in sorted(groups.items()):
        accuracies = [entry["accuracy"] for entry in found]
        rows.append(
            {
                "data": data,
                "shots": shots,
                "way": way,
                "draws": len(found),
                "accuracy": round(statistics.mean(accuracies), 4),
                "deviation": round(statistics.stdev(accuracies), 4) if len(found) > 1 else None,
                "seconds": round(statistics.median(entry["seconds"] for entry in found), 2),
            }
        )
    return rows


def table(draws: list[dict]) -> str:
    lines = ["| data | images a class | way | accuracy | seconds | draws |", "|---|---|---|---|---|---|"]
    for entry in summary(draws):
        deviation = "" if entry["deviation"] is None else f" ± {100 * entry['deviation']:.1f}"
        lines.append(
            f"| {entry['data']} | {entry['shots']} | {entry['way']} | {100 * entry['accuracy']:.1f}{deviation} % "
            f"| {entry['seconds']:.1f} | {entry['draws']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
