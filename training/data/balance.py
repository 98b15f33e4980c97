"""Balance: what a skewed data set's rare classes weigh, and how often their images are met.

Two remedies, of which a run takes one: *weights* let every image be met once an epoch and count for more in the loss;
*sampling* fills an epoch of the same length with equally many images of every class. Knows labels, not images.
"""

import torch
from torch import Generator, Tensor

from training.recipes import Recipe


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Weigh each class inversely to its number of images, as scikit-learn's `balanced` does.

    Args:
        labels: int64 `[n]`, of the whole training split.
        classes: how many classes there are.

    Returns:
        float32 `[classes]`, which `torch.nn.functional.cross_entropy` takes as `weight`; their mean over the images
        is 1. A class without images weighs 0: label smoothing is not to draw the network to what it never sees.
    """
    counts = torch.bincount(labels, minlength=classes)
    weights = len(labels) / (counts.count_nonzero() * counts.double())
    return torch.where(counts > 0, weights, 0).float()


def epoch_order(labels: Tensor, recipe: Recipe, generator: Generator) -> Tensor:
    """Say in which order an epoch meets the training images.

    With `balance` `sampling`, every class has the same number of places, ±1 where they do not divide. Its images take
    the places in turn, in a new order every time round: no image of a rare class is met twice more than another of
    it, and of a frequent class none is met twice.

    Args:
        labels: int64 `[n]`, of the whole training split.
        recipe: `balance` is read; unless it is `sampling`, each image is met once.
        generator: a CPU generator.

    Returns:
        int64 `[n]`, places in `labels`.
    """
    count = len(labels)
    if recipe.balance != "sampling":
        return torch.randperm(count, generator=generator)
    by_class = torch.split(torch.argsort(labels, stable=True), torch.bincount(labels).tolist())
    present = [members for members in by_class if len(members)]
    places, over = divmod(count, len(present))
    favoured = torch.randperm(len(present), generator=generator)[:over].tolist()
    met = [_in_turn(members, places + (number in favoured), generator) for number, members in enumerate(present)]
    return torch.cat(met)[torch.randperm(count, generator=generator)]


def _in_turn(members: Tensor, places: int, generator: Generator) -> Tensor:
    """Fill places with members, all of them before any comes again."""
    rounds = -(-places // len(members))
    turns = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
    return torch.cat(turns)[:places]
