"""Which part of a network learns in an epoch, and how fast: what begins from weights is not to forget them at once.

Owns what the backbone and the head of a network are. Knows nothing of where weights come from.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from training.errors import WeightsError
from training.recipes import Recipe


def last_dense(network: nn.Module) -> str:
    """Return the name of the last dense layer, which tells the classes apart: the head; all below is the backbone.

    Raises:
        WeightsError: there is none.
    """
    names: list[str] = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise WeightsError("The network has no dense layer that could be replaced for other classes: choose another.")
    return names[-1]


def prepare(network: nn.Module, optimizer: Optimizer, recipe: Recipe, number: int) -> None:
    """Put a network into training for epoch `number`, but for what the recipe leaves as it is in it.

    While the backbone is frozen its parameters take no gradients, and its batch normalisations keep to their
    statistics. With `keep_statistics` they do so to the end: a batch of few images, of other classes, has others.
    """
    network.train()
    frozen = number <= recipe.frozen_epochs
    if recipe.frozen_epochs:
        head = _head(network)
        # Not all parameters: a network may have some that are never to learn, and these the optimizer does not know.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(not frozen or id(parameter) in head)
    if frozen or recipe.keep_statistics:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def at_rates(group: Mapping[str, Any], network: nn.Module, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield an optimizer's group as it is, or its backbone at a rate of its own and its head."""
    if recipe.backbone_rate == 1:
        yield dict(group)
        return
    head = _head(network)
    for of_head, rate in ((False, recipe.learning_rate * recipe.backbone_rate), (True, recipe.learning_rate)):
        parameters = [parameter for parameter in group["params"] if (id(parameter) in head) == of_head]
        if parameters:
            yield {**group, "params": parameters, "lr": rate}


def _head(network: nn.Module) -> set[int]:
    """Return the numbers of the parameters of the last dense layer."""
    return {id(parameter) for parameter in network.get_submodule(last_dense(network)).parameters()}
