"""The Open Inference Protocol for tests: small graphs of tensors, and messages as clients build them."""

import json
import struct
from pathlib import Path

import httpx
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from app.tensors import DATATYPES

ONNX_KINDS = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
assert ONNX_KINDS.keys() == DATATYPES.keys()


def save_graph(path: Path, nodes, inputs, outputs, constants=()) -> None:
    """Write an ONNX file; inputs and outputs are (name, datatype, shape)."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, ONNX_KINDS[kind], shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, ONNX_KINDS[kind], shape) for name, kind, shape in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def make_echo(models: Path, name: str = "echo", datatypes: tuple[str, ...] = tuple(DATATYPES)) -> None:
    """A graph that gives back one tensor of each datatype, `[rows, length]`."""
    save_graph(
        models / name / "1/model.onnx",
        [helper.make_node("Identity", [f"in_{kind}"], [f"out_{kind}"]) for kind in datatypes],
        [(f"in_{kind}", kind, ["N", f"L_{kind}"]) for kind in datatypes],
        [(f"out_{kind}", kind, ["N", f"L_{kind}"]) for kind in datatypes],
    )


def make_pair(models: Path) -> None:
    """A graph of two inputs that batch: FP32 `[rows, 4]`; `sum` and `log` of the sum."""
    save_graph(
        models / "pair/1/model.onnx",
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Log", ["sum"], ["log"])],
        [("a", "FP32", ["N", 4]), ("b", "FP32", ["N", 4])],
        [("sum", "FP32", ["N", 4]), ("log", "FP32", ["N", 4])],
    )


def make_fixed(models: Path) -> None:
    """A graph whose rows do not batch: INT64 `[3]` and twice that."""
    save_graph(
        models / "fixed/1/model.onnx",
        [helper.make_node("Add", ["x", "x"], ["twice"])],
        [("x", "INT64", [3])],
        [("twice", "INT64", [3])],
    )


def strings(*elements: bytes) -> bytes:
    """BYTES in binary form."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def binary_input(name: str, array: np.ndarray, datatype: str) -> tuple[dict, bytes]:
    data = strings(*array.ravel().tolist()) if datatype == "BYTES" else array.tobytes()
    described = {"name": name, "shape": list(array.shape), "datatype": datatype}
    return described | {"parameters": {"binary_data_size": len(data)}}, data


def image_input(*images: bytes, shape: list[int] | None = None) -> tuple[dict, bytes]:
    data = strings(*images)
    described = {"name": "image", "shape": shape or [len(images)], "datatype": "BYTES"}
    return described | {"parameters": {"binary_data_size": len(data)}}, data


def message(document: dict, *tails: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request with binary tensors."""
    head = json.dumps(document).encode()
    return head + b"".join(tails), {"Inference-Header-Content-Length": str(len(head))}


def outputs_of(response: httpx.Response) -> dict[str, np.ndarray]:
    """The outputs of an answer, binary ones and those in JSON, as arrays; BYTES as objects."""
    assert response.status_code == 200, response.text
    length = int(response.headers.get("inference-header-content-length", len(response.content)))
    document, tail = json.loads(response.content[:length]), response.content[length:]
    found = {}
    for output in document["outputs"]:
        dtype = DATATYPES[output["datatype"]]
        if "data" in output:
            flat = np.array(output["data"], dtype)
        else:
            size = output["parameters"]["binary_data_size"]
            part, tail = tail[:size], tail[size:]
            flat = np.array(_split(part), object) if dtype == np.object_ else np.frombuffer(part, dtype)
        found[output["name"]] = flat.reshape(output["shape"])
    assert not tail
    return found


def _split(data: bytes) -> list[bytes]:
    elements = []
    while data:
        (size,) = struct.unpack_from("<I", data)
        elements.append(data[4 : 4 + size])
        data = data[4 + size :]
    return elements
