"""How far golden answers move where a device rounds what it multiplies: every bundle of models/, emulated on the CPU.

python -m benchmarks.tf32               # a table, and benchmarks/results/tf32.json

Both operands of every Conv, ConvTranspose, Gemm and MatMul of float32 are rounded, weights and activations alike, and
multiplied and summed in float32; biases and all other operators stay as they are. Beside that stands the graph as it is
written, without the runtime's optimisation. Graphs in 8 bits are rounded too: what lies between their scales is
float32 in ONNX Runtime's CUDA provider, for the rules that make integer kernels of it are for others (its
qdq_selector_action_transformer.cc). Half precision differs from TF32 in range, and in where ties go.

No GPU is asked. Which layers it rounds at all, and in which order it sums, is for `python -m benchmarks.gpu` to tell;
so is whether its kernels round, as PyTorch's matrix products do (triton-lang/triton issue 4574), or cut off.
"""

import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.shape_inference import infer_shapes

from app import runtime
from app.cpus import machine
from app.errors import BundleError
from app.golden import prove
from app.images import decode
from app.manifest import Bundle
from benchmarks.models import MODELS, ROOT, name_of, read_bundles
from training.compress.int8 import in_float_arithmetic
from training.graphs.parts import WEIGHTED, copied

RESULT = ROOT / "benchmarks/results/tf32.json"
SPLIT = 2.0**42 + 1
"""Leaves 11 of a double's 53 significant bits: the one that is implied, and ten of mantissa."""
OFF_TIES = 1 + 2.0**-40
"""Moves what lies in the middle away from zero, and no other float32 over a middle: that is 2**-24 away, or further."""
LOWER = 1 - 6e-4
"""Takes any number of 11 bits to where the next one towards zero is the nearest."""

Rounding = Callable[[str, str], list[NodeProto]]
"""From the names of a float32 tensor and of its rounded form to the nodes between them."""


def to_tf32(tensor: str, rounded: str) -> list[NodeProto]:
    """Round to 10 bits of mantissa, ties away from zero, as PTX's `cvt.rna.tf32.f32` does.

    Numbers below 1.2e-38 keep more bits than TF32 has there.
    """
    return [
        helper.make_node("Cast", [tensor], [f"{rounded}/double"], to=TensorProto.DOUBLE),
        *times(f"{rounded}/double", OFF_TIES, f"{rounded}/off"),
        *nearest(f"{rounded}/off", f"{rounded}/nearest"),
        helper.make_node("Cast", [f"{rounded}/nearest"], [rounded], to=TensorProto.FLOAT),
    ]


def cut_to_tf32(tensor: str, rounded: str) -> list[NodeProto]:
    """Drop the other 13 bits of mantissa, as a tensor core does with a float32 that nobody has rounded for it."""
    double, near, lower, chosen = (f"{rounded}/{step}" for step in ("double", "nearest", "lower", "chosen"))
    return [
        helper.make_node("Cast", [tensor], [double], to=TensorProto.DOUBLE),
        *nearest(double, near),
        *times(near, LOWER, f"{lower}/between"),
        *nearest(f"{lower}/between", lower),
        helper.make_node("Abs", [double], [f"{double}/size"]),
        helper.make_node("Abs", [near], [f"{near}/size"]),
        helper.make_node("Greater", [f"{near}/size", f"{double}/size"], [f"{rounded}/over"]),
        helper.make_node("Where", [f"{rounded}/over", lower, near], [chosen]),
        helper.make_node("Cast", [chosen], [rounded], to=TensorProto.FLOAT),
    ]


def nearest(tensor: str, rounded: str) -> list[NodeProto]:
    """Round doubles to 11 significant bits, ties either way, by Dekker's splitting: 42 bits are gone in the sums.

    T. J. Dekker, *A Floating-Point Technique for Extending the Available Precision*, 1971. In float32 it overflows.
    """
    return [
        *times(tensor, SPLIT, f"{rounded}/product"),
        helper.make_node("Sub", [f"{rounded}/product", tensor], [f"{rounded}/rest"]),
        helper.make_node("Sub", [f"{rounded}/product", f"{rounded}/rest"], [rounded]),
    ]


def times(tensor: str, factor: float, product: str) -> list[NodeProto]:
    value = numpy_helper.from_array(np.array(factor, np.float64))
    return [
        helper.make_node("Constant", [], [f"{product}/factor"], value=value),
        helper.make_node("Mul", [tensor, f"{product}/factor"], [product]),
    ]


def to_float16(tensor: str, rounded: str) -> list[NodeProto]:
    """Round to half precision, ties to even: TF32's mantissa, and 5 bits of exponent for its 8."""
    return [
        helper.make_node("Cast", [tensor], [f"{rounded}/half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{rounded}/half"], [rounded], to=TensorProto.FLOAT),
    ]


WAYS: dict[str, tuple[Rounding, Collection[int]]] = {
    "float32": (to_tf32, ()),
    "TF32": (to_tf32, (0, 1)),
    "TF32, cut off": (cut_to_tf32, (0, 1)),
    "TF32, weights alone": (to_tf32, (1,)),
    "float16": (to_float16, (0, 1)),
}
"""How operands are rounded, and which of the two."""


def main() -> None:
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "onnxruntime": runtime.load().__version__,
        "models": {name_of(bundle): measured(bundle) for bundle in read_bundles(MODELS)},
    }
    RESULT.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(table(report["models"]))


def measured(bundle: Bundle) -> dict[str, Any]:
    """Run a bundle's golden set in every way, and judge as the service does when it loads."""
    model = onnx.load(bundle.model_path)
    pixels = np.stack([decode(data, bundle.manifest.pixels) for data in bundle.golden_bytes()])
    expected = bundle.golden_probabilities()
    answers = {way: answered(with_rounding(model, *told), pixels) for way, told in WAYS.items()}
    return {
        "sha256": bundle.manifest.model.sha256,
        "tolerance": bundle.manifest.golden.tolerance,
        "products": len(products(model)),
        "largest_difference": {way: float(f"{np.abs(rows - expected).max():.2g}") for way, rows in answers.items()},
        "proved": {way: proves(bundle, rows) for way, rows in answers.items()},
    }


def proves(bundle: Bundle, rows: NDArray[np.float32]) -> bool:
    """Tell whether the service would load a bundle whose golden images have these answers."""
    try:
        prove(bundle, lambda _: rows)
    except BundleError:
        return False
    return True


def answered(model: ModelProto, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Run uint8 `[n, height, width, 3]` to probabilities `[n, classes]`, node by node as the graph is written."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        onnx.save(model, path)
        return in_float_arithmetic(path)(pixels)


# ---------------------------------------------------------------- the graph


def with_rounding(model: ModelProto, rounding: Rounding, operands: Collection[int]) -> ModelProto:
    """Return a copy in which these operands of every float32 product, 0 and 1 or one of them, are rounded first."""
    model = copied(model)
    rounds = {node.output[0] for node in products(model)}
    done: set[str] = set()
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        for place in operands if node.output[0] in rounds else ():
            tensor = node.input[place]
            if tensor not in done:
                nodes += rounding(tensor, f"{tensor}/rounded")
                done.add(tensor)
            node.input[place] = f"{tensor}/rounded"
        nodes.append(node)
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    return model


def products(model: ModelProto) -> list[NodeProto]:
    """Return the nodes that multiply float32 tensors with each other and sum, in the graph's order."""
    graph = infer_shapes(model, strict_mode=True).graph
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            floats.add(info.name)
    return [node for node in model.graph.node if node.op_type in WEIGHTED and floats.issuperset(node.input[:2])]


# ---------------------------------------------------------------- the table


def table(models: dict[str, dict[str, Any]]) -> str:
    """Return the largest differences of a golden probability; ✗ where the service would not load the bundle."""
    lines = [f"| bundle | tolerated | {' | '.join(WAYS)} |", f"|---{'|---:' * (1 + len(WAYS))}|"]
    for name, found in models.items():
        cells = [
            f"{difference:.2g}{'' if found['proved'][way] else ' ✗'}"
            for way, difference in found["largest_difference"].items()
        ]
        lines.append(f"| `{name}` | {found['tolerance']:.2g} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
