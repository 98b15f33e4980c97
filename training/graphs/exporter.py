"""A module in, one self-contained ONNX graph out: what it takes and gives by name, and nothing of this machine in it.

Owns PyTorch's exporter. Knows nothing of images, bundles or what the tensors mean.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from training.errors import ExportError

OPSET = 18


def make_graph(
    module: nn.Module, inputs: Mapping[str, Tensor], output: str, free: Mapping[str, Sequence[str | None]]
) -> onnx.ModelProto:
    """Return the graph of a module, in evaluation mode, that takes `inputs` in this order and gives one tensor.

    Args:
        module: left on the CPU.
        inputs: one example of each input. No free dimension of it may be 1, which the exporter would take for fixed.
        output: the name of what the module returns.
        free: for each input the names of its dimensions, None where one is fixed; equal names are equal sizes.

    Raises:
        ExportError: the module cannot be expressed as a graph, or not with the dimensions that are to be free.
    """
    sizes = {name: torch.export.Dim(name) for names in free.values() for name in names if name is not None}
    shapes = tuple({at: sizes[name] for at, name in enumerate(free[tensor]) if name is not None} for tensor in inputs)
    module.cpu().eval()
    # For its own time the exporter replaces how an LSTM is taken apart, so that the length stays free, but not what an
    # earlier export left in this cache: every second one had a fixed length (torch 2.13).
    torch.ops.aten.lstm.input._dispatch_cache.clear()
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"The network cannot be exported: {str(error).splitlines()[0]}") from error
    if program is None:
        raise ExportError("The network cannot be exported: PyTorch returned no graph.")
    model: onnx.ModelProto = program.model_proto
    _strip(model)
    onnx.checker.check_model(model, full_check=True)
    _check_free(model, free)
    return model


def _check_free(model: onnx.ModelProto, free: Mapping[str, Sequence[str | None]]) -> None:
    """The exporter fixes a dimension that it cannot keep free, and does not say so."""
    for tensor in model.graph.input:
        for name, dimension in zip(free[tensor.name], tensor.type.tensor_type.shape.dim, strict=True):
            if name is not None and not dimension.dim_param:
                raise ExportError(
                    f"The network cannot be exported: dimension '{name}' of '{tensor.name}' came out fixed at "
                    f"{dimension.dim_value}."
                )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what a user cannot mend: deprecations inside the exporter, and its log of torchvision's absence."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes for its developers: stack traces with this machine's paths, names of scopes."""
    del model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    del model.graph.metadata_props[:]
    entries: Sequence[Any] = [
        *model.graph.node,
        *model.graph.initializer,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
    ]
    for entry in entries:
        entry.doc_string = ""
        del entry.metadata_props[:]
    del model.graph.value_info[:]
    del model.functions[:]
