"""Reading a graph and keeping a part of it: who makes which tensor, what is needed for one, which nodes are learned.

Owns what the other rooms do to graphs in common. Changes one only where its name says so.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose second input is what was learned."""


def copied(model: ModelProto) -> ModelProto:
    """Return a copy that can be changed."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def makers(graph: GraphProto) -> dict[str, NodeProto]:
    """Return for each tensor that is computed the node that computes it."""
    return {output: node for node in graph.node for output in node.output}


def taken(node: NodeProto) -> Iterator[str]:
    """Yield what a node takes, and what the graphs inside a loop or a branch take from around them."""
    yield from node.input
    for attribute in node.attribute:
        for inner in [attribute.g, *attribute.graphs]:
            for inside in inner.node:
                yield from taken(inside)


def constants(graph: GraphProto) -> set[str]:
    """Return every tensor that does not depend on the graph's inputs."""
    known = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if all(name in known for name in taken(node) if name):
            known |= set(node.output)
    return known


def attribute(node: NodeProto, name: str) -> object:
    """Return a node's attribute; None where it has none of that name."""
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), None)


def output(model: ModelProto, name: str) -> ValueInfoProto:
    """Return what a graph says of one of its outputs."""
    return next(info for info in model.graph.output if info.name == name)


def element_type(model: ModelProto, tensor: str) -> int:
    """Return a tensor's element type; float32 where the graph does not tell."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    for info in (*inferred.value_info, *inferred.output):
        if info.name == tensor:
            return int(info.type.tensor_type.elem_type)
    return int(TensorProto.FLOAT)


# ---------------------------------------------------------------- keeping a part


def needed(nodes: Sequence[NodeProto], tensor: str, given: Collection[str]) -> list[NodeProto]:
    """Return the nodes that a tensor is computed by, in their order: ONNX demands that makers stand before takers."""
    wanted, found = {tensor}, []
    for node in reversed(nodes):
        if wanted & (set(node.output) - set(given)):
            found.append(node)
            wanted |= set(taken(node))
    return found[::-1]


def keep(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Leave these nodes in a graph, in this order, and of its tensors those that they take."""
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    used = {name for node in kept for name in taken(node)}
    tensors = [TensorProto.FromString(each.SerializeToString()) for each in graph.initializer if each.name in used]
    for field, entries in (("node", kept), ("initializer", tensors)):
        graph.ClearField(field)
        getattr(graph, field).extend(entries)
    graph.ClearField("value_info")
    graph.ClearField("quantization_annotation")


# ---------------------------------------------------------------- what was learned


def name_nodes(model: ModelProto) -> None:
    """Give every node a name, after its first output, where it has none: what is kept in float is told by name."""
    for node in model.graph.node:
        node.name = node.name or f"node_{node.output[0]}"


def weighted_nodes(model: ModelProto) -> list[NodeProto]:
    """Return the nodes that hold float32 weights, in the graph's order."""
    floats = {tensor.name for tensor in model.graph.initializer if tensor.data_type == tensor.FLOAT}
    return [node for node in model.graph.node if node.op_type in WEIGHTED and node.input[1] in floats]


def around_network(model: ModelProto) -> set[str]:
    """Name all nodes; return the names of those that no weighted node comes before, and that none comes after."""
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
