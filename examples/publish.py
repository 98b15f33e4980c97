"""The last step of every example: a network becomes `<models>/<name>/<version>/`, if its graph answers as it does.

Owns the files and the comparison. Knows nothing of what the tensors mean.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from app import runtime
from training.atomic import replacing
from training.errors import ExportError
from training.graphs import save_graph

OUTPUT = "probabilities"
LARGEST_DIFFERENCE = 1e-5
"""Of any probability between PyTorch and ONNX Runtime."""

Inputs = Mapping[str, Tensor]


def publish(
    network: nn.Module,
    folder: Path,
    batches: Sequence[Inputs],
    free: Mapping[str, Sequence[str | None]],
    labels: Sequence[str],
) -> float:
    """Write `model.onnx` and `labels.txt`, and return the largest difference of a probability from PyTorch's.

    Args:
        network: takes the inputs by position, gives probabilities float32 `[n, classes]`.
        folder: `<models>/<name>/<version>`.
        batches: inputs by name, in the network's order, of several sizes: the runtimes are compared on all of them.
        free: the names of each input's dimensions, as `save_graph` takes them.
        labels: one a class, in order.

    Raises:
        ExportError: the two differ by more than 1e-5; nothing is written.
    """
    with TemporaryDirectory() as scratch:
        graph = Path(scratch) / "model.onnx"
        save_graph(network, graph, batches[0], OUTPUT, free)
        difference = compare(network, graph, batches)
        if not difference <= LARGEST_DIFFERENCE:
            raise ExportError(
                f"The graph differs from the network by {difference:.2g} in a probability, allowed is "
                f"{LARGEST_DIFFERENCE:.0e}: nothing was written."
            )
        with replacing(folder / "labels.txt") as file:
            file.write("".join(f"{label}\n" for label in labels).encode())
        with replacing(folder / "model.onnx") as file:
            file.write(graph.read_bytes())
    return difference


def compare(network: nn.Module, graph: Path, batches: Iterable[Inputs]) -> float:
    """Return the largest absolute difference of an answer between PyTorch and ONNX Runtime."""
    session = runtime.load().InferenceSession(graph, providers=["CPUExecutionProvider"])
    network.eval()
    worst = 0.0
    for inputs in batches:
        with torch.inference_mode():
            expected = network(*inputs.values()).numpy()
        (given,) = session.run([OUTPUT], {name: tensor.numpy() for name, tensor in inputs.items()})
        # A NaN must not hide behind max().
        worst = float(np.maximum(worst, np.abs(given - expected).max()))
    return worst
