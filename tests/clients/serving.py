"""What the clients' checks run against: a Convoy process with models for them, and the scripts' outcomes as tests."""

import ast
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from app.keys import Access, make_key
from app.tensors import DATATYPES
from tests.app.watching import free_port
from tests.bundles import make_bundle, plain_image
from tests.clients.environments import python_with
from tests.servers import convoy

SCRIPTS = Path(__file__).parent / "scripts"
SCRIPT_TIMEOUT_S = 240

_ELEMENTS = {
    "BOOL": TensorProto.BOOL,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
} | {name: getattr(TensorProto, name) for name in DATATYPES if "INT" in name}


def checks_of(script: str) -> dict[str, str]:
    """Return the checks of a script: function → what its docstring says that it checks."""
    tree = ast.parse((SCRIPTS / f"{script}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name: ast.get_docstring(node) or "" for node in functions if node.name.startswith("check_")}


def outcomes_of(environment: str, script: str, folder: Path) -> dict[str, str]:
    """Run a script's checks, in its environment, against an open server and one that asks for keys.

    Returns:
        Check → traceback, or an empty string for one that has passed.
    """
    python = python_with(environment)
    write_models(folder / "models")
    write_images(folder / "images")
    key, line = make_key("tests", frozenset({Access.PREDICT, Access.ADMIN}))
    (folder / "keys").write_text(line + "\n")
    with serving(folder, "open") as address, serving(folder, "guarded", keys=folder / "keys") as guarded:
        servers = {"open": {**address, "images": str(folder / "images")}, "guarded": {**guarded, "key": key}}
        command = [python, SCRIPTS / f"{script}.py", json.dumps(servers)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=SCRIPT_TIMEOUT_S)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@contextmanager
def serving(folder: Path, name: str, **settings: object) -> Iterator[dict[str, str]]:
    """Serve the folder's models, for the checks' sake with little to warm up."""
    port = free_port()
    settings |= {"default_model": "colours", "grpc_port": port, "sessions": 1, "max_batch": 2}
    with convoy(folder / "models", folder / name, **settings) as server:
        yield {"url": server.url, "http": server.url.removeprefix("http://"), "grpc": f"127.0.0.1:{port}"}


def write_images(folder: Path) -> None:
    """Write encoded images of different sizes and kinds, each named by its class."""
    folder.mkdir()
    for colour, kind, size in (("red", "JPEG", (40, 30)), ("green", "JPEG", (16, 16)), ("blue", "PNG", (17, 90))):
        name = f"{colour}.{'jpg' if kind == 'JPEG' else 'png'}"
        (folder / name).write_bytes(plain_image(colour, kind, size))


def write_models(root: Path) -> None:
    """Write the classifier `colours`, a slow one, one more, and two models of tensors."""
    make_bundle(root, "colours")
    make_bundle(root, "slow", slow=True)
    make_bundle(root, "other")
    kinds = [
        (helper.make_node("Identity", [kind], [f"{kind}_out"]), kind, element) for kind, element in _ELEMENTS.items()
    ]
    write_graph(
        root / "kinds" / "1",
        [node for node, _, _ in kinds],
        [helper.make_tensor_value_info(kind, element, ["N", 2]) for _, kind, element in kinds],
        [helper.make_tensor_value_info(f"{kind}_out", element, ["N", 2]) for _, kind, element in kinds],
    )
    write_graph(
        root / "pair" / "1",
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in ("a", "b")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in ("sum", "difference")],
    )


def write_graph(directory: Path, nodes: list, inputs: list, outputs: list) -> None:
    graph = helper.make_graph(nodes, directory.parent.name, inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    directory.mkdir(parents=True)
    onnx.save(model, directory / "model.onnx")
