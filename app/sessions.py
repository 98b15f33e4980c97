"""Sessions: which provider runs a graph, with how many threads, and whether it is the one that was asked for.

Owns every ONNX Runtime option. Knows nothing of batches, requests or where models come from; a session is used by
one thread only, the one that the batcher gives it.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from app import cuda, plugins, runtime, tensorrt
from app.binding import GRAPH_ID, Bound, can_bind
from app.errors import BundleError, DeviceLostError, SettingsError
from app.manifest import ENERGY_NAME, INPUT_NAME, OUTPUT_NAME
from app.plugins import Hardware, Plugin
from app.tensors import VARIABLE, Array, TensorSpec, datatype_of

Device = Literal["auto", "cpu", "cuda", "tensorrt"]

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

_alone = threading.Lock()
"""Held while a session is made, for two at once on one GPU have crashed (onnxruntime issue 26610), and while launches
are recorded or replayed: a recording is spoilt when any other thread of the process asks CUDA for memory meanwhile."""


def place(device: Device | Literal["plugin"], library: str, hardware: Hardware, options: str) -> Device | Plugin:
    """Return where sessions are to run, as settings say it.

    Raises:
        SettingsError: it is to be a plug-in, and which one is not said, or not how.
    """
    return Plugin.parse(library, hardware, options) if device == "plugin" else device


class Session(Protocol):
    """A loaded graph."""

    provider: str
    """`cpu`, `cuda`, `tensorrt` or a plug-in's name: where the graph really runs."""

    def run(self, *inputs: Array) -> tuple[Array, ...]:
        """Turn the graph's inputs, in its order, into its outputs, in its order.

        Raises:
            DeviceLostError: this process cannot use the device any more.
        """
        ...

    def join(self, parts: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        """Return the rows of several requests one after the other, for `run`: an array per input."""
        ...

    def padding(self, rows: int) -> int:
        """Return how many rows a run of so many is filled up with."""
        ...

    def copied_s(self) -> float:
        """Return the time that went into copying rows and scores since this was last asked, seconds."""
        ...


class PlainSession:
    """What every session does that has no buffers of its own."""

    _copied_s = 0.0

    def join(self, parts: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        """See `Session.join`."""
        started = time.perf_counter()
        joined = tuple([np.concatenate(arrays) for arrays in zip(*parts, strict=True)])
        self._copied_s += time.perf_counter() - started
        return joined

    def padding(self, rows: int) -> int:
        """See `Session.padding`."""
        return 0

    def copied_s(self) -> float:
        """See `Session.copied_s`."""
        seconds, self._copied_s = self._copied_s, 0.0
        return seconds


class OnnxSession(PlainSession):
    """An ONNX Runtime session over any graph of tensors.

    Attributes:
        provider: `cpu`, `cuda`, `tensorrt` or a plug-in's name; what TensorRT does not know runs in CUDA.
        inputs, outputs: what the graph takes and gives, in its order.
    """

    def __init__(
        self,
        path: Path,
        device: Device | Plugin,
        threads: int,
        engines: tensorrt.Engines | None = None,
        gpu: cuda.Cuda | None = None,
    ) -> None:
        """Load the graph at `path`; with TensorRT that takes minutes, unless its engine was kept.

        Args:
            path: the graph's file.
            device: where it shall run.
            threads: inside the session.
            engines: how TensorRT's are built, if that is the device; None: for single rows, and not kept.
            gpu: how it runs in CUDA, if it does.

        Raises:
            BundleError: the file is not a graph that ONNX Runtime can load, or takes or gives more than tensors.
            SettingsError: `device` is cuda, tensorrt or a plug-in, and the graph does not run there.
        """
        with _alone:
            self._session = _create(path, device, threads, engines or tensorrt.Engines(), gpu or cuda.Cuda())
        self.provider = plugins.name_of(self._session.get_providers()[0])
        wanted = plugins.name_of(plugins.device_of(device).ep_name) if isinstance(device, Plugin) else device
        if _is_strict(device) and self.provider != wanted:
            raise SettingsError(
                f"device is {_told(device)}, but ONNX Runtime gave a session in {self.provider}: no such device is "
                "usable."
            )
        self.inputs = _specs(self._session.get_inputs(), path)
        self.outputs = _specs(self._session.get_outputs(), path)
        self.symbols = tuple(tuple(node.shape) for node in self._session.get_inputs())
        """The inputs' dimensions as the graph names them: a number, or the name of a variable one."""
        self._input_names = [spec.name for spec in self.inputs]
        self._output_names = [spec.name for spec in self.outputs]
        self._options = _run_options()
        self._records = self.provider == "cuda" and gpu is not None and gpu.graphs
        if self._records:
            self._options.add_run_config_entry(GRAPH_ID, "-1")  # what is not bound is not recorded
        self._bound: Bound | None = None

    @property
    def has_variable_inputs(self) -> bool:
        """Whether any dimension of an input is a request's to choose."""
        return any(VARIABLE in spec.shape for spec in self.inputs)

    def bind(self, sizes: Sequence[int]) -> None:
        """On a GPU, run batches of these sizes from now on, out of buffers that stay; rising, the last one the largest.

        Only for a graph whose rows have nothing to do with each other. Where its tensors vary in more than their rows,
        nothing changes.
        """
        if self.provider != "cpu" and can_bind(self.inputs, self.outputs):
            recorded = "cuda" if self._records else ""
            self._bound = Bound(
                self._session, self.inputs, self.outputs, sizes, cuda.pinned, _run_options, recorded=recorded
            )

    def join(self, parts: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        """See `Session.join`."""
        return super().join(parts) if self._bound is None else self._bound.join(parts)

    def padding(self, rows: int) -> int:
        """See `Session.padding`."""
        return 0 if self._bound is None else self._bound.padding(rows)

    def copied_s(self) -> float:
        """See `Session.copied_s`."""
        return super().copied_s() if self._bound is None else self._bound.copied_s()

    def run(self, *inputs: Array) -> tuple[Array, ...]:
        """See `Session.run`."""
        try:
            if self._bound is not None:
                with _alone if self._records else nullcontext():
                    return self._bound.run(*inputs)
            fed = dict(zip(self._input_names, inputs, strict=True))
            return tuple(self._session.run(self._output_names, fed, self._options))
        except Exception as error:
            if self.provider != "cpu" and cuda.is_lost(str(error)):
                raise DeviceLostError(f"The GPU has failed, and this process with it: {_first_line(error)}") from error
            raise


class ClassifierSession(OnnxSession):
    """A session over a bundle's graph: uint8 `[n, height, width, 3]` to float32 probabilities `[n, classes]`."""

    def __init__(
        self,
        path: Path,
        device: Device | Plugin,
        threads: int,
        engines: tensorrt.Engines | None = None,
        gpu: cuda.Cuda | None = None,
    ) -> None:
        """Load the graph at `path`, as any.

        Raises:
            BundleError: the file is not a graph that ONNX Runtime can load, or lacks the bundle's input or output.
            SettingsError: `device` is cuda, tensorrt or a plug-in, and the graph does not run there.
        """
        super().__init__(path, device, threads, engines, gpu)
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


def _run_options() -> Any:
    options = runtime.load().RunOptions()
    # Else every row that a graph does not take is a line on standard error too, in colours; the error says it.
    options.log_severity_level = 4
    return options


def _create(path: Path, device: Device | Plugin, threads: int, engines: tensorrt.Engines, gpu: cuda.Cuda) -> Any:
    ort = runtime.load()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would take the processor from the event loop and the decoders, and burn a container's quota.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if _is_strict(device):
        # Without this key ONNX Runtime falls back to the CPU in silence; with it, naming the CPU provider is an error.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    given = _given(ort, options, path, device, engines, gpu)
    told = given[0][1] if device == "tensorrt" and given is not None else {}
    try:
        # A provider that fails would else be dropped for the next, with no more than words on standard output.
        with tensorrt.building(cast("dict[str, str]", told)):
            return ort.InferenceSession(str(path), options, providers=given, enable_fallback=not _is_strict(device))
    except Exception as error:  # ONNX Runtime raises a dozen unrelated classes, some straight from pybind11
        if _is_strict(device):
            reason = (isinstance(device, str) and cuda.missing_driver()) or _first_line(error)
            raise SettingsError(f"device is {_told(device)}, but {path} does not run on it: {reason}") from error
        raise BundleError(f"{path} is not a graph that ONNX Runtime can load: {_first_line(error)}") from error


def _is_strict(device: Device | Plugin) -> bool:
    """Tell whether a device means itself or nothing."""
    return isinstance(device, Plugin) or device in ("cuda", "tensorrt")


def _told(device: Device | Plugin) -> str:
    return f"plugin {device.library}" if isinstance(device, Plugin) else device


def _given(
    ort: Any, options: Any, path: Path, device: Device | Plugin, engines: tensorrt.Engines, gpu: cuda.Cuda
) -> list[str | tuple[str, dict[str, str]]] | None:
    """Return the providers for a session, each with what it is told; None: the options have a plug-in's device."""
    if isinstance(device, Plugin):
        options.add_provider_for_devices([plugins.device_of(device)], dict(device.options))
        return None
    providers = _providers(ort, device)
    if device == "tensorrt" and not gpu.tf32:
        tensorrt.forbid_tf32()
    if CUDA in providers:
        ort.preload_dlls()
    given: list[str | tuple[str, dict[str, str]]] = list(providers)
    if CUDA in providers:
        # Behind TensorRT it has parts of a graph, and launches are recorded of whole ones.
        own = dataclasses.replace(gpu, graphs=gpu.graphs and device != "tensorrt")
        given[providers.index(CUDA)] = (CUDA, cuda.options(own))
    if device == "tensorrt":
        given[0] = (tensorrt.PROVIDER, _tensorrt_options(ort, path, engines, gpu.tf32))
    return given


def _providers(ort: Any, device: Device) -> list[str]:
    available = ort.get_available_providers()
    match device:
        case "cuda":
            if CUDA not in available:
                raise SettingsError("device is cuda, but this ONNX Runtime has no CUDA: install convoy-serve[gpu].")
            return [CUDA]
        case "tensorrt":
            if tensorrt.PROVIDER not in available:
                raise SettingsError(
                    "device is tensorrt, but this ONNX Runtime has no TensorRT: install convoy-serve[gpu]."
                )
            return [tensorrt.PROVIDER, CUDA]
        case "auto" if CUDA in available:
            return [CUDA, CPU]
        case _:
            return [CPU]


def _tensorrt_options(ort: Any, path: Path, engines: tensorrt.Engines, tf32: bool) -> dict[str, str]:
    """Return the provider's options for a graph, whose inputs a session on the CPU tells, which runs nothing."""
    version = tensorrt.load_libraries()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        inputs = ort.InferenceSession(str(path), options, providers=[CPU]).get_inputs()
    except Exception as error:
        raise BundleError(f"{path} is not a graph that ONNX Runtime can load: {_first_line(error)}") from error
    versions = f"onnxruntime-{ort.__version__}-tensorrt-{version}{'-tf32' if tf32 else ''}"
    found = tensorrt.options(path, [(node.name, node.shape) for node in inputs], engines, versions)
    tensorrt.make_room(found)
    return found


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
