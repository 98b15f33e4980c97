"""Probabilities in, labels out: what the numbers of a session mean to a person.

Pure functions on one row at a time; softmax is in the graph. Knows neither models nor requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Score:
    """One class of an answer."""

    label: str
    index: int
    probability: float


def top_k(probabilities: NDArray[np.float32], labels: Sequence[str], k: int) -> list[Score]:
    """Return the `k` most probable classes of float32 `[classes]`, best first; equal ones in class order."""
    k = min(k, len(probabilities))
    if k < len(probabilities):
        # The k-th largest value decides, so that ties at the edge go to the lower class index, as in a full sort.
        edge = np.partition(probabilities, len(probabilities) - k)[len(probabilities) - k]
        candidates = np.flatnonzero(probabilities >= edge)
    else:
        candidates = np.arange(k)
    best = candidates[np.argsort(-probabilities[candidates], kind="stable")][:k]
    return [Score(labels[i], i, round(float(probabilities[i]), 6)) for i in best.tolist()]
