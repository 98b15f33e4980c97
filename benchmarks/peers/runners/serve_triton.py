"""Triton: writes its model repository, then becomes the `tritonserver` that the nvidia-pytriton wheel carries.

The wheel has the Python backend and no other. A request's body is the image itself (a raw binary request: one BYTES
input, `Inference-Header-Content-Length: 0`), the cheapest form that Triton takes over HTTP.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from task import HOST, SHARED_PREFIX, Task, read_task

RUNNERS = Path(__file__).resolve().parent
CONFIG = """
name: "classifier"
backend: "python"
max_batch_size: {batch}
input [{{ name: "image" data_type: TYPE_STRING dims: [1] }}]
output [{{ name: "answer" data_type: TYPE_STRING dims: [1] }}]
instance_group [{{ count: {workers} kind: KIND_CPU }}]
dynamic_batching {{ max_queue_delay_microseconds: {wait_us} }}
"""


def main() -> None:
    task = read_task()
    # Under the driver's own folder for temporary files, which it removes.
    scratch = Path(tempfile.mkdtemp(prefix="triton-"))
    package = wheel()
    command = [
        str(package / "tritonserver/bin/tritonserver"),
        f"--model-repository={repository(scratch, task)}",
        f"--backend-directory={backends(scratch, package / 'tritonserver')}",
        f"--http-address={HOST}",
        f"--http-port={task.port}",
        *([f"--http-thread-count={task.fronts}"] if task.fronts else []),
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--exit-timeout-secs=2",
        "--log-info=false",
        f"--backend-config=python,shm-region-prefix-name={SHARED_PREFIX}{os.getpid()}-",
    ]
    os.execve(command[0], command, environment(package))


def wheel() -> Path:
    """Find the wheel's folder without importing it, which would start what is not needed here."""
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        raise SystemExit("nvidia-pytriton is not installed in this environment.")
    return Path(found.origin).parent


def repository(scratch: Path, task: Task) -> Path:
    version = scratch / "models/classifier/1"
    version.mkdir(parents=True)
    for source, name in (("triton_model.py", "model.py"), ("classifier.py", "classifier.py"), ("task.py", "task.py")):
        shutil.copyfile(RUNNERS / source, version / name)
    config = CONFIG.format(batch=task.batch, workers=task.workers, wait_us=round(task.wait_ms * 1000))
    (version.parent / "config.pbtxt").write_text(config)
    return scratch / "models"


def backends(scratch: Path, server: Path) -> Path:
    """Lay the Python backend beside the stub for this version of Python, as it wants them."""
    target = scratch / "backends/python"
    shutil.copytree(server / "backends/python", target)
    stub = server / f"python_backend_stubs/{sys.version_info.major}.{sys.version_info.minor}/triton_python_backend_stub"
    if not stub.is_file():
        raise SystemExit(f"nvidia-pytriton has no stub for Python {sys.version_info.major}.{sys.version_info.minor}.")
    shutil.copy(stub, target)
    return target.parent


def environment(package: Path) -> dict[str, str]:
    """Libraries of the wheel and of this Python.

    The Python inside the stub finds this environment's packages by PATH; it takes no notice of PYTHONPATH, and finds
    Convoy's decoder because the driver's working directory is the repository.
    """
    bundled = package / "tritonserver/external_libs"
    if not bundled.is_dir():
        bundled = package.parent / "nvidia_pytriton.libs"
    libraries = [str(bundled), sysconfig.get_config_var("LIBDIR")]
    return os.environ | {
        "LD_LIBRARY_PATH": ":".join([*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


if __name__ == "__main__":
    main()
