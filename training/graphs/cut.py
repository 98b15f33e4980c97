"""An ONNX graph, cut before its last linear layer: the part below as a backbone, and a new head grafted onto it.

Owns where a classifier's graph ends being a description of the image and begins to be one of its classes. Reads the
graph alone, so that it works for whatever wrote it; knows nothing of images, labels or PyTorch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from app.manifest import INPUT_NAME, OUTPUT_NAME
from training.errors import SurgeryError
from training.graphs.parts import attribute, constants, copied, element_type, keep, makers, needed, output

FEATURES_NAME = "features"
"""What the graph of a backbone gives: float32 `[n, width]`."""
LINEAR = {"Gemm", "MatMul"}
PASSED = {
    "Add",
    "Cast",
    "Clip",
    "DequantizeLinear",
    "Div",
    "Flatten",
    "Identity",
    "Mul",
    "QuantizeLinear",
    "Reshape",
    "Softmax",
    "Squeeze",
    "Sub",
}
"""What may stand between the last linear layer and the answer: a bias, a temperature, the softmax, quantisation."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a graph is divided."""

    features: str
    """The tensor that the last linear layer takes."""
    linear: str
    """That layer's name, for a sentence."""


def find_cut(model: onnx.ModelProto, what: str) -> Cut:
    """Find the last linear layer, walking from the probabilities upwards.

    Args:
        model: a graph from `image` to `probabilities`.
        what: what a sentence calls it.

    Raises:
        SurgeryError: there is no such layer, or something stands after it that is more than its bias, a temperature,
            softmax or quantisation.
    """
    made_by, fixed = makers(model.graph), constants(model.graph)
    tensor = OUTPUT_NAME
    while tensor in made_by:
        node = made_by[tensor]
        varying = [name for name in node.input if name and name not in fixed]
        if node.op_type in LINEAR and varying == [node.input[0]] and not attribute(node, "transA"):
            return Cut(features=_before_cosine(made_by, node.input[0]), linear=node.name or node.output[0])
        if node.op_type not in PASSED or len(varying) != 1:
            raise SurgeryError(
                f"{what} does not end in a linear layer and a softmax: {node.op_type} '{node.name or tensor}' is what "
                "its probabilities come from, so there are no features to take from it; choose another bundle."
            )
        (tensor,) = varying
    raise SurgeryError(f"{what} has no linear layer before its probabilities: choose another bundle to take features.")


def _before_cosine(made_by: Mapping[str, onnx.NodeProto], tensor: str) -> str:
    """Return what a cosine head takes: it centres and normalises the features before its linear layer."""
    if tensor in made_by and made_by[tensor].op_type == "LpNormalization":
        tensor = made_by[tensor].input[0]
        if tensor in made_by and made_by[tensor].op_type == "Sub":
            tensor = made_by[tensor].input[0]
    return tensor


def backbone(model: onnx.ModelProto, cut: Cut) -> onnx.ModelProto:
    """Return the graph from `image` to `features`, float32."""
    below = _below(model, cut.features)
    below.graph.node.append(helper.make_node("Cast", [cut.features], [FEATURES_NAME], to=TensorProto.FLOAT))
    below.graph.output.append(helper.make_tensor_value_info(FEATURES_NAME, TensorProto.FLOAT, ["n", None]))
    return below


def above(model: onnx.ModelProto, cut: Cut) -> onnx.ModelProto:
    """Return what `backbone` leaves: the graph from `features`, float32 `[n, width]`, to `probabilities`."""
    rest = copied(model)
    entry = helper.make_node("Cast", [FEATURES_NAME], [cut.features], to=element_type(model, cut.features))
    keep(rest.graph, [entry, *needed(rest.graph.node, OUTPUT_NAME, given={cut.features})])
    rest.graph.ClearField("output")
    rest.graph.output.append(output(model, OUTPUT_NAME))
    rest.graph.ClearField("input")
    rest.graph.input.append(helper.make_tensor_value_info(FEATURES_NAME, TensorProto.FLOAT, ["n", None]))
    return rest


def graft(
    model: onnx.ModelProto,
    cut: Cut,
    steps: Sequence[tuple[str, Sequence[str], Mapping[str, Any]]],
    weights: Mapping[str, NDArray[np.float32]],
    classes: int,
) -> onnx.ModelProto:
    """Return the graph with a new head in place of everything above the cut.

    Args:
        model: the graph whose backbone is kept, every tensor and name of it.
        cut: where its head begins.
        steps: the head's nodes in order, each an operator, its inputs and its attributes. An input is the name of a
            weight, or "" for what the step before gives; the first takes the features.
        weights: the head's tensors by the names that the steps use; they are stored as `head.<name>`.
        classes: how many probabilities the last step gives.
    """
    grown = _below(model, cut.features)
    prefix = _free_prefix(grown.graph)
    nodes = [helper.make_node("Cast", [cut.features], [f"{prefix}.features"], f"{prefix}.cast", to=TensorProto.FLOAT)]
    for place, (operator, inputs, attributes) in enumerate(steps):
        last = nodes[-1].output[0]
        names = [f"{prefix}.{name}" if name else last for name in inputs]
        given = OUTPUT_NAME if place == len(steps) - 1 else f"{prefix}.{place}"
        nodes.append(helper.make_node(operator, names, [given], f"{prefix}.{operator.lower()}.{place}", **attributes))
    grown.graph.node.extend(nodes)
    grown.graph.initializer.extend(
        numpy_helper.from_array(array, f"{prefix}.{name}") for name, array in weights.items()
    )
    grown.graph.output.append(helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["n", classes]))
    onnx.checker.check_model(grown, full_check=True)
    return grown


def _below(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """Copy what a tensor is computed from; the copy has no output yet."""
    below = copied(model)
    below.graph.ClearField("output")
    keep(below.graph, needed(below.graph.node, tensor, given={INPUT_NAME}))
    return below


def _free_prefix(graph: onnx.GraphProto) -> str:
    """Return `head`, or another where the backbone has such names: the cosine head of a bundle leaves some behind."""
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    number, prefix = 1, "head"
    while any(name.startswith(f"{prefix}.") for name in names):
        number += 1
        prefix = f"head{number}"
    return prefix
