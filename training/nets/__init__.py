"""The networks, by name: one family per file, and the function's name is the network's name.

A network takes float32 `[n, 3, size, size]`, already normalised, and gives logits float32 `[n, classes]`.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from training.errors import RecipeError
from training.nets.airbench import airbench94
from training.nets.article import article_cnn
from training.nets.efficientnet_lite import efficientnet_lite0, from_published


class Builder(Protocol):
    """A network's function."""

    __name__: str

    def __call__(self, *, classes: int, size: int, dropout: float) -> nn.Module:
        """Return the network with fresh weights, drawn from PyTorch's global generator."""


BUILDERS: tuple[Builder, ...] = (airbench94, article_cnn, efficientnet_lite0)
NETWORKS: dict[str, Builder] = {builder.__name__: builder for builder in BUILDERS}

Weights = dict[str, Tensor]
PUBLISHED: dict[str, Callable[[Weights], Weights]] = {"efficientnet_lite0": from_published}
"""For networks whose published weights use other names: their state dict → ours."""


def build(name: str, *, classes: int, size: int, dropout: float) -> nn.Module:
    """Build a network by name.

    Raises:
        RecipeError: no network has that name, or the image is too small for it.
    """
    if name not in NETWORKS:
        raise RecipeError(f"--network: there is no '{name}'; there are {', '.join(sorted(NETWORKS))}.")
    return NETWORKS[name](classes=classes, size=size, dropout=dropout)
