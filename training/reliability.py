"""Reliability: whether a model that is 80 % sure is right in 80 of 100 cases.

Probabilities and true labels in, bins and the expected calibration error out (Guo et al., *On Calibration of Modern
Neural Networks*, 2017, equations 2 to 5). Draws nothing and changes no model.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers whose confidence lies above `low` and up to `high`; both means are 0 where there are none."""

    low: float
    high: float
    images: int
    confidence: float
    """Mean probability of the label that was given."""
    accuracy: float


def reliability(probabilities: NDArray[np.float32], truth: NDArray[np.int64], count: int = BINS) -> tuple[Bin, ...]:
    """Sort answers by confidence into bins of equal width.

    Args:
        probabilities: float32 `[n, classes]`.
        truth: int64 `[n]`.
        count: of bins, between 0 and 1.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == truth
    edges = np.linspace(0, 1, count + 1)
    # A confidence of exactly an edge belongs below it, and float32 may sum to a little above 1.
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, count - 1)
    found = []
    for place, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        inside = places == place
        images = int(inside.sum())
        means = (float(confidence[inside].mean()), float(right[inside].mean())) if images else (0.0, 0.0)
        found.append(Bin(low, high, images, *means))
    return tuple(found)


def calibration_error(probabilities: NDArray[np.float32], truth: NDArray[np.int64], count: int = BINS) -> float:
    """Return the mean distance between confidence and accuracy over the bins, each weighed by its images."""
    bins = reliability(probabilities, truth, count)
    return sum(entry.images * abs(entry.confidence - entry.accuracy) for entry in bins) / len(truth)
