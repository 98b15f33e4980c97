"""The last step of every example: a graph takes its place in a folder of models, if it answers as its network does.

Owns the proof and the files. Knows nothing of what the tensors mean.
"""

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx

from app import runtime
from app.manifest import MODEL_FILE, write_tensor_manifest
from app.tensors import Array
from training.errors import ExportError
from training.graphs.exporter import OPSET

OUTPUT = "probabilities"
LARGEST_DIFFERENCE = 1e-5
"""Of any probability between PyTorch and ONNX Runtime on the machine that exports."""
GOLDEN_TOLERANCE = 1e-4
"""The same on the machine that serves, whichever it is."""


class Answered(NamedTuple):
    """Inputs by name, and the probabilities float32 `[n, classes]` that the network gives for them in PyTorch."""

    inputs: Mapping[str, Array]
    probabilities: Array


def publish(
    graph: onnx.ModelProto, answered: Sequence[Answered], folder: Path, story: Mapping[str, Any], command: str
) -> float:
    """Write `<models>/<name>/<version>/` whole, in the place of what was there, or leave everything as it is.

    Args:
        graph: gives `probabilities`.
        answered: batches of several sizes, all of which the graph must answer alike; the first becomes the golden set.
        folder: `<models>/<name>/<version>`.
        story: what the manifest says: `description`, `labels`, `evaluation`, `source`, `licence`.
        command: what the user typed.

    Returns:
        The largest difference of a probability from PyTorch's.

    Raises:
        ExportError: it is larger than 1e-5, or an answer is not a number.
    """
    difference = compare(graph, answered)
    if not difference <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"The graph differs from the network by {difference:.2g} in a probability, allowed is "
            f"{LARGEST_DIFFERENCE:.0e}: nothing was written."
        )
    fields = dict(story)
    fields |= {
        "name": folder.parent.name,
        "version": folder.name,
        "opset": OPSET,
        "tolerance": GOLDEN_TOLERANCE,
        "evaluation": {**fields["evaluation"], "runtime_difference": float(f"{difference:.2g}")},
        "provenance": {
            "source": fields.pop("source"),
            "licence": fields.pop("licence"),
            "command": command,
            "created": datetime.now(UTC).date().isoformat(),
        },
    }
    golden = {f"in.{name}": _as_kept(array) for name, array in answered[0].inputs.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        written = Path(scratch) / folder.name
        written.mkdir()
        onnx.save(graph, written / MODEL_FILE)
        write_tensor_manifest(written, fields, {**golden, f"out.{OUTPUT}": answered[0].probabilities})
        if folder.exists():
            shutil.rmtree(folder)
        written.rename(folder)
    return difference


def compare(graph: onnx.ModelProto, answered: Sequence[Answered]) -> float:
    """Return the largest absolute difference of ONNX Runtime's answers; NaN where one is not a number."""
    session = runtime.load().InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    differences = [
        np.abs(session.run([OUTPUT], dict(inputs))[0] - probabilities).max() for inputs, probabilities in answered
    ]
    return float(np.max(differences))


def _as_kept(array: Array) -> Array:
    """Return texts as NumPy keeps them in a file: in fixed width."""
    return array.astype(np.str_) if array.dtype == np.object_ else array
