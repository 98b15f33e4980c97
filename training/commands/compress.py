"""`compress`: a model in, a cheaper one beside it in one table, or a refusal: INT8, FP16, pruning, distillation."""

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands.bundles import add_bundle, version_of
from training.commands.flags import DATA_HELP, add_cache, count
from training.errors import CompressError
from training.progress import say

if TYPE_CHECKING:
    from app.golden import Run
    from app.manifest import Bundle
    from training.compress.int8 import Attempt, Quantiser
    from training.data import Split
    from training.listing import Picture

CALIBRATIONS = ("minmax", "entropy", "percentile")


def add(commands: Any) -> None:
    """Add the sub-command and its four methods."""
    parser = commands.add_parser("compress", help="make a model cheaper, within a bound on what accuracy it may lose")
    methods = parser.add_subparsers(required=True, metavar="METHOD")
    _add_int8(methods)
    _add_fp16(methods)


def _add_int8(methods: Any) -> None:
    parser = methods.add_parser("int8", help="a bundle's graph in 8-bit integers, for CPUs")
    parser.set_defaults(run=_int8)
    _add_common(parser)
    parser.add_argument(
        "--calibrate-on",
        type=Path,
        metavar="FOLDER",
        help="photos to measure activations' ranges on, without labels; default: training images of --data",
    )
    parser.add_argument(
        "--calibration",
        choices=("auto", *CALIBRATIONS),
        default="auto",
        help="how ranges are chosen; auto: by whichever the answers stay nearest to the parent's (%(default)s)",
    )
    parser.add_argument(
        "--calibration-images", type=count, default=300, metavar="N", help="how many at most (%(default)s)"
    )


def _add_fp16(methods: Any) -> None:
    parser = methods.add_parser("fp16", help="a bundle's graph in half precision, for GPUs")
    parser.set_defaults(run=_fp16)
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="bundle", help="bundle directory")
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    _add_bound(parser)
    parser.add_argument("--name", help="name of the new model; default: the parent's and the method")
    add_bundle(parser, golden=False)
    add_cache(parser)


def _add_bound(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-loss",
        type=_points,
        required=True,
        metavar="POINTS",
        help="percentage points of accuracy that may be lost; beyond, nothing is written",
    )


def _points(text: str) -> float:
    try:
        points = float(text)
    except ValueError:
        points = math.nan
    if not 0 <= points <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of points from 0 to 100")
    return points


# ---------------------------------------------------------------- a bundle's graph, changed


@dataclass(frozen=True, slots=True)
class _Task:
    """A parent bundle, and what it and its child are measured on."""

    parent: "Bundle"
    version: str
    test: "Split"
    measured_on: str
    spare: "tuple[Picture, ...]"
    """Pictures of the data that are not measured on."""

    def accuracy(self, model: Path) -> float:
        """Measure an ONNX file."""
        from training.classifiers import BATCH, in_batches, onnx_run
        from training.evaluate import measure_figures

        probabilities = in_batches(onnx_run(model), self.test.images, BATCH)
        return measure_figures(probabilities, self.test.labels, self.parent.manifest.labels).accuracy


def _task(options: argparse.Namespace, method: str) -> _Task:
    import torch

    from app.manifest import read_bundle, verify_files
    from training.classifiers import open_classifier
    from training.data import load_split, read_listing
    from training.listing import ALL, TRAIN, choose_part

    parent = read_bundle(options.model)
    verify_files(parent)
    options.name = options.name or f"{parent.manifest.name}-{method}"
    version = version_of(options, options.name)
    origin = open_classifier(options.model, torch.device("cpu")).origin
    listing = read_listing(options.data).relabelled(parent.manifest.labels)
    part, pictures, words = choose_part(listing, options.data, origin)
    spare = () if part == ALL else choose_part(listing, options.data, origin, TRAIN)[1]
    test = load_split(pictures, parent.manifest.pixels, options.cache_dir)
    return _Task(parent, version, test, f"{options.data}, {words}", spare)


def _int8(options: argparse.Namespace) -> None:
    from training.compress.int8 import METHODS, Quantiser, in_float_arithmetic
    from training.compress.table import points_lost

    task = _task(options, "int8")
    calibration, told = _calibration_images(options, task)
    before = task.accuracy(task.parent.model_path)
    with tempfile.TemporaryDirectory() as scratch:
        quantiser = Quantiser(task.parent.model_path, calibration.images, Path(scratch))
        attempt = quantiser.best(METHODS if options.calibration == "auto" else [options.calibration])
        say(f"Ranges by {attempt.method}, on {told}: the answers diverge by {attempt.divergence:.4f} nats.")
        after, looks = task.accuracy(attempt.path), 1
        if points_lost(before, after) > options.max_loss:
            attempt, after, looks = _search(quantiser, attempt, task, (before, after), options.max_loss)
        details = {
            "calibration": attempt.method,
            "calibrated_on": told,
            "divergence_nats": float(f"{attempt.divergence:.3g}"),
            "layers_in_float32": list(attempt.in_float),
            "looks_at_the_test_images": looks,
            "weights": "int8, 7 bits, per channel",
            "activations": "uint8",
        }
        otherwise = in_float_arithmetic(attempt.path)
        _finish(task, attempt.path, otherwise, "int8", details, (before, after), options)


def _calibration_images(options: argparse.Namespace, task: _Task) -> "tuple[Split, str]":
    """Return images that the figures are not measured on, and words for them.

    Raises:
        CompressError: the data has none to spare.
    """
    from training.data import load_split
    from training.trees import read_photos

    pictures = task.spare if options.calibrate_on is None else read_photos(options.calibrate_on)
    if not pictures:
        raise CompressError(
            f"{options.model} was not trained on {options.data}, and all of it is to be measured on: "
            "give --calibrate-on a folder of other photos."
        )
    place = f"the training part of {options.data}" if options.calibrate_on is None else str(options.calibrate_on)
    chosen = _spread(pictures, options.calibration_images)
    split = load_split(chosen, task.parent.manifest.pixels, options.cache_dir)
    return split, f"{len(chosen)} images of {place}"


def _spread(pictures: "Sequence[Picture]", most: int) -> "tuple[Picture, ...]":
    """Take up to `most` at even distances: data sets are sorted by class."""
    taken = min(most, len(pictures))
    return tuple(pictures[place * len(pictures) // taken] for place in range(taken))


def _search(
    quantiser: "Quantiser", attempt: "Attempt", task: _Task, accuracies: tuple[float, float], max_loss: float
) -> "tuple[Attempt, float, int]":
    """Keep ever more sensitive layers in float32 until the bound holds.

    Returns:
        The attempt, its accuracy, and how often the test images were looked at to find it.

    Raises:
        CompressError: the bound is broken with half of the layers in float32 too.
    """
    from training.compress.table import check_bound, points_lost

    say("That loses more than --max-loss: looking for the layers that it comes from.")
    before, best = accuracies
    for looks, gentler in enumerate(quantiser.gentler(attempt), 2):
        accuracy = task.accuracy(gentler.path)
        say(f"{len(gentler.in_float)} of the layers in float32: {points_lost(before, accuracy):.2f} points are lost.")
        if points_lost(before, accuracy) <= max_loss:
            return gentler, accuracy, looks
        best = max(best, accuracy)
    check_bound(before, best, max_loss)
    raise AssertionError("the best of several attempts that each break the bound breaks it")


def _fp16(options: argparse.Namespace) -> None:
    from training.classifiers import onnx_run
    from training.compress.fp16 import SPEED_NOTE, halve
    from training.compress.table import check_bound

    task = _task(options, "fp16")
    before = task.accuracy(task.parent.model_path)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model.onnx"
        halve(task.parent.model_path, model)
        after = task.accuracy(model)
        check_bound(before, after, options.max_loss)
        # How half precision rounds differs by device; the parent, which does not round so, is as far from each.
        otherwise = onnx_run(task.parent.model_path)
        details = {"weights": "float16", "activations": "float16", "note": SPEED_NOTE}
        _finish(task, model, otherwise, "fp16", details, (before, after), options)
    say(SPEED_NOTE)


def _finish(
    task: _Task,
    model: Path,
    otherwise: "Run",
    method: str,
    details: Mapping[str, Any],
    accuracies: tuple[float, float],
    options: argparse.Namespace,
) -> None:
    """Measure parent and child in turns, write the bundle, and show the table."""
    from rich.console import Console

    from app.cpus import machine
    from training.compress.bundles import Child, write_child
    from training.compress.speed import measure_in_turns
    from training.compress.table import Row, comparison_table, in_words
    from training.costs import costs_of

    parent = task.parent
    models = (parent.model_path, model)
    names = (f"{parent.manifest.name}/{parent.manifest.version}", f"{options.name}/{task.version}")
    rows = [
        Row(name, accuracy, path.stat().st_size, costs_of(path), speed)
        for name, accuracy, path, speed in zip(
            names, accuracies, models, measure_in_turns(models, task.test.images), strict=True
        )
    ]
    words = in_words(*rows)
    child = Child(
        model=model,
        otherwise=otherwise,
        name=options.name,
        version=task.version,
        description=options.description or f"{parent.manifest.description} Compressed: {method}.",
        method=method,
        details=details,
        evaluation={
            "data": task.measured_on,
            "images": len(task.test.labels),
            "accuracy": round(accuracies[1], 6),
            "beside_parent": {"models": [row.record() for row in rows], "in_words": words, "machine": machine()},
            "command": options.command_line,
        },
        command=options.command_line,
    )
    target = options.models_dir / options.name / task.version
    bundle = write_child(parent, child, target)
    Console().print(comparison_table(rows))
    say(f"{target}: {words}")
    tolerance = bundle.manifest.golden.tolerance
    say(f"Its golden answers hold within {tolerance:.2g}.")
