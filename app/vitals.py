"""How this process is: whether its event loop is late, what it may use, what runs in it.

Measures for whoever watches; nothing here decides anything. Knows nothing of requests.
"""

import asyncio
from typing import Protocol

from app import __version__
from app.cpus import cpu_limit
from app.gpu import GpuWatch
from app.metrics import Metrics
from app.runtime import installed_wheels

STEP_S = 0.1


class RunsModels(Protocol):
    """What models run in this process: a repository, or an engine."""

    def show_queues(self) -> int:
        """Show each model's line and sessions; returns how many sessions run here."""
        ...

    def providers(self) -> set[str]:
        """Return where models run: `cpu`, `cuda`, `tensorrt` or a plug-in's name."""
        ...


class Vitals:
    """Shows what is true from the start, and goes on measuring on the event loop from `start` to `close`."""

    def __init__(
        self, metrics: Metrics, models: RunsModels, *, device: str, decode_threads: int, threads_per_session: int
    ) -> None:
        """Show what is running, and where it should run.

        Args:
            metrics: this process's.
            models: whose sessions run here.
            device: the setting.
            decode_threads: threads that decode.
            threads_per_session: threads inside each session.
        """
        self._metrics = metrics
        self._models = models
        self._threads_per_session = threads_per_session
        self._gpus: GpuWatch | None = None
        self._timer: asyncio.TimerHandle | None = None
        [(runtime, version)] = installed_wheels().items()
        metrics.build_info.labels(__version__, runtime, version).set(1)
        metrics.wanted_device.labels(wanted_device(device, runtime)).set(1)
        metrics.cpu_limit.labels().set(cpu_limit())
        metrics.threads.labels("decode").set(decode_threads)
        self._sessions = metrics.threads.labels("session")

    def start(self) -> None:
        """Measure from now on how late the event loop, which runs now, wakes up."""
        self._tick(asyncio.get_running_loop().time())

    def show(self) -> None:
        """Bring up to date what changes with the models."""
        running = self._models.show_queues()
        self._sessions.set(running * self._threads_per_session)
        if self._gpus is None and running and not self._models.providers() <= {"cpu"}:
            self._gpus = GpuWatch(self._metrics)
            self._gpus.start()

    def close(self) -> None:
        """Stop measuring."""
        if self._timer is not None:
            self._timer.cancel()
        if self._gpus is not None:
            self._gpus.close()

    def _tick(self, due: float) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._metrics.loop_lag.observe(max(0.0, now - due))
        self._timer = loop.call_at(now + STEP_S, self._tick, now + STEP_S)


def wanted_device(device: str, runtime: str) -> str:
    """Return where models should run: `auto` on the wheel for GPUs means a GPU, or something is wrong."""
    if device != "auto":
        return device
    return "cuda" if runtime == "onnxruntime-gpu" else "cpu"
