"""Sessions: which provider runs a graph, with how many threads, and whether it is the one that was asked for.

Owns every ONNX Runtime option. Knows nothing of batches, requests or where models come from; a session is used by
one thread only, the one that the batcher gives it.
"""

import threading
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from app import runtime
from app.errors import BundleError, SettingsError
from app.manifest import INPUT_NAME, OUTPUT_NAME

Device = Literal["auto", "cpu", "cuda"]

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

# Creating two sessions on one GPU at once has crashed (onnxruntime issue 26610).
_creation = threading.Lock()


class Session(Protocol):
    """A loaded graph that turns pixels into probabilities."""

    provider: str
    """`cpu` or `cuda`: where the graph really runs."""

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turn uint8 `[n, height, width, 3]` into float32 probabilities `[n, classes]`."""
        ...


class OnnxSession:
    """An ONNX Runtime session over a bundle's graph."""

    def __init__(self, path: Path, device: Device, threads: int) -> None:
        """Load the graph at `path`.

        Raises:
            BundleError: the file is not a graph that ONNX Runtime can load, or lacks the bundle's input or output.
            SettingsError: `device` is cuda and the graph does not run there.
        """
        with _creation:
            self._session = _create(path, device, threads)
        self.provider = "cuda" if CUDA in self._session.get_providers() else "cpu"
        if device == "cuda" and self.provider != "cuda":
            raise SettingsError("device is cuda, but ONNX Runtime gave a session on the CPU: no CUDA device is usable.")
        self.input_shape = _signature(self._session.get_inputs(), INPUT_NAME, "tensor(uint8)", path)
        self.output_shape = _signature(self._session.get_outputs(), OUTPUT_NAME, "tensor(float)", path)

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turn uint8 `[n, height, width, 3]` into float32 probabilities `[n, classes]`."""
        probabilities: NDArray[np.float32] = self._session.run([OUTPUT_NAME], {INPUT_NAME: pixels})[0]
        return probabilities


def _create(path: Path, device: Device, threads: int) -> Any:
    ort = runtime.load()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would take the processor from the event loop and the decoders, and burn a container's quota.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = _providers(ort, device)
    if device == "cuda":
        # Without this key ONNX Runtime falls back to the CPU in silence; with it, naming the CPU provider is an error.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if CUDA in providers:
        ort.preload_dlls()
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime raises a dozen unrelated classes, some straight from pybind11
        if device == "cuda":
            raise SettingsError(f"device is cuda, but {path} does not run on it: {_first_line(error)}") from error
        raise BundleError(f"{path} is not a graph that ONNX Runtime can load: {_first_line(error)}") from error


def _providers(ort: Any, device: Device) -> list[str]:
    available = CUDA in ort.get_available_providers()
    match device:
        case "cuda":
            if not available:
                raise SettingsError("device is cuda, but this ONNX Runtime has no CUDA: install convoy-serve[gpu].")
            return [CUDA]
        case "auto" if available:
            return [CUDA, CPU]
        case _:
            return [CPU]


def _signature(nodes: list[Any], name: str, kind: str, path: Path) -> list[int | str | None]:
    """Return the shape of the graph's one input or output called `name`, or raise BundleError."""
    found = ", ".join(f"{node.name}: {node.type}{node.shape}" for node in nodes)
    if len(nodes) != 1 or nodes[0].name != name or nodes[0].type != kind:
        raise BundleError(f"{path} should have one '{name}' of {kind}, but has {found}.")
    shape: list[int | str | None] = nodes[0].shape
    return shape


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
