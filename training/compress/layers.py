"""Which nodes of a graph are its network, and which are around it: normalisation before, probabilities after.

Owns reading of graphs for `int8.py` and `fp16.py`; changes none.
"""

from collections.abc import Iterable, Iterator

from onnx import ModelProto, NodeProto

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose second input is what was learned."""


def name_nodes(model: ModelProto) -> None:
    """Give every node a name, after its first output, where it has none: what is kept in float is told by name."""
    for node in model.graph.node:
        node.name = node.name or f"node_{node.output[0]}"


def weighted_nodes(model: ModelProto) -> list[NodeProto]:
    """Return the nodes that hold float32 weights, in the graph's order."""
    constants = {tensor.name for tensor in model.graph.initializer if tensor.data_type == tensor.FLOAT}
    return [node for node in model.graph.node if node.op_type in WEIGHTED and node.input[1] in constants]


def around_network(model: ModelProto) -> set[str]:
    """Return the names of all nodes that no weighted node comes before, and of those that none comes after."""
    name_nodes(model)
    weighted = {node.name for node in weighted_nodes(model)}
    nodes = {node.name for node in model.graph.node}
    return (nodes - _reached(model.graph.node, weighted)) | (nodes - _reached(_turned(model), weighted))


def _reached(nodes: Iterable[NodeProto], start: set[str]) -> set[str]:
    """Return the start and every node to which a tensor leads from it; nodes are in the order of the tensors' way."""
    reached: set[str] = set()
    tensors: set[str] = set()
    for node in nodes:
        if node.name in start or tensors.intersection(node.input):
            reached.add(node.name)
            tensors.update(node.output)
    return reached


def _turned(model: ModelProto) -> Iterator[NodeProto]:
    """Yield the nodes from last to first, with inputs and outputs exchanged."""
    for node in reversed(model.graph.node):
        turned = NodeProto(name=node.name, op_type=node.op_type)
        turned.input.extend(node.output)
        turned.output.extend(node.input)
        yield turned
