"""The end of a graph, rewritten: by arithmetic, on a small graph whose logits are the red row of the image."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from training.classifiers import onnx_run
from training.errors import ExportError
from training.graphs.ending import LOGITS_NAME, logits_of, plain, temperature_of, with_temperature
from training.trust.calibration import softmax
from training.trust.energy import energy_of

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 1, 5, 3), np.uint8)
LOGITS = (IMAGES[:, 0, :, 0] / 16).astype(np.float32)


def graph_of(kind: str) -> onnx.ModelProto:
    """float32, float16 with casts around it as a converter writes them, or with an Identity after the softmax."""
    half = kind == "half"
    number = np.float16 if half else np.float32
    nodes = [
        helper.make_node("Cast", ["image"], ["numbers"], to=TensorProto.FLOAT16 if half else TensorProto.FLOAT),
        helper.make_node("Slice", ["numbers", "from", "to", "axis"], ["red"]),
        helper.make_node("Reshape", ["red", "shape"], ["rows"]),
        helper.make_node("Div", ["rows", "sixteen"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities" if kind == "single" else "soft"], axis=-1),
    ]
    if half:
        nodes.append(helper.make_node("Cast", ["soft"], ["probabilities"], to=TensorProto.FLOAT))
    elif kind == "identity":
        nodes.append(helper.make_node("Identity", ["soft"], ["probabilities"]))
    constants = {
        "from": np.array([0], np.int64),
        "to": np.array([1], np.int64),
        "axis": np.array([3], np.int64),
        "shape": np.array([-1, 5], np.int64),
        "sixteen": np.array(16, number),
    }
    graph = helper.make_graph(
        nodes,
        "red",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 1, 5, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def answer(graph: onnx.ModelProto, folder: Path, output: str = "probabilities") -> np.ndarray:
    onnx.save(graph, folder / "graph.onnx")
    return onnx_run(folder / "graph.onnx", given=output)(IMAGES)


@pytest.mark.parametrize("kind", ["single", "half", "identity"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.25])
def test_a_graph_gets_its_temperature_and_its_energy(kind: str, temperature: float, tmp_path: Path):
    graph = graph_of(kind)
    before = graph.SerializeToString()
    rewritten = with_temperature(graph, temperature)
    assert graph.SerializeToString() == before
    assert [output.name for output in rewritten.graph.output] == ["probabilities", "energy"]
    assert [size.dim_param for size in rewritten.graph.output[1].type.tensor_type.shape.dim] == ["n"]
    tolerance = 2e-2 if kind == "half" else 1e-5
    np.testing.assert_allclose(answer(rewritten, tmp_path), softmax(LOGITS, temperature), atol=tolerance)
    np.testing.assert_allclose(
        answer(rewritten, tmp_path, "energy"), energy_of(LOGITS, temperature), atol=tolerance, rtol=1e-3
    )
    assert temperature_of(rewritten) == temperature
    divisions = [node for node in rewritten.graph.node if "calibration.temperature" in node.input]
    assert len(divisions) == (temperature != 1)


@pytest.mark.parametrize("kind", ["single", "half", "identity"])
def test_the_logits_come_out_as_they_were_before_any_temperature(kind: str, tmp_path: Path):
    for graph in (graph_of(kind), with_temperature(graph_of(kind), 2.0)):
        found = answer(logits_of(graph), tmp_path, LOGITS_NAME)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, LOGITS, atol=1e-2 if kind == "half" else 1e-6)


@pytest.mark.parametrize("kind", ["single", "half", "identity"])
def test_a_temperature_is_replaced_and_can_be_taken_out_again(kind: str):
    graph = graph_of(kind)
    twice = with_temperature(with_temperature(graph, 2.0), 0.7)
    assert twice == with_temperature(graph, 0.7)
    assert plain(twice) == graph
    assert plain(graph) == graph


def last_node_replaced(node: onnx.NodeProto) -> onnx.ModelProto:
    graph = graph_of("single")
    graph.graph.node[-1].CopyFrom(node)
    return graph


@pytest.mark.parametrize(
    ("node", "maker"),
    [
        (helper.make_node("Sigmoid", ["scores"], ["probabilities"]), "a Sigmoid"),
        (helper.make_node("Softmax", ["scores"], ["probabilities"], axis=0), "a Softmax"),
        (helper.make_node("Softmax", ["scores"], ["nobody asks"]), "nothing"),
    ],
)
def test_a_graph_without_a_softmax_over_its_classes_is_refused(node: onnx.NodeProto, maker: str):
    with pytest.raises(ExportError, match=f"comes from {maker}, not from a softmax over the classes"):
        with_temperature(last_node_replaced(node), 2.0)
