"""Export: a network in, a proven bundle out, or one sentence and nothing.

Owns the proof that the graph answers as the network does. The order is the point: graph, comparison on real
images, golden set, bundle, proof of the bundle, and only then its place under `models/`.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from app.golden import Run, prove
from app.manifest import INPUT_NAME, OUTPUT_NAME, Bundle, PixelRecipe, write_bundle
from training.classifiers import in_batches, onnx_run, torch_run
from training.data.arrays import Split
from training.data.listing import Picture
from training.errors import ExportError
from training.evaluate import measure_figures
from training.golden import choose_golden
from training.graphs.exporter import make_graph
from training.servable import Servable
from training.trust.calibrate import calibrate_graph
from training.trust.fitted import Evidence

LARGEST_DIFFERENCE = 1e-4
"""Of any probability between PyTorch and ONNX Runtime. Measured on real images: 6e-7 and 1.1e-6 for the two models."""
GOLDEN_TOLERANCE = 1e-4
"""Measured on the two models: other thread counts, batch sizes and optimisation levels differ by 5e-7 or less; weights
rounded as TF32 does, by 3e-4 and more (`python -m benchmarks.tf32`); one level in one pixel of a thousand, by 4e-4 and
more; the mildest wrong recipe, by 1.4e-2."""
COMPARED = 500
BATCHES = (1, 7, 64)


@dataclass(frozen=True, slots=True)
class Offer:
    """What is to be exported, and all that the manifest says of it beside what export measures."""

    name: str
    version: str
    description: str
    labels: tuple[str, ...]
    pixels: PixelRecipe
    training: dict[str, Any]
    data: str
    """What the figures are measured on, for people."""
    source: str
    licence: str
    command: str
    data_card: bytes | None = None
    """What the model was trained on (`training/data/cards.py`), as a file."""
    parent: dict[str, Any] | None = None
    """What this was compressed from."""
    golden_tolerance: float = GOLDEN_TOLERANCE
    """Largest difference from the golden answers where it is served, of any probability."""
    figures: dict[str, Any] = field(default_factory=dict)
    """More for the manifest's evaluation, measured by whoever offers."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What export measured."""

    bundle: Bundle
    difference: float
    detects: dict[str, float]


def export(
    servable: Servable,
    offer: Offer,
    split: Split,
    target: Path,
    golden_from: Sequence[Picture] = (),
    evidence: Evidence | None = None,
) -> Exported:
    """Write the bundle `target` and prove it.

    Args:
        servable: the network with its weights.
        offer: what the manifest says of it.
        split: real images, to compare the runtimes and to measure accuracy on.
        target: `<models>/<name>/<version>`.
        golden_from: pictures for the golden set that may be passed on; by default those of the split.
        evidence: what the probabilities are calibrated with, beside the split.

    Raises:
        ExportError: ONNX Runtime and PyTorch differ; nothing is written.
        BundleError: the bundle does not prove itself; nothing is written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model.onnx"
        write_graph(servable, offer.pixels, model)
        reference = torch_run(servable, torch.device("cpu"))
        return export_graph(model, reference, offer, split, target, golden_from, evidence)


def export_graph(
    model: Path,
    reference: Run,
    offer: Offer,
    split: Split,
    target: Path,
    golden_from: Sequence[Picture] = (),
    evidence: Evidence | None = None,
) -> Exported:
    """Write the bundle `target` of a graph that need not be PyTorch's, and prove it.

    Args:
        model: ONNX file from `image` to `probabilities`, self-contained, which ends in a softmax; the bundle's graph
            is this with a temperature before the softmax, and the energy as a second output.
        reference: what the graph has to answer, computed in another way, before any temperature.
        offer: what the manifest says of it.
        split: real images, to compare graph and reference and to measure accuracy on.
        target: `<models>/<name>/<version>`.
        golden_from: pictures for the golden set that may be passed on; by default those of the split.
        evidence: what the probabilities are calibrated with, beside the split.

    Raises:
        ExportError: the graph does not answer as the reference; nothing is written.
        BundleError: ONNX Runtime does not take the graph, or the bundle does not prove itself; nothing is written.
    """
    difference = compare(reference, onnx_run(model), split)
    calibrated = calibrate_graph(onnx.load(model), split, offer.data, evidence or Evidence())
    figures = measure_figures(calibrated.probabilities, split.labels, offer.labels)
    with tempfile.TemporaryDirectory() as scratch:
        final = Path(scratch) / "model.onnx"
        onnx.save(calibrated.graph, final)
        golden = choose_golden(golden_from or split.pictures, offer.pixels, onnx_run(final))
        manifest = {
            "name": offer.name,
            "version": offer.version,
            "description": offer.description,
            "pixels": offer.pixels,
            "labels": offer.labels,
            "training": offer.training,
            "evaluation": {
                "data": offer.data,
                **figures.summary(),
                **offer.figures,
                "runtime_difference": float(f"{difference:.2g}"),
                "golden_detects": {wrong: float(f"{change:.2g}") for wrong, change in golden.detects.items()},
                "command": offer.command,
            },
            **calibrated.records(),
            "parent": offer.parent,
            "provenance": {
                "source": offer.source,
                "licence": offer.licence,
                "command": offer.command,
                "created": datetime.now(UTC).date().isoformat(),
            },
            "opset": opset_of(model),
            "tolerance": offer.golden_tolerance,
            "golden_labels": [offer.labels[index] for index in golden.probabilities.argmax(axis=1).tolist()],
        }
        bundle = write_bundle(
            target,
            manifest,
            final,
            golden.images,
            golden.probabilities,
            check=lambda written: prove(written, onnx_run(written.model_path)),
            data_card=offer.data_card,
        )
    return Exported(bundle, difference, golden.detects)


def write_graph(servable: Servable, pixels: PixelRecipe, path: Path) -> None:
    """Write the ONNX file: one self-contained graph, free batch, fixed image size, nothing of this machine in it.

    Raises:
        ExportError: the network cannot be expressed as a graph.
    """
    example = torch.zeros(2, pixels.height, pixels.width, 3, dtype=torch.uint8)
    graph = make_graph(servable, {INPUT_NAME: example}, OUTPUT_NAME, {INPUT_NAME: ("n", None, None, None)})
    onnx.save(graph, path)


def opset_of(model: Path) -> int:
    """Return the version of ONNX' own operators that a file's graph is written in."""
    graph = onnx.load(model, load_external_data=False)
    return next(int(entry.version) for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))


def compare(reference: Run, candidate: Run, split: Split) -> float:
    """Compare two runtimes on up to 500 images spread over the split, in batches of several sizes.

    Returns:
        The largest absolute difference of a probability.

    Raises:
        ExportError: it is larger than 1e-4, or an answer is not a number.
    """
    images = spread(split.images, COMPARED)
    expected = in_batches(reference, images, max(BATCHES))
    worst = 0.0
    for batch in BATCHES:
        difference = float(np.abs(in_batches(candidate, images, batch) - expected).max())
        if not difference <= LARGEST_DIFFERENCE:
            raise ExportError(
                f"The graph differs from the network by {difference:.2g} in a probability (batches of {batch}, "
                f"{len(images)} images), allowed is {LARGEST_DIFFERENCE:.0e}: no bundle was written."
            )
        worst = max(worst, difference)
    return worst


def spread(images: NDArray[np.uint8], most: int) -> NDArray[np.uint8]:
    """Take up to `most` images at even distances: data sets are sorted by class."""
    return np.asarray(images[np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)])
