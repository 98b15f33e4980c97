"""Sessions: which provider runs a graph, with how many threads, and whether it is the one that was asked for.

Owns every ONNX Runtime option. Knows nothing of batches, requests or where models come from; a session is used by
one thread only, the one that the batcher gives it.
"""

import math
import threading
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from app import runtime
from app.errors import BundleError, SettingsError
from app.manifest import ENERGY_NAME, INPUT_NAME, OUTPUT_NAME
from app.tensors import VARIABLE, Array, TensorSpec, datatype_of

Device = Literal["auto", "cpu", "cuda"]

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

# Creating two sessions on one GPU at once has crashed (onnxruntime issue 26610).
_creation = threading.Lock()


class Session(Protocol):
    """A loaded graph."""

    provider: str
    """`cpu` or `cuda`: where the graph really runs."""

    def run(self, *inputs: Array) -> tuple[Array, ...]:
        """Turn the graph's inputs, in its order, into its outputs, in its order."""
        ...


class OnnxSession:
    """An ONNX Runtime session over any graph of tensors.

    Attributes:
        provider: `cpu` or `cuda`.
        inputs, outputs: what the graph takes and gives, in its order.
    """

    def __init__(self, path: Path, device: Device, threads: int) -> None:
        """Load the graph at `path`.

        Raises:
            BundleError: the file is not a graph that ONNX Runtime can load, or takes or gives more than tensors.
            SettingsError: `device` is cuda and the graph does not run there.
        """
        with _creation:
            self._session = _create(path, device, threads)
        self.provider = "cuda" if CUDA in self._session.get_providers() else "cpu"
        if device == "cuda" and self.provider != "cuda":
            raise SettingsError("device is cuda, but ONNX Runtime gave a session on the CPU: no CUDA device is usable.")
        self.inputs = _specs(self._session.get_inputs(), path)
        self.outputs = _specs(self._session.get_outputs(), path)
        self.symbols = tuple(tuple(node.shape) for node in self._session.get_inputs())
        """The inputs' dimensions as the graph names them: a number, or the name of a variable one."""
        self._input_names = [spec.name for spec in self.inputs]
        self._output_names = [spec.name for spec in self.outputs]
        self._options = runtime.load().RunOptions()
        # Else every row that a graph does not take is a line on standard error too, in colours; the error says it.
        self._options.log_severity_level = 4

    def run(self, *inputs: Array) -> tuple[Array, ...]:
        """Turn the graph's inputs into its outputs, both in its order."""
        fed = dict(zip(self._input_names, inputs, strict=True))
        return tuple(self._session.run(self._output_names, fed, self._options))


class ClassifierSession(OnnxSession):
    """A session over a bundle's graph: uint8 `[n, height, width, 3]` to float32 probabilities `[n, classes]`."""

    def __init__(self, path: Path, device: Device, threads: int) -> None:
        """Load the graph at `path`.

        Raises:
            BundleError: the file is not a graph that ONNX Runtime can load, or lacks the bundle's input or output.
            SettingsError: `device` is cuda and the graph does not run there.
        """
        super().__init__(path, device, threads)
        _expect(self.inputs, INPUT_NAME, "UINT8", path)
        # Nobody asks for the energy yet. It is computed all the same: at most 1 µs of 98 with the smallest network.
        self.outputs = tuple(spec for spec in self.outputs if spec.name != ENERGY_NAME)
        _expect(self.outputs, OUTPUT_NAME, "FP32", path)
        self._output_names = [OUTPUT_NAME]

    def run(self, *inputs: Array) -> tuple[Array, ...]:
        """Turn uint8 `[n, height, width, 3]` into float32 probabilities `[n, classes]`.

        Raises:
            ValueError: a probability is no number.
        """
        outputs = super().run(*inputs)
        if not math.isfinite(outputs[0].sum()):
            raise ValueError("it gave an answer that is no number")
        return outputs

    def classify(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Do what `run` does, as callers without a batcher want it."""
        return cast(NDArray[np.float32], self.run(pixels)[0])


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


def _specs(nodes: list[Any], path: Path) -> tuple[TensorSpec, ...]:
    specs = []
    for node in nodes:
        datatype = datatype_of(node.type)
        if datatype is None:
            raise BundleError(f"{path}: '{node.name}' is a {node.type}, which cannot travel as a tensor.")
        shape = tuple(size if isinstance(size, int) and size >= 0 else VARIABLE for size in node.shape)
        specs.append(TensorSpec(node.name, datatype, shape))
    return tuple(specs)


def _expect(specs: tuple[TensorSpec, ...], name: str, datatype: str, path: Path) -> None:
    """Raise BundleError unless there is exactly one tensor, with this name and datatype."""
    if len(specs) != 1 or (specs[0].name, specs[0].datatype) != (name, datatype):
        found = ", ".join(f"{spec.name}: {spec.datatype}{list(spec.shape)}" for spec in specs)
        raise BundleError(f"{path} should have one '{name}' of {datatype}, but has {found}.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
