"""TensorRT: what ONNX Runtime is told, so that an engine is built before any request, for all batches.

Owns the provider's options and finds its libraries. Knows nothing of bundles, batches or requests; `sessions.py` alone
asks. Options: https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
"""

import ctypes
import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.errors import BundleError, SettingsError
from app.manifest import sha256_of

PROVIDER = "TensorrtExecutionProvider"
LIBRARIES = ("libnvinfer.so.10", "libnvonnxparser.so.10")
"""What the provider of onnxruntime-gpu 1.31 is linked with, beside CUDA and cuDNN (`readelf -d`); in this order."""
PACKAGE = "tensorrt_libs"
"""Where pip puts them (`tensorrt-cu13-libs`), which no loader searches."""

TF32_VARIABLE = "NVIDIA_TF32_OVERRIDE"

Shape = Sequence[int | str | None]
"""A graph's input as ONNX Runtime has it: a number, or the name of a variable dimension."""


@dataclass(frozen=True, slots=True)
class Engines:
    """How engines are built.

    Attributes:
        rows: the first dimension goes up to this. More rows in a run would build another engine while a client waits.
        cache: directory that keeps what was built; empty: every session of every start builds anew. Whoever can write
            there can run code here: engines are native programs.
        fp16: let layers compute in half precision. The golden answers must still come out.
    """

    rows: int = 1
    cache: str = ""
    fp16: bool = False

    def at_least(self, rows: int) -> "Engines":
        """Return the same for so many rows, or more."""
        return dataclasses.replace(self, rows=max(rows, self.rows))


def forbid_tf32() -> None:
    """Have NVIDIA's libraries compute float32 products in full, which TensorRT has no option for here.

    They look once, when they are loaded. https://docs.nvidia.com/deeplearning/tensorrt/ (NVIDIA_TF32_OVERRIDE)
    """
    os.environ.setdefault(TF32_VARIABLE, "0")


def load_libraries() -> int:
    """Load TensorRT into the process, where the provider then finds it by name, and return its version: 101601.

    Raises:
        SettingsError: a library is not there, or needs one that is not.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    loaded = [_load(name, places) for name in LIBRARIES]
    version: int = loaded[0].getInferLibVersion()
    return version


def options(path: Path, inputs: Sequence[tuple[str, Shape]], engines: Engines, versions: str) -> dict[str, str]:
    """Return the provider's options for one graph.

    Args:
        path: the graph's file.
        inputs: its inputs' names and shapes.
        engines: how they are built.
        versions: of ONNX Runtime and TensorRT, for which alone a kept engine is good. The kind of GPU is in the names
            that the provider gives its files.

    Raises:
        BundleError: a dimension besides the first varies, so that no engine can be built before a request tells it.
    """
    variable = [(name, shape) for name, shape in inputs if not all(isinstance(size, int) for size in shape)]
    for name, shape in variable:
        if not all(isinstance(size, int) for size in shape[1:]):
            raise BundleError(
                f"{path}: '{name}' varies in more than its first dimension ({list(shape)}), so no TensorRT engine can "
                "be built before requests come: serve it with device cuda."
            )
    found = {"trt_fp16_enable": f"{engines.fp16:d}"}
    if variable:
        # Most requests of a loaded service run in full batches: kernels are chosen for those.
        for bound, rows in (("min", 1), ("opt", engines.rows), ("max", engines.rows)):
            found[f"trt_profile_{bound}_shapes"] = ",".join(_shape(name, rows, shape) for name, shape in variable)
    if engines.cache:
        # The provider's names for engines do not tell two trainings of one network apart, so a digest must.
        kept = Path(engines.cache) / versions
        engine = f"{_digest(path.parent)[:16]}-{engines.rows}{'-fp16' if engines.fp16 else ''}"
        found |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": f"{kept / engine}",
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": f"{kept}",
        }
    return found


def make_room(found: dict[str, str]) -> None:
    """Make the directory that the options name, if they do.

    Raises:
        SettingsError: it cannot be written to; a build of minutes would be for nothing.
    """
    if "trt_engine_cache_path" not in found:
        return
    directory = Path(found["trt_engine_cache_path"])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise SettingsError(f"tensorrt_cache: {directory} cannot be written to: {error.strerror}.") from error


@contextmanager
def building(found: Mapping[str, str]) -> Iterator[None]:
    """Let no other process build or read the same engine for the length of a block; blocks until it is this one's turn.

    Args:
        found: the provider's options, whose directory is there: see `make_room`.
    """
    if "trt_engine_cache_path" not in found:
        yield
        return
    with (Path(found["trt_engine_cache_path"]) / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(name: str, places: Sequence[Path]) -> ctypes.CDLL:
    found = next((place / name for place in places if (place / name).exists()), None)
    try:
        return ctypes.CDLL(str(found or name), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise SettingsError(
            f"device is tensorrt, but TensorRT 10 is not here ({error}): install tensorrt-cu13-libs below 11, or use "
            "device cuda."
        ) from error


def _shape(name: str, rows: int, shape: Shape) -> str:
    return f"{name}:" + "x".join(map(str, (rows, *shape[1:])))


def _digest(directory: Path) -> str:
    """Return a digest of every file in a directory: weights may lie beside their graph."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
