"""What NVML says, from a fake one: no test machine has to have a GPU."""

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from app.gpu import GpuWatch, show, visible_devices
from app.metrics import Metrics
from app.vitals import wanted_device


class NVMLError(Exception):
    """As pynvml's."""


def fake_nvml(count: int = 2, *, knows_load: bool = True) -> ModuleType:
    module = ModuleType("pynvml")

    def load(device: int) -> SimpleNamespace:
        if not module.knows_load:
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=37, memory=20)

    vars(module).update(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        knows_load=knows_load,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda device: f"GPU-{device}abc",
        nvmlDeviceGetName=lambda device: "NVIDIA L4",
        nvmlDeviceGetUtilizationRates=load,
        nvmlDeviceGetMemoryInfo=lambda device: SimpleNamespace(used=6 << 30, total=24 << 30),
        nvmlDeviceGetPowerUsage=lambda device: 41_500,
        nvmlDeviceGetEnforcedPowerLimit=lambda device: 72_000,
        nvmlDeviceGetTemperature=lambda device, sensor: 55,
    )
    return module


def gpu_lines(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.render().decode().splitlines() if line.startswith("convoy_gpu")]
    return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines)}


def test_figures_are_shown_in_base_units():
    metrics = Metrics()
    show(metrics, fake_nvml(), "0", 0)
    assert gpu_lines(metrics) == {
        'convoy_gpu_utilization_ratio{gpu="0"}': 0.37,
        'convoy_gpu_memory_used_bytes{gpu="0"}': 6 << 30,
        'convoy_gpu_memory_total_bytes{gpu="0"}': 24 << 30,
        'convoy_gpu_power_watts{gpu="0"}': 41.5,
        'convoy_gpu_power_limit_watts{gpu="0"}': 72,
        'convoy_gpu_temperature_celsius{gpu="0"}': 55,
    }


def test_what_a_device_does_not_know_is_left_out():
    metrics, nvml = Metrics(), fake_nvml()
    show(metrics, nvml, "0", 0)
    nvml.knows_load = False
    for _ in range(2):
        show(metrics, nvml, "0", 0)
    assert 'convoy_gpu_utilization_ratio{gpu="0"}' not in gpu_lines(metrics)
    assert 'convoy_gpu_power_watts{gpu="0"}' in gpu_lines(metrics)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"0", "1", "2"}),
        ({"CUDA_VISIBLE_DEVICES": "1"}, {"1"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-2a, 0"}, {"0", "2"}),
        ({"CUDA_VISIBLE_DEVICES": ""}, set()),
    ],
)
def test_only_devices_that_cuda_may_use(environment, expected):
    assert set(visible_devices(fake_nvml(3), environment)) == expected


def test_a_watch_shows_every_device_until_it_is_closed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    metrics = Metrics()
    watch = GpuWatch(metrics)
    watch.start()
    until = time.monotonic() + 10
    while 'convoy_gpu_temperature_celsius{gpu="1"}' not in gpu_lines(metrics):
        assert time.monotonic() < until
        time.sleep(0.01)
    watch.close()
    watch._thread.join(10)
    assert not watch._thread.is_alive()
    assert gpu_lines(metrics)['convoy_gpu_info{gpu="1",name="NVIDIA L4",uuid="GPU-1abc"}'] == 1


@pytest.mark.parametrize("missing", ["package", "driver"])
def test_without_package_or_driver_there_are_no_figures_and_one_line(monkeypatch, caplog, missing):
    nvml = fake_nvml()

    def no_driver() -> None:
        raise NVMLError("Driver Not Loaded")

    nvml.nvmlInit = no_driver
    monkeypatch.setitem(sys.modules, "pynvml", None if missing == "package" else nvml)
    metrics = Metrics()
    watch = GpuWatch(metrics)
    watch.start()
    watch._thread.join(10)
    assert not watch._thread.is_alive()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert gpu_lines(metrics) == {}


@pytest.mark.parametrize(
    ("device", "runtime", "wanted"),
    [
        ("auto", "onnxruntime", "cpu"),
        ("auto", "onnxruntime-gpu", "cuda"),
        ("cpu", "onnxruntime-gpu", "cpu"),
        ("cuda", "onnxruntime", "cuda"),
    ],
)
def test_where_models_should_run(device, runtime, wanted):
    assert wanted_device(device, runtime) == wanted
