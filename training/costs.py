"""What a network costs to keep and to run: parameters and multiply-adds, counted from its ONNX graph.

Counts what any bundle holds, whoever wrote it, so that networks, their pruned and their quantised forms stand in one
table. Looks at shapes only: never runs a model, and knows nothing of images or bundles. What stands inside of a branch
or a loop is not counted.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto
from onnx.inliner import inline_local_functions
from onnx.shape_inference import infer_shapes

from training.errors import GraphError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Costs:
    """What a network costs, by the graph that is served: batch normalisation is folded into convolutions there."""

    parameters: int
    """Numbers that were learned: weights and biases, each once, in whatever datatype they are kept."""
    multiply_adds: int
    """Products of one image's way through the graph, each with its addition; those of layers with weights, and of
    products of two activations. Normalisation, activations and pooling are not counted, as is the custom."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Where an operator keeps what it learned, by places among its inputs."""

    weights: tuple[int, ...]
    biases: tuple[int, ...] = ()


CONVOLUTIONS = {
    "Conv": _Layer((1,), (2,)),
    "ConvInteger": _Layer((1,)),
    "QLinearConv": _Layer((3,), (8,)),
}
TRANSPOSED = {"ConvTranspose": _Layer((1,), (2,))}
PRODUCTS = {
    "Gemm": _Layer((1,), (2,)),
    "MatMul": _Layer((1,)),
    "MatMulInteger": _Layer((1,)),
    "QLinearMatMul": _Layer((3,)),
}
RECURRENT = {"RNN": _Layer((1, 2), (3,)), "GRU": _Layer((1, 2), (3,)), "LSTM": _Layer((1, 2), (3,))}
NORMALISATIONS = {
    "BatchNormalization": _Layer((1, 2)),
    "InstanceNormalization": _Layer((1, 2)),
    "GroupNormalization": _Layer((1, 2)),
    "LayerNormalization": _Layer((1, 2)),
    "PRelu": _Layer((1,)),
}
LAYERS = CONVOLUTIONS | TRANSPOSED | PRODUCTS | RECURRENT | NORMALISATIONS
ACTIVATIONS = {"QLinearMatMul": (0, 3)}
"""The two factors of a product, where they are not the first two inputs."""
SAME_NUMBERS = {
    "DequantizeLinear",
    "QuantizeLinear",
    "Cast",
    "Identity",
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
}
"""Operators that pass weights on: what is behind them is what was learned."""


def costs_of(path: Path) -> Costs:
    """Count the graph of an ONNX file.

    Raises:
        GraphError: it is not readable as ONNX, or a shape in it cannot be told.
    """
    try:
        return count(onnx.load(path))
    except GraphError as error:
        raise GraphError(f"{path}: {error.message}") from error
    except Exception as error:  # protobuf's errors have no common class with onnx's
        raise GraphError(f"{path} cannot be read as an ONNX graph: {str(error).splitlines()[0]}") from error


def count(model: ModelProto) -> Costs:
    """Count a graph; free dimensions of its inputs, as that of the batch, are taken as 1.

    Raises:
        GraphError: the shape of something that is multiplied cannot be told.
    """
    if model.functions:
        model = inline_local_functions(model)
    nodes, shapes = model.graph.node, _shapes(model)
    constants, makers = _constants(model), {name: node for node in nodes for name in node.output}
    learned: dict[str, int] = {}
    for node in nodes:
        for source in _learned_by(node, constants, makers):
            learned[source] = math.prod(constants[source])
    return Costs(sum(learned.values()), sum(_multiply_adds(node, shapes) for node in nodes))


# ---------------------------------------------------------------- what was learned


def _learned_by(node: NodeProto, constants: Mapping[str, Shape], makers: Mapping[str, NodeProto]) -> Iterator[str]:
    """Yield the names of the constants that a layer learned; a sum after a product learned a bias too."""
    layer = LAYERS.get(node.op_type)
    if layer is not None:
        sources = [node.input[place] for place in (*layer.weights, *layer.biases) if place < len(node.input)]
    elif node.op_type == "Add" and any(_is_product(name, makers) for name in node.input):
        sources = list(node.input)
    else:
        return
    for name in sources:
        source = _behind(name, makers)
        if source in constants:
            yield source


def _is_product(name: str, makers: Mapping[str, NodeProto]) -> bool:
    maker = makers.get(_behind(name, makers))
    return maker is not None and maker.op_type in PRODUCTS


def _behind(name: str, makers: Mapping[str, NodeProto]) -> str:
    while (maker := makers.get(name)) is not None and maker.op_type in SAME_NUMBERS:
        name = maker.input[0]
    return name


def _constants(model: ModelProto) -> dict[str, Shape]:
    found = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = tuple(attribute.t.dims)
    return found


# ---------------------------------------------------------------- what is multiplied


def _multiply_adds(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Return how often a number of one tensor is multiplied with one of another."""

    def size(name: str) -> int:
        return math.prod(_known(shapes, name, node))

    kind = node.op_type
    if kind in CONVOLUTIONS:
        # Every weight once for each image and place of the result; the channel's place is in the weights' own shape.
        batch, _, *places = _known(shapes, node.output[0], node)
        return batch * math.prod(places) * size(node.input[CONVOLUTIONS[kind].weights[0]])
    if kind in TRANSPOSED:
        batch, _, *places = _known(shapes, node.input[0], node)
        return batch * math.prod(places) * size(node.input[1])
    if kind in PRODUCTS:
        left, _ = ACTIVATIONS.get(kind, (0, 1))
        transposed = kind == "Gemm" and any(entry.name == "transA" and entry.i for entry in node.attribute)
        inner = _known(shapes, node.input[left], node)[0 if transposed else -1]
        return size(node.output[0]) * inner
    if kind in RECURRENT:
        steps, batch, _ = _known(shapes, node.input[0], node)
        return steps * batch * sum(size(node.input[place]) for place in RECURRENT[kind].weights)
    return 0


def _known(shapes: Mapping[str, Shape], name: str, node: NodeProto) -> Shape:
    shape = shapes.get(name)
    if shape is None:
        raise GraphError(
            f"The shape of '{name}' at the operator {node.op_type} cannot be told, so its multiply-adds cannot be "
            "counted: write quantised graphs in the QDQ form, whose operators are all in the ONNX standard."
        )
    return shape


def _shapes(model: ModelProto) -> dict[str, Shape]:
    """Return the shape of every tensor that has one, with free dimensions of the inputs as 1."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    # What the file says of its inside is with the free dimension; it is inferred anew.
    del fixed.graph.value_info[:]
    for tensor in (*fixed.graph.input, *fixed.graph.output):
        for dimension in tensor.type.tensor_type.shape.dim:
            if not dimension.HasField("dim_value"):
                dimension.dim_value = 1
    inferred = infer_shapes(fixed, data_prop=True).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for tensor in (*inferred.input, *inferred.value_info, *inferred.output):
        shape = tensor.type.tensor_type.shape
        if tensor.type.tensor_type.HasField("shape") and all(part.HasField("dim_value") for part in shape.dim):
            found[tensor.name] = tuple(part.dim_value for part in shape.dim)
    return found
