"""Distillation: a bundle as the teacher of another network (Hinton, Vinyals & Dean 2015).

Owns how a bundle is asked during training. The loss is `training/train.py`'s.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from app.golden import Run
from training.recipes import Recipe
from training.servable import Servable
from training.train import PRECISIONS


def asked_of(run: Run) -> Callable[[Tensor], Tensor]:
    """Let a graph answer augmented planes, rounded to the levels that it takes.

    Args:
        run: uint8 `[n, height, width, 3]` → probabilities.

    Returns:
        Planes float32 `[n, 3, height, width]` in 0-255 → probabilities float32 `[n, classes]`, on the planes' device.
    """

    def probabilities(planes: Tensor) -> Tensor:
        pixels = planes.detach().round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return torch.from_numpy(run(pixels.cpu().numpy())).to(planes.device)

    return probabilities


def asked_in_torch(servable: Servable, recipe: Recipe, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Let a network answer augmented planes as they are, in the recipe's precision and layout; as `asked_of`."""
    servable.to(device).eval()
    if recipe.channels_last:
        servable.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = PRECISIONS.get(recipe.precision)

    def probabilities(planes: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            ready = servable.normalise(planes)
            ready = ready.contiguous(memory_format=torch.channels_last) if recipe.channels_last else ready
            logits: Tensor = servable.network(ready)
        return logits.float().softmax(dim=1)

    return probabilities
