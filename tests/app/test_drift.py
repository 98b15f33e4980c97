"""What is counted of predictions: the right bins, seldom enough, and nothing that a bundle does not speak of."""

from pathlib import Path

import numpy as np
import pytest

from app.drift import PERIOD_S, REST, Sampler, _tenths
from app.families import MAX_BINS
from app.manifest import read_bundle
from app.metrics import Metrics
from app.trust import Histogram
from tests.bundles import COLOURS, make_bundle, plain_image


def reference(**changed: object) -> dict:
    fields = {
        "data": "drawn",
        "images": 100,
        "confidence": {"edges": [0, 0.5, 0.9, 1], "counts": [10, 20, 70]},
        "entropy": {"edges": [0, 0.1, 0.5, 1], "counts": [80, 15, 5]},
        "predicted": [40, 30, 20, 9, 1, 0],
        "brightness": {"edges": [0, 64, 128, 192, 256], "counts": [0, 50, 50, 0]},
        "contrast": {"edges": [0, 64, 128], "counts": [100, 0]},
        "width": {"edges": [8, 16, 32, 64], "counts": [0, 100, 0]},
        "height": {"edges": [8, 16, 32, 64], "counts": [0, 100, 0]},
        "size_bytes": None,
    }
    return fields | changed


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("drift") / "models", reference=reference())


def shown(metrics: Metrics, name: str, feature: str) -> dict[str, float]:
    families = {family.name: family for family in metrics.registry.collect()}
    samples = families[name.removesuffix("_total")].samples
    return {sample.labels["bin"]: sample.value for sample in samples if sample.labels["feature"] == feature}


def answer(colour: str, confidence: float) -> np.ndarray:
    row = np.full(len(COLOURS), (1 - confidence) / (len(COLOURS) - 1), np.float32)
    row[list(COLOURS).index(colour)] = confidence
    return row[None]


def pixels(level: int) -> np.ndarray:
    return np.full((1, 16, 16, 3), level, np.uint8)


def test_an_image_falls_into_the_bins_of_the_reference(bundle):
    metrics = Metrics()
    sampler = Sampler(bundle.manifest, metrics)
    sampler.look(pixels(100), answer("green", 0.7), [plain_image("green", size=(40, 20))])
    counted = {
        feature: [name for name, count in shown(metrics, "convoy_feature_images_total", feature).items() if count]
        for feature in ("class", "confidence", "brightness", "contrast", "width", "height", "size_bytes")
    }
    assert counted == {
        "class": ["green"],
        "confidence": ["0.5..0.9"],
        "brightness": ["64..128"],
        "contrast": ["..64"],
        "width": ["32.."],
        "height": ["16..32"],
        "size_bytes": [],
    }
    [confidence] = [f for f in metrics.registry.collect() if f.name == "convoy_prediction_confidence"]
    [total] = [sample.value for sample in confidence.samples if sample.name.endswith("_sum")]
    assert total == pytest.approx(0.7)


def test_only_classes_that_the_reference_has_enough_of_are_counted_apart(bundle):
    metrics = Metrics()
    sampler = Sampler(bundle.manifest, metrics)
    for colour in ("red", "white", "gray", "black"):
        sampler.look(pixels(100), answer(colour, 0.7), None)
    assert shown(metrics, "convoy_feature_images_total", "class") == {"red": 1, "green": 0, "blue": 0, REST: 3}
    ratios = shown(metrics, "convoy_feature_reference_ratio", "class")
    assert sum(ratios.values()) == pytest.approx(1)
    assert ratios["red"] == pytest.approx(40.5 / 102)


def test_images_that_came_as_pixels_have_no_size(bundle):
    metrics = Metrics()
    Sampler(bundle.manifest, metrics).look(pixels(100), answer("red", 0.9), None)
    assert sum(shown(metrics, "convoy_feature_images_total", "width").values()) == 0
    assert sum(shown(metrics, "convoy_feature_images_total", "brightness").values()) == 1


def test_an_image_is_due_once_a_period_and_each_place_in_a_request_has_its_turn(bundle):
    metrics = Metrics()
    sampler = Sampler(bundle.manifest, metrics)
    assert [sampler.take(now) for now in (50.0, 50.0 + PERIOD_S / 2, 50.0 + PERIOD_S)] == [True, False, True]
    both = np.concatenate([pixels(10), pixels(200)])
    answers = np.concatenate([answer("black", 0.9), answer("white", 0.9)])
    for _ in range(2):
        sampler.look(both, answers, None)
    assert [*shown(metrics, "convoy_feature_images_total", "brightness").values()] == [1, 0, 0, 1]


def test_a_bundle_that_says_nothing_is_compared_with_nothing(tmp_path):
    metrics = Metrics()
    sampler = Sampler(make_bundle(tmp_path / "models").manifest, metrics)
    sampler.look(pixels(100), answer("red", 0.9), [plain_image("red")])
    assert shown(metrics, "convoy_feature_images_total", "brightness") == {}
    assert shown(metrics, "convoy_feature_reference_ratio", "class") == {}


def test_a_version_that_is_replaced_in_place_leaves_no_share_behind(bundle, tmp_path):
    metrics = Metrics()
    other = make_bundle(
        tmp_path / "models", reference=reference(brightness={"edges": [0, 100, 256], "counts": [50, 50]})
    )
    for one in (bundle, other):
        Sampler(one.manifest, metrics)
    assert [*shown(metrics, "convoy_feature_reference_ratio", "brightness")] == ["..100", "100.."]
    lines = [line for line in metrics.render().decode().splitlines() if line.startswith("convoy_feature")]
    assert len({line.rsplit(" ", 1)[0] for line in lines}) == len(lines)


def test_bins_hold_about_a_tenth_each():
    flat = Histogram(edges=tuple(range(101)), counts=(10,) * 100)
    assert [count for _, count in _tenths(flat)] == [100] * 10
    steep = Histogram(edges=tuple(range(21)), counts=(0, 5000, *[50] * 18))
    bins = list(_tenths(steep))
    assert (bins[0], bins[1]) == ((0, 0), (1, 5000))
    assert all(count <= 150 for _, count in bins[2:])
    assert len(bins) <= MAX_BINS


@pytest.mark.parametrize("model", ["cifar10", "imagenet"])
def test_shipped_bundles_can_be_compared_with(model):
    metrics = Metrics()
    Sampler(read_bundle(Path(__file__).parents[2] / "models" / model / "1").manifest, metrics)
    name = metrics.features.name
    features = {labels[2] for labels in metrics.sums(name)[name]}
    assert {"confidence", "entropy", "brightness", "width"} <= features
    assert ("class" in features) == (model == "cifar10")
