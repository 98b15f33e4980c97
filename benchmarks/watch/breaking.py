"""Ways to break a service that runs, and to mend it: each says which alerts fire meanwhile, and resolve after."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.bench.load import Plan
from app.bench.requests import Endpoint, build_requests, read_bodies
from app.bench.server import Server, serving
from app.offline import image_files

MODEL = Path(__file__).parents[2] / "models/cifar10-article/1"
IMAGES = MODEL / "golden"
RATE = 20.0
PAUSE_S, RUN_S = 0.7, 0.3


@dataclass(frozen=True)
class Broken:
    """What one way of breaking needs: its alerts, the service's settings, and how it is broken until a block ends."""

    alerts: frozenset[str]
    settings: dict[str, object]
    breaking: Callable[[Server, Path], AbstractContextManager[None]]


def models_in(folder: Path) -> Path:
    """Return a models directory with one model, to be changed at will."""
    shutil.copytree(MODEL, folder / "models/cifar10-article/1")
    return folder / "models"


@contextmanager
def load(url: str, *, rate: float | None = RATE, connections: int = 16) -> Iterator[None]:
    """Send the image at a constant rate, or in a closed loop, until the block ends."""
    words = [sys.executable, "-m", "app.cli", "bench", url, str(IMAGES), "--seconds", "3600", "--warm-up", "0"]
    words += ["--connections", str(connections), *(["--rate", str(rate)] if rate else [])]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


@contextmanager
def altered_version(server: Server, models: Path) -> Iterator[None]:
    """Deliver a version whose graph is not the one that was exported; take it away again."""
    target = models / "cifar10-article/2"
    shutil.copytree(MODEL, target)
    manifest = target / "model.json"
    manifest.write_text(manifest.read_text().replace('"version": "1"', '"version": "2"', 1))
    with (target / "model.onnx").open("r+b") as graph:
        graph.seek(1000)
        graph.write(b"\0" * 16)
    yield
    shutil.rmtree(target)


@contextmanager
def more_clients_than_room(server: Server, models: Path) -> Iterator[None]:
    """Have sixty-four clients ask for what there is room for once."""
    with load(server.url, rate=None, connections=64):
        yield


@contextmanager
def crowd(server: Server, models: Path) -> Iterator[None]:
    """Have as many clients ask as there is room for, whose line is longer than the promised time."""
    with load(server.url, rate=None, connections=200):
        yield


@contextmanager
def pauses(server: Server, models: Path) -> Iterator[None]:
    """Stop the process for most of each second, as a machine that is overcommitted does."""
    ended = threading.Event()

    def pause() -> None:
        while not ended.is_set():
            os.kill(server.pid, signal.SIGSTOP)
            time.sleep(PAUSE_S)
            os.kill(server.pid, signal.SIGCONT)
            ended.wait(RUN_S)

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def killed_workers(server: Server, models: Path) -> Iterator[None]:
    """Kill a worker again and again, four times."""
    for _ in range(4):
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        time.sleep(3.0)
    yield


@contextmanager
def nothing_ready(server: Server, models: Path) -> Iterator[None]:
    """Take the only model's folder away; put it back."""
    there, away = models / "cifar10-article", models.parent / "away"
    there.rename(away)
    yield
    away.rename(there)


WAYS: dict[str, Broken] = {
    "altered-version": Broken(frozenset({"ConvoyReloadFailed", "ConvoyModelFailed"}), {"watch_s": 1}, altered_version),
    "refusals": Broken(
        frozenset({"ConvoyErrorBudgetBurn", "ConvoyRefusing"}), {"max_inflight_images": 1}, more_clients_than_room
    ),
    "crowd": Broken(frozenset({"ConvoyLatencyBudgetBurn"}), {"slo_ms": 10}, crowd),
    # Who is kept waiting by a process that stands still has not been seen by it yet, so few requests count as slow.
    "pauses": Broken(frozenset({"ConvoyEventLoopLate"}), {}, pauses),
    "killed-workers": Broken(frozenset({"ConvoyRestarts"}), {"workers": 2}, killed_workers),
    "nothing-ready": Broken(frozenset({"ConvoyNoneReady"}), {"watch_s": 1}, nothing_ready),
}


@contextmanager
def service(folder: Path, settings: dict[str, object]) -> Iterator[tuple[Server, Path]]:
    """Run a service over a models directory of its own."""
    models = models_in(folder)
    with serving(models, {"access_log": False} | settings) as server:
        yield server, models


def plan(url: str, seconds: float) -> Plan:
    """Return a constant load, whose own figures are compared with Prometheus's."""
    endpoint = Endpoint.of(url, "")
    return Plan(
        endpoint,
        build_requests(endpoint, read_bodies(image_files([IMAGES]))),
        connections=64,
        rate=RATE,
        seconds=seconds,
        warm_up_s=5,
    )
