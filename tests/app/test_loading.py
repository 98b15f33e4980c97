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
from app.service import loader_of
from app.sessions import ClassifierSession
from app.settings import Settings
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
ALL_ROWS = ("axes", np.array([0], np.int64))


def of_sums(kind: str, *taken: str, last: int = 3, **constants: object) -> onnx.ModelProto:
    """Each row's answer is made of the sum of all rows up to it, so rows must never share a run."""
    return graph_of(
        [("CumSum", ["x", "axis"], ["sums"], {}), (kind, ["sums", *taken], ["y"], {})],
        [("x", np.float32, ["N", 3])],
        [("y", np.float32, ["N", last])],
        [("axis", np.array(0, np.int64)), *[(name, np.asarray(value)) for name, value in constants.items()]],
    )


def fair_share(least: int) -> onnx.ModelProto:
    """The difference to the largest of all rows, if that is at least so much."""
    return graph_of(
        [
            ("ReduceMax", ["x", "axes"], ["top"], {}),
            ("Max", ["top", "least"], ["bound"], {}),
            ("Sub", ["x", "bound"], ["y"], {}),
        ],
        [("x", np.int64, ["N", 4])],
        [("y", np.int64, ["N", 4])],
        [ALL_ROWS, ("least", np.array(least, np.int64))],
    )


def classes_of_sums() -> onnx.ModelProto:
    """The largest of 50,000 probabilities is not much above 1/50,000."""
    weights = np.random.default_rng(0).normal(size=(3, 50_000)).astype(np.float32) / 100
    return graph_of(
        [
            ("CumSum", ["x", "axis"], ["sums"], {}),
            ("MatMul", ["sums", "weights"], ["logits"], {}),
            ("Softmax", ["logits"], ["y"], {"axis": -1}),
        ],
        [("x", np.float32, ["N", 3])],
        [("y", np.float32, ["N", 50_000])],
        [("axis", np.array(0, np.int64)), ("weights", weights)],
    )


def first_two_rows() -> onnx.ModelProto:
    """All rows but the first two are 0."""
    return graph_of(
        [
            ("Slice", ["x", "start", "end", "start"], ["kept"], {}),
            ("Shape", ["x"], ["shape"], {}),
            ("Shape", ["kept"], ["shape of kept"], {}),
            ("Sub", ["shape", "shape of kept"], ["missing"], {}),
            ("Concat", ["none", "missing"], ["pads"], {"axis": 0}),
            ("Pad", ["kept", "pads"], ["y"], {}),
        ],
        [("x", np.float32, ["N", 3])],
        [("y", np.float32, ["N", 3])],
        [("start", np.array([0], np.int64)), ("end", np.array([2], np.int64)), ("none", np.array([0, 0], np.int64))],
    )


def embedded(kinds: int) -> onnx.ModelProto:
    """Tokens and their kinds, as BERT takes them: of the latter there are only two, or one."""
    shape, tables = ["N", "L"], (("words", 500), ("kinds", kinds))
    return graph_of(
        [("Gather", ["words", "ids"], ["a"], {}), ("Gather", ["kinds", "types"], ["b"], {}), ("Add", "ab", ["y"], {})],
        [("ids", np.int64, shape), ("types", np.int64, shape)],
        [("y", np.float32, [*shape, 8])],
        [(name, np.random.default_rng(count).normal(size=(count, 8)).astype(np.float32)) for name, count in tables],
    )


def positive_rows() -> onnx.ModelProto:
    """The rows whose sum is above -1.5, however many that are."""
    return graph_of(
        [
            ("ReduceSum", ["x", "axes"], ["sum"], {"keepdims": 0}),
            ("Greater", ["sum", "least"], ["is_kept"], {}),
            ("Compress", ["x", "is_kept"], ["y"], {"axis": 0}),
        ],
        [("x", np.float32, ["N", 4])],
        [("y", np.float32, ["M", 4])],
        [("axes", np.array([1], np.int64)), ("least", np.array(-1.5, np.float32))],
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
        (of_sums("Mul", "small", small=np.float32(1e-6)), 0, "answer differently in 'y' than each alone"),
        (of_sums("Clip", "least", least=np.float32(50)), 0, "answer differently in 'y' than each alone"),
        (of_sums("Clip", "least", least=np.float32(1e9)), 0, "has the same answer"),
        (classes_of_sums(), 0, "answer differently in 'y' than each alone"),
        (fair_share(0), 0, "answer differently in 'y' than each alone"),
        (fair_share(100), 0, "answer differently in 'y' than each alone"),
        (first_two_rows(), 0, "answer differently in 'y' than each alone"),
        (positive_rows(), 0, "rows give 'y' in shape"),
        (embedded(2), 16, ""),
        (embedded(1), 16, ""),
    ],
)
def test_rows_share_a_run_only_where_that_is_proved(tmp_path, graph, max_batch, why):
    model = load(tmp_path, graph)
    assert model.max_batch == max_batch
    assert why in model.unbatched_why and bool(why) == bool(model.unbatched_why)
    with pytest.raises(BadRequestError, match="takes tensors, not images"):
        model.classifier  # noqa: B018


def test_single_rows_that_give_several_are_not_run_in_turn(tmp_path):
    """Of the answers to two such requests nobody could tell where the second begins."""
    graph = graph_of(
        [("Squeeze", ["x", "axes"], ["y"], {})],
        [("x", np.float32, [1, "T", 3])],
        [("y", np.float32, ["T", 3])],
        [ALL_ROWS],
    )
    model = load(tmp_path, graph)
    assert model.max_batch == 0 and "is not that of the inputs, fixed at 1" in model.unbatched_why
    assert model.inputs[0].shape == (1, -1, 3)


def test_a_graph_that_takes_nothing_is_not_tried_with_gigabytes(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr("app.batchable._run", lambda session, inputs: tried.append(max(map(np.size, inputs))))
    model = load(tmp_path, double("N", "H", "W", 3))
    assert model.max_batch == 0 and "No input that was tried" in model.unbatched_why
    assert tried and max(tried) == 224 * 224 * 3


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


@pytest.mark.parametrize(
    ("settings", "provider", "planned"),
    [
        ({"device": "cpu"}, "cpu", 48),
        ({"device": "auto"}, "cpu", 48),
        ({"device": "auto"}, "cuda", 2),
        ({"device": "tensorrt"}, "tensorrt", 2),
        ({"device": "cuda", "sessions": 5}, "cuda", 5),
        ({"device": "plugin", "plugin": "fast"}, "fast", 2),
        ({"device": "plugin", "plugin": "fast", "plugin_hardware": "cpu"}, "fast", 48),
    ],
)
def test_a_gpu_has_two_sessions_however_many_processors_are_beside_it(settings, provider, planned):
    assert loader_of(Settings(**settings), Metrics(), 48).planned(provider) == planned
