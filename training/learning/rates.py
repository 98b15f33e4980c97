"""Looking for a learning rate: the range test of Smith (2015).

Trains a fresh network for a few hundred steps while the rate grows from far too small to far too large, and reads off
where the loss falls fastest. The network is thrown away. Owns the test and what is concluded from it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from training.data.arrays import Split
from training.data.augment import alternate
from training.data.balance import class_weights, epoch_order
from training.errors import RecipeError
from training.learning.devices import deterministic
from training.recipes import Recipe
from training.train import Learner, batches, epoch_generators, fresh_network, make_batch, train_step

SMOOTHING = 0.95
"""Decay of the average over the steps' losses; Smith's plots and fastai's finder use about as much."""
DIVERGED = 4.0
"""The test ends where the smoothed loss is this many times the lowest."""


@dataclass(frozen=True, slots=True)
class Try:
    """One step of the test: its rate, and the smoothed training loss after it, in nats."""

    rate: float
    loss: float


def try_rates(
    recipe: Recipe, classes: int, split: Split, device: torch.device, *, lowest: float, highest: float, steps: int
) -> Iterator[Try]:
    """Train for up to `steps` steps at rates from `lowest` to `highest`, equally far apart in their logarithm.

    All groups' rates grow together: with Muon, `plain_rate` keeps its proportion to `learning_rate`.

    Raises:
        RecipeError: the range is empty.
    """
    if not 0 < lowest < highest:
        raise RecipeError(f"--lowest {lowest:g} --highest {highest:g}: the lowest rate must be below the highest.")
    deterministic()
    learner = Learner(fresh_network(recipe, classes, split).to(device), classes, recipe, device)
    learner.network.train()
    weight = class_weights(torch.from_numpy(split.labels), classes).to(device) if recipe.balance == "weights" else None
    average, best = 0.0, math.inf
    for step, (chosen, mirrored, generator) in enumerate(_endless(split, recipe)):
        if step == steps:
            return
        rate = lowest * (highest / lowest) ** (step / max(1, steps - 1))
        learner.set_rate(rate / recipe.learning_rate)
        planes, targets = make_batch(learner, split, chosen, generator, mirrored)
        loss = train_step(learner, planes, targets, weight, len(chosen))[0].item() / len(chosen)
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed = average / (1 - SMOOTHING ** (step + 1))
        if not math.isfinite(smoothed):
            return
        yield Try(rate, smoothed)
        best = min(best, smoothed)
        if smoothed > DIVERGED * best:
            return


def best_rate(tries: list[Try]) -> float:
    """Return the rate at which the loss falls fastest per factor of the rate, before its minimum.

    Raises:
        RecipeError: the loss never fell.
    """
    lowest = min(range(len(tries)), key=lambda at: tries[at].loss) if tries else 0
    if lowest < 2:
        raise RecipeError("The loss does not fall at any rate tried: give a smaller --lowest, or look at the data.")
    # Over a tenth of the range: from step to step the loss is mostly noise.
    width = max(1, len(tries) // 10)
    slopes = {
        at: (tries[min(at + width, lowest)].loss - tries[max(at - width, 0)].loss)
        / (math.log(tries[min(at + width, lowest)].rate) - math.log(tries[max(at - width, 0)].rate))
        for at in range(1, lowest)
    }
    return tries[min(slopes, key=lambda at: slopes[at])].rate


def _endless(split: Split, recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Generator]]:
    """Yield batches' places, epoch after epoch, each with its epoch's flips and its generator for augmentation."""
    number = 0
    while True:
        number += 1
        order, generator = epoch_generators(recipe.seed, number)
        mirrored = alternate(len(split.labels), recipe, number)
        for chosen in batches(epoch_order(torch.from_numpy(split.labels), recipe, order), recipe.batch_size):
            yield chosen, mirrored, generator
