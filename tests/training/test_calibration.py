from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.pictures import draw_reliability
from training.trust.calibration import (
    COLDEST,
    HOTTEST,
    adaptive_error,
    calibration_error,
    fit_temperature,
    measure,
    reliability,
    softmax,
)


def draw(count: int, classes: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose labels are drawn from softmax(logits / temperature): that is their true temperature."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (count, classes)).astype(np.float32)
    shares = softmax(logits, temperature).cumsum(axis=1)
    labels = (random.random((count, 1)) > shares[:, :-1]).sum(axis=1)
    return logits, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5, 8.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_the_true_temperature_is_found_within_its_error(temperature: float, classes: int):
    logits, labels = draw(4000, classes, temperature)
    fit = fit_temperature(logits, labels)
    assert fit.standard_error is not None
    assert abs(fit.temperature - temperature) < 3.5 * fit.standard_error
    assert fit.standard_error < 0.12 * temperature


def test_no_other_temperature_is_likelier():
    logits, labels = draw(500, 7, 1.7, seed=3)
    best = fit_temperature(logits, labels).temperature

    def loss(temperature: float) -> float:
        return float(-np.log(softmax(logits, temperature)[np.arange(500), labels]).mean())

    for factor in (0.9, 0.999, 1.001, 1.1):
        assert loss(best) < loss(best * factor)


def test_the_standard_error_is_that_of_repeated_draws():
    fits = [fit_temperature(*draw(400, 5, 1.5, seed)) for seed in range(120)]
    spread = np.std([fit.temperature for fit in fits])
    told = np.mean([fit.standard_error for fit in fits])
    assert told == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize(("which", "bound"), [("argmax", COLDEST), ("argmin", HOTTEST)])
def test_images_that_say_nothing_stop_the_fit_at_its_bound(which: str, bound: float):
    logits, _ = draw(100, 5, 1.0)
    fit = fit_temperature(logits, getattr(logits, which)(axis=1))
    assert (fit.temperature, fit.standard_error) == (bound, None)


def test_huge_logits_do_not_overflow():
    logits = np.array([[1e4, 0, -1e4], [3e4, 2.9e4, 0]], np.float32)
    probabilities = softmax(logits, np.array([1.0, 1e3]))
    np.testing.assert_allclose(probabilities[1], np.exp([30, 29, 0]) / np.exp([30, 29, 0]).sum())
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_the_errors_are_those_of_the_definition():
    """Four images: two at 0.65 of which one is right, two at 0.95, both right. Worked out by hand."""
    probabilities = np.array([[0.65, 0.35], [0.35, 0.65], [0.95, 0.05], [0.05, 0.95]])
    labels = np.array([0, 0, 0, 1])
    assert calibration_error(probabilities, labels) == pytest.approx((2 * 0.15 + 2 * 0.05) / 4)
    assert adaptive_error(probabilities, labels, bins=2) == pytest.approx((2 * 0.15 + 2 * 0.05) / 4)
    assert adaptive_error(probabilities, labels) == pytest.approx((0.35 + 0.65 + 0.05 + 0.05) / 4)
    figures = measure(probabilities, labels)
    losses = np.log([0.65, 0.35, 0.95, 0.95])
    assert figures.negative_log_likelihood == pytest.approx(-losses.mean(), abs=1e-6)
    assert figures.brier_score == pytest.approx(2 * (0.35**2 + 0.65**2 + 0.05**2 + 0.05**2) / 4, abs=1e-6)


def test_a_reliability_diagram_holds_every_image_once_and_adds_up_to_the_error():
    logits, labels = draw(700, 4, 2.0)
    probabilities = softmax(logits)
    bins = reliability(probabilities, labels)
    assert len(bins) == 15
    assert sum(entry.images for entry in bins) == 700
    full = [entry for entry in bins if entry.images]
    assert all(entry.low < entry.confidence <= entry.high for entry in full)
    gaps = sum(entry.images * abs(entry.accuracy - entry.confidence) for entry in full) / 700
    assert gaps == pytest.approx(calibration_error(probabilities, labels))
    assert all(np.isnan(entry.confidence) for entry in bins if not entry.images)


def test_the_edges_belong_to_the_bin_below():
    probabilities = np.array([[1.0, 0.0], [0.6, 0.4], [0.5, 0.5]])
    counts = [entry.images for entry in reliability(probabilities, np.zeros(3, np.int64), bins=5)]
    assert counts == [0, 0, 2, 0, 1]


def test_an_honest_model_is_within_chance_and_a_dishonest_one_is_not():
    logits, labels = draw(300, 6, 2.0)
    honest, loud = measure(softmax(logits, 2.0), labels), measure(softmax(logits), labels)
    assert honest.calibration_error <= honest.chance_error_95
    assert 0 < honest.chance_error < honest.chance_error_95
    assert loud.calibration_error > 2 * loud.chance_error_95
    assert honest.negative_log_likelihood < loud.negative_log_likelihood
    assert honest.brier_score < loud.brier_score


def test_the_diagram_is_drawn_even_where_bins_are_empty(tmp_path: Path):
    logits, labels = draw(30, 4, 2.0)
    draw_reliability(
        reliability(softmax(logits), labels), reliability(softmax(logits, 2.0), labels), tmp_path / "r.png"
    )
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10
