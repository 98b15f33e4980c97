"""Optimizers: what turns gradients into steps, by a recipe.

Owns which parameters are decayed and which Muon turns. The step's size over time is `schedules.py`'s, which
multiplies every group's own rate.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.learning.freezing import at_rates
from training.recipes import Recipe

ADAM_EPSILON = 1e-7
"""Keras' value; PyTorch's is 1e-8. Keras applies it without PyTorch's bias correction: early steps differ a little."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al. 2024: steepest at zero, so that three steps bring singular values near 1."""
NEWTON_SCHULZ_STEPS = 3
PLAIN_MOMENTUM = 0.85
"""Momentum of what Muon does not turn; airbench's value."""


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the recipe's optimizer over what can be trained in a network.

    Weight decay is for matrices and filters: biases and normalisations are not drawn to zero, except by Muon's plain
    half, as in airbench.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if recipe.optimizer == "muon":
        return Muon(parameters, recipe)
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if recipe.weight_decay:
        decayed = [parameter for parameter in parameters if parameter.ndim > 1]
        spared = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
    groups = [part for group in groups for part in at_rates(group, network, recipe)]
    rate = recipe.learning_rate
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, nesterov=recipe.nesterov)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    return torch.optim.Adam(groups, lr=rate, eps=ADAM_EPSILON)


class Muon(torch.optim.Optimizer):
    """Steps of equal length in all directions of a filter bank; Nesterov's momentum for everything else.

    Filters (four dimensions) get the orthogonal matrix that is nearest to their momentum (Jordan et al. 2024), and
    are kept at the norm of such a matrix, which stands in for weight decay. PyTorch's own Muon takes matrices only.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], recipe: Recipe) -> None:
        given = list(parameters)
        filters = [parameter for parameter in given if parameter.ndim == 4]
        plain = [parameter for parameter in given if parameter.ndim != 4]
        turned = {"params": filters, "lr": recipe.learning_rate, "momentum": recipe.momentum, "turned": True}
        others = {"params": plain, "lr": recipe.plain_rate, "momentum": PLAIN_MOMENTUM, "turned": False}
        others["weight_decay"] = recipe.weight_decay
        super().__init__([group for group in (turned, others) if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step by the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group.get("weight_decay"):
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradient)
                momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
                direction = gradient.add(momentum, alpha=group["momentum"])
                if group["turned"]:
                    parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                    direction = orthogonal(direction.flatten(1)).view_as(direction)
                parameter.sub_(direction, alpha=group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix near `matrix`, by a Newton-Schulz iteration in bfloat16.

    Args:
        matrix: float32 `[rows, columns]`.

    Returns:
        float32 of the same shape, singular values between about 0.5 and 1.5: nearer is not worth its time.
    """
    first, second, third = NEWTON_SCHULZ
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.T
        x = first * x + (second * square + third * square @ square) @ x
    nearby: Tensor = (x.T if tall else x).to(matrix.dtype)
    return nearby
