"""TF32, emulated: rounded as the bits would be, only what float32 products take; what is kept is of what is there."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app import runtime
from app.manifest import read_bundle
from benchmarks import tf32
from benchmarks.models import MODELS, name_of, read_bundles

ROOT = Path(__file__).parent.parent.parent
DROPPED = 13
SMALLEST_NORMAL = 2.0**-126


def graph(nodes, inputs, outputs, constants=None, kind=TensorProto.FLOAT):
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model, **inputs):
    options = runtime.load().SessionOptions()
    options.graph_optimization_level = runtime.load().GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.load().InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def rounded(rounding, values):
    (found,) = run(graph(rounding("x", "y"), {"x": ["n"]}, {"y": ["n"]}), x=values)
    return found


def bits(values):
    return values.view(np.uint32)


def floats():
    """Return finite float32 of every size, the middles between two of TF32 and what is next to them, and both zeros."""
    random = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32)
    middles = random >> DROPPED << DROPPED | 1 << (DROPPED - 1)
    edges = np.array([0.0, 1.0, np.finfo(np.float32).max, SMALLEST_NORMAL, 65_520, 2 - 2.0**-23], np.float32)
    found = np.concatenate([random, middles, middles - 1, middles + 1, bits(edges), bits(-edges)]).view(np.float32)
    return found[np.isfinite(found)]


def halves_away(values):
    return (bits(values) + np.uint32(1 << (DROPPED - 1))) >> DROPPED << DROPPED


def cut(values):
    return bits(values) >> DROPPED << DROPPED


@pytest.mark.parametrize(("rounding", "expected"), [(tf32.to_tf32, halves_away), (tf32.cut_to_tf32, cut)])
def test_numbers_are_rounded_as_their_bits_would_be(rounding, expected):
    values = floats()
    values = values[(np.abs(values) >= SMALLEST_NORMAL) | (values == 0)]
    np.testing.assert_array_equal(bits(rounded(rounding, values)), expected(values))


@pytest.mark.parametrize("rounding", [tf32.to_tf32, tf32.cut_to_tf32])
def test_the_smallest_numbers_keep_at_least_what_tf32_keeps(rounding):
    values = np.arange(1, 2**23, 997, np.uint32).view(np.float32)
    values = np.concatenate([values, -values])
    error = np.abs(rounded(rounding, values).astype(np.float64) - values)
    assert (error <= np.abs(values.astype(np.float64)) * 2.0**-10).all()
    assert error.max() < SMALLEST_NORMAL * 2.0**-10


def test_what_is_too_large_for_tf32_is_infinite():
    largest = np.finfo(np.float32).max
    assert rounded(tf32.to_tf32, np.array([largest, -largest], np.float32)).tolist() == [np.inf, -np.inf]
    assert np.isfinite(rounded(tf32.cut_to_tf32, np.array([largest], np.float32))).all()


def test_half_precision_is_numpy_s():
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    np.testing.assert_array_equal(rounded(tf32.to_float16, values), values.astype(np.float16).astype(np.float32))


def test_operands_are_rounded_once_each_and_nothing_else_is():
    random = np.random.default_rng(0)
    x, bias = random.normal(size=(3, 4)).astype(np.float32), random.normal(size=5).astype(np.float32)
    one, other = (random.normal(size=(4, 5)).astype(np.float32) for _ in range(2))
    nodes = [
        helper.make_node("Gemm", ["x", "one", "bias"], ["a"]),
        helper.make_node("MatMul", ["x", "other"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    model = graph(nodes, {"x": [3, 4]}, {"y": [3, 5]}, {"one": one, "other": other, "bias": bias})
    before = model.SerializeToString()
    both = tf32.with_rounding(model, tf32.to_tf32, (0, 1))
    onnx.checker.check_model(both, full_check=True)
    x_, one_, other_ = (halves_away(values).view(np.float32) for values in (x, one, other))
    np.testing.assert_allclose(run(both, x=x)[0], x_ @ one_ + bias + x_ @ other_, rtol=1e-5, atol=1e-5)
    assert sum("x/rounded" in node.output for node in both.graph.node) == 1
    weights = run(tf32.with_rounding(model, tf32.to_tf32, (1,)), x=x)[0]
    np.testing.assert_allclose(weights, x @ one_ + bias + x @ other_, rtol=1e-5, atol=1e-5)
    assert tf32.with_rounding(model, tf32.to_tf32, ()).graph == model.graph
    assert model.SerializeToString() == before


def test_products_that_are_not_of_float32_are_left_alone():
    weights = {"weights": np.ones((4, 5), np.float16)}
    nodes = [helper.make_node("MatMul", ["x", "weights"], ["y"])]
    model = graph(nodes, {"x": [3, 4]}, {"y": [3, 5]}, weights, TensorProto.FLOAT16)
    assert tf32.products(model) == []
    assert tf32.with_rounding(model, tf32.to_tf32, (0, 1)).graph == model.graph


def test_a_graph_in_8_bits_has_as_many_float32_products_as_its_parent():
    parent, child = (onnx.load(MODELS / name / "1/model.onnx") for name in ("cifar10-article", "cifar10-article-int8"))
    assert len(tf32.products(child)) == len(tf32.products(parent)) == 4


def test_the_smallest_bundle_is_judged_as_it_was_when_it_was_measured():
    bundle = read_bundle(MODELS / "cifar10-article/1")
    found, kept = tf32.measured(bundle), json.loads(tf32.RESULT.read_text())["models"][name_of(bundle)]
    assert found["proved"] == kept["proved"]
    assert found["proved"]["float32"] and not found["proved"]["TF32"]


def test_what_is_kept_is_of_the_bundles_that_are_there_and_the_page_has_it():
    """After a change of a model: python -m benchmarks.tf32, and its table goes into docs/operations.md."""
    kept = json.loads(tf32.RESULT.read_text())["models"]
    assert {name: found["sha256"] for name, found in kept.items()} == {
        name_of(bundle): bundle.manifest.model.sha256 for bundle in read_bundles(MODELS)
    }
    assert all(found["proved"]["float32"] for found in kept.values())
    assert f"\n{tf32.table(kept)}\n" in (ROOT / "docs/operations.md").read_text()
