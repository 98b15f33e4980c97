"""Calibration: does 80 % sure mean right four times of five, and one number that makes it so.

Temperature scaling (Guo et al., On Calibration of Modern Neural Networks, 2017): `softmax(logits / T)` with the T of
least negative log-likelihood. It changes no image's likeliest label. Arrays in, numbers out; knows no model or file.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.trust import BINS, ProbabilityFigures

COLDEST, HOTTEST = 0.05, 20.0
"""Bounds of T: beyond them the images say nothing of it but that it is small, or large."""
CHANCE_DRAWS = 1000
CHANCE_NUMBERS = 4_000_000
"""Of random numbers at most, so that 50,000 images take a second; the draws become fewer."""
STEPS = 100

Floats = NDArray[np.floating]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fit:
    """A temperature, and what its images say of its error."""

    temperature: float
    standard_error: float | None
    """None where T stopped at a bound: no image, or every one, is given the wrong label, for instance."""


@dataclass(frozen=True, slots=True)
class Bin:
    """The images whose likeliest label has a probability in (low, high]: the first bin holds 0 too."""

    low: float
    high: float
    images: int
    confidence: float
    """Mean probability of their likeliest label; NaN without images."""
    accuracy: float
    """Share of them whose likeliest label is the true one; NaN without images."""


def softmax(logits: Floats, temperature: float | Floats = 1.0) -> NDArray[np.float64]:
    """Return `softmax(logits / T)`, float64 `[n, classes]`; T is one number, or one for each row `[n]`."""
    shifted = _shifted(logits)
    shifted /= np.reshape(temperature, (-1, 1))
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def fit_temperature(logits: Floats, labels: Labels) -> Fit:
    """Find the T of least negative log-likelihood of labels int64 `[n]` under `softmax(logits / T)`.

    In 1/T the likelihood is convex, so its slope is followed to zero by Newton's steps, halving the bracket where a
    step would leave it. The standard error is the sandwich estimate: right even where the model is wrong.
    """
    centred = _shifted(logits)
    wanted = centred[np.arange(len(labels)), labels]
    low, high = 1 / HOTTEST, 1 / COLDEST
    if _slopes(centred, wanted, low)[0].mean() >= 0:
        return Fit(HOTTEST, None)
    if _slopes(centred, wanted, high)[0].mean() <= 0:
        return Fit(COLDEST, None)
    inverse = 1.0
    for _ in range(STEPS):
        slopes, curvature = _slopes(centred, wanted, inverse)
        slope = float(slopes.mean())
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else high + 1
        following = step if low < step < high else (low + high) / 2
        if abs(following - inverse) < 1e-12 * inverse:
            break
        inverse = following
    error = float(np.sqrt((slopes**2).sum()) / (len(labels) * curvature)) if curvature > 0 else None
    return Fit(1 / inverse, None if error is None else error / inverse**2)


def _shifted(logits: Floats) -> NDArray[np.float64]:
    """Return the logits with 0 as the largest of each row, float64: no exponential overflows."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    return exact


def _slopes(centred: Floats, wanted: Floats, inverse: float) -> tuple[NDArray[np.float64], float]:
    """Return each image's derivative of the negative log-likelihood by 1/T, and the mean second derivative."""
    weights = np.exp(centred * inverse)
    weights /= weights.sum(axis=1, keepdims=True)
    mean = (weights * centred).sum(axis=1)
    variance = (weights * centred**2).sum(axis=1) - mean**2
    return mean - wanted, float(variance.mean())


# ---------------------------------------------------------------- figures


def measure(probabilities: Floats, labels: Labels, seed: int = 0) -> ProbabilityFigures:
    """Say how far probabilities `[n, classes]` are from the labels int64 `[n]`."""
    confidence, _ = _answers(probabilities, labels)
    truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    squares = (probabilities.astype(np.float64) ** 2).sum(axis=1) - 2 * truth + 1
    chance = _chance_errors(confidence, seed)
    return ProbabilityFigures(
        calibration_error=_rounded(calibration_error(probabilities, labels)),
        adaptive_error=_rounded(adaptive_error(probabilities, labels)),
        chance_error=_rounded(chance.mean()),
        chance_error_95=_rounded(np.quantile(chance, 0.95)),
        negative_log_likelihood=_rounded(-np.log(np.maximum(truth, np.finfo(np.float64).tiny)).mean()),
        brier_score=_rounded(squares.mean()),
    )


def reliability(probabilities: Floats, labels: Labels, bins: int = BINS) -> tuple[Bin, ...]:
    """Return what a reliability diagram shows: bins of equal width by the likeliest label's probability."""
    confidence, right = _answers(probabilities, labels)
    places = _places(confidence, bins)
    counts = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = np.bincount(places, confidence, bins) / counts
        shares = np.bincount(places, right, bins) / counts
    edges = np.linspace(0, 1, bins + 1)
    columns = (edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), means.tolist(), shares.tolist())
    return tuple(Bin(*row) for row in zip(*columns, strict=True))


def calibration_error(probabilities: Floats, labels: Labels, bins: int = BINS) -> float:
    """Return the expected calibration error over bins of equal width, 0-1."""
    confidence, right = _answers(probabilities, labels)
    return float(np.abs(np.bincount(_places(confidence, bins), right - confidence)).sum() / len(labels))


def adaptive_error(probabilities: Floats, labels: Labels, bins: int = BINS) -> float:
    """Return the expected calibration error over bins of equally many images, give or take one, 0-1."""
    confidence, right = _answers(probabilities, labels)
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split((right - confidence)[order], min(bins, len(labels)))
    return float(sum(abs(part.sum()) for part in parts) / len(labels))


def _answers(probabilities: Floats, labels: Labels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the likeliest label's probability, and 1 where it is the true label, each `[n]`."""
    return probabilities.max(axis=1).astype(np.float64), (probabilities.argmax(axis=1) == labels).astype(np.float64)


def _places(confidence: Floats, bins: int) -> NDArray[np.int64]:
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def _chance_errors(confidence: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Return calibration errors of a model that is right exactly as often as it says, `[draws]`."""
    random = np.random.default_rng(seed)
    places = _places(confidence, BINS)
    draws = max(20, min(CHANCE_DRAWS, CHANCE_NUMBERS // len(confidence)))
    errors = np.empty(draws)
    for draw in range(draws):
        right = random.random(len(confidence)) < confidence
        errors[draw] = np.abs(np.bincount(places, right - confidence)).sum() / len(confidence)
    return errors


def _rounded(value: float | np.floating) -> float:
    return max(0.0, round(float(value), 6))
