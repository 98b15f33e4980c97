"""The moving average of a network's weights, which often answers better than the last of them."""

import copy
from typing import Any

import torch
from torch import nn


class Average:
    """An exponential moving average of weights and statistics (Polyak & Juditsky 1992), as a network of its own.

    Early on it forgets faster, `(1 + n) / (10 + n)` after n steps, so that the fresh weights do not stay in it.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay
        self._steps = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the weights after a step; whole numbers, such as counts of batches, are taken as they are."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        averages = self.network.state_dict()
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                averages[name].lerp_(value, 1 - decay)
            else:
                averages[name].copy_(value)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"steps": self._steps, "weights": self.network.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self._steps = state["steps"]
        self.network.load_state_dict(state["weights"])
