"""Runs over buffers that stay: on the CPU's provider, which binds as CUDA's does."""

import ctypes

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from app import cuda, sessions
from app.binding import Bound, can_bind
from app.cuda import Cuda, batch_sizes
from app.runtime import load
from app.sessions import OnnxSession
from app.tensors import TensorSpec
from tests.bundles import colour_graph


def zeros(size: int) -> np.ndarray:
    return np.zeros(size, np.uint8)


@pytest.fixture(scope="module")
def colours():
    return load().InferenceSession(colour_graph().SerializeToString(), providers=["CPUExecutionProvider"])


def bound_to(session, sizes, recorded="") -> Bound:
    inputs = (TensorSpec("image", "UINT8", (-1, 16, 16, 3)),)
    outputs = (TensorSpec("probabilities", "FP32", (-1, 6)),)
    return Bound(session, inputs, outputs, sizes, zeros, load().RunOptions, recorded=recorded)


@pytest.mark.parametrize("recorded", ["", "cpu"], ids=["copied", "at fixed addresses"])
def test_any_number_of_rows_gives_what_the_session_gives(colours, recorded):
    bound = bound_to(colours, (1, 2, 4, 8), recorded)
    rng = np.random.default_rng(0)
    for rows in (1, 3, 8, 2, 5, 19, 1, 16):
        pixels = rng.integers(0, 256, (rows, 16, 16, 3), np.uint8)
        [found] = bound.run(pixels)
        [expected] = colours.run(None, {"image": pixels})
        assert found.shape == (rows, 6)
        assert np.allclose(found, expected, atol=1e-6)


def test_an_answer_is_not_changed_by_the_next_run(colours):
    bound = bound_to(colours, (1, 4))
    rng = np.random.default_rng(1)
    one, other = (rng.integers(0, 256, (3, 16, 16, 3), np.uint8) for _ in range(2))
    [first] = bound.run(one)
    kept = first.copy()
    bound.run(other)
    assert (first == kept).all()


def test_rows_that_failed_are_not_what_later_batches_are_filled_up_with():
    taken = helper.make_tensor_value_info("index", TensorProto.INT64, ["N", 1])
    given = helper.make_tensor_value_info("found", TensorProto.FLOAT, ["N", 1])
    table = helper.make_tensor("table", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "index"], ["found"])], "g", [taken], [given], [table]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs, outputs = (TensorSpec("index", "INT64", (-1, 1)),), (TensorSpec("found", "FP32", (-1, 1)),)
    bound = Bound(session, inputs, outputs, (1, 2, 4), zeros, load().RunOptions)
    with pytest.raises(Exception, match="out of data bounds"):
        bound.run(np.array([[0], [1], [2], [9]]))
    assert bound.run(np.array([[0], [1], [2]]))[0].tolist() == [[1.0], [2.0], [3.0]]


def test_joined_rows_are_where_the_run_wants_them(colours):
    bound = bound_to(colours, (1, 4, 8))
    rng = np.random.default_rng(2)
    parts = [(rng.integers(0, 256, (rows, 16, 16, 3), np.uint8),) for rows in (2, 1, 3)]
    joined = bound.join(parts)
    assert joined[0].ctypes.data == bound._inputs[0].ctypes.data
    [found] = bound.run(*joined)
    [expected] = colours.run(None, {"image": np.concatenate([part[0] for part in parts])})
    assert np.allclose(found, expected, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 1000))
def test_sizes_rise_to_the_largest_and_padding_is_what_is_missing_to_the_next(largest, rows):
    sizes = batch_sizes(largest)
    assert list(sizes) == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == largest
    bound = Bound.__new__(Bound)
    bound._sizes = sizes
    rest = rows % largest
    padding = bound.padding(rows)
    assert padding == (min(size for size in sizes if size >= rest) - rest if rest else 0)
    assert padding < largest


def test_only_rows_of_numbers_that_vary_alone_are_bound():
    rows, texts = TensorSpec("a", "FP32", (-1, 3)), TensorSpec("b", "BYTES", (-1, 3))
    assert can_bind([rows], [rows])
    assert not can_bind([rows], [texts])
    assert not can_bind([TensorSpec("c", "FP32", (-1, -1))], [rows])
    assert not can_bind([TensorSpec("d", "FP32", (1, 3))], [rows])


def test_the_provider_is_told_the_settings():
    assert cuda.options(Cuda()) == {
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "prefer_nhwc": "0",
        "use_tf32": "0",
        "enable_cuda_graph": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
    told = cuda.options(Cuda("heuristic", nhwc=True, tf32=True, graphs=True, memory_bytes=2_000_000_000))
    assert told["gpu_mem_limit"] == "2000000000"
    assert (told["prefer_nhwc"], told["use_tf32"], told["enable_cuda_graph"]) == ("1", "1", "1")


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", True),
        ("CUDA error 719 : unspecified launch failure", True),
        ("CUDA failure 214: uncorrectable ECC error encountered", True),
        ("CUDNN failure 4: CUDNN_STATUS_INTERNAL_ERROR ; device-side assert triggered", True),
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=pod", False),
        ("Got invalid dimensions for input: image", False),
        ("CUDA failure 7001", False),
        ("BFCArena::AllocateRawInternal Available memory of 0 is smaller than requested bytes of 700", False),
    ],
)
def test_faults_that_are_the_end_are_told_from_those_of_a_request(said, lost):
    assert cuda.is_lost(said) is lost


def test_without_cuda_buffers_are_ordinary_memory():
    memory = cuda.pinned(100)
    assert (memory.shape, memory.dtype, memory.sum()) == ((100,), np.uint8, 0)


class Cudart:
    """CUDA's library, over ordinary memory."""

    def __init__(self) -> None:
        self.held = {}

    def cudaHostAlloc(self, address, size, flags):  # noqa: N802
        memory = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(memory)
        self.held[address._obj.value] = memory
        return 0

    def cudaFreeHost(self, address):  # noqa: N802
        del self.held[address.value]


def test_pinned_memory_is_given_back_with_the_last_array_over_it(monkeypatch):
    library = Cudart()
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda _: library)
    memory = cuda.pinned(1000)
    part = memory[10:20].reshape(2, 5)
    assert len(library.held) == 1
    del memory
    part[...] = 7
    assert len(library.held) == 1
    del part
    assert not library.held


class OnGpu:
    """ONNX Runtime's session, but its provider calls itself CUDA."""

    def __init__(self, session) -> None:
        self._session = session

    def __getattr__(self, name: str):
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [sessions.CUDA]


def test_a_session_on_a_gpu_runs_in_known_sizes(tmp_path, monkeypatch, colours):
    monkeypatch.setattr(sessions, "_create", lambda *_: OnGpu(colours))
    session = OnnxSession(tmp_path / "model.onnx", "cuda", 1)
    pixels = np.random.default_rng(4).integers(0, 256, (5, 16, 16, 3), np.uint8)
    plain = session.run(pixels)
    assert session.padding(5) == 0
    session.bind(batch_sizes(8))
    assert session.padding(5) == 3
    assert np.allclose(session.run(pixels)[0], plain[0], atol=1e-6)
    assert np.allclose(session.run(*session.join([(pixels[:2],), (pixels[2:],)]))[0], plain[0], atol=1e-6)


def test_on_the_cpu_nothing_is_bound(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(colour_graph(), path)
    session = OnnxSession(path, "cpu", 1)
    session.bind(batch_sizes(8))
    assert session.padding(5) == 0


def test_two_inputs_are_bound_each_to_its_own_buffer():
    nodes = [helper.make_node("Sub", ["a", "b"], ["difference"]), helper.make_node("Add", ["a", "b"], ["sum"])]
    both = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2]) for name in ("a", "b")]
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2]) for name in ("difference", "sum")]
    model = helper.make_model(
        helper.make_graph(nodes, "two", both, given), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    session = load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    spec = {name: TensorSpec(name, "FP32", (-1, 2)) for name in ("a", "b", "difference", "sum")}
    bound = Bound(session, (spec["a"], spec["b"]), (spec["difference"], spec["sum"]), (1, 4), zeros, load().RunOptions)
    a, b = np.arange(6, dtype=np.float32).reshape(3, 2), np.full((3, 2), 0.5, np.float32)
    difference, total = bound.run(a, b)
    assert (difference == a - b).all() and (total == a + b).all()
