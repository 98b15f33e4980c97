"""The energy of an image: low where the network finds evidence for some class, high for what is like none of them.

`-T · logsumexp(logits / T)` (Liu et al., Energy-based Out-of-distribution Detection, 2020), in nats. Arrays in,
numbers out.
"""

import numpy as np
from numpy.typing import NDArray

from training.trust.calibration import Floats

KEPT = (0.9, 0.95, 0.99)
"""Shares of known images that thresholds are written for."""


def energy_of(logits: Floats, temperature: float | Floats = 1.0) -> NDArray[np.float64]:
    """Return the energy of each row of logits, float64 `[n]`; T is one number, or one for each row."""
    scaled = logits.astype(np.float64) / np.reshape(temperature, (-1, 1))
    largest = scaled.max(axis=1)
    evidence = largest + np.log(np.exp(scaled - largest[:, None]).sum(axis=1))
    return np.asarray(-np.asarray(temperature) * evidence)


def auroc(known: Floats, unfamiliar: Floats) -> float:
    """Return the probability that a score of `unfamiliar` is above one of `known`, ties counted half (Mann-Whitney)."""
    ordered = np.sort(known)
    below = np.searchsorted(ordered, unfamiliar, side="left")
    upto = np.searchsorted(ordered, unfamiliar, side="right")
    return float((below + upto).sum() / 2 / (len(known) * len(unfamiliar)))
