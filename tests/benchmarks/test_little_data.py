import json

import numpy as np
import pytest
import torch

from benchmarks import little_data
from benchmarks.little_data import Arm, blend_a_class, few, keep, kept
from training.data.arrays import Split


def test_the_normal_distribution_is_the_classes_own():
    random = np.random.default_rng(1)
    labels = torch.arange(2).repeat(600)
    shared = random.normal(0, 12, (1200, 1, 1, 1))
    centres = np.where(labels.numpy()[:, None, None, None], 160, 90)
    images = torch.from_numpy((centres + shared + random.normal(0, 9, (1200, 1, 2, 3))).round().astype(np.uint8))
    made = blend_a_class(images, labels, seed=3)
    assert (made.shape, made.dtype) == (images.shape, torch.uint8)
    for label in (0, 1):
        real, drawn = (some[labels == label].flatten(1).double() for some in (images, made))
        torch.testing.assert_close(drawn.mean(0), real.mean(0), atol=2, rtol=0)
        torch.testing.assert_close(drawn.T.cov(), real.T.cov(), atol=35, rtol=0)
        assert real.T.cov().min() > 100
    assert not torch.equal(made, blend_a_class(images, labels, seed=4))


def test_few_images_are_so_many_of_each_class_and_the_seeds_own():
    labels = np.arange(90) % 3
    split = Split(np.arange(90, dtype=np.uint8).repeat(12).reshape(90, 2, 2, 3), labels, ())
    images, chosen = few(split, 5, seed=0)
    assert torch.bincount(chosen).tolist() == [5, 5, 5]
    assert (images[:, 0, 0, 0] % 3).tolist() == chosen.tolist()
    assert len(images[:, 0, 0, 0].unique()) == 15
    assert torch.equal(images, few(split, 5, seed=0)[0])
    assert not torch.equal(images, few(split, 5, seed=1)[0])


def test_an_arm_learns_from_its_images_and_from_generated_ones():
    images = torch.cat([torch.full((20, 32, 32, 3), grey, dtype=torch.uint8) for grey in (40, 200)])
    labels = torch.arange(2).repeat_interleave(20)
    asked = []

    def generate(images: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
        asked.append((len(images), seed))
        return images

    for arm in (Arm({"mixup": 1}), Arm({}, generate)):
        network = little_data.train(arm, images, labels, passes=640, seed=7)
        test = Split(images.numpy(), labels.numpy(), ())
        assert little_data.accuracy(network, little_data.make_recipe(**little_data.PIXELS), test) == 1
    assert asked == [(40, 7)]


def test_the_results_hold_every_run_and_each_arms_mean(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(little_data, "RESULTS", tmp_path / "results.json")
    assert kept() == []
    runs = [
        {"images_per_class": 50, "arm": "flip, shift", "seed": seed, "accuracy": 0.4 + seed / 10} for seed in (0, 1)
    ]
    keep(runs)
    assert kept() == runs
    expected = {"images_per_class": 50, "arm": "flip, shift", "seeds": 2, "mean": 0.45, "least": 0.4, "most": 0.5}
    assert json.loads(little_data.RESULTS.read_text())["arms"] == [expected]
