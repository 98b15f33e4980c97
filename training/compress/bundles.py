"""A compressed graph becomes a bundle: its parent's golden images with its own answers, its parent's record, its proof.

Owns what a child's manifest takes from its parent's. Computes no graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from app.golden import Run, prove
from app.images import decode
from app.manifest import Bundle, write_bundle
from training.classifiers import onnx_run
from training.errors import CompressError
from training.export import GOLDEN_TOLERANCE, opset_of
from training.golden import detected

MARGIN = 2
"""The tolerance is so many times what two right implementations were apart on the golden images."""
LARGEST_TOLERANCE = 0.1
"""The manifest's own limit: beyond it a golden set proves nothing."""


@dataclass(frozen=True, slots=True)
class Child:
    """What was made of a bundle."""

    model: Path
    otherwise: Run
    """The same graph, computed in another right way: what differs is rounding."""
    name: str
    version: str
    description: str
    method: str
    details: Mapping[str, Any]
    trust: Mapping[str, Any]
    """The manifest's sections on how far it can be trusted."""
    evaluation: Mapping[str, Any]
    command: str


def write_child(parent: Bundle, child: Child, target: Path) -> Bundle:
    """Write the bundle `target` and prove it.

    Pixel recipe, labels, training, data card, source and licence are the parent's. So are the golden images, which were
    chosen so that each field of the recipe shows, and which may be passed on.

    Raises:
        CompressError: its answers depend too much on how it is computed; nothing is written.
        BundleError: the bundle does not prove itself; nothing is written.
    """
    manifest = parent.manifest
    names = [Path(image.file).name for image in manifest.golden.images]
    images = dict(zip(names, parent.golden_bytes(), strict=True))
    run = onnx_run(child.model)
    pixels = np.stack([decode(data, manifest.pixels) for data in images.values()])
    probabilities = run(pixels)
    apart = float(np.abs(child.otherwise(pixels) - probabilities).max())
    tolerance = max(GOLDEN_TOLERANCE, MARGIN * apart)
    # An image whose label harmless rounding could change would keep the bundle from serving.
    sure = np.flatnonzero(np.diff(np.sort(probabilities, axis=1)[:, -2:], axis=1)[:, 0] > 2 * tolerance)
    if tolerance > LARGEST_TOLERANCE or not len(sure):
        raise CompressError(
            f"Two right ways of computing the graph differ by {apart:.2g} in a golden probability, so its answers "
            f"could not be checked within {LARGEST_TOLERANCE}: no bundle was written."
        )
    images, probabilities = {names[place]: images[names[place]] for place in sure.tolist()}, probabilities[sure]
    detects = detected(list(images.values()), manifest.pixels, probabilities, run)
    fields = manifest.model_dump(mode="json", include={"schema_version", "pixels", "labels", "training"}) | {
        "name": child.name,
        "version": child.version,
        "description": child.description,
        **child.trust,
        "evaluation": {
            **child.evaluation,
            "golden_rounding": float(f"{apart:.2g}"),
            "golden_detects": {wrong: float(f"{change:.2g}") for wrong, change in detects.items()},
        },
        "parent": {
            "name": manifest.name,
            "version": manifest.version,
            "sha256": manifest.model.sha256,
            "method": child.method,
            "details": dict(child.details),
        },
        "provenance": {
            "source": manifest.provenance.source,
            "licence": manifest.provenance.licence,
            "command": child.command,
            "created": datetime.now(UTC).date().isoformat(),
        },
        "opset": opset_of(child.model),
        "tolerance": tolerance,
        "golden_labels": [manifest.labels[index] for index in probabilities.argmax(axis=1).tolist()],
    }
    return write_bundle(
        target,
        fields,
        child.model,
        images,
        probabilities,
        check=lambda written: prove(written, onnx_run(written.model_path)),
        data_card=parent.data_card_bytes(),
    )
