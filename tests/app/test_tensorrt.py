"""What ONNX Runtime is told of TensorRT, and what a person is told where it is not there. No test machine has a GPU."""

import asyncio
import ctypes
import os
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from app import cuda, runtime, sessions, tensorrt
from app.errors import BundleError, SettingsError
from app.loading import Loader
from app.manifest import Bundle
from app.metrics import Metrics
from app.sessions import CUDA, ClassifierSession, OnnxSession
from app.tensorrt import LIBRARIES, PROVIDER, Engines
from tests.bundles import make_bundle

VERSIONS = "onnxruntime-1.31.1-tensorrt-101601"
PIXELS = ("pixels", ["N", 224, 224, 3])


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "models")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Stand for ONNX Runtime with TensorRT: what is asked of it is kept, what is computed the CPU computes."""
    ort = runtime.load()
    kept: list[SimpleNamespace] = []

    def session(path: str, options: Any, providers: list[Any], enable_fallback: bool = True) -> Any:
        made = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        if providers == ["CPUExecutionProvider"]:
            return made
        entries = {
            "session.disable_cpu_ep_fallback": options.get_session_config_entry("session.disable_cpu_ep_fallback")
        }
        kept.append(SimpleNamespace(providers=providers, enable_fallback=enable_fallback, entries=entries))
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        return SimpleNamespace(
            get_providers=lambda: names,
            get_inputs=made.get_inputs,
            get_outputs=made.get_outputs,
            run=made.run,
            io_binding=made.io_binding,
            run_with_iobinding=made.run_with_iobinding,
        )

    fake = SimpleNamespace(
        __version__="1.31.1",
        SessionOptions=ort.SessionOptions,
        RunOptions=ort.RunOptions,
        GraphOptimizationLevel=ort.GraphOptimizationLevel,
        InferenceSession=session,
        get_available_providers=lambda: [PROVIDER, CUDA, "CPUExecutionProvider"],
        preload_dlls=lambda: None,
    )
    monkeypatch.setattr(runtime, "load", lambda: fake)
    monkeypatch.setattr(tensorrt, "load_libraries", lambda: 101601)
    return kept


def test_one_engine_takes_every_batch():
    found = tensorrt.options(Path("model.onnx"), [PIXELS, ("scale", [1])], Engines(64), VERSIONS)
    assert found == {
        "trt_fp16_enable": "0",
        "trt_profile_min_shapes": "pixels:1x224x224x3",
        "trt_profile_opt_shapes": "pixels:64x224x224x3",
        "trt_profile_max_shapes": "pixels:64x224x224x3",
    }


def test_several_inputs_share_their_rows():
    found = tensorrt.options(Path("model.onnx"), [("ids", ["N", 8]), ("mask", ["N", 8])], Engines(4), VERSIONS)
    assert found["trt_profile_max_shapes"] == "ids:4x8,mask:4x8"


def test_fixed_shapes_need_no_profile():
    assert tensorrt.options(Path("model.onnx"), [("x", [1, 8])], Engines(4), VERSIONS) == {"trt_fp16_enable": "0"}


@pytest.mark.parametrize("shape", [["N", "length"], [1, "length"], ["N", None, 3]])
def test_what_no_engine_can_be_built_for_is_told(shape):
    with pytest.raises(BundleError, match=r"'tokens' varies in more than its first dimension .* device cuda"):
        tensorrt.options(Path("model.onnx"), [("tokens", shape)], Engines(4), VERSIONS)


def test_kept_engines_are_apart_where_one_is_no_good_for_the_other(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"weights")

    def place(engines: Engines, versions: str = VERSIONS) -> str:
        return tensorrt.options(tmp_path / "model.onnx", [PIXELS], engines, versions)["trt_engine_cache_path"]

    cache = str(tmp_path / "cache")
    first = place(Engines(16, cache))
    places = [
        first,
        place(Engines(32, cache)),
        place(Engines(16, cache, fp16=True)),
        place(Engines(16, cache), "newer"),
    ]
    assert first.startswith(f"{cache}/{VERSIONS}/")
    assert place(Engines(16, cache)) == first
    # Trained anew: the same names, the same shapes, which is all that the provider looks at.
    (tmp_path / "model.onnx").write_bytes(b"others")
    places.append(place(Engines(16, cache)))
    (tmp_path / "model.onnx.data").write_bytes(b"weights beside the graph")
    places.append(place(Engines(16, cache)))
    assert len(set(places)) == len(places)


def test_a_session_asks_for_tensorrt_then_cuda_and_nothing_else(asked, bundle, tmp_path):
    session = ClassifierSession(bundle.model_path, "tensorrt", 1, Engines(8, str(tmp_path / "cache"), fp16=True))
    assert session.provider == "tensorrt"
    [made] = asked
    (first, options), (second, _) = made.providers
    assert (first, second) == (PROVIDER, CUDA)
    assert made.enable_fallback is False
    assert made.entries == {"session.disable_cpu_ep_fallback": "1"}
    assert options["trt_profile_max_shapes"] == "image:8x16x16x3"
    assert options["trt_fp16_enable"] == options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert Path(options["trt_engine_cache_path"]).is_dir()
    assert Path(options["trt_engine_cache_path"]).parent == Path(options["trt_timing_cache_path"])


def test_a_cache_that_cannot_be_written_to_is_told_before_minutes_of_building(asked, bundle, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SettingsError, match=r"tensorrt_cache: .* cannot be written to: Not a directory"):
        ClassifierSession(bundle.model_path, "tensorrt", 1, Engines(8, str(tmp_path / "cache")))


def test_a_session_that_came_out_on_another_provider_is_refused(asked, bundle, monkeypatch):
    monkeypatch.setattr(sessions.plugins, "name_of", lambda _: "cuda")
    with pytest.raises(SettingsError, match="device is tensorrt, but ONNX Runtime gave a session in cuda"):
        ClassifierSession(bundle.model_path, "tensorrt", 1)


@pytest.mark.parametrize(
    ("driver", "said"),
    [("libnobody-has.so.1", r"driver \(libnobody-has\.so\.1\) is not found"), ("libc.so.6", "CPU EP")],
)
def test_a_missing_driver_is_named_where_it_is_the_reason(asked, bundle, monkeypatch, driver, said):
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("This session contains graph nodes that are assigned to the default CPU EP")

    monkeypatch.setattr(runtime.load(), "InferenceSession", refused)
    monkeypatch.setattr(cuda, "DRIVER", driver)
    with pytest.raises(SettingsError, match=f"device is cuda, but .* does not run on it: .*{said}"):
        ClassifierSession(bundle.model_path, "cuda", 1)


def test_what_is_no_graph_is_the_bundles_fault(asked, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"model\.onnx is not a graph"):
        OnnxSession(tmp_path / "model.onnx", "tensorrt", 1)


def test_a_wheel_without_it_says_which_has_it(bundle):
    if PROVIDER in runtime.load().get_available_providers():
        pytest.skip("this ONNX Runtime has TensorRT")
    with pytest.raises(SettingsError, match=r"device is tensorrt, .* install convoy-serve\[gpu\]"):
        ClassifierSession(bundle.model_path, "tensorrt", 1)


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setattr(tensorrt, "LIBRARIES", ("libnvinfer-that-nobody-has.so.10",))
    with pytest.raises(SettingsError, match=r"libnvinfer-that-nobody-has\.so\.10.*install tensorrt-cu13-libs below 11"):
        tensorrt.load_libraries()


def test_libraries_are_taken_from_where_pip_puts_them(tmp_path, monkeypatch):
    package = tmp_path / tensorrt.PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    (package / LIBRARIES[0]).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, tensorrt.PACKAGE, raising=False)
    loaded: list[tuple[str, int]] = []

    def load(name: str, mode: int) -> SimpleNamespace:
        loaded.append((name, mode))
        return SimpleNamespace(getInferLibVersion=lambda: 101601)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert tensorrt.load_libraries() == 101601
    # The second is not in the package, so the loader is asked for it.
    assert loaded == [(str(package / LIBRARIES[0]), ctypes.RTLD_GLOBAL), (LIBRARIES[1], ctypes.RTLD_GLOBAL)]


def test_a_graph_whose_requests_have_shapes_of_their_own_is_not_taken(asked, tmp_path):
    loop = asyncio.new_event_loop()
    loader = Loader(Metrics(), device="tensorrt", sessions=1, threads_per_session=1, max_batch=4, linger_s=0)
    try:
        with pytest.raises(BundleError, match="TensorRT would build an engine for each: serve it with device cuda"):
            loader.load("m", "1", write_rows_that_know_of_each_other(tmp_path), loop)
    finally:
        loop.close()


def write_rows_that_know_of_each_other(directory: Path) -> Path:
    """Write a graph in which each row becomes its difference from the sum of all."""
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=1), helper.make_node("Sub", ["x", "sum"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, directory / "model.onnx")
    return directory


def test_no_two_processes_build_the_same_engine_at_once(tmp_path):
    found = {"trt_engine_cache_path": str(tmp_path)}
    program = (
        "import sys; from app.tensorrt import building\n"
        "with building({'trt_engine_cache_path': sys.argv[1]}):\n"
        "    print('in', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with tensorrt.building(found):
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout is not None
        ready, _, _ = select.select([other.stdout], [], [], 1)
        assert not ready, "it waits for its turn"
    assert other.stdout.readline() == b"in\n"
    other.communicate()
    with tensorrt.building({}):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


def test_tf32_is_forbidden_unless_it_is_asked_for(asked, bundle, monkeypatch, tmp_path):
    monkeypatch.delenv(tensorrt.TF32_VARIABLE, raising=False)
    ClassifierSession(bundle.model_path, "tensorrt", 1, Engines(2, str(tmp_path)), cuda.Cuda(tf32=True))
    assert tensorrt.TF32_VARIABLE not in os.environ
    ClassifierSession(bundle.model_path, "tensorrt", 1, Engines(2, str(tmp_path)))
    assert os.environ[tensorrt.TF32_VARIABLE] == "0"
    monkeypatch.delenv(tensorrt.TF32_VARIABLE)
    kept = [made.providers[0][1]["trt_engine_cache_path"] for made in asked]
    assert kept[0] != kept[1], "an engine that rounds is another"
