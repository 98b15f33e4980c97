"""`compress int8` and `compress fp16`: the steps of the two methods that change a bundle's graph."""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands.bundles import version_of
from training.errors import CompressError
from training.progress import say

if TYPE_CHECKING:
    from app.golden import Run
    from app.manifest import Bundle, PixelRecipe
    from training.compress.beside import Measured
    from training.compress.int8 import Attempt, Quantiser
    from training.data.arrays import Split
    from training.data.listing import Picture


@dataclass(frozen=True, slots=True)
class _Task:
    """A parent bundle, and what it and its child are measured on."""

    parent: "Bundle"
    version: str
    test: "Split"
    measured_on: str
    spare: "tuple[Picture, ...]"
    """Pictures of the data that are not measured on."""

    held_out: "Split | None"
    """Images that were kept from training and are not the test's."""
    name: str
    """Of the child."""

    @property
    def pixels(self) -> "PixelRecipe":
        """How both see an image."""
        return self.parent.manifest.pixels

    def measured(self, model: Path, name: str | None = None) -> "Measured":
        """Measure an ONNX file."""
        from training.compress.beside import measure

        return measure(name or f"{self.name}/{self.version}", model, self.test, self.parent.manifest.labels)

    def measured_parent(self) -> "Measured":
        """Measure the parent."""
        manifest = self.parent.manifest
        return self.measured(self.parent.model_path, f"{manifest.name}/{manifest.version}")


def _task(options: argparse.Namespace, method: str) -> _Task:
    from app.manifest import read_bundle, verify_files
    from training.classifiers import origin_told
    from training.data.arrays import load_split, read_listing
    from training.data.listing import ALL, TEST, TRAIN, choose_part, validation_of

    parent = read_bundle(options.model)
    verify_files(parent)
    name = options.name or f"{parent.manifest.name}-{method}"
    version = version_of(options, name)
    pixels, origin = parent.manifest.pixels, origin_told(parent)
    listing = read_listing(options.data).relabelled(parent.manifest.labels)
    part, pictures, words = choose_part(listing, options.data, origin)
    spare = () if part == ALL else choose_part(listing, options.data, origin, TRAIN)[1]
    held_out = validation_of(listing, options.data, origin) if part == TEST else ()
    return _Task(
        parent=parent,
        version=version,
        test=load_split(pictures, pixels, options.cache_dir),
        measured_on=f"{options.data}, {words}",
        spare=spare,
        held_out=load_split(held_out, pixels, options.cache_dir) if held_out else None,
        name=name,
    )


def run_int8(options: argparse.Namespace) -> None:
    """Quantise a bundle's graph, with more layers in float32 where the bound asks for it, and write a bundle."""
    from training.compress.int8 import AUTO, Quantiser, in_float_arithmetic
    from training.compress.table import points_lost

    task = _task(options, "int8")
    calibration, told = _calibration_images(options, task)
    before = task.measured_parent()
    with tempfile.TemporaryDirectory() as scratch:
        quantiser = Quantiser(task.parent.model_path, calibration.images, Path(scratch))
        attempt = quantiser.best(AUTO if options.calibration == "auto" else [options.calibration])
        say(f"Ranges by {attempt.method}, on {told}: the answers diverge by {attempt.divergence:.4f} nats.")
        after, looks = task.measured(attempt.path), 1
        if points_lost(before.accuracy, after.accuracy) > options.max_loss:
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

        def otherwise(model: Path, temperature: float) -> "Run":
            return in_float_arithmetic(model)

        _finish(task, (before, after), otherwise, "int8", details, options)


def _calibration_images(options: argparse.Namespace, task: _Task) -> "tuple[Split, str]":
    """Return images that the figures are not measured on, and words for them.

    Raises:
        CompressError: the data has none to spare.
    """
    from training.data.arrays import load_split
    from training.data.trees import read_photos

    pictures = task.spare if options.calibrate_on is None else read_photos(options.calibrate_on)
    if not pictures:
        raise CompressError(
            f"{options.model} was not trained on {options.data}, and all of it is to be measured on: "
            "give --calibrate-on a folder of other photos."
        )
    place = f"the training part of {options.data}" if options.calibrate_on is None else str(options.calibrate_on)
    chosen = _spread(pictures, options.calibration_images)
    split = load_split(chosen, task.pixels, options.cache_dir)
    return split, f"{len(chosen)} images of {place}"


def _spread(pictures: "Sequence[Picture]", most: int) -> "tuple[Picture, ...]":
    """Take up to `most` at even distances: data sets are sorted by class."""
    taken = min(most, len(pictures))
    return tuple(pictures[place * len(pictures) // taken] for place in range(taken))


def _search(
    quantiser: "Quantiser",
    attempt: "Attempt",
    task: _Task,
    measured: "tuple[Measured, Measured]",
    max_loss: float,
) -> "tuple[Attempt, Measured, int]":
    """Keep ever more sensitive layers in float32 until the bound holds.

    Returns:
        The attempt, what it is measured at, and how often the test images were looked at to find it.

    Raises:
        CompressError: the bound is broken with half of the layers in float32 too.
    """
    from training.compress.table import check_bound, points_lost

    say("That loses more than --max-loss: looking for the layers that it comes from.")
    before, best = measured
    for looks, gentler in enumerate(quantiser.gentler(attempt), 2):
        after = task.measured(gentler.path)
        lost = points_lost(before.accuracy, after.accuracy)
        say(f"{len(gentler.in_float)} of the layers in float32: {lost:.2f} points are lost.")
        if lost <= max_loss:
            return gentler, after, looks
        best = max(best, after, key=lambda tried: tried.accuracy)
    check_bound(before.accuracy, best.accuracy, max_loss)
    raise AssertionError("the best of several attempts that each break the bound breaks it")


def run_fp16(options: argparse.Namespace) -> None:
    """Halve a bundle's graph, and write a bundle."""
    import onnx

    from training.classifiers import onnx_run
    from training.compress.fp16 import SPEED_NOTE, halve
    from training.compress.table import check_bound
    from training.graphs.ending import with_temperature

    task = _task(options, "fp16")
    before = task.measured_parent()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model.onnx"
        halve(task.parent.model_path, model)
        after = task.measured(model)
        check_bound(before.accuracy, after.accuracy, options.max_loss)
        details = {"weights": "float16", "activations": "float16", "note": SPEED_NOTE}

        def otherwise(_: Path, temperature: float) -> "Run":
            # How half precision rounds differs by device; the parent, which does not round so, is as far from each.
            unrounded = Path(scratch) / "unrounded.onnx"
            onnx.save(with_temperature(onnx.load(task.parent.model_path), temperature), unrounded)
            return onnx_run(unrounded)

        _finish(task, (before, after), otherwise, "fp16", details, options)
    say(SPEED_NOTE)


def _finish(
    task: _Task,
    measured: "tuple[Measured, Measured]",
    otherwise: "Callable[[Path, float], Run]",
    method: str,
    details: Mapping[str, Any],
    options: argparse.Namespace,
) -> None:
    """Calibrate the child, measure it and its parent in turns, write the bundle, and show the table.

    `otherwise` computes the calibrated child in another right way: from its file and temperature to the function.
    """
    import onnx
    from rich.console import Console

    from training.commands.bundles import describe_trust, strangers
    from training.compress.beside import record_of, rows_of
    from training.compress.bundles import Child, write_child
    from training.compress.table import comparison_table, in_words
    from training.trust.calibrate import calibrate_graph
    from training.trust.fitted import Evidence

    before, after = measured
    evidence = Evidence(task.held_out, strangers=strangers(options, task.pixels), calibrate=options.calibrate)
    calibrated = calibrate_graph(onnx.load(after.path), task.test, task.measured_on, evidence)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model.onnx"
        onnx.save(calibrated.graph, model)
        rows = rows_of([before, replace(after, path=model)], task.test.images)
        child = Child(
            model=model,
            otherwise=otherwise(model, calibrated.trust.temperature),
            name=task.name,
            version=task.version,
            description=options.description or f"{task.parent.manifest.description} Compressed: {method}.",
            method=method,
            details=details,
            trust=calibrated.records(),
            evaluation={
                "data": task.measured_on,
                "images": len(task.test.labels),
                "accuracy": round(after.accuracy, 6),
                "beside_parent": record_of(rows),
                "command": options.command_line,
            },
            command=options.command_line,
        )
        target = options.models_dir / task.name / task.version
        bundle = write_child(task.parent, child, target)
    Console().print(comparison_table(rows))
    say(f"{target}: {in_words(rows[0], rows[-1])}")
    tolerance, detects = bundle.manifest.golden.tolerance, bundle.manifest.evaluation["golden_detects"]
    assert isinstance(detects, dict)
    unnoticed = [wrong for wrong, change in detects.items() if float(str(change)) <= tolerance]
    blind = f", which would not notice {', '.join(unnoticed)}" if unnoticed else ""
    say(f"Its golden answers hold within {tolerance:.2g}{blind}.")
    describe_trust(bundle.manifest)
