import numpy as np
import pytest

from training.trust.energy import auroc, energy_of


def test_energy_is_minus_t_logsumexp():
    logits = np.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 5.0]])
    np.testing.assert_allclose(energy_of(logits), -np.log(np.exp(logits).sum(axis=1)))
    np.testing.assert_allclose(energy_of(logits, 2.0), -2 * np.log(np.exp(logits / 2).sum(axis=1)))
    np.testing.assert_allclose(energy_of(logits, np.array([1.0, 2.0])), [energy_of(logits)[0], energy_of(logits, 2)[1]])
    assert energy_of(np.array([[5000.0, 0.0]]))[0] == -5000


def test_auroc_counts_pairs_and_ties_half():
    assert auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1
    assert auroc(np.array([3.0, 4.0]), np.array([1.0])) == 0
    assert auroc(np.array([1.0, 2.0, 2.0]), np.array([2.0])) == pytest.approx((1 + 0.5 + 0.5) / 3)
    random = np.random.default_rng(0)
    known, other = random.integers(0, 9, 40), random.integers(2, 12, 30)
    pairs = [(b > a) + (b == a) / 2 for a in known for b in other]
    assert auroc(known, other) == pytest.approx(np.mean(pairs))
