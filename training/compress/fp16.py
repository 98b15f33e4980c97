"""FP16: half the bytes, for devices that compute in half precision.

Owns one graph turned into another by ONNX Runtime's own converter. What comes before the first layer and what makes
probabilities of logits stay in float32: 8-bit pixels are scaled exactly, and each row still sums to 1. Input and output
keep their types. A CPU computes in float32 and converts at every layer, so there the graph is only smaller.
"""

from pathlib import Path

import onnx

from app import runtime
from training.errors import CompressError
from training.graphs.ending import plain
from training.graphs.parts import around_network, weighted_nodes

SPEED_NOTE = (
    "FP16 is for GPUs that compute in half precision: on a CPU the bundle is only smaller, and speed is not claimed."
)


def halve(model: Path, into: Path) -> None:
    """Write the float16 form of an ONNX file, without its temperature: the child gets one of its own.

    Raises:
        CompressError: nothing in the graph can be halved, or it has been compressed before.
    """
    graph = plain(onnx.load(model))
    if not weighted_nodes(graph):
        raise CompressError(f"{model} has no float32 weights to halve: give a bundle that was not compressed before.")
    kept = around_network(graph)
    convert = runtime.tool("transformers.float16").convert_float_to_float16
    halved = convert(graph, keep_io_types=True, op_block_list=[], node_block_list=sorted(kept))
    _without_detours(halved)
    ordered = runtime.tool("transformers.onnx_model").OnnxModel(halved)
    ordered.topological_sort()  # the converter puts its casts last
    del ordered.model.graph.value_info[:]
    onnx.checker.check_model(ordered.model, full_check=True)
    onnx.save(ordered.model, into)


def _without_detours(model: onnx.ModelProto) -> None:
    """Lead float32 from one node that stays in it to the next at once: the converter goes by way of float16."""
    detours = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Cast" and node.name.endswith("_cast_to_fp16_node")
    }
    outputs = {tensor.name for tensor in model.graph.output}
    renamed: dict[str, str] = {}
    """Float32 tensor that took the detour → its name where it is used."""
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.input[0] in detours and _casts_to_float(node):
            straight, used = detours[node.input[0]], node.output[0]
            model.graph.node.remove(node)
            if used in outputs:
                renamed[straight] = used
            else:
                _rename_inputs(model, used, straight)
    for straight, used in renamed.items():
        for node in model.graph.node:
            node.output[:] = [used if name == straight else name for name in node.output]
        _rename_inputs(model, straight, used)
    wanted = {name for node in model.graph.node for name in node.input} | outputs
    for node in [node for node in model.graph.node if node.op_type == "Cast" and node.output[0] not in wanted]:
        model.graph.node.remove(node)


def _casts_to_float(node: onnx.NodeProto) -> bool:
    return any(entry.name == "to" and entry.i == onnx.TensorProto.FLOAT for entry in node.attribute)


def _rename_inputs(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
