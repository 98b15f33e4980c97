import numpy as np
import pytest

from training.trust.calibration import softmax
from training.trust.conformal import COVERAGES, fit_threshold, label_sets


@pytest.mark.parametrize("coverage", COVERAGES)
def test_the_promise_holds_on_images_like_those_it_was_fitted_on(coverage: float):
    """Exchangeable data: over many splits the mean coverage is between the promise and 1/(n + 1) above it."""
    random = np.random.default_rng(0)
    fitted, rounds, held = 199, 300, 0.0
    for _ in range(rounds):
        probabilities = softmax(random.normal(0, 2, (fitted + 400, 8)))
        # Labels that the model knows little of: the promise needs no good model.
        labels = np.where(random.random(len(probabilities)) < 0.5, probabilities.argmax(axis=1), 3)
        threshold = fit_threshold(probabilities[:fitted], labels[:fitted], coverage)
        plain = probabilities[fitted:] >= threshold
        held += plain[np.arange(400), labels[fitted:]].mean() / rounds
        assert (label_sets(probabilities[fitted:], threshold) >= plain).all()
    assert coverage - 0.006 < held < coverage + 1 / (fitted + 1) + 0.006


def test_the_threshold_is_the_rank_that_the_promise_needs():
    """Of nine images a promise of 0.9 takes the 9th largest probability of a true label, and 0.8 the 8th."""
    truth = np.linspace(0.9, 0.1, 9)
    probabilities = np.stack([truth, 1 - truth], axis=1)
    labels = np.zeros(9, np.int64)
    assert fit_threshold(probabilities, labels, 0.9) == pytest.approx(0.1)
    assert fit_threshold(probabilities, labels, 0.8) == pytest.approx(0.2)


def test_too_few_images_let_every_label_in():
    probabilities = np.array([[0.7, 0.2, 0.1]] * 98)
    assert fit_threshold(probabilities, np.zeros(98, np.int64), 0.99) == 0
    assert label_sets(probabilities, 0.0).all()


def test_the_likeliest_label_is_always_in():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25]])
    assert label_sets(probabilities, 0.9).tolist() == [[True, False, False], [True, False, False]]
    assert label_sets(probabilities, np.array([0.3, 0.9])).tolist() == [[True, True, False], [True, False, False]]
