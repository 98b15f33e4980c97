"""Weights that a training begins from: all but the last layer of a run, a bundle or a file of published weights.

Owns the way back from a bundle's graph to the network that it was exported from, and the proof of it: the network,
below the bundle's own last layer, must give the bundle's golden answers. Trains nothing.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from app.golden import Run
from app.images import decode
from app.manifest import MANIFEST_FILE, Bundle, read_bundle, verify_files
from training.classifiers import onnx_run, servable_of
from training.errors import RecipeError, WeightsError
from training.graphs.cut import FEATURES_NAME, above, find_cut
from training.learning.freezing import last_dense
from training.nets import build
from training.published import read_network, read_state
from training.recipes import PIXEL_KNOBS, Recipe, make_recipe
from training.runs import is_run, read_checkpoint
from training.servable import Normalise

LARGEST_DIFFERENCE = 1e-4
"""Of any golden probability between the bundle and the network rebuilt from it. Measured: 6e-7 for efficientnet_lite0,
whose batch normalisation is folded into the convolutions."""
GRAPH_PREFIX = "network."
"""What `training/servable.py` puts before the names of a network's tensors."""

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a training begins from."""

    knobs: Mapping[str, Any]
    """Of the recipe: the network, and the pixels and the range that its weights are used to."""
    weights: Weights
    """Tensors by their names in the network, but for those of its last dense layer."""
    told: str
    """Where they are from, for a checkpoint and a manifest."""


def read_beginning(path: Path, given: Mapping[str, Any]) -> Beginning:
    """Read weights to begin from.

    Args:
        path: a run, a bundle, or a PyTorch state dict in our names or in those of its publisher.
        given: the knobs that the user gave; a state dict does not say its network and its pixels, so these must.

    Raises:
        BundleError, RunError, WeightsError: it cannot be read, or the network cannot be rebuilt from it.
        RecipeError: another network is asked for, or none for a state dict.
    """
    if not path.exists():
        raise WeightsError(f"{path} does not exist: give --from a run, a bundle or a file of weights.")
    if is_run(path):
        beginning = _from_run(path)
    elif path.is_dir():
        beginning = _from_bundle(path)
    else:
        beginning = _from_file(path, given)
    if given.get("network", beginning.knobs["network"]) != beginning.knobs["network"]:
        raise RecipeError(
            f"--network {given['network']}: {path} holds the weights of {beginning.knobs['network']}; leave it out."
        )
    return beginning


def begun(beginning: Beginning, recipe: Recipe, classes: int) -> Weights:
    """Return the state of the recipe's network with the weights to begin from; its last layer is drawn by the seed.

    Raises:
        WeightsError: the weights do not fit the network at this size.
    """
    torch.manual_seed(recipe.seed)
    network = build(recipe.network, classes=classes, size=recipe.size, dropout=recipe.dropout)
    begin(network, beginning.weights, f"The {beginning.told}")
    return dict(network.state_dict())


def begin(network: nn.Module, weights: Weights, what: str) -> None:
    """Load the weights into a fresh network, whose last dense layer stays as it was drawn.

    Raises:
        WeightsError: a tensor has no place in it, or another shape there.
    """
    expected = {name: tensor for name, tensor in network.state_dict().items() if not _is_head(network, name)}
    for name in sorted(expected.keys() ^ weights.keys()):
        raise WeightsError(f"{what} {'holds' if name in weights else 'lacks'} '{name}': it is of another network.")
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            raise WeightsError(
                f"{what} holds '{name}' as {list(weights[name].shape)}, and the network takes {list(tensor.shape)}: "
                "give --size as it was trained with."
            )
    network.load_state_dict(weights, strict=False)


def _is_head(network: nn.Module, tensor: str) -> bool:
    layer, _, _ = tensor.rpartition(".")
    return layer == last_dense(network)


def _below_head(network: nn.Module) -> Weights:
    return {name: tensor for name, tensor in network.state_dict().items() if not _is_head(network, name)}


# ---------------------------------------------------------------- from a run, from a file


def _from_run(path: Path) -> Beginning:
    checkpoint = read_checkpoint(path)
    network = servable_of(checkpoint).network
    told = f"run of {checkpoint.recipe.network} on {checkpoint.data}, after epoch {len(checkpoint.history)}"
    return Beginning(checkpoint.recipe.model_dump(include=set(PIXEL_KNOBS)), _below_head(network), told)


def _from_file(path: Path, given: Mapping[str, Any]) -> Beginning:
    if "network" not in given:
        raise RecipeError(f"--from {path} is no run and no bundle: for a file of weights give its --network too.")
    recipe = make_recipe(**{knob: value for knob, value in given.items() if knob in PIXEL_KNOBS})
    matrices = [tensor for tensor in read_state(path).values() if tensor.ndim == 2]
    if not matrices:
        raise WeightsError(f"{path} holds no dense layer, so it does not say how many classes it has.")
    network = read_network(path, recipe, classes=len(matrices[-1]))
    return Beginning(recipe.model_dump(include=set(PIXEL_KNOBS)), _below_head(network), f"weights of {path.name}")


# ---------------------------------------------------------------- from a bundle


def _from_bundle(path: Path) -> Beginning:
    bundle = read_bundle(path)
    verify_files(bundle)
    knobs = bundle.manifest.training.get("recipe")
    if not isinstance(knobs, dict) or "network" not in knobs:
        raise WeightsError(
            f"{path / MANIFEST_FILE} does not say which network its graph is of, so it cannot be trained on: "
            "use `convoy-train few-shot`, which needs the graph alone."
        )
    recipe = make_recipe(**{knob: value for knob, value in knobs.items() if knob in PIXEL_KNOBS})
    network = build(recipe.network, classes=2, size=recipe.size, dropout=0.0).eval()
    graph = onnx.load(bundle.model_path)
    begin(network, _tensors_of(graph, network, recipe, str(path)), str(path))
    _prove(bundle, graph, network, recipe)
    manifest = bundle.manifest
    told = f"bundle {manifest.name} {manifest.version}, model.onnx SHA-256 {manifest.model.sha256}"
    return Beginning(recipe.model_dump(include=set(PIXEL_KNOBS)), _below_head(network), told)


def _tensors_of(graph: onnx.ModelProto, network: nn.Module, recipe: Recipe, what: str) -> Weights:
    """Find the network's tensors among the graph's, which the exporter leaves their names.

    It folds batch normalisation into the convolution before it. Such a layer becomes one that changes nothing but
    adds the bias: weight and variance 1, mean 0.
    """
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    biases = {
        node.input[1]: node.input[2] for node in graph.graph.node if node.op_type == "Conv" and len(node.input) > 2
    }
    found = {
        name: _tensor(stored[GRAPH_PREFIX + name]) for name in _below_head(network) if GRAPH_PREFIX + name in stored
    }
    for convolution, norm in _normalised(network, recipe.size).items():
        bias = stored.get(biases.get(f"{GRAPH_PREFIX}{convolution}.weight", ""))
        if f"{norm}.running_mean" in found or bias is None:
            continue
        shift, epsilon = _tensor(bias), _epsilon(network.get_submodule(norm))
        if f"{convolution}.bias" in found:
            found[f"{convolution}.bias"] = torch.zeros_like(shift)
        found |= {
            f"{norm}.weight": torch.ones_like(shift),
            f"{norm}.bias": shift,
            f"{norm}.running_mean": torch.zeros_like(shift),
            f"{norm}.running_var": torch.full_like(shift, 1 - epsilon),
        }
    for name, tensor in _below_head(network).items():
        if name.endswith(".num_batches_tracked"):
            found[name] = torch.zeros_like(tensor)
        elif name not in found:
            raise WeightsError(
                f"{what} has no tensor '{GRAPH_PREFIX}{name}' in its graph, which {recipe.network} has: it was "
                "quantised, or written by another exporter; begin from the bundle or the run that it was made of."
            )
    return found


def _epsilon(norm: nn.Module) -> float:
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return norm.eps


def _normalised(network: nn.Module, size: int) -> dict[str, str]:
    """Return for each convolution whose output a batch normalisation takes the name of that layer."""
    pairs: dict[str, str] = {}
    made: dict[int, tuple[str, Tensor]] = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):

            def remember(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                made[id(output)] = name, output  # the tensor too, that no other gets its number

            hooks.append(module.register_forward_hook(remember))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):

            def pair(_: nn.Module, taken: tuple[Tensor], name: str = name) -> None:
                if id(taken[0]) in made:
                    pairs[made[id(taken[0])][0]] = name

            hooks.append(module.register_forward_pre_hook(pair))
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    return pairs


def _prove(bundle: Bundle, graph: onnx.ModelProto, network: nn.Module, recipe: Recipe) -> None:
    """Give the golden images to the network, and its features to the bundle's own last layer.

    Raises:
        WeightsError: an answer differs from the bundle's by more than 1e-4.
        SurgeryError: the bundle's graph has no last linear layer.
    """
    images = torch.from_numpy(np.stack([decode(data, bundle.manifest.pixels) for data in bundle.golden_bytes()]))
    features: list[Tensor] = []
    head = network.get_submodule(last_dense(network))
    hook = head.register_forward_pre_hook(lambda _, taken: features.append(taken[0]))
    try:
        with torch.inference_mode():
            network(Normalise(recipe)(images.permute(0, 3, 1, 2).float()))
    finally:
        hook.remove()
    classify = _above(graph, bundle)
    difference = float(np.abs(classify(features[0].numpy()) - bundle.golden_probabilities()).max())
    if not difference <= LARGEST_DIFFERENCE:
        raise WeightsError(
            f"{bundle.directory}: {recipe.network} rebuilt from its graph differs from it by {difference:.2g} in a "
            f"probability, allowed is {LARGEST_DIFFERENCE:.0e}; begin from the run or the weights that it was made of."
        )


def _above(graph: onnx.ModelProto, bundle: Bundle) -> Run:
    with tempfile.TemporaryDirectory() as scratch:
        rest = Path(scratch) / "head.onnx"
        onnx.save(above(graph, find_cut(graph, str(bundle.model_path))), rest)
        return onnx_run(rest, taken=FEATURES_NAME)


def _tensor(stored: onnx.TensorProto) -> Tensor:
    return torch.from_numpy(numpy_helper.to_array(stored).astype(np.float32))
