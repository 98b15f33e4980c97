"""How far a model can be trusted: from its logits on images it was not trained on to the manifest's four records.

Owns which images a number was fitted on and which it was measured on: never the same. With images held out from
training, all is fitted on them and measured on the test images. Without, the test images are cut into halves of the
same classes; what is fitted on one is measured on the other, both ways, and what the bundle carries is then fitted on
all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from app.trust import (
    Calibration,
    Conformal,
    EnergyThreshold,
    LabelSet,
    OutOfDistribution,
    Reference,
    Unfamiliar,
)
from training.data.arrays import Split
from training.trust.calibration import Fit, Floats, Labels, fit_temperature, measure, softmax
from training.trust.conformal import COVERAGES, fit_threshold, label_sets
from training.trust.energy import KEPT, auroc, energy_of
from training.trust.reference import describe

FEWEST = 20
"""Images for a temperature: below, its error is larger than what it mends."""


@dataclass(frozen=True, slots=True)
class Strangers:
    """Images that are none of the classes: uint8 `[n, height, width, 3]`, and what they are, for people."""

    data: str
    images: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What there is to fit and measure with, beside the split that a bundle's figures are of."""

    held_out: Split | None = None
    """Images kept from training that are not the test's; None: the test images are cut into halves."""
    held_out_words: str = "images held out from training"
    strangers: tuple[Strangers, ...] = ()
    calibrate: bool = True
    """False leaves T = 1; everything else is measured all the same."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Labelled images and what the network says of them: logits float32 `[n, classes]`, labels int64 `[n]`."""

    logits: Floats
    labels: Labels

    def some(self, chosen: NDArray[np.int64]) -> "Answers":
        """Return those at some places."""
        return Answers(self.logits[chosen], self.labels[chosen])


@dataclass(frozen=True, slots=True)
class Trust:
    """The four records, and the temperature that the graph is to have."""

    calibration: Calibration
    conformal: Conformal
    ood: OutOfDistribution
    reference: Reference

    @property
    def temperature(self) -> float:
        """T of the graph."""
        return self.calibration.temperature


def assess(
    ask: Callable[[NDArray[np.uint8]], Floats], split: Split, logits: Floats, evidence: Evidence, data: str
) -> Trust:
    """Fit and measure all four.

    Args:
        ask: gives the logits of images uint8 `[n, height, width, 3]`, however many.
        split: the images that figures are measured on.
        logits: of the split, `[n, classes]`.
        evidence: what else there is.
        data: what the split is, for people.
    """
    test = Answers(logits, split.labels)
    source = split
    if evidence.held_out is not None and len(evidence.held_out.labels):
        source = evidence.held_out
        plan = _Plan.held_out(Answers(ask(source.images), source.labels), test, evidence.held_out_words, data)
    else:
        plan = _Plan.halves(test, data)
    calibration = _calibrate(plan, evidence.calibrate)
    if calibration.temperature == 1:
        plan = plan.untempered()
    energies = energy_of(test.logits, calibration.temperature)
    strangers = [(stranger, ask(stranger.images)) for stranger in evidence.strangers]
    return Trust(
        calibration,
        _conformal(plan),
        _out_of_distribution(plan, energies, test, strangers, calibration.temperature),
        describe(
            softmax(plan.fitting.logits, calibration.temperature),
            source.images,
            source.pictures,
            test.logits.shape[1],
            plan.fitted_on,
        ),
    )


# ---------------------------------------------------------------- who is fitted, who is measured


@dataclass(frozen=True, slots=True)
class _Fold:
    """What is fitted on `fitting` is measured on the test images at `measured`."""

    fitting: Answers
    measured: NDArray[np.int64]
    temperature: float
    """Fitted on `fitting`; 1 where the graph is to have none."""


@dataclass(frozen=True, slots=True)
class _Plan:
    fitting: Answers
    """What the bundle's own numbers are fitted on."""
    test: Answers
    fit: Fit
    temperature: float
    """Of the bundle."""
    folds: tuple[_Fold, ...]
    fitted_on: str
    measured_on: str

    @classmethod
    def held_out(cls, fitting: Answers, test: Answers, fitted_on: str, measured_on: str) -> "_Plan":
        """Fit on images that are not the test's."""
        fit = _fit(fitting)
        fold = _Fold(fitting, np.arange(len(test.labels)), fit.temperature)
        return cls(fitting, test, fit, fit.temperature, (fold,), fitted_on, measured_on)

    @classmethod
    def halves(cls, test: Answers, data: str) -> "_Plan":
        """Fit on each half of the test images for the other; a single image has to serve for both."""
        fit = _fit(test)
        one, other = halves(test.labels)
        if not len(one):
            return cls.held_out(test, test, data, data)
        folds = []
        for fitted, measured in ((one, other), (other, one)):
            part = test.some(fitted)
            folds.append(_Fold(part, measured, _fit(part).temperature))
        words = f"{data}: fitted on one half of the images and measured on the other, both ways"
        return cls(test, test, fit, fit.temperature, tuple(folds), data, words)

    def untempered(self) -> "_Plan":
        """Return the plan for a bundle whose temperature stays 1."""
        return replace(self, temperature=1.0, folds=tuple(replace(fold, temperature=1.0) for fold in self.folds))

    def measured(self) -> Iterator[tuple[_Fold, NDArray[np.float64], Labels]]:
        """Yield each fold with the probabilities of the images it is measured on, at its temperature, and labels."""
        for fold in self.folds:
            part = self.test.some(fold.measured)
            yield fold, softmax(part.logits, fold.temperature), part.labels


def halves(labels: Labels, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut the places of labels int64 `[n]` into halves that share every class out evenly; the same at every call."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return np.sort(by_class[1::2]), np.sort(by_class[::2])


# ---------------------------------------------------------------- the records


def _fit(answers: Answers) -> Fit:
    """Fit a temperature to four decimals: what the manifest says is what the graph does."""
    fit = fit_temperature(answers.logits, answers.labels)
    error = None if fit.standard_error is None else round(fit.standard_error, 4)
    return Fit(round(fit.temperature, 4), error)


def _calibrate(plan: _Plan, wanted: bool) -> Calibration:
    """Fit the temperature; it goes into the graph only if, measured elsewhere, it makes probabilities likelier."""
    before = measure(softmax(plan.test.logits), plan.test.labels)
    tempered = np.empty_like(plan.test.logits, np.float64)
    for fold, probabilities, _ in plan.measured():
        tempered[fold.measured] = probabilities
    after = measure(tempered, plan.test.labels)
    note = ""
    if not wanted:
        note = "Not wanted (--no-calibrate)."
    elif len(plan.fitting.labels) < FEWEST:
        note = f"{len(plan.fitting.labels)} images are too few to fit a temperature: it takes {FEWEST}."
    elif plan.fit.standard_error is None:
        note = "The fit stopped at its bound: these images do not say what T is."
    elif after.negative_log_likelihood >= before.negative_log_likelihood:
        note = (
            f"On images it was not fitted on, it raised the negative log-likelihood from "
            f"{before.negative_log_likelihood:.4f} to {after.negative_log_likelihood:.4f}."
        )
    return Calibration(
        temperature=1.0 if note else plan.fit.temperature,
        fitted_temperature=plan.fit.temperature,
        standard_error=plan.fit.standard_error,
        note=note,
        fitted_on=plan.fitted_on,
        fitted_images=len(plan.fitting.labels),
        measured_on=plan.measured_on,
        measured_images=len(plan.test.labels),
        before=before,
        after=before if note else after,
    )


def _conformal(plan: _Plan) -> Conformal:
    final = softmax(plan.fitting.logits, plan.temperature)
    sets = []
    for coverage in COVERAGES:
        held, size = 0, 0
        for fold, probabilities, labels in plan.measured():
            threshold = fit_threshold(softmax(fold.fitting.logits, fold.temperature), fold.fitting.labels, coverage)
            chosen = label_sets(probabilities, threshold)
            held += int(chosen[np.arange(len(labels)), labels].sum())
            size += int(chosen.sum())
        count = len(plan.test.labels)
        sets.append(
            LabelSet(
                coverage=coverage,
                threshold=_below(fit_threshold(final, plan.fitting.labels, coverage)),
                measured_coverage=round(held / count, 6),
                mean_size=round(size / count, 4),
            )
        )
    return Conformal(
        fitted_on=plan.fitted_on,
        fitted_images=len(plan.fitting.labels),
        measured_on=plan.measured_on,
        measured_images=len(plan.test.labels),
        sets=tuple(sets),
    )


def _below(threshold: float) -> float:
    """Round down: a threshold a hair above the probability it was taken from would break the promise."""
    return max(0.0, float(np.floor(threshold * 1e7) / 1e7))


def _out_of_distribution(
    plan: _Plan,
    energies: NDArray[np.float64],
    test: Answers,
    strangers: Sequence[tuple[Strangers, Floats]],
    temperature: float,
) -> OutOfDistribution:
    fitted = energy_of(plan.fitting.logits, temperature)
    bounds = [float(np.quantile(fitted, kept, method="higher")) for kept in KEPT]
    thresholds = []
    for kept, bound in zip(KEPT, bounds, strict=True):
        below = 0
        for fold in plan.folds:
            limit = np.quantile(energy_of(fold.fitting.logits, temperature), kept, method="higher")
            below += int((energies[fold.measured] <= limit).sum())
        thresholds.append(
            EnergyThreshold(kept=kept, energy=round(bound, 5), measured_kept=round(below / len(energies), 6))
        )
    doubts = 1 - softmax(test.logits, temperature).max(axis=1)
    unfamiliar = []
    for stranger, logits in strangers:
        found = energy_of(logits, temperature)
        unfamiliar.append(
            Unfamiliar(
                data=stranger.data,
                images=len(found),
                auroc=round(auroc(energies, found), 4),
                auroc_of_probability=round(auroc(doubts, 1 - softmax(logits, temperature).max(axis=1)), 4),
                noticed=tuple(round(float((found > bound).mean()), 4) for bound in bounds),
            )
        )
    return OutOfDistribution(
        fitted_on=plan.fitted_on,
        fitted_images=len(plan.fitting.labels),
        thresholds=tuple(thresholds),
        unfamiliar=tuple(unfamiliar),
    )
