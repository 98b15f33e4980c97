"""The structure that ARCHITECTURE.md draws, held against the code's imports."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each room and the floor it is on: a module may import only from lower floors, or from its own package.
FLOORS = {
    "app.cli": 14,
    "app.workers": 13,
    "app.bench": 13,
    "app.processes": 12,
    "app.server": 11,
    "app.service": 10,
    "app.terminal": 10,
    "app.grpc": 9,
    "app.remote": 10,
    "app.http": 9,
    "app.offline": 9,
    "app.v2": 8,
    "app.engine": 7,
    "app.tickets": 6,
    "app.admission": 5,
    "app.deadlines": 0,
    "app.operations": 7,
    "app.repository": 6,
    "app.versions": 2,
    "app.board": 1,
    "app.loading": 5,
    "app.batcher": 4,
    "app.line": 3,
    "app.runs": 2,
    "app.batchable": 4,
    "app.sessions": 3,
    "app.accept": 3,
    "app.tls": 2,
    "app.probes": 3,
    "app.golden": 4,
    "app.gone": 3,
    "app.images": 2,
    "app.journal": 3,
    "app.keys": 1,
    "app.manifest": 1,
    "app.drift": 3,
    "app.families": 1,
    "app.gpu": 3,
    "app.binding": 2,
    "app.cuda": 0,
    "app.metrics": 2,
    "app.vitals": 6,
    "app.cluster": 8,
    "app.pages": 0,
    "app.plugins": 2,
    "app.progress": 0,
    "app.runtime": 1,
    "app.scores": 1,
    "app.settings": 1,
    "app.cpus": 0,
    "app.jpeg": 0,
    "app.logs": 0,
    "app.tensorrt": 2,
    "app.tensors": 0,
    "app.tracing": 1,
    "app.otlp": 2,
    "app.trust": 0,
    "app.errors": 0,
    "app.watch": 0,
    "app": 0,
}
PACKAGES = ("app.bench", "app.cluster", "app.grpc", "app.http", "app.v2")
TRAINING_MAY_IMPORT = {
    "app",
    "app.cpus",
    "app.errors",
    "app.golden",
    "app.images",
    "app.manifest",
    "app.runtime",
    "app.trust",
}


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Return the modules of this project and the top-level names of others that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        else:
            continue
        found.update(name for name in names if name.split(".")[0] not in ("app", "convoy", "training"))
        found.update(name for name in names if name in ALL)
    return found


ALL = modules("app") | modules("convoy") | modules("training")


def room(module: str) -> str:
    return next((package for package in PACKAGES if module.startswith(package)), module)


def floor(module: str) -> int:
    assert room(module) in FLOORS, f"{module} has no floor: add it to the test and to ARCHITECTURE.md"
    return FLOORS[room(module)]


@pytest.mark.parametrize("module", modules("app"))
def test_imports_go_down(module):
    for imported in imports(ALL[module]) & set(modules("app")):
        if room(imported) != room(module):
            assert floor(imported) < floor(module), f"{module} imports {imported}, which is not below it"


@pytest.mark.parametrize("module", modules("app"))
def test_app_never_imports_training_or_torch(module):
    tops = {name.split(".")[0] for name in imports(ALL[module])}
    drawing = {"matplotlib"} if module == "app.bench.pictures" else set()
    assert not tops & {"torch", "training", "onnx", "matplotlib"} - drawing


@pytest.mark.parametrize("module", modules("training"))
def test_training_uses_only_the_shared_rooms_of_app(module):
    used = {name for name in imports(ALL[module]) if name in modules("app")}
    assert used <= TRAINING_MAY_IMPORT


@pytest.mark.parametrize("module", modules("convoy"))
def test_the_client_stands_alone(module):
    """It goes into programs that have nothing of the service: httpx is all it may bring along."""
    imported = imports(ALL[module])
    assert not {name for name in imported if name in modules("app") or name in modules("training")}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names | {"convoy", "httpx", "numpy", "PIL"}
    assert "httpx" not in imported or module in ("convoy.aio", "convoy.client", "convoy.wire")


@pytest.mark.parametrize("module", modules("app"))
def test_only_one_room_asks_a_service_through_the_client(module):
    assert not imports(ALL[module]) & set(modules("convoy")) or module == "app.remote"


@pytest.mark.parametrize("module", ALL)
def test_only_one_room_imports_onnx_runtime(module):
    of_the_runtime = {name for name in imports(ALL[module]) if name.split(".")[0] == "onnxruntime"}
    tools = {
        name for name in of_the_runtime if name.startswith(("onnxruntime.quantization", "onnxruntime.transformers"))
    }
    assert not of_the_runtime - (tools if module.startswith("training.compress.") else set()) or module == "app.runtime"


def test_this_test_sees_a_wrong_import(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def late():\n    from app.http import errors\n    import torch\n")
    assert imports(wrong) == {"app.http", "app.http.errors", "torch"}
    assert floor("app.http.errors") > floor("app.batcher")


PROBE = """
import importlib, json, logging, os, sys, threading
def state():
    files = len(os.listdir("/proc/self/fd"))
    return {"threads": threading.active_count(), "environment": dict(os.environ), "files": files}
before = state()
for module in %s:
    importlib.import_module(module)
after = state()
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "handlers": len(logging.getLogger().handlers),
    "heavy": sorted(name for name in ("torch", "onnxruntime", "training", "matplotlib", "onnx") if name in sys.modules),
    "written": sorted(os.listdir(".")),
}))
"""


def test_nothing_happens_at_import(tmp_path):
    """Importing every module of app starts no thread, opens no file, changes no environment, loads no runtime."""
    names = [name for name in modules("app") if name != "app.__main__"]
    result = subprocess.run(
        [sys.executable, "-c", PROBE % names],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == {"changed": [], "handlers": 0, "heavy": [], "written": []}


def test_importing_the_client_is_light(tmp_path):
    code = "import convoy, json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(result.stdout))
    assert {"convoy", "httpx"} <= loaded
    assert not loaded & {"app", "training", "numpy", "PIL", "pydantic", "fastapi", "starlette", "onnxruntime", "torch"}


def test_serving_never_loads_torch_or_training(server):
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in maps, "the method does not see loaded libraries"
    assert "torch" not in maps
