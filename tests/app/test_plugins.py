"""Providers that are loaded as libraries: stood for by ones that are only pretended, whose sessions the CPU runs."""

import asyncio
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from app import plugins, runtime
from app.errors import SettingsError
from app.golden import prove
from app.loading import Loader
from app.manifest import Bundle, read_bundle
from app.metrics import Metrics
from app.plugins import Plugin
from app.sessions import ClassifierSession, place
from tests.bundles import make_bundle

NAME = "FastExecutionProvider"
REAL = os.environ.get("TEST_WITH_PLUGIN", "")
"""A package or library, as the setting `plugin`, that finds a device where the tests run."""


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "models")


@pytest.fixture
def ort(monkeypatch, tmp_path):
    """Stand for ONNX Runtime with a library that finds an NPU and a GPU, in a package of its own."""
    real = runtime.load()
    fake = SimpleNamespace(
        SessionOptions=Options,
        RunOptions=real.RunOptions,
        devices=[device("CPUExecutionProvider", "CPU")],
        brings=[device(NAME, "NPU"), device(NAME, "GPU")],
        registered=[],
        made=[],
        gives=[NAME, "CPUExecutionProvider"],
    )

    def register(name: str, path: str) -> None:
        if Path(path).read_text() != "a library":
            raise RuntimeError("cannot open it\nand more")
        fake.registered.append(path)
        fake.devices += fake.brings

    def session(path: str, options: "Options", providers: object, enable_fallback: bool) -> SimpleNamespace:
        fake.made.append(SimpleNamespace(options=options, providers=providers, enable_fallback=enable_fallback))
        own = real.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = ("get_inputs", "get_outputs", "run", "io_binding", "run_with_iobinding")
        return SimpleNamespace(get_providers=lambda: fake.gives, **{name: getattr(own, name) for name in names})

    fake.register_execution_provider_library = register
    fake.get_ep_devices = lambda: list(fake.devices)
    fake.InferenceSession = session
    monkeypatch.setattr(runtime, "load", lambda: fake)
    plugins._register.cache_clear()
    (tmp_path / "libfast.so").write_text("a library")
    package = ModuleType("onnxruntime_ep_fast")
    package.__spec__ = SimpleNamespace()  # type: ignore[assignment]  # that it is there is all that is asked
    package.get_library_path = lambda: str(tmp_path / "libfast.so")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_fast", package)
    yield fake
    plugins._register.cache_clear()


class Options:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.added: list[tuple[object, dict[str, str]]] = []

    def add_session_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value

    def add_provider_for_devices(self, devices: list[SimpleNamespace], options: dict[str, str]) -> None:
        self.added.append(([device.device.type.name for device in devices], options))


def device(provider: str, kind: str) -> SimpleNamespace:
    return SimpleNamespace(ep_name=provider, device=SimpleNamespace(type=SimpleNamespace(name=kind)))


def test_a_model_runs_on_the_plug_in_or_not_at_all(ort, bundle):
    plugin = place("plugin", "onnxruntime_ep_fast", "gpu", " precision=FP16, threads=1 ")
    loader = Loader(Metrics(), device=plugin, sessions=2, threads_per_session=1, max_batch=4, linger_s=0)

    async def load():
        model, difference = loader.load("colours", "1", bundle.directory, asyncio.get_running_loop())
        await asyncio.to_thread(model.batcher.close)
        return model, difference

    model, difference = asyncio.run(load())
    assert model.provider == "fast" and difference < 1e-6, "the golden answers came out of buffers, in known sizes"
    assert len(ort.registered) == 1, "a library is loaded once, whatever the number of sessions"
    for made in ort.made:
        assert made.options.added == [(["GPU"], {"precision": "FP16", "threads": "1"})]
        assert made.options.entries["session.disable_cpu_ep_fallback"] == "1"
        assert (made.providers, made.enable_fallback) == (None, False)


def test_a_session_that_came_out_elsewhere_is_refused(ort, bundle):
    ort.gives = ["CPUExecutionProvider"]
    with pytest.raises(SettingsError, match=r"device is plugin onnxruntime_ep_fast, but .* gave a session in cpu"):
        ClassifierSession(bundle.model_path, Plugin("onnxruntime_ep_fast"), 1)


def test_a_graph_that_does_not_run_on_it_ends_the_start(ort, bundle, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("nodes are assigned to the default CPU EP")

    monkeypatch.setattr(ort, "InferenceSession", refused)
    with pytest.raises(SettingsError, match=r"device is plugin onnxruntime_ep_fast, but .* does not run on it: nodes"):
        ClassifierSession(bundle.model_path, Plugin("onnxruntime_ep_fast"), 1)


def test_the_first_device_is_taken_where_any_will_do_and_a_path_does_as_well_as_a_package(ort, tmp_path):
    found = plugins.device_of(Plugin(str(tmp_path / "libfast.so")))
    assert (found.ep_name, found.device.type.name) == (NAME, "NPU")


@pytest.mark.parametrize(
    ("library", "hardware", "said"),
    [
        ("onnxruntime_ep_fast", "cpu", r"no device that it can run on here of the kind cpu \(only npu, gpu\)"),
        ("onnxruntime_ep_missing", "any", "the package onnxruntime_ep_missing is not installed"),
        ("not a package", "any", "the package not a package is not installed"),
        ("json", "any", "the package json brings no library of a provider"),
        ("/nowhere/libfast.so", "any", "there is no file /nowhere/libfast.so"),
        ("broken.so", "any", r"broken.so is no library of a provider: cannot open it$"),
    ],
)
def test_what_is_wrong_with_a_plug_in_is_one_sentence(ort, tmp_path, monkeypatch, library, hardware, said):
    monkeypatch.chdir(tmp_path)
    Path("broken.so").write_text("nonsense")
    with pytest.raises(SettingsError, match=said):
        plugins.device_of(Plugin(library, hardware))


def test_a_library_that_finds_nothing_here_says_so(ort):
    ort.brings = []
    with pytest.raises(SettingsError, match=r"onnxruntime_ep_fast finds no device that it can run on here \(none\)"):
        plugins.device_of(Plugin("onnxruntime_ep_fast"))


def test_settings_that_name_no_plug_in_or_no_options_are_refused():
    with pytest.raises(SettingsError, match="device is plugin: say by plugin which"):
        place("plugin", "", "any", "")
    with pytest.raises(SettingsError, match="plugin_options has 'fast': write name=value"):
        place("plugin", "onnxruntime_ep_fast", "any", "a=1,fast")
    assert place("cuda", "", "any", "") == "cuda"


def test_names_of_providers_are_short():
    names = ["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider", "WebGpuExecutionProvider"]
    assert list(map(plugins.name_of, names)) == ["cpu", "cuda", "tensorrt", "webgpu"]


@pytest.mark.skipif(not REAL, reason="TEST_WITH_PLUGIN names no provider that there is a device for")
@pytest.mark.parametrize("name", ["cifar10-article", "cifar10"])
def test_a_real_plug_in_gives_the_golden_answers_and_those_of_the_processor(name):
    bundle = read_bundle(Path(__file__).parents[2] / "models" / name / "1")
    plugin = place("plugin", REAL, "any", os.environ.get("TEST_WITH_PLUGIN_OPTIONS", ""))
    session = ClassifierSession(bundle.model_path, plugin, 1)
    assert prove(bundle, session.classify) <= bundle.manifest.golden.tolerance
    expected = ClassifierSession(bundle.model_path, "cpu", 1)
    session.bind((1, 2, 4))
    pixels = bundle.manifest.pixels
    for rows in (1, 3, 4, 2, 9):
        images = np.random.default_rng(rows).integers(0, 256, (rows, pixels.height, pixels.width, 3), np.uint8)
        assert np.allclose(session.classify(images), expected.classify(images), atol=bundle.manifest.golden.tolerance)
