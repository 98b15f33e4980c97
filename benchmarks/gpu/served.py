"""What the service gets of the device over HTTP, and what kept it from getting more."""

import multiprocessing
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.cpus import usable_cpus
from app.images import decode
from app.manifest import Bundle, PixelRecipe
from app.sessions import ClassifierSession
from benchmarks.gpu.bench import SIZES, Bench
from benchmarks.gpu.load import Loaded, load
from benchmarks.peers.runners.task import Task as PeerTask
from benchmarks.peers.scenarios import IMAGES, ROOT, Setting
from benchmarks.peers.servers import RUNNERS, PeerError, peer
from benchmarks.peers.servers import serving as peer_serving
from benchmarks.survival.rows import growth_of
from benchmarks.survival.service import Service, cpu_s
from convoy.tensors import LENGTH_HEADER, pack

PROVIDER = "PEER_PROVIDER"
"""What the peers' runners read."""
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
PEERS = ("litserve", "mosec")
PEER_SETTING = Setting(workers=2, batch=32, wait_ms=1)
PEER_CONNECTIONS = 128
TRIAL_S = 120.0
SAMPLES = 1000
"""Least requests for a p99."""
START_S = 60.0
LOOK_S = 0.5


def photos(bench: Bench) -> None:
    """Measure encoded photos, and how busy the device and the processors were with them."""
    image, name = IMAGES["web.jpg"](), bench.served.manifest.name
    decoding = None
    try:
        decoding = decode_ceiling(image, bench.served.manifest.pixels, bench.workers, bench.seconds)
        bench.finding.told(f"decoded on {bench.workers} processors, the service's", decoding, "images/s")
    except Exception as error:
        bench.finding.left_out("decoding alone", error)
    with bench.service() as service:
        found = _throughput(bench, service, f"/models/{name}/predict", image, {})
    bounds = [bound for bound in (bench.best, decoding) if bound]
    if len(bounds) == 2:
        bench.finding.at_least("÷ the smaller ceiling, device or decoding", found.per_s / min(bounds), 0.9)


def tensors(bench: Bench) -> None:
    """Measure raw pixels over binary V2."""
    name = bench.served.manifest.name
    pixels = decode(IMAGES["web.jpg"](), bench.served.manifest.pixels)
    body, json_length = pack({"image": pixels[None]})
    headers = {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(json_length)}
    with bench.service() as service:
        found = _throughput(bench, service, f"/v2/models/{name}/infer", body, headers)
    if bench.best:
        bench.finding.at_least("÷ ceiling of the device", found.per_s / bench.best, 0.8)


def _throughput(bench: Bench, service: Service, path: str, body: bytes, headers: Mapping[str, str]) -> Loaded:
    """Measure a closed loop, and tell what it took."""
    load(service.url + path, body, bench.connections, 2, headers, 0)
    before, cpu_before = service.metrics(), sum(map(cpu_s, service.pids()))
    with Utilization(service) as utilization:
        found = load(service.url + path, body, bench.connections, bench.seconds, headers, 0)
    growth = growth_of(before, service.metrics())
    told = bench.finding.told
    told("requests a second", found.per_s, "requests/s")
    told("p99", found.p99_ms, "ms")
    if found.busiest:
        told("busiest process of the generator; near 1: the service may do more", found.busiest, "processors")
    _tell_busy(bench, growth, sum(map(cpu_s, service.pids())) - cpu_before, found.per_s)
    if utilization.seen:
        told("share of time in which the GPU ran something, median", statistics.median(utilization.seen))
    return found


def _tell_busy(bench: Bench, growth: Mapping[str, float], spent_s: float, per_s: float) -> None:
    """Tell how many sessions and processors were busy: their time for an image, times images a second.

    So no time before the first request or after the last is in a share.
    """
    told, rows = bench.finding.told, max(1.0, total(growth, "convoy_batch_size_sum"))
    sessions = sum(key.startswith("convoy_session_busy_seconds_total") for key in growth)
    told(f"busy of {sessions} sessions", total(growth, "convoy_session_busy_seconds_total") / rows * per_s, "sessions")
    told("of these copying", total(growth, "convoy_session_copy_seconds_total") / rows * per_s, "sessions")
    told(f"busy with the service, of {usable_cpus()} processors", spent_s / rows * per_s, "processors")
    shares = {key: value for key, value in growth.items() if key.startswith("process_cpu_seconds_total")}
    bench.finding.note("processors", {key: round(value / rows * per_s, 2) for key, value in shares.items()})
    told("rows of padding ÷ images", total(growth, "convoy_padding_rows_total") / rows)
    told("rows of a run, mean", rows / max(1.0, total(growth, "convoy_batch_size_count")), "rows")


class Utilization:
    """What NVML says of the GPU, looked at every half second while a block runs."""

    def __init__(self, service: Service) -> None:
        self.seen: list[float] = []
        self._service = service
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_loop, daemon=True)

    def __enter__(self) -> "Utilization":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look_loop(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                found = self._service.metrics()
            except OSError:  # a service under load may be late
                continue
            self.seen += [value for key, value in found.items() if key.startswith("convoy_gpu_utilization_ratio")]


def total(samples: Mapping[str, float], name: str) -> float:
    """Return the sum of a family's series."""
    return sum(value for key, value in samples.items() if key.partition("{")[0] == name)


def decode_ceiling(image: bytes, recipe: PixelRecipe, processors: int, seconds: float) -> float:
    """Return images a second of nothing but decoding, in so many processes."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(processors)
    with ProcessPoolExecutor(processors, spawn, initializer=_adopt, initargs=(barrier,)) as pool:
        return sum(pool.map(_decode_for, *zip(*[(image, recipe, seconds)] * processors, strict=True)))


_barrier: Any = None


def _adopt(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _decode_for(image: bytes, recipe: PixelRecipe, seconds: float) -> float:
    decode(image, recipe)
    _barrier.wait(START_S)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        decode(image, recipe)
        count += 1
    return count / elapsed


def one(bench: Bench) -> None:
    """Measure one photo on an idle service."""
    image = IMAGES["web.jpg"]()
    try:
        bare_ms = _bare(bench, image)
        bench.finding.told("bare decode and run, p50", float(np.quantile(bare_ms, 0.5)), "ms")
        bench.finding.told(f"bare decode and run, p99 of {len(bare_ms)}", float(np.quantile(bare_ms, 0.99)), "ms")
    except Exception as error:
        bench.finding.left_out("bare decode and run", error)
    with bench.service(workers=1) as service:
        url = f"{service.url}/models/{bench.served.manifest.name}/predict"
        rate = load(url, image, 1, 1, warm_up_s=1).per_s
        seconds = min(3.0 * bench.seconds, max(float(bench.seconds), SAMPLES / rate))
        found = load(url, image, 1, seconds, warm_up_s=0)
    bench.finding.told("served, p50", found.p50_ms, "ms")
    bench.finding.told(f"served, p99 of {found.per_s * seconds:.0f}", found.p99_ms, "ms")


def _bare(bench: Bench, image: bytes) -> list[float]:
    """Return the milliseconds of each decode and run, warmed up: enough for a p99, or as many as the time allows."""
    session = ClassifierSession(bench.served.model_path, bench.device, usable_cpus())
    session.bind(SIZES)
    taken: list[float] = []
    until = time.perf_counter() + 3 * bench.seconds
    for number in range(SAMPLES + 50):
        started = time.perf_counter()
        session.classify(decode(image, bench.served.manifest.pixels)[None])
        taken.append((time.perf_counter() - started) * 1000)
        if time.perf_counter() > until and number > 60:
            break
    return taken[50:]


def peers(bench: Bench) -> None:
    """Measure the servers that others made, on the same graph and device."""
    if not PEERS_PYTHON.exists():
        raise PeerError("There is no environment for them: make bench-peers makes it.")
    image = IMAGES["web.jpg"]()
    label = bench.served.manifest.labels[int(_cpu_answer(bench.served, image).argmax())]
    provider = "CPUExecutionProvider" if bench.device == "cpu" else "CUDAExecutionProvider"
    rates = {}
    with peers_told(provider):
        try_runner(PEERS_PYTHON, bench.served)
        for name in PEERS:
            launch = peer(name, PEERS_PYTHON, bench.served, PEER_SETTING, "plain")
            try:
                with peer_serving(launch, [(image, label)]) as url:
                    rates[name] = load(url, image, PEER_CONNECTIONS, bench.seconds).per_s
            except Exception as error:
                bench.finding.left_out(name, error)
                continue
            bench.finding.told(name, rates[name], "requests/s")
    if not rates:
        raise PeerError("None of them could be measured.")
    with bench.service() as service:
        url = f"{service.url}/models/{bench.served.manifest.name}/predict"
        own = load(url, image, bench.connections, bench.seconds).per_s
    bench.finding.told("Convoy", own, "requests/s")
    bench.finding.at_least("Convoy ÷ the better", own / max(rates.values()), 2.0)


@contextmanager
def peers_told(provider: str) -> Iterator[None]:
    """Have the peers' runners use this provider, in a block."""
    os.environ[PROVIDER] = provider
    try:
        yield
    finally:
        del os.environ[PROVIDER]


def try_runner(python: Path, bundle: Bundle) -> None:
    """Have the peers' session made and run once without their servers, which may start failing workers for ever.

    Raises:
        PeerError: it does not run, or not in the provider that is wanted; the message is what it said last.
    """
    task = PeerTask(bundle.directory, "plain", 0, 1, 1, 0, 0)
    done = subprocess.run(
        [python, RUNNERS / "classifier.py"],
        env=os.environ | task.environment() | {"PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=TRIAL_S,
        check=False,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"it ended with {done.returncode}"]
        raise PeerError(f"The peers' session cannot be measured: {said[-1][:500]}")


def _cpu_answer(bundle: Bundle, image: bytes) -> NDArray[np.float32]:
    session = ClassifierSession(bundle.model_path, "cpu", usable_cpus())
    answer: NDArray[np.float32] = session.classify(decode(image, bundle.manifest.pixels)[None])[0]
    return answer
