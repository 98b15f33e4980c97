from dataclasses import replace

import numpy as np
import pytest

from tests.training.test_calibration import draw
from training.data.arrays import Split
from training.data.listing import Picture
from training.trust.calibration import fit_temperature
from training.trust.fitted import Evidence, Strangers, Trust, assess, halves


def split_of(logits: np.ndarray, labels: np.ndarray) -> Split:
    """Images whose first pixels are the logits, so that a function can say them again."""
    images = np.ascontiguousarray(logits, np.float32).view(np.uint8).reshape(len(logits), -1, 4, 1).repeat(3, axis=3)
    return Split(images, labels, tuple(Picture(str(n), 0, "", image) for n, image in enumerate(images)))


def ask(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images[..., 0]).reshape(len(images), -1).view(np.float32)


def assessed(logits: np.ndarray, labels: np.ndarray, evidence: Evidence | None = None) -> Trust:
    return assess(ask, split_of(logits, labels), logits, evidence or Evidence(), "the test images")


def test_held_out_images_fit_and_test_images_measure():
    held_out, test = draw(3000, 6, 2.0, seed=1), draw(1000, 6, 2.0, seed=2)
    found = assessed(*test, Evidence(held_out=split_of(*held_out), held_out_words="those held out"))
    calibration = found.calibration
    assert calibration.temperature == round(fit_temperature(*held_out).temperature, 4)
    assert (calibration.fitted_on, calibration.fitted_images) == ("those held out", 3000)
    assert (calibration.measured_on, calibration.measured_images) == ("the test images", 1000)
    assert calibration.before.calibration_error > 0.1
    assert calibration.after.calibration_error < calibration.after.chance_error_95
    assert found.reference.images == 3000
    for entry in found.conformal.sets:
        assert entry.measured_coverage >= entry.coverage - 0.03
    sizes = [entry.mean_size for entry in found.conformal.sets]
    assert sizes == sorted(sizes)
    for bound in found.ood.thresholds:
        assert bound.measured_kept == pytest.approx(bound.kept, abs=0.03)


def test_without_held_out_images_no_number_meets_the_images_it_was_fitted_on():
    """Halves of different temperatures: measured on itself, each half would look honest."""
    logits, labels = draw(2000, 6, 1.0)
    one, other = halves(labels)
    logits[one] *= 4
    logits[other] *= 0.5
    found = assessed(logits, labels).calibration
    assert found.measured_on.endswith("fitted on one half of the images and measured on the other, both ways")
    assert found.note.startswith("On images it was not fitted on, it raised the negative log-likelihood")
    assert found.temperature == 1
    assert found.fitted_temperature != 1
    assert found.after == found.before


def test_what_the_bundle_gets_is_fitted_on_all_test_images():
    logits, labels = draw(900, 5, 0.5)
    found = assessed(logits, labels).calibration
    assert found.temperature == round(fit_temperature(logits, labels).temperature, 4)
    assert found.after.negative_log_likelihood < found.before.negative_log_likelihood


def test_halves_share_out_every_class():
    labels = np.repeat(np.arange(5), (10, 4, 1, 7, 8))
    one, other = halves(labels)
    assert sorted([*one, *other]) == list(range(30))
    counts = np.abs(np.bincount(labels[one], minlength=5) - np.bincount(labels[other], minlength=5))
    assert counts.max() <= 1
    assert all(np.array_equal(*pair) for pair in zip((one, other), halves(labels), strict=True))


@pytest.mark.parametrize(
    ("count", "wanted", "note"),
    [(500, False, "Not wanted"), (12, True, "12 images are too few"), (1, True, "1 images are too few")],
)
def test_where_there_is_no_temperature_the_rest_is_measured_all_the_same(count: int, wanted: bool, note: str):
    logits, labels = draw(count, 5, 3.0, seed=5)
    found = assessed(logits, labels, Evidence(calibrate=wanted))
    assert found.temperature == 1
    assert found.calibration.note.startswith(note)
    assert found.reference.images == found.conformal.fitted_images == found.ood.fitted_images == count


def test_a_model_without_mistakes_keeps_its_probabilities():
    logits, _ = draw(200, 5, 1.0)
    found = assessed(logits, logits.argmax(axis=1))
    assert found.calibration.note.startswith("The fit stopped at its bound")
    assert found.temperature == 1


def test_strangers_are_told_by_their_energy():
    logits, labels = draw(600, 5, 1.0)
    logits[np.arange(600), labels] += 12
    none = np.random.default_rng(9).normal(0, 1, (80, 5)).astype(np.float32)
    found = assessed(logits, labels, Evidence(strangers=(Strangers("noise", split_of(none, labels[:80]).images),)))
    (stranger,) = found.ood.unfamiliar
    assert (stranger.data, stranger.images) == ("noise", 80)
    assert stranger.auroc > 0.99
    assert list(stranger.noticed) == sorted(stranger.noticed, reverse=True)
    assert stranger.noticed[1] > 0.9


def test_an_empty_held_out_part_is_none():
    logits, labels = draw(100, 5, 1.0)
    empty = replace(split_of(logits, labels), images=np.zeros((0, 1, 1, 3), np.uint8), labels=labels[:0])
    assert assessed(logits, labels, Evidence(held_out=empty)) == assessed(logits, labels)
