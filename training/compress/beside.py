"""Models measured beside each other: accuracy on the same images, speed in turns, costs by their graphs.

Owns the order of the measurements; what they mean is `table.py`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.cpus import machine
from training.classifiers import BATCH, in_batches, onnx_run
from training.compress.speed import measure_in_turns
from training.compress.table import Row, in_words
from training.costs import costs_of
from training.data.arrays import Split
from training.evaluate import measure_figures


@dataclass(frozen=True, slots=True)
class Measured:
    """A graph, and its accuracy from 0 to 1."""

    name: str
    path: Path
    accuracy: float


def measure(name: str, path: Path, split: Split, labels: tuple[str, ...]) -> Measured:
    """Measure the accuracy of an ONNX file on a split, numbered by `labels`."""
    probabilities = in_batches(onnx_run(path), split.images, BATCH)
    return Measured(name, path, measure_figures(probabilities, split.labels, labels).accuracy)


def rows_of(measured: Sequence[Measured], images: NDArray[np.uint8]) -> list[Row]:
    """Measure the speed of models in turns, on images uint8 `[n, height, width, 3]`, and make rows of a table."""
    speeds = measure_in_turns([model.path for model in measured], images)
    return [
        Row(model.name, model.accuracy, model.path.stat().st_size, costs_of(model.path), speed)
        for model, speed in zip(measured, speeds, strict=True)
    ]


def record_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the table as JSON values, for a manifest: the first row is the parent's, the last the child's."""
    return {
        "models": [row.record() for row in rows],
        "in_words": in_words(rows[0], rows[-1]),
        "machine": machine(),
    }
