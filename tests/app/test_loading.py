import asyncio
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.errors import BadRequestError, BundleError
from app.loading import LoadedModel, Loader, warm_up
from app.manifest import write_tensor_manifest
from app.metrics import Metrics
from app.sessions import ClassifierSession
from app.tensors import TensorSpec
from tests.bundles import RECIPE, make_bundle


class RecordingSession:
    def __init__(self, provider):
        self.provider = provider
        self.shapes = []

    def run(self, pixels):
        assert pixels.dtype == np.uint8
        self.shapes.append(pixels.shape)
        return (np.zeros((len(pixels), 6), np.float32),)


@pytest.mark.parametrize(
    ("provider", "max_batch", "sizes"),
    [("cpu", 16, [16]), ("cpu", 1, [1]), ("cuda", 16, [1, 2, 4, 8, 16]), ("cuda", 12, [1, 2, 4, 8, 12])],
)
def test_warm_up_runs_what_a_first_request_would_pay_for(tmp_path, provider, max_batch, sizes):
    session = RecordingSession(provider)
    warm_up(make_bundle(tmp_path / "models"), session, max_batch)
    assert session.shapes == [(size, RECIPE.height, RECIPE.width, 3) for size in sizes]


def test_a_classifier_whose_answer_is_no_number_says_so(tmp_path):
    bundle = make_bundle(tmp_path / "models")
    graph = onnx.load(bundle.model_path)
    bias = next(array for array in graph.graph.initializer if array.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(6, np.nan, np.float32), "bias"))
    onnx.save(graph, tmp_path / "nan.onnx")
    session = ClassifierSession(tmp_path / "nan.onnx", "cpu", 1)
    with pytest.raises(ValueError, match="no number"):
        session.run(np.zeros((1, 16, 16, 3), np.uint8))


def graph_of(nodes, inputs, outputs, constants=()) -> onnx.ModelProto:
    kinds = {np.float32: TensorProto.FLOAT, np.int64: TensorProto.INT64, str: TensorProto.STRING}
    graph = helper.make_graph(
        [helper.make_node(kind, taken, given, **attributes) for kind, taken, given, attributes in nodes],
        "graph",
        [helper.make_tensor_value_info(name, kinds[kind], shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, kinds[kind], shape) for name, kind, shape in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def double(first, *rest, last=None) -> onnx.ModelProto:
    shape = [first, *rest]
    return graph_of([("Add", ["x", "x"], ["y"], {})], [("x", np.float32, shape)], [("y", np.float32, last or shape)])


ALONG_TIME = graph_of(
    [("CumSum", ["x", "axis"], ["y"], {})],
    [("x", np.float32, ["T", 3])],
    [("y", np.float32, ["T", 3])],
    [("axis", np.array(0, np.int64))],
)
SUM_OF_ALL = graph_of(
    [("ReduceSum", ["x"], ["y"], {"keepdims": 0})], [("x", np.float32, ["N", 3])], [("y", np.float32, [])]
)
TWO_INPUTS = graph_of(
    [("Add", ["a", "b"], ["y"], {})],
    [("a", np.float32, ["N", 3]), ("b", np.float32, ["N", 3])],
    [("y", np.float32, ["N", 3])],
)
TWO_AXES = graph_of(
    [("MatMul", ["a", "b"], ["y"], {})],
    [("a", np.float32, ["N", 3]), ("b", np.float32, ["M", 3, 3])],
    [("y", np.float32, ["M", "N", 3])],
)
STRINGS = graph_of([("Identity", ["x"], ["y"], {})], [("x", str, ["N", "L"])], [("y", str, ["N", "L"])])


@pytest.mark.parametrize(
    ("graph", "max_batch", "why"),
    [
        (double("N", 3), 16, ""),
        (double("N", "T", 3), 16, ""),
        (TWO_INPUTS, 16, ""),
        (STRINGS, 16, ""),
        (double(1, 3), 1, "rows run one by one"),
        (double(4, 3), 0, "fixed at 4"),
        (ALONG_TIME, 0, "answer differently in 'y' than each alone"),
        (SUM_OF_ALL, 0, "'y' is a single value"),
        (TWO_AXES, 0, "called M and N"),
    ],
)
def test_rows_share_a_run_only_where_that_is_proved(tmp_path, graph, max_batch, why):
    model = load(tmp_path, graph)
    assert model.max_batch == max_batch
    assert why in model.unbatched_why and bool(why) == bool(model.unbatched_why)
    with pytest.raises(BadRequestError, match="takes tensors, not images"):
        model.classifier  # noqa: B018


def test_a_fixed_row_is_announced_as_variable_rows(tmp_path):
    model = load(tmp_path, double(1, 3))
    assert model.inputs == (TensorSpec("x", "FP32", (-1, 3)),)
    assert model.outputs == (TensorSpec("y", "FP32", (-1, 3)),)


def test_golden_tensors_prove_a_model_of_tensors(tmp_path):
    directory = written(tmp_path, double("N", 3))
    rows = np.ones((2, 3), np.float32)
    fields = {"name": "m", "version": "1", "opset": 18, "tolerance": 1e-6}
    write_tensor_manifest(directory, fields, {"in.x": rows, "out.y": 2 * rows})
    assert load_from(directory)[1] == 0.0
    write_tensor_manifest(directory, fields, {"in.x": rows, "out.y": 3 * rows})
    with pytest.raises(BundleError, match="'y' differs by 1, allowed is 1e-06"):
        load_from(directory)
    write_tensor_manifest(directory, fields, {"in.x": rows})
    with pytest.raises(BundleError, match=r"lacks 'out.y'"):
        load_from(directory)
    write_tensor_manifest(directory, fields | {"batching": "never"}, {"in.x": rows, "out.y": 2 * rows})
    assert load_from(directory)[0].max_batch == 0
    (directory / "golden/tensors.npz").write_bytes(b"not an archive")
    with pytest.raises(BundleError, match="is not the file that was exported"):
        load_from(directory)


def written(tmp_path, graph) -> Path:
    directory = tmp_path / "m" / "1"
    directory.mkdir(parents=True)
    onnx.save(graph, directory / "model.onnx")
    return directory


def load(tmp_path, graph) -> LoadedModel:
    return load_from(written(tmp_path, graph))[0]


def load_from(directory: Path) -> tuple[LoadedModel, float | None]:
    loader = Loader(Metrics(), device="cpu", sessions=1, threads_per_session=1, max_batch=16, linger_s=0.0)
    loop = asyncio.new_event_loop()
    try:
        model, difference = loader.load("m", "1", directory, loop)
        model.batcher.close()
    finally:
        loop.close()
    return model, difference
