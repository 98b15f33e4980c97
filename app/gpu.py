"""What the GPUs do, as NVIDIA's management library says: load, memory, power, temperature.

Owns the one import of nvidia-ml-py (`pynvml`), which only a process with a model on a GPU needs, and the thread that
asks: an answer may take milliseconds, which the event loop does not have. Knows nothing of sessions or models.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from app.families import Gauge
from app.metrics import Metrics

log = logging.getLogger(__name__)

PERIOD_S = 2.0
VISIBLE = "CUDA_VISIBLE_DEVICES"


class GpuWatch:
    """Shows the GPUs' figures from a thread of its own, from `start` to `close`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch_loop, name="gpu", daemon=True)

    def start(self) -> None:
        """Begin to watch; without nvidia-ml-py or a driver, say so once in the log and show nothing."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stopping.set()

    def _watch_loop(self) -> None:
        try:
            import pynvml
        except ImportError:
            log.warning("no figures of the GPU: nvidia-ml-py is not installed (convoy-serve[gpu] brings it)")
            return
        try:
            pynvml.nvmlInit()
            devices = visible_devices(pynvml, os.environ)
        except pynvml.NVMLError as error:
            log.warning("no figures of the GPU", extra={"reason": str(error)})
            return
        for gpu, device in devices.items():
            self._metrics.gpu_info.labels(
                gpu, _text(pynvml.nvmlDeviceGetUUID(device)), _text(pynvml.nvmlDeviceGetName(device))
            ).set(1)
        while not self._stopping.is_set():
            for gpu, device in devices.items():
                show(self._metrics, pynvml, gpu, device)
            self._stopping.wait(PERIOD_S)


def show(metrics: Metrics, pynvml: ModuleType, gpu: str, device: Any) -> None:
    """Show what one GPU says; what it does not know, as a MIG slice its load, is shown no longer."""

    def memory() -> Any:
        return pynvml.nvmlDeviceGetMemoryInfo(device)

    figures: tuple[tuple[Gauge, Callable[[], float]], ...] = (
        (metrics.gpu_utilization, lambda: pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100),
        (metrics.gpu_memory_used, lambda: memory().used),
        (metrics.gpu_memory_total, lambda: memory().total),
        (metrics.gpu_power, lambda: pynvml.nvmlDeviceGetPowerUsage(device) / 1000),
        (metrics.gpu_power_limit, lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000),
        (
            metrics.gpu_temperature,
            lambda: pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU),
        ),
    )
    for gauge, ask in figures:
        try:
            gauge.labels(gpu).set(ask())
        except pynvml.NVMLError:
            gauge.remove(gpu)


def visible_devices(pynvml: ModuleType, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the handles of the GPUs that CUDA may use here, by their number on the machine.

    The library sees every GPU of the container, whatever `CUDA_VISIBLE_DEVICES` says: numbers, or starts of UUIDs.
    Numbers are the bus's, as nvidia-smi shows them; CUDA counts so too where all GPUs are of one kind.
    """
    everything = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    numbered = {str(index): device for index, device in enumerate(everything)}
    wanted = environment.get(VISIBLE)
    if wanted is None:
        return numbered
    found = {}
    for word in filter(None, map(str.strip, wanted.split(","))):
        for number, device in numbered.items():
            if word == number or _text(pynvml.nvmlDeviceGetUUID(device)).startswith(word):
                found[number] = device
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
