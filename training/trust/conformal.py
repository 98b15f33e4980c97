"""Label sets that hold the true label as often as they promise: split conformal prediction.

The score of a label is 1 - its probability (Sadinle, Lei and Wasserman, Least Ambiguous Set-Valued Classifiers, 2019):
of all rules with the same coverage it gives the smallest sets on average, and at serving time it is one comparison.
Arrays in, numbers out.
"""

import math

import numpy as np
from numpy.typing import NDArray

from training.trust.calibration import Floats, Labels

COVERAGES = (0.8, 0.9, 0.95, 0.99)


def fit_threshold(probabilities: Floats, labels: Labels, coverage: float) -> float:
    """Return the least probability of a label in the set, so that sets hold the true label with `coverage` at least.

    With n images it is the ceil((n + 1) · coverage)-th largest probability of a true label; where that is beyond n the
    images are too few, and 0 lets every label in.
    """
    truth = np.sort(probabilities[np.arange(len(labels)), labels])[::-1]
    # Rounded first: floating point makes some whole numbers a little more than they are.
    rank = math.ceil(round((len(truth) + 1) * coverage, 9))
    return float(truth[rank - 1]) if rank <= len(truth) else 0.0


def label_sets(probabilities: Floats, threshold: float | Floats) -> NDArray[np.bool_]:
    """Return which labels are in each image's set, `[n, classes]`: the likeliest one always is."""
    sets: NDArray[np.bool_] = probabilities >= np.reshape(threshold, (-1, 1))
    sets[np.arange(len(sets)), probabilities.argmax(axis=1)] = True
    return sets
