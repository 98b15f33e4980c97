import pytest
import torch
from torch.nn.functional import cross_entropy

from training.data.balance import class_weights, epoch_order
from training.recipes import Recipe, make_recipe

LABELS = torch.tensor([0] * 60 + [2] * 9 + [1] * 31)[torch.randperm(100, generator=torch.Generator().manual_seed(7))]
SAMPLING = make_recipe(balance="sampling")


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_weights_give_every_class_the_same_say():
    weights = class_weights(LABELS, 3)
    torch.testing.assert_close(weights * torch.bincount(LABELS), torch.full((3,), 100 / 3))
    torch.testing.assert_close(weights[LABELS].mean(), torch.tensor(1.0))
    logits = torch.zeros(100, 3)
    logits[:, 0] = 3
    by_class = torch.stack([cross_entropy(logits[LABELS.eq(label)], LABELS[LABELS.eq(label)]) for label in range(3)])
    torch.testing.assert_close(cross_entropy(logits, LABELS, weight=weights), by_class.mean())


def test_a_class_without_images_weighs_nothing():
    weights = class_weights(LABELS, 5)
    assert weights[3:].tolist() == [0, 0]
    torch.testing.assert_close(weights[:3], class_weights(LABELS, 3))


@pytest.mark.parametrize("balance", ["none", "weights"])
def test_without_sampling_the_order_is_the_one_it_was(balance: str):
    order = epoch_order(LABELS, make_recipe(balance=balance), seeded())
    assert torch.equal(order, torch.randperm(100, generator=seeded()))
    assert Recipe().balance == "none"


def test_sampling_fills_an_epoch_with_equally_many_of_each_class():
    order = epoch_order(LABELS, SAMPLING, seeded())
    assert len(order) == 100
    assert sorted(torch.bincount(LABELS[order]).tolist()) == [33, 33, 34]


def test_sampling_takes_the_images_of_a_class_in_turn():
    met = torch.bincount(epoch_order(LABELS, SAMPLING, seeded()), minlength=100)
    for label, times in ((0, {0, 1}), (1, {1, 2}), (2, {3, 4})):
        assert set(met[LABELS.eq(label)].tolist()) <= times


def test_sampling_mixes_the_classes_and_is_new_each_epoch():
    first, again, second = (epoch_order(LABELS, SAMPLING, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert set(first[LABELS[first] == 0].tolist()) != set(second[LABELS[second] == 0].tolist())
    assert torch.bincount(LABELS[first[:50]], minlength=3).min() > 5


def test_the_places_left_over_favour_no_class_for_ever():
    favoured = {int(torch.bincount(LABELS[epoch_order(LABELS, SAMPLING, seeded(seed))]).argmax()) for seed in range(20)}
    assert favoured == {0, 1, 2}


def test_sampling_passes_over_a_class_without_images():
    labels = torch.tensor([0, 0, 0, 3])
    assert torch.bincount(labels[epoch_order(labels, SAMPLING, seeded())]).tolist() == [2, 0, 0, 2]
