"""Costs held against arithmetic by hand, PyTorch's own counter, and the networks that are here."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from app.manifest import read_bundle
from training.costs import Costs, costs_of, count
from training.errors import GraphError
from training.nets import build

ROOT = Path(__file__).parent.parent.parent


def graph(nodes, weights, taken, given, opset=18) -> onnx.ModelProto:
    """A model of a few operators; `taken` and `given` are (name, shape) of floats."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info(taken[0], TensorProto.FLOAT, taken[1])],
            [helper.make_tensor_value_info(given[0], TensorProto.FLOAT, given[1])],
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
    )


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_a_convolution():
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1])
    model = graph([node], {"w": zeros(8, 3, 3, 3), "b": zeros(8)}, ("x", ["n", 3, 32, 32]), ("y", ["n", 8, 16, 16]))
    assert count(model) == Costs(parameters=8 * 27 + 8, multiply_adds=16 * 16 * 8 * 27)


def test_a_grouped_convolution_multiplies_within_its_groups():
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=12)
    model = graph([node], {"w": zeros(12, 1, 5, 5)}, ("x", ["n", 12, 9, 9]), ("y", ["n", 12, 5, 5]))
    assert count(model) == Costs(12 * 25, 5 * 5 * 12 * 25)


def test_a_transposed_convolution_uses_its_weights_at_every_place_of_its_input():
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    model = graph([node], {"w": zeros(6, 4, 2, 2)}, ("x", ["n", 6, 7, 7]), ("y", ["n", 4, 14, 14]))
    assert count(model) == Costs(6 * 4 * 4, 7 * 7 * 6 * 4 * 4)


def test_products_with_their_biases_each_tensor_once():
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        helper.make_node("MatMul", ["h", "v"], ["z"]),
        helper.make_node("Add", ["z", "c"], ["s"]),
        helper.make_node("MatMul", ["s", "v"], ["y"]),
    ]
    weights = {"w": zeros(20, 30), "b": zeros(20), "v": zeros(20, 20), "c": zeros(20)}
    model = graph(nodes, weights, ("x", ["n", 30]), ("y", ["n", 20]))
    assert count(model) == Costs(20 * 30 + 20 + 20 * 20 + 20, 30 * 20 + 2 * 20 * 20)


def test_numbers_that_nobody_learned_are_no_parameters():
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "running_mean", "running_var"], ["y"]),
    ]
    weights = {name: zeros(3) for name in ("scale", "shift", "running_mean", "running_var")} | {"mean": zeros(3, 1, 1)}
    model = graph(nodes, weights, ("x", ["n", 3, 4, 4]), ("y", ["n", 3, 4, 4]))
    assert count(model) == Costs(6, 0)


def test_a_quantised_convolution_counts_as_the_one_it_is():
    """As ONNX Runtime writes it: weights, bias and activations each behind a DequantizeLinear."""
    weights = {
        "w": np.zeros((8, 3, 3, 3), np.int8),
        "w_scale": np.ones(8, np.float32),
        "w_zero": np.zeros(8, np.int8),
        "b": np.zeros(8, np.int32),
        "b_scale": np.ones(8, np.float32),
        "b_zero": np.zeros(8, np.int32),
        "x_scale": np.ones((), np.float32),
        "x_zero": np.zeros((), np.uint8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wf"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bf"], axis=0),
        helper.make_node("Conv", ["xf", "wf", "bf"], ["y"]),
    ]
    model = graph(nodes, weights, ("x", ["n", 3, 10, 10]), ("y", ["n", 8, 8, 8]))
    assert count(model) == Costs(8 * 27 + 8, 8 * 8 * 8 * 27)
    integer = [
        *nodes[:1],
        helper.make_node(
            "QLinearConv", ["xq", "x_scale", "x_zero", "w", "w_scale", "w_zero", "x_scale", "x_zero", "b"], ["q"]
        ),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["y"]),
    ]
    assert count(graph(integer, weights, ("x", ["n", 3, 10, 10]), ("y", ["n", 8, 8, 8]))) == count(model)


def test_a_recurrent_layer_uses_its_weights_at_every_step():
    node = helper.make_node("LSTM", ["x", "w", "r", "b"], ["y"], hidden_size=5)
    weights = {"w": zeros(1, 20, 7), "r": zeros(1, 20, 5), "b": zeros(1, 40)}
    model = graph([node], weights, ("x", [9, "n", 7]), ("y", [9, 1, "n", 5]))
    assert count(model) == Costs(20 * 7 + 20 * 5 + 40, 9 * (20 * 7 + 20 * 5))


@pytest.mark.parametrize("name", ["cifar10-article", "imagenet"])
def test_a_bundle_costs_what_pytorch_counts(name):
    bundle = read_bundle(ROOT / "models" / name / "1")
    knobs = bundle.manifest.training["recipe"]
    with torch.device("meta"):
        network = build(knobs["network"], classes=len(bundle.manifest.labels), size=knobs["size"], dropout=0.5).eval()
        with FlopCounterMode(display=False) as counted:
            network(torch.zeros(1, 3, knobs["size"], knobs["size"]))
    folded = sum(len(layer.weight) for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    costs = costs_of(bundle.model_path)
    assert costs.multiply_adds == counted.get_total_flops() // 2
    # A convolution and its normalisation have three numbers a channel beside the weights' own; folded, one bias.
    assert costs.parameters == sum(parameter.numel() for parameter in network.parameters()) - folded


def test_efficientnet_lite0_needs_0_39_thousand_million_multiply_adds():
    costs = costs_of(ROOT / "models/imagenet/1/model.onnx")
    assert costs == Costs(parameters=4_631_000, multiply_adds=385_187_552)


def test_what_cannot_be_counted_is_refused_by_name(tmp_path):
    nodes = [
        helper.make_node("Foreign", ["x"], ["h"], domain="elsewhere"),
        helper.make_node("Conv", ["h", "w"], ["y"]),
    ]
    model = graph(nodes, {"w": zeros(8, 3, 3, 3)}, ("x", ["n", 3, 8, 8]), ("y", ["n", "c", "h", "v"]))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(GraphError, match=r"foreign\.onnx: The shape of 'y' at the operator Conv cannot be told"):
        costs_of(tmp_path / "foreign.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(GraphError, match=r"broken\.onnx cannot be read as an ONNX graph"):
        costs_of(tmp_path / "broken.onnx")
