"""The network as it is served: uint8 pixels in, probabilities out.

Owns the half of preprocessing that is in the graph. Training, evaluation and export all normalise through
`Normalise`, so that what was trained is what is served.
"""

from typing import Self

import torch
from torch import Tensor, nn

from training.recipes import Recipe


class Normalise(nn.Module):
    """`(x · rescale - mean) / std`, folded into one factor and one shift per channel.

    float32 `[n, 3, height, width]` in 0-255 → the same shape in the network's range.
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        mean, std = torch.tensor(recipe.mean, dtype=torch.float64), torch.tensor(recipe.std, dtype=torch.float64)
        self.register_buffer("factor", _per_channel(recipe.rescale / std), persistent=False)
        self.register_buffer("shift", _per_channel(-mean / std), persistent=False)
        self._shifts = bool(self.shift.any())

    def forward(self, planes: Tensor) -> Tensor:
        """Normalise a batch."""
        scaled = planes * self.factor
        return scaled + self.shift if self._shifts else scaled


class Servable(nn.Module):
    """uint8 `[n, height, width, 3]` → float32 probabilities `[n, classes]`: the whole graph of a bundle."""

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.normalise = Normalise(recipe)
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Classify a batch."""
        # Transposed before the cast: a quarter of the bytes move.
        planes = image.permute(0, 3, 1, 2).float()
        probabilities: Tensor = self.network(self.normalise(planes)).softmax(dim=1)
        return probabilities

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: dropout and batch statistics have no place in serving."""
        return super().train(False)


def _per_channel(values: Tensor) -> Tensor:
    """float64 `[3]` → float32 `[1, 3, 1, 1]`, or one scalar where the channels agree."""
    values = values.float()
    return values[0].clone() if bool((values == values[0]).all()) else values.view(1, 3, 1, 1)
