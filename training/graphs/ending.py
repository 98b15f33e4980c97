"""The end of a bundle's graph: logits, temperature, probabilities, energy.

Rewrites the ONNX graph itself, so it works for every bundle, whatever wrote it: PyTorch's exporter, a quantiser, a
pruner. Knows no numbers but T, and runs nothing.

```
    logits ──▶ Div by T ──▶ Softmax ──▶ probabilities
                  └──▶ ReduceLogSumExp ──▶ Mul by -T ──▶ energy
```
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from app.manifest import ENERGY_NAME, OUTPUT_NAME
from training.errors import ExportError
from training.graphs.parts import copied, element_type, keep, makers, output

LOGITS_NAME = "calibration.logits"
"""Not plainly `logits`: a network may have a tensor of that name already."""
_TEMPERATURE, _MINUS_TEMPERATURE, _AXES = "calibration.temperature", "calibration.minus_temperature", "calibration.axes"
_FLOAT, _SCALED, _EVIDENCE = "calibration.float", "calibration.scaled", "calibration.evidence"
_OURS = frozenset({_TEMPERATURE, _MINUS_TEMPERATURE, _AXES, _FLOAT, _SCALED, _EVIDENCE, ENERGY_NAME})
_TRANSPARENT = frozenset({"Cast", "Identity"})
"""What may stand between the softmax and `probabilities`: 16-bit graphs end in a cast."""


def temperature_of(graph: onnx.ModelProto) -> float:
    """Return the temperature that a graph applies; 1 where it has none of ours."""
    for tensor in graph.graph.initializer:
        if tensor.name == _TEMPERATURE:
            return float(numpy_helper.to_array(tensor))
    return 1.0


def plain(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy without our temperature and energy: what the network itself answers, at T = 1."""
    copy = copied(graph)
    softmax = _softmax(copy)
    softmax.input[0] = _logits(copy)
    keep(copy.graph, [node for node in copy.graph.node if not _OURS & set(node.output)])
    for ours in [info for info in copy.graph.output if info.name in _OURS]:
        copy.graph.output.remove(ours)
    return copy


def logits_of(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that gives the logits alone, float32 `[n, classes]`, before any temperature."""
    copy = plain(graph)
    source = _logits(copy)
    kind = element_type(copy, source)
    nodes = [node for node in copy.graph.node if OUTPUT_NAME not in node.output]
    if kind == TensorProto.FLOAT:
        nodes.append(helper.make_node("Identity", [source], [LOGITS_NAME]))
    else:
        nodes.append(helper.make_node("Cast", [source], [LOGITS_NAME], to=TensorProto.FLOAT))
    shape = output(copy, OUTPUT_NAME).type.tensor_type.shape
    keep(copy.graph, nodes)
    del copy.graph.output[:]
    copy.graph.output.append(helper.make_tensor_value_info(LOGITS_NAME, TensorProto.FLOAT, None))
    copy.graph.output[0].type.tensor_type.shape.CopyFrom(shape)
    onnx.checker.check_model(copy, full_check=True)
    return copy


def with_temperature(graph: onnx.ModelProto, temperature: float) -> onnx.ModelProto:
    """Return a copy that answers `softmax(logits / T)` and has the second output `energy`, float32 `[n]`.

    A temperature that was there is replaced. At T = 1 nothing stands before the softmax.

    Raises:
        ExportError: the graph does not end in a softmax over its classes.
    """
    copy = plain(graph)
    softmax, source = _softmax(copy), _logits(copy)
    before: list[NodeProto] = []
    constants: dict[str, NDArray[Any]] = {
        _MINUS_TEMPERATURE: np.array(-temperature, np.float32),
        _AXES: np.array([1], np.int64),
    }
    if element_type(copy, source) != TensorProto.FLOAT:
        # 16 bits would round the temperature, and the sum of a thousand exponentials may be more than they hold.
        before.append(helper.make_node("Cast", [source], [_FLOAT], to=TensorProto.FLOAT))
        source = _FLOAT
    if temperature != 1:
        constants[_TEMPERATURE] = np.array(temperature, np.float32)
        before.append(helper.make_node("Div", [source, _TEMPERATURE], [_SCALED]))
        source = _SCALED
    softmax.input[0] = source
    energy = [
        helper.make_node("ReduceLogSumExp", [source, _AXES], [_EVIDENCE], keepdims=0),
        helper.make_node("Mul", [_EVIDENCE, _MINUS_TEMPERATURE], [ENERGY_NAME]),
    ]
    nodes: list[NodeProto] = []
    for node in copy.graph.node:
        nodes += [*before, node] if node.output[0] == softmax.output[0] else [node]
    copy.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    keep(copy.graph, [*nodes, *energy])
    rows = output(copy, OUTPUT_NAME).type.tensor_type.shape.dim[0]
    copy.graph.output.append(helper.make_tensor_value_info(ENERGY_NAME, TensorProto.FLOAT, [None]))
    copy.graph.output[-1].type.tensor_type.shape.dim[0].CopyFrom(rows)
    onnx.checker.check_model(copy, full_check=True)
    return copy


# ---------------------------------------------------------------- finding it


def _softmax(graph: onnx.ModelProto) -> NodeProto:
    """Return the softmax that `probabilities` comes from.

    Raises:
        ExportError: there is none over the classes.
    """
    made_by = makers(graph.graph)
    node = made_by.get(OUTPUT_NAME)
    while node is not None and node.op_type in _TRANSPARENT:
        node = made_by.get(node.input[0])
    if node is None or node.op_type != "Softmax" or _axis(node) not in (-1, 1):
        found = "nothing" if node is None else f"a {node.op_type}"
        raise ExportError(
            f"The graph's '{OUTPUT_NAME}' comes from {found}, not from a softmax over the classes, so it has no logits "
            "to calibrate: leave the last Softmax in, in floating point."
        )
    return node


def _axis(softmax: NodeProto) -> int:
    return next((attribute.i for attribute in softmax.attribute if attribute.name == "axis"), -1)


def _logits(graph: onnx.ModelProto) -> str:
    """Return the name of the network's logits, before a temperature and a cast of ours."""
    made_by = makers(graph.graph)
    name = _softmax(graph).input[0]
    while name in (_SCALED, _FLOAT):
        name = made_by[name].input[0]
    return str(name)
