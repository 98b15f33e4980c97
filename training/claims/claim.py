"""What a claim is, and whether runs hold it. Arithmetic only: trains nothing and reads no file."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

STANDARD_ERRORS = 3.0
"""Runs of a claim that is true lie further below it than this in one of 700 cases."""
UNKNOWN_DEVIATION = 0.005
"""Of accuracy between runs, where neither the claim nor the runs here are enough to tell: half a point."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a recipe attained: the mean over its runs, each from a seed of its own."""

    data: str
    """What was trained and tested on, in words."""
    train_images: int
    test_images: int
    accuracy: float
    """On the test images after the last epoch, 0-1."""
    deviation: float | None
    """Of accuracy between the runs; None: one run."""
    runs: int
    seconds: float
    """Of training: all epochs, without the tests between them and the decoding before."""
    hardware: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a recipe."""

    seed: int
    accuracy: float
    seconds: float
    images_per_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Runs beside a claim."""

    accuracy: float
    """Mean over the runs."""
    deviation: float | None
    """Of accuracy between them; None: one run."""
    seconds: float
    images_per_s: float
    allowed: float
    """How far below the claim the mean may lie by chance alone."""
    held: bool


def judge(trials: Sequence[Trial], claim: Claim) -> Verdict:
    """Say whether runs hold a claim: their mean is not below it by more than chance explains.

    Chance is three standard errors of the difference of both means, by the larger of the deviations that are known.
    Time is told and not judged: it is of the hardware.
    """
    accuracy, deviation = mean_and_deviation([trial.accuracy for trial in trials])
    known = max(claim.deviation or 0.0, deviation or 0.0) or UNKNOWN_DEVIATION
    allowed = STANDARD_ERRORS * known * math.sqrt(1 / claim.runs + 1 / len(trials))
    return Verdict(
        accuracy=accuracy,
        deviation=deviation,
        seconds=statistics.mean(trial.seconds for trial in trials),
        images_per_s=statistics.mean(trial.images_per_s for trial in trials),
        allowed=allowed,
        held=accuracy >= claim.accuracy - allowed,
    )


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation; a single value has none."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
