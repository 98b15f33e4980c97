"""Label suspects by confident learning, on probabilities of a classifier that has not seen the picture it judges.

Northcutt, Jiang and Chuang gave the method (2021, *Confident Learning: Estimating Uncertainty in Dataset Labels*).
Owns the mathematics: out-of-fold probabilities by logistic regression on features, the confident joint, the ranking.
Knows nothing of images, networks or files. The authors' library, cleanlab 2.9, brings scikit-learn, SciPy and pandas
for the forty lines that are needed, so it is not a dependency; `benchmarks/data_checks.py` compares with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from training.progress import counting

FOLDS = 5
PENALTY = 1e-3
"""L2, on features of variance 1; the loss is a mean. CIFAR-10 with 2 % wrong labels: see docs/data.md."""
MOST_ITERATIONS = 100
Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Suspect:
    """A picture whose label is probably wrong."""

    place: int
    suggested: int
    """The label that it probably has."""
    given_probability: float
    suggested_probability: float


def out_of_fold(features: NDArray[np.float32], labels: Labels, groups: Labels, classes: int) -> Probabilities:
    """Classify every picture by a logistic head that was fitted without it, and without its duplicates.

    Args:
        features: float32 `[n, width]`.
        labels: int64 `[n]`.
        groups: int64 `[n]`: pictures of the same number are left out together.
        classes: how many labels there are.

    Returns:
        Float64 `[n, classes]`.
    """
    spread = features.std(axis=0)
    inputs = torch.from_numpy((features - features.mean(axis=0)) / np.where(spread > 1e-6, spread, 1))
    truth = torch.from_numpy(labels)
    folds = torch.from_numpy(_folds(labels, groups))
    probabilities = np.empty((len(labels), classes))
    with counting("Judging labels", FOLDS) as advance:
        for fold in range(FOLDS):
            is_out = folds == fold
            weight, bias = _fit(inputs[~is_out], truth[~is_out], classes)
            logits = inputs[is_out] @ weight + bias
            probabilities[is_out.numpy()] = logits.double().softmax(dim=1).numpy()
            advance(1)
    return probabilities


def confident_joint(probabilities: Probabilities, labels: Labels) -> tuple[NDArray[np.int64], Labels]:
    """Count the pictures by given label and label that they confidently have.

    A picture confidently has the label whose probability is at least the mean of that probability over the pictures
    given it (equation 2 of the paper); of several, the likeliest.

    Returns:
        Counts int64 `[given, probable]`, and the probable labels int64 `[n]`, -1 where none is confident.
    """
    classes = probabilities.shape[1]
    thresholds = np.array(
        [
            probabilities[labels == label, label].mean() if (labels == label).any() else np.inf
            for label in range(classes)
        ]
    )
    is_confident = probabilities >= thresholds - 1e-6
    probable = np.where(is_confident, probabilities, -1).argmax(axis=1)
    probable[~is_confident.any(axis=1)] = -1
    joint = np.zeros((classes, classes), np.int64)
    is_counted = probable >= 0
    np.add.at(joint, (labels[is_counted], probable[is_counted]), 1)
    return joint, probable


def find_suspects(probabilities: Probabilities, labels: Labels) -> list[Suspect]:
    """Return the pictures off the diagonal of the confident joint whose given label is not the likeliest.

    The surest come first: they are ordered by the margin of the probable label over the given one.
    """
    _, probable = confident_joint(probabilities, labels)
    places = np.flatnonzero((probable >= 0) & (probable != labels) & (probabilities.argmax(axis=1) != labels))
    given = probabilities[places, labels[places]]
    suggested = probabilities[places, probable[places]]
    order = np.argsort(given - suggested, kind="stable")
    return [Suspect(int(places[at]), int(probable[places[at]]), float(given[at]), float(suggested[at])) for at in order]


def _folds(labels: Labels, groups: Labels) -> Labels:
    """Deal each class out over the folds in random order, but every group into the fold of its first picture."""
    fold = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.random.default_rng([0, label]).permutation(np.flatnonzero(labels == label))
        fold[members] = np.arange(len(members)) % FOLDS
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    together: Labels = fold[first][group]
    return together


def _fit(inputs: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise mean cross-entropy + penalty/2 · |weights|² by L-BFGS: `[width, classes]` and `[classes]`."""
    weight = torch.zeros(inputs.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MOST_ITERATIONS, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(inputs @ weight + bias, labels) + PENALTY / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def groups_of(count: int, same: Sequence[Sequence[int]]) -> Labels:
    """Number pictures 0 to `count`, those of one group alike, int64 `[count]`; a later group joins its first's."""
    groups = np.arange(count)
    for members in same:
        groups[list(members)] = groups[members[0]]
    return groups
