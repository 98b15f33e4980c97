"""INT8: static quantisation of a graph by ONNX Runtime's own tools, weights per channel, ranges from real images.

Owns the choice of what is quantised and how. Activations are uint8, weights int8 in 7 bits: two products of 255 and 64
sum to 32,640, which fits into 16 bits, so processors without VNNI, which add such pairs in 16 bits, cannot saturate
and answer bit for bit as those with it (of 8-bit weights, an emulated Haswell's answers were up to 0.65 away in a
probability; of 7-bit weights, 0). Pixels' normalisation and what makes probabilities of logits stay in float32.
Knows nothing of bundles, labels or bounds.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from app import runtime
from app.golden import Run
from app.manifest import INPUT_NAME, OUTPUT_NAME
from training.classifiers import in_batches, onnx_run
from training.errors import CompressError
from training.graphs.ending import plain
from training.graphs.parts import WEIGHTED, around_network, name_nodes, weighted_nodes
from training.progress import counting

Method = Literal["minmax", "entropy", "percentile"]
AUTO: tuple[Method, ...] = ("minmax", "percentile")
"""Of the two the better. Entropy was behind on both models, by divergences of 0.14 and 1.6 nats against 0.001 and 0.04,
and takes minutes."""
QUANTISED = (
    *WEIGHTED,
    *("Add", "Concat", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Pad"),
)
"""Operators that compute on, or pass on, 8-bit numbers; all others, as Gelu and Softmax, compute in float32."""
RUN_BATCH = 10
"""The calibrators keep every activation of a batch in memory: 30 MB an image for a 224×224 network."""
ENTROPY_BINS = {"num_bins": 512, "num_quantized_bins": 128}
"""With the tools' own 128 bins nothing can be cut off: the ranges are min-max's."""
PERCENTILE = {"percentile": 99.99, "symmetric": False}
SENSITIVITY_IMAGES = 64


@dataclass(frozen=True, slots=True)
class Attempt:
    """A quantised graph that was tried."""

    path: Path
    method: Method
    in_float: tuple[str, ...]
    """Nodes that stayed in float32 for the sake of accuracy."""
    divergence: float
    """Mean Kullback-Leibler divergence of its answers from the parent's on the calibration images, nats."""


class Quantiser:
    """One parent graph and its calibration images; ranges are measured once a method, attempts are cheap.

    A temperature that the graph has is left out: the child gets one of its own.
    """

    def __init__(self, model: Path, images: NDArray[np.uint8], folder: Path) -> None:
        """Take an ONNX file, images uint8 `[n, height, width, 3]` without labels, and a folder for what is tried.

        Raises:
            CompressError: the graph has been quantised before, or has nothing to quantise.
        """
        graph = plain(onnx.load(model))
        if any(node.op_type == "DequantizeLinear" for node in graph.graph.node):
            raise CompressError(f"{model} is quantised already: give the bundle that it was made of.")
        if not weighted_nodes(graph):
            raise CompressError(f"{model} has no float32 convolution or dense layer to quantise.")
        self._images, self._folder = images, folder
        untempered = folder / "untempered.onnx"
        onnx.save(graph, untempered)
        self._expected = in_batches(onnx_run(untempered), images, RUN_BATCH)
        self._prepared = self._prepare(untempered)
        prepared = onnx.load(self._prepared)
        self._weighted = [node.name for node in weighted_nodes(prepared)]
        self._never = sorted(around_network(prepared) | _sums_with_constants(prepared))

    def attempt(self, method: Method, in_float: Sequence[str] = ()) -> Attempt:
        """Quantise all but some nodes with the ranges of one method."""
        path = self._folder / f"{method}-{len(in_float)}.onnx"
        self._quantise(path, method, in_float)
        return Attempt(path, method, tuple(in_float), self._divergence(path, self._images, self._expected))

    def best(self, methods: Sequence[Method] = AUTO) -> Attempt:
        """Quantise by each method, and return what stays nearest to the parent's answers."""
        return min((self.attempt(method) for method in methods), key=lambda attempt: attempt.divergence)

    def gentler(self, attempt: Attempt) -> Iterator[Attempt]:
        """Yield attempts that keep ever more layers in float32, those first whose quantisation costs most.

        How much a layer costs is how much nearer the answers come when it alone is kept in float32. First one layer,
        then twice as many each time, at most half of them: beyond that there is little to gain by INT8.
        """
        order = self._by_sensitivity(attempt)
        count = 1
        while count <= len(order) // 2:
            yield self.attempt(attempt.method, order[:count])
            count *= 2

    def _by_sensitivity(self, attempt: Attempt) -> list[str]:
        few = np.linspace(0, len(self._images) - 1, min(SENSITIVITY_IMAGES, len(self._images))).round().astype(int)
        images, expected = self._images[few], self._expected[few]
        divergences: dict[str, float] = {}
        path = self._folder / "all-but-one.onnx"
        with counting("Sensitivity", len(self._weighted)) as advance:
            for name in self._weighted:
                self._quantise(path, attempt.method, [name])
                divergences[name] = self._divergence(path, images, expected)
                advance(1)
        return sorted(divergences, key=lambda name: divergences[name])

    def _prepare(self, model: Path) -> Path:
        """Fold constants and infer shapes, as the tools ask for."""
        prepared = self._folder / "prepared.onnx"
        runtime.tool("quantization.shape_inference").quant_pre_process(
            str(model), str(prepared), skip_symbolic_shape=True
        )
        named = onnx.load(prepared)
        name_nodes(named)
        onnx.save(named, prepared)
        return prepared

    def _quantise(self, into: Path, method: Method, in_float: Sequence[str]) -> None:
        tools = runtime.tool("quantization")
        with _quiet():
            tools.quantize_static(
                str(self._prepared),
                str(into),
                op_types_to_quantize=list(QUANTISED),
                per_channel=True,
                reduce_range=True,
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
                nodes_to_exclude=[*self._never, *in_float],
                calibrate_method=_method(method),
                calibration_cache_path=self._ranges(method),
                # Logits in 8 bits would be steps of a tenth, and more.
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
            )
        graph = onnx.load(into)
        del graph.metadata_props[:]
        del graph.graph.value_info[:]
        onnx.save(graph, into)

    def _ranges(self, method: Method) -> Path:
        """Measure the range of every activation on the images, once, and return the file that holds them."""
        path = self._folder / f"{method}.json"
        if path.is_file():
            return path
        tools = runtime.tool("quantization.calibrate")
        extra: dict[Method, dict[str, Any]] = {"minmax": {}, "entropy": ENTROPY_BINS, "percentile": PERCENTILE}
        with _quiet(), counting(f"Calibrating ({method})", len(self._images)) as advance:
            calibrator = tools.create_calibrator(
                self._prepared,
                list(QUANTISED),
                augmented_model_path=str(self._folder / f"{method}-augmented.onnx"),
                calibrate_method=_method(method),
                extra_options=extra[method],
            )
            for at in range(0, len(self._images), RUN_BATCH):
                batch = np.ascontiguousarray(self._images[at : at + RUN_BATCH])
                calibrator.collect_data(_Once({INPUT_NAME: batch}))
                advance(len(batch))
            tools.save_tensors_data(calibrator.compute_data(), path)
        return path

    @staticmethod
    def _divergence(path: Path, images: NDArray[np.uint8], expected: NDArray[np.float32]) -> float:
        return divergence(expected, in_batches(onnx_run(path), images, RUN_BATCH))


class _Once:
    """The tools' data reader, for one batch."""

    def __init__(self, feed: dict[str, NDArray[np.uint8]]) -> None:
        self._feeds = [feed]

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return self._feeds.pop() if self._feeds else None


def divergence(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return the mean Kullback-Leibler divergence of rows `found` from rows `expected`, float32 `[n, classes]`, nats.

    Finer than accuracy: every image tells of it, not only those near a border between classes.
    """
    tiny = np.finfo(np.float32).tiny
    p, q = expected.astype(np.float64).clip(tiny), found.astype(np.float64).clip(tiny)
    return float((p * (np.log(p) - np.log(q))).sum(axis=1).mean())


def in_float_arithmetic(model: Path) -> Run:
    """Return the function that classifies by the quantised graph as it is written: 8-bit numbers, float32 arithmetic.

    The runtime's optimisation replaces this by integer kernels, which round at other places; so does any other
    provider. How far the two are apart is how far an honest implementation may be.
    """
    ort = runtime.load()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run([OUTPUT_NAME], {INPUT_NAME: images})[0]
        return found

    return run


def _sums_with_constants(model: onnx.ModelProto) -> set[str]:
    """Name the sums that are part of an activation, as in Gelu; a sum of two tensors joins two ways and is worth it."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return {node.name for node in model.graph.node if node.op_type == "Add" and constants.intersection(node.input)}


def _method(name: Method) -> Any:
    return runtime.tool("quantization").CalibrationMethod[
        {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}[name]
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tools' own progress, which they print."""
    with redirect_stdout(io.StringIO()):
        yield
