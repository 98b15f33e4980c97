"""Weights that others published: read safely, and fitted to our networks with nothing missing and nothing left over."""

from pathlib import Path

import torch
from torch import Tensor, nn

from training.errors import WeightsError
from training.nets import PUBLISHED, build
from training.nets.translation import is_published, translate
from training.recipes import Recipe


def read_labels(path: Path) -> tuple[str, ...]:
    """Read a text file with one label a line, in the order of the network's outputs.

    Raises:
        WeightsError: it cannot be read, or holds fewer than two labels.
    """
    try:
        labels = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} cannot be read as a text file of labels: {error}.") from error
    if len(labels) < 2:
        raise WeightsError(f"{path} holds {len(labels)} labels: write one label a line, at least two.")
    return labels


def read_network(path: Path, recipe: Recipe, classes: int) -> nn.Module:
    """Build the recipe's network with the state dict at `path`, in our names or in those of its publisher.

    Raises:
        WeightsError: the file is no state dict, or its tensors are not exactly those of the network.
    """
    network = build(recipe.network, classes=classes, size=recipe.size, dropout=recipe.dropout)
    weights = read_state(path)
    ours, name_of = network.state_dict().keys(), PUBLISHED.get(recipe.network)
    if name_of is not None and is_published(weights, ours, name_of):
        weights = translate(weights, ours, name_of, recipe.network)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip().rstrip(".")
        raise WeightsError(f"{path} does not fit {recipe.network} with {classes} classes: {reason}.") from error
    return network.eval()


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a PyTorch state dict; nothing in it is executed.

    Raises:
        WeightsError: the file is none.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist: give --weights a PyTorch state dict.") from None
    except Exception as error:  # what is damaged may raise anything, an IndexError too
        raise WeightsError(f"{path} is damaged, or no plain PyTorch state dict.") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{path} holds no state dict, the mapping from names to tensors.")
    return dict(state)
