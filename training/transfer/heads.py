"""New last layers for few images: features and labels in, a head out, in NumPy and in the steps of a graph.

Owns the mathematics. A cosine head compares with the mean of each class (Snell et al. 2017; centred as by Wang et al.
2019, SimpleShot); a logistic head is multinomial regression with an L2 penalty. What is free in either is chosen by
the likelihood of images that were left out. Knows nothing of images, graphs' backbones or files.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.errors import SurgeryError

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Step = tuple[str, Sequence[str], Mapping[str, Any]]
"""An operator of ONNX, its inputs ("": what the step before gives; else a weight's name), its attributes."""

SHARPNESSES = np.geomspace(2, 60, 35)
"""Factors on the cosine before the softmax that are tried."""
STRENGTHS = np.geomspace(1e-5, 1e-1, 9)
"""L2 penalties that are tried, on features brought to a mean square norm of 1."""
FOLDS = 5
ALONE_SHARPNESS = 10.0
ALONE_STRENGTH = 1e-3
"""Taken where a class has a single image, so that none can be left out: near what five images choose."""
MOST_STEPS = 200
REMEMBERED = 10
FLAT = 1e-5
"""Largest slope that is taken for a minimum."""


@dataclass(frozen=True, slots=True)
class Head:
    """A fitted head."""

    steps: Sequence[Step]
    weights: Mapping[str, NDArray[np.float32]]
    about: Mapping[str, object] = field(default_factory=dict)
    """How it was fitted, for a manifest."""

    def probabilities(self, features: Features) -> NDArray[np.float32]:
        """Classify features float32 `[n, width]` in double precision, as the graph's steps do: `[n, classes]`."""
        found = features.astype(np.float64)
        for operator, inputs, _ in self.steps:
            given = [self.weights[name].astype(np.float64) for name in inputs if name]
            found = _OPERATORS[operator](found, *given)
        return found.astype(np.float32)


def fit_cosine(features: Features, labels: Labels, classes: int) -> Head:
    """Fit the nearest class mean by cosine, as probabilities.

    Args:
        features: float32 `[n, width]`.
        labels: int64 `[n]`, each class at least once.
        classes: how many there are.

    Raises:
        SurgeryError: a feature is not a number, or all features are alike.
    """
    wide = _checked(features)
    centre = np.stack([wide[labels == label].mean(axis=0) for label in range(classes)]).mean(axis=0)
    units = _unit(wide - centre)
    sums = np.stack([units[labels == label].sum(axis=0) for label in range(classes)])
    sharpness, loss = _choose_sharpness(units, sums, labels)
    weights = {
        "centre": centre.astype(np.float32),
        "weight": np.ascontiguousarray((sharpness * _unit(sums)).T, np.float32),
    }
    steps: list[Step] = [
        ("Sub", ("", "centre"), {}),
        ("LpNormalization", ("",), {"axis": 1, "p": 2}),
        ("Gemm", ("", "weight"), {}),
        ("Softmax", ("",), {"axis": 1}),
    ]
    return Head(steps, weights, {"head": "cosine", "sharpness": round(sharpness, 3), "left_out_loss": loss})


def fit_logistic(features: Features, labels: Labels, classes: int) -> Head:
    """Fit multinomial logistic regression with an L2 penalty chosen by cross-validation.

    The folds are stratified: as many as the smallest class has images, at most five.

    Args:
        features: float32 `[n, width]`.
        labels: int64 `[n]`, each class at least once.
        classes: how many there are.

    Raises:
        SurgeryError: a feature is not a number, or all features are alike.
    """
    wide = _checked(features)
    centre = wide.mean(axis=0)
    scale = float(np.sqrt(((wide - centre) ** 2).sum(axis=1).mean()))
    # With a penalty of squares the weights lie in the span of the images: n numbers a class do for `width`.
    left, singular, basis = np.linalg.svd((wide - centre) / scale, full_matrices=False)
    short = left * singular
    strength, loss = _choose_strength(short, labels, classes)
    weight, bias = _regress(short, labels, classes, [strength])[0]
    weight = basis.T @ weight / scale
    weights = {"weight": weight.astype(np.float32), "bias": (bias - centre @ weight).astype(np.float32)}
    steps: list[Step] = [("Gemm", ("", "weight", "bias"), {}), ("Softmax", ("",), {"axis": 1})]
    return Head(steps, weights, {"head": "logistic", "l2": float(f"{strength:.3g}"), "left_out_loss": loss})


HEADS: dict[str, Callable[[Features, Labels, int], Head]] = {"cosine": fit_cosine, "logistic": fit_logistic}


# ---------------------------------------------------------------- what is chosen on images left out


def _choose_sharpness(
    units: NDArray[np.float64], sums: NDArray[np.float64], labels: Labels
) -> tuple[float, float | None]:
    """Leave each image out of its class' mean in turn: the sharpness and its loss, None where none can be left out."""
    if np.bincount(labels).min() < 2:
        return ALONE_SHARPNESS, None
    cosines = units @ _unit(sums).T
    own = (units * _unit(sums[labels] - units)).sum(axis=1)
    cosines[np.arange(len(labels)), labels] = own
    losses = [_loss(sharpness * cosines, labels) for sharpness in SHARPNESSES]
    best = int(np.argmin(losses))
    return float(SHARPNESSES[best]), round(losses[best], 4)


def _choose_strength(short: NDArray[np.float64], labels: Labels, classes: int) -> tuple[float, float | None]:
    """Cross-validate: the L2 penalty and its loss, None where no image can be left out."""
    folds = min(FOLDS, int(np.bincount(labels, minlength=classes).min()))
    if folds < 2:
        return ALONE_STRENGTH, None
    fold = _folds(labels, folds)
    losses = np.zeros(len(STRENGTHS))
    for out in range(folds):
        kept, held = fold != out, fold == out
        for place, (weight, bias) in enumerate(_regress(short[kept], labels[kept], classes, STRENGTHS)):
            losses[place] += _loss(short[held] @ weight + bias, labels[held]) * held.mean()
    best = int(np.argmin(losses))
    return float(STRENGTHS[best]), round(float(losses[best]), 4)


def _folds(labels: Labels, folds: int) -> NDArray[np.int64]:
    """Deal the images of each class out in turn, int64 `[n]`: the shots were drawn at random, so their order is."""
    fold = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        fold[members] = np.arange(len(members)) % folds
    return fold


def _regress(
    inputs: NDArray[np.float64], labels: Labels, classes: int, strengths: Sequence[float] | NDArray[np.float64]
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Minimise mean cross-entropy + strength/2 · |weights|², the strongest penalty first, each from the last.

    Returns:
        Weights `[width, classes]` and biases `[classes]` for each strength, in the order given.
    """
    rows, width = inputs.shape
    truth = np.eye(classes)[labels]
    found = np.zeros((width + 1) * classes)
    fitted = {}
    for strength in sorted(strengths, reverse=True):

        def slope(flat: NDArray[np.float64], strength: float = strength) -> tuple[float, NDArray[np.float64]]:
            weight, bias = flat[:-classes].reshape(width, classes), flat[-classes:]
            logits = inputs @ weight + bias
            error = (_softmax(logits) - truth) / rows
            gradient = np.concatenate([(inputs.T @ error + strength * weight).ravel(), error.sum(axis=0)])
            return _loss(logits, labels) + strength / 2 * float((weight**2).sum()), gradient

        found = _descend(slope, found)
        fitted[strength] = found[:-classes].reshape(width, classes), found[-classes:]
    return [fitted[strength] for strength in strengths]


def _descend(
    slope: Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]], place: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Minimise a smooth convex function by L-BFGS (Nocedal & Wright 2006, algorithm 7.5), halving long steps.

    PyTorch's is made for networks: 1.4 s for fifty images of 1,280 features and all their folds, this one 0.1 s.
    """
    value, gradient = slope(place)
    pairs: deque[tuple[NDArray[np.float64], NDArray[np.float64]]] = deque(maxlen=REMEMBERED)
    for _ in range(MOST_STEPS):
        if np.abs(gradient).max() < FLAT:
            break
        direction = -_scaled_by_curvature(gradient, pairs)
        step = 1.0
        fall = float(direction @ gradient)
        while (found := slope(place + step * direction))[0] > value + 1e-4 * step * fall and step > 1e-9:
            step /= 2
        pairs.append((step * direction, found[1] - gradient))
        place, (value, gradient) = place + step * direction, found
    return place


def _scaled_by_curvature(
    gradient: NDArray[np.float64], pairs: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]
) -> NDArray[np.float64]:
    """Multiply a gradient by the inverse Hessian that the last moves, and what they changed of it, tell of."""
    shares = []
    for move, change in reversed(pairs):
        share = float(move @ gradient / (move @ change))
        gradient = gradient - share * change
        shares.append(share)
    if pairs:
        move, change = pairs[-1]
        gradient = gradient * float(move @ change / (change @ change))
    for (move, change), share in zip(pairs, reversed(shares), strict=True):
        gradient = gradient + (share - float(change @ gradient / (move @ change))) * move
    return gradient


# ---------------------------------------------------------------- arithmetic


def _checked(features: Features) -> NDArray[np.float64]:
    if not np.isfinite(features).all():
        raise SurgeryError("The backbone gives features that are not numbers for an image: choose another bundle.")
    if not np.ptp(features, axis=0).any():
        raise SurgeryError(
            "The backbone gives the same features for all images: choose another bundle, or see to them."
        )
    return features.astype(np.float64)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale rows to length 1; one of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units: NDArray[np.float64] = rows / np.where(lengths == 0, 1, lengths)
    return units


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers: NDArray[np.float64] = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _loss(logits: NDArray[np.float64], labels: Labels) -> float:
    """Return the mean cross-entropy, nats."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]).mean())


def _gemm(
    rows: NDArray[np.float64], weight: NDArray[np.float64], bias: NDArray[np.float64] | float = 0.0
) -> NDArray[np.float64]:
    logits: NDArray[np.float64] = rows @ weight + bias
    return logits


_OPERATORS: dict[str, Callable[..., NDArray[np.float64]]] = {
    "Sub": np.subtract,
    "LpNormalization": _unit,
    "Gemm": _gemm,
    "Softmax": _softmax,
}
