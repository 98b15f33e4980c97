"""Structured pruning: whole channels leave a trained network, so that what is left is a smaller, ordinary one.

Owns the choice of channels, and how many. Channels depend on each other over sums and normalisations; that is followed
by torch-pruning (Fang et al. 2023). A channel matters as much as the loss would change without it, to first order
(Molchanov et al. 2019). What it costs in accuracy shows, and is mended, elsewhere: by training on.
"""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from training.errors import CompressError

MULTIPLE = 8
"""Of channels that stay in a layer: kernels compute so many at once, and odd numbers would cost as much."""
MOST_OF_A_LAYER = 0.9
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Of all channels, that are tried to go."""
FINER = 5
"""Halvings between two of them, at most."""
CLOSE = 0.01
"""Of the multiply-adds: so much more than was asked for may go."""
WEIGHING_BATCH = 100


@dataclass(frozen=True, slots=True)
class Pruned:
    """A network without some of its channels."""

    network: nn.Module
    share: float
    """Of all channels, the share that had to go."""
    before: int
    """Multiply-adds of one image."""
    after: int

    @property
    def drop(self) -> float:
        """The share of multiply-adds that is gone."""
        return 1 - self.after / self.before


def prune(network: nn.Module, planes: Tensor, labels: Tensor, classes: int, drop: float) -> Pruned:
    """Return a copy of a network with at least a share `drop` of its multiply-adds gone, and little more.

    Args:
        network: on the CPU; it is left as it is.
        planes: float32 `[n, 3, size, size]`, normalised training images to weigh the channels by, some hundreds.
        labels: int64 `[n]`.
        classes: layers of so many outputs give the logits, and stay whole.
        drop: from 0 to 1.

    Raises:
        CompressError: the network cannot be made so small by pruning.
    """
    weighed = _weighed(network, planes, labels)
    before = multiply_adds(weighed, planes[:1])

    def without(share: float) -> Pruned:
        smaller = _without_channels(weighed, planes[:1], classes, share)
        return Pruned(smaller, share, before, multiply_adds(smaller, planes[:1]))

    # From few to many: with very many the library passes over layers that would lose too much, and less is gone.
    largest, least, best = 0.0, 0.0, None
    for share in SHARES:
        tried = without(share)
        if tried.drop >= drop:
            best = tried
            break
        largest, least = max(largest, tried.drop), share
    if best is None:
        raise CompressError(
            f"Pruning can take {largest:.0%} of this network's multiply-adds, not {drop:.0%}: ask for a smaller --drop."
        )
    for _ in range(FINER):
        if best.drop - drop < CLOSE:
            break
        tried = without((least + best.share) / 2)
        if tried.drop >= drop:
            best = tried
        else:
            least = tried.share
    _restore_gradients(best.network, network)
    return best


def multiply_adds(network: nn.Module, planes: Tensor) -> int:
    """Count the multiply-adds of convolutions and dense layers for one image, planes `[1, 3, size, size]`."""
    total = 0

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1)

    handles = [
        layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.inference_mode():
        network.eval()(planes)
    for handle in handles:
        handle.remove()
    return total


def _weighed(network: nn.Module, planes: Tensor, labels: Tensor) -> nn.Module:
    """Return a copy with the gradients of the mean loss, of frozen parameters too."""
    weighed = copy.deepcopy(network).float().eval()
    for parameter in weighed.parameters():
        parameter.requires_grad_(True)
    for some, wanted in zip(torch.split(planes, WEIGHING_BATCH), torch.split(labels, WEIGHING_BATCH), strict=True):
        loss = cross_entropy(weighed(some), wanted, reduction="sum") / len(labels)
        loss.backward()  # type: ignore[no-untyped-call]
    return weighed


def _without_channels(weighed: nn.Module, planes: Tensor, classes: int, share: float) -> nn.Module:
    import torch_pruning

    smaller = copy.deepcopy(weighed)
    for kept, parameter in zip(smaller.parameters(), weighed.parameters(), strict=True):
        kept.grad = None if parameter.grad is None else parameter.grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that its tracing does not find; they stay as they are
        pruner = torch_pruning.BasePruner(
            smaller,
            planes,
            importance=torch_pruning.importance.GroupTaylorImportance(),
            global_pruning=True,
            pruning_ratio=share,
            max_pruning_ratio=MOST_OF_A_LAYER,
            round_to=MULTIPLE,
            ignored_layers=_whole_layers(smaller, classes),
        )
        pruner.step()
    return smaller


def _whole_layers(network: nn.Module, classes: int) -> list[nn.Module]:
    """Return the layers whose outputs are the classes."""
    return [
        layer
        for layer in network.modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == classes)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == classes)
    ]


def _restore_gradients(pruned: nn.Module, network: nn.Module) -> None:
    """Freeze again what was frozen, and forget the gradients."""
    trained = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    for name, parameter in pruned.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(trained[name])
