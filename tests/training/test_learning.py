"""What learns: optimizers, schedules, the moving average, pieces of a batch, a teacher, stopping early."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from training import train
from training.data.arrays import Split
from training.errors import RecipeError
from training.learning import rates
from training.learning.averages import Average
from training.learning.optimizers import Muon, make_optimizer, orthogonal
from training.learning.ranks import Ranks
from training.learning.rates import Try, best_rate, try_rates
from training.learning.schedules import rate_at
from training.nets import build
from training.nets.airbench import WHITENED, Airbench
from training.recipes import Recipe, make_recipe
from training.runs import Epoch, best_epoch, in_vain
from training.views import several_views

CPU = torch.device("cpu")
PLAIN = {"shear": 0, "zoom": 0, "flip": False, "dropout": 0, "size": 32, "batch_size": 8, "epochs": 1}


@pytest.fixture
def split() -> Split:
    """Sixteen images of two classes, the one darker than the other."""
    labels = np.arange(16) % 2
    noise = np.random.default_rng(0).integers(0, 100, (16, 32, 32, 3))
    return Split((noise + 100 * labels[:, None, None, None]).astype(np.uint8), labels, ())


def small(classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, classes))


def fitted(split: Split, teacher: train.Teacher | None = None, **knobs: object) -> tuple[nn.Module, list[Epoch]]:
    network = small()
    epochs = list(train.fit(network, 2, make_recipe(**PLAIN | knobs), split, split, CPU, teacher=teacher))
    return network, epochs


def distance(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max((one - other).abs().max().item() for one, other in pairs)


# ---------------------------------------------------------------- schedules


def test_a_constant_rate_stays():
    assert {rate_at(step, 10, Recipe()) for step in range(10)} == {1.0}


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_a_rate_rises_to_one_and_falls_to_nearly_nothing(schedule: str):
    recipe = make_recipe(schedule=schedule, warmup=0.2)
    rates = [rate_at(step, 100, recipe) for step in range(100)]
    assert max(rates) == rates[20] == 1
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert rates[60] == pytest.approx(0.5)  # both are half way down in the middle


def test_without_warmup_the_first_step_is_the_largest():
    assert rate_at(0, 10, make_recipe(schedule="one-cycle")) == 1


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adamw", "muon"])
def test_every_optimizer_learns(optimizer: str, split: Split):
    rate = 0.05 if optimizer == "muon" else 0.003
    _, epochs = fitted(split, optimizer=optimizer, learning_rate=rate, plain_rate=0.003, epochs=12)
    assert epochs[-1].train_loss < epochs[0].train_loss
    assert epochs[-1].test_accuracy == 1


def test_biases_are_not_decayed():
    network = small()
    weight, bias = network[0].weight.clone(), network[0].bias.clone()  # type: ignore[operator, union-attr]
    optimizer = make_optimizer(network, make_recipe(optimizer="adamw", weight_decay=0.1, learning_rate=0.5))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(network[0].weight, weight * 0.95)
    torch.testing.assert_close(network[0].bias, bias)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (8, 8)])
def test_an_orthogonal_direction_has_singular_values_near_one(shape: tuple[int, int]):
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1]))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.max() < 1.6
    assert values.min() > 0.2
    assert torch.linalg.svdvals(matrix).max() / torch.linalg.svdvals(matrix).min() > values.max() / values.min()


def test_muon_keeps_the_norm_of_filters_and_leaves_what_is_frozen():
    network = Airbench(classes=3)
    frozen = network.whiten.weight.clone()
    optimizer = make_optimizer(network, make_recipe(optimizer="muon", learning_rate=1e-6))
    assert isinstance(optimizer, Muon)
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert network.group2[4].weight.norm().item() == pytest.approx(math.sqrt(256), rel=1e-3)
    assert torch.equal(network.whiten.weight, frozen)


# ---------------------------------------------------------------- the flagship's first weights


def test_airbench_whitens_what_it_sees():
    network = build("airbench94", classes=10, size=32, dropout=0.0)
    assert isinstance(network, train.SetByData)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_972_792
    images = torch.nn.functional.avg_pool2d(torch.randn(200, 3, 34, 34), 3, stride=1)  # neighbours alike, as in photos
    network.initialise(images)
    with torch.no_grad():
        seen = network.whiten(images).permute(1, 0, 2, 3).flatten(1)[: WHITENED // 2]
    covariance = seen @ seen.T / seen.shape[1]
    assert (covariance - torch.eye(len(covariance))).abs().max() < 0.05


def test_airbench_says_which_images_are_too_small():
    with pytest.raises(RecipeError, match="needs 17 pixels, not 16"):
        build("airbench94", classes=10, size=16, dropout=0.0)


# ---------------------------------------------------------------- pieces, precision, averages


def test_a_batch_in_pieces_takes_the_same_step(split: Split):
    whole, _ = fitted(split, optimizer="sgd", learning_rate=0.01)
    pieces, _ = fitted(split, optimizer="sgd", learning_rate=0.01, accumulate=3)
    assert distance(whole, pieces) < 1e-6
    assert distance(whole, small()) > 1e-3


def test_half_precision_and_another_layout_learn_nearly_the_same(split: Split):
    plain, epochs = fitted(split, optimizer="sgd", learning_rate=0.01)
    half, others = fitted(split, optimizer="sgd", learning_rate=0.01, precision="bf16", channels_last=True)
    assert 0 < distance(plain, half) < 5e-3
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    assert others[0].train_loss == pytest.approx(epochs[0].train_loss, rel=0.02)


def test_fp16_needs_a_gpu(split: Split):
    with pytest.raises(RecipeError, match="--precision fp16: only a GPU"):
        fitted(split, precision="fp16")


def test_the_average_lies_between_old_and_new_weights():
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    average = Average(network, decay=0.5)
    nn.init.ones_(network.weight)
    average.update(network)
    first = average.network.weight.item()
    assert first == pytest.approx(1 - 2 / 11)  # (1 + 1) / (10 + 1) is kept of what was there
    for _ in range(20):
        average.update(network)
    assert average.network.weight.item() > 0.99
    again = Average(nn.Linear(1, 1), decay=0.5)
    again.restore(average.state())
    assert torch.equal(again.network.weight, average.network.weight)


def test_the_average_is_what_a_fit_ends_with(split: Split):
    last, _ = fitted(split, epochs=3)
    averaged, _ = fitted(split, epochs=3, ema=0.99)
    assert distance(last, averaged) > 0


def test_blended_images_are_learnt(split: Split):
    _, epochs = fitted(split, mixup=0.2, cutmix=1, epochs=3, learning_rate=0.003)
    assert epochs[-1].test_accuracy == 1


# ---------------------------------------------------------------- a rate, several views


def test_the_rate_found_learns_and_lies_below_where_it_diverges(split: Split):
    recipe = make_recipe(**PLAIN)
    tries = list(try_rates(recipe, 2, split, CPU, lowest=1e-5, highest=100, steps=80))
    assert len(tries) < 80  # ended where the loss was lost
    assert [each.rate for each in tries] == sorted(each.rate for each in tries)
    assert 1e-4 < best_rate(tries) < tries[-1].rate


def test_a_loss_that_never_falls_gives_no_rate():
    with pytest.raises(RecipeError, match="does not fall at any rate"):
        best_rate([Try(10.0**power, 1.0 + power) for power in range(5)])
    with pytest.raises(RecipeError, match="the lowest rate must be below the highest"):
        next(try_rates(Recipe(), 2, Split(np.zeros((0,)), np.zeros(0), ()), CPU, lowest=1, highest=1, steps=3))


def test_a_rate_is_looked_for_with_the_balance_of_the_training(split: Split, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rates, "fresh_network", lambda *_: small())
    rare = Split(split.images, (np.arange(16) == 3).astype(np.int64), ())
    first = {
        balance: next(try_rates(make_recipe(**PLAIN, balance=balance), 2, rare, CPU, lowest=1e-6, highest=1, steps=1))
        for balance in ("none", "weights", "sampling")
    }
    assert len({found.loss for found in first.values()}) == 3


def test_views_are_joined_by_their_logits():
    def run(images: np.ndarray) -> np.ndarray:
        logits = images[:, 0, :2, 0].astype(np.float32) / 10  # tells left from right, and up from down
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    images = np.random.default_rng(0).integers(0, 30, (4, 6, 5, 3)).astype(np.uint8)
    mirrored = several_views(run, "mirror")(images)
    both = (np.log(run(images)) + np.log(run(images[:, :, ::-1]))) / 2
    np.testing.assert_allclose(np.log(mirrored[:, 0] / mirrored[:, 1]), both[:, 0] - both[:, 1], rtol=1e-4, atol=1e-5)
    shifted = several_views(run, "shift")(images)
    np.testing.assert_allclose(shifted.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(several_views(run, "shift")(images[:, :, ::-1]), shifted, rtol=1e-5)
    assert several_views(run, "none") is run


# ---------------------------------------------------------------- a teacher


def test_a_teacher_is_believed_rather_than_the_labels(split: Split):
    def contrary(planes: torch.Tensor) -> torch.Tensor:
        dark = planes.mean(dim=(1, 2, 3)) < 100
        return torch.stack([~dark, dark], dim=1).float()

    _, epochs = fitted(split, train.Teacher(contrary, weight=1.0), epochs=6, learning_rate=0.003)
    assert epochs[-1].test_accuracy == 0


def test_a_teachers_loss_vanishes_where_the_pupil_agrees():
    logits = torch.randn(5, 3)
    learner = train.Learner(small(3), 3, Recipe(), CPU, teacher=train.Teacher(lambda _: logits.softmax(1), weight=1.0))
    loss = train.loss_of(logits, torch.zeros(5, dtype=torch.int64), torch.zeros(5, 3, 32, 32), None, learner)
    assert abs(float(loss)) < 1e-4


# ---------------------------------------------------------------- what is told on the way


def test_figures_are_asked_for_by_the_clock_and_not_at_every_step(split: Split, monkeypatch: pytest.MonkeyPatch):
    notes: list[str] = []

    @contextmanager
    def counting(*_: object, **__: object) -> Iterator[Callable[..., None]]:
        yield lambda _, note: notes.append(note)

    monkeypatch.setattr(train, "counting", counting)
    for step_s, expected in ((0.001, 1), (0.2, 3)):
        clock = count(0.0, step_s)
        monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda clock=clock: next(clock)))
        notes.clear()
        learner = train.Learner(small(), 2, make_recipe(**PLAIN | {"batch_size": 2}), CPU)
        loss, _ = train.train_epoch(learner, split, 1)
        assert len(notes) == 8
        assert len(dict.fromkeys(notes)) == expected
        assert f"loss {loss:.3f}" not in notes[0]


# ---------------------------------------------------------------- stopping early


def epochs_of(*losses: float) -> tuple[Epoch, ...]:
    return tuple(Epoch(number, 0, 0, 0, 0, 1, 1, loss, 0.5) for number, loss in enumerate(losses, start=1))


def test_a_run_is_in_vain_after_as_many_epochs_without_better():
    recipe = make_recipe(patience=2, validation_fraction=0.1)
    assert not in_vain(epochs_of(1.0, 0.9), recipe)
    assert not in_vain(epochs_of(1.0, 0.9, 0.9), recipe)
    assert in_vain(epochs_of(1.0, 0.9, 0.9, 0.95), recipe)
    assert not in_vain(epochs_of(1.0, 0.9, 0.9, 0.95), make_recipe())
    assert best_epoch(epochs_of(1.0, 0.9, 0.9)) == 2


def test_the_best_weights_are_kept_and_the_run_stops(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = make_recipe(**PLAIN | {"epochs": 9, "patience": 2, "validation_fraction": 0.5})
    losses = iter([1.0, 0.5, 0.6, 0.7, 0.1])
    measured: list[float] = []

    def measure(*arguments: object) -> tuple[float, float]:
        measured.append(0.0)
        return (1.0, 0.5) if len(measured) % 2 else (next(losses), 0.5)  # test first, then validation

    monkeypatch.setattr(train, "measure", measure)
    monkeypatch.setattr(train, "build", lambda *_, **__: small())
    written = []
    monkeypatch.setattr(train, "write_checkpoint", lambda _, checkpoint: written.append(checkpoint))
    start = train.Start(recipe, ("dark", "bright"), "data", "digest", "command", "hardware")
    assert len(list(train.train(tmp_path, start, split, split, CPU, split))) == 4
    assert [checkpoint.is_finished for checkpoint in written] == [False, False, False, True]
    assert written[-1].weights_in_words == "those after epoch 2, the best of 4 on the validation part"
    assert torch.equal(written[-1].weights["0.weight"], written[1].best["0.weight"])
    assert not torch.equal(written[-1].weights["0.weight"], written[-1].network["0.weight"])


def test_a_last_batch_of_few_images_has_fewer_pieces(split: Split):
    # Batches of 7, 7 and 2 images. Of a piece of one image a normalisation may know no variance, of none nothing.
    network, sizes = small(), []
    network.register_forward_pre_hook(lambda _, taken: sizes.append(len(taken[0])))
    learner = train.Learner(network, 2, make_recipe(**PLAIN | {"batch_size": 7, "accumulate": 3}), CPU)
    train.train_epoch(learner, split, 1)
    assert sizes == [3, 2, 2, 3, 2, 2, 2]


def test_every_process_needs_images_of_each_batch():
    with pytest.raises(RecipeError, match=r"--batch-size 7: 2 processes need two images or more each for each of 2"):
        train.Learner(small(), 2, make_recipe(batch_size=7, accumulate=2), CPU, ranks=Ranks(0, 2))


class Second(Ranks):
    """One of two processes, whose own measurements are not those that count."""

    def share(self, value: Any) -> Any:
        return replace(value, validation_loss=float(value.epoch))


def test_all_processes_stop_by_the_figures_of_the_first(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = make_recipe(**PLAIN | {"epochs": 5, "patience": 1, "validation_fraction": 0.5})
    monkeypatch.setattr(train, "build", lambda *_, **__: small())
    monkeypatch.setattr(train, "write_checkpoint", lambda *_: None)
    start = train.Start(recipe, ("dark", "bright"), "data", "digest", "command", "hardware")
    history = list(train.train(tmp_path, start, split, split, CPU, split, ranks=Second()))
    assert [epoch.validation_loss for epoch in history] == [1, 2]


def test_patience_needs_images_to_stop_by():
    with pytest.raises(RecipeError, match="--patience: needs --validation-fraction"):
        make_recipe(patience=3)
