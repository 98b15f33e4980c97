"""The memory of device and host through changing batches and hot swaps: what is held after the last as after the first.

Each swap is another version of the same bundle, put there whole; the service finds it, and says in its log that it is
ready. The next comes when its time has come and the last one is served: swaps are counted, not only asked for.
"""

import json
import math
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.manifest import MANIFEST_FILE
from benchmarks.gpu.bench import Bench, reason_of
from benchmarks.gpu.load import load
from benchmarks.peers.scenarios import IMAGES
from benchmarks.survival.service import Service

DURATION_S, SWAPS = 600.0, 20
DEVICE_GROWTH, HOST_GROWTH = 0.03, 0.05
START_S, END_S = 40.0, 40.0
"""Of its time, for a service to start; for it to make the last swap, and to end."""
LEAST_S = 30.0
LOOK_S = 0.5
SETTLE_S = 3.0
"""From a version that is served, until the one before it is gone."""
CALM_LOOKS = 4
"""Least number between two swaps."""
GRACE_S = 20.0
"""For the last swap to be made."""
BURST_S = 5.0


@dataclass(frozen=True, slots=True)
class Look:
    """What host and device held at a moment, bytes; calm: no swap was under way, nor had just been."""

    sizes: tuple[int, int]
    calm: bool


Held = Mapping[int, Sequence[Look]]
"""By how many swaps had been asked for."""


def memory(bench: Bench) -> None:
    """Watch the memory under load, through as many swaps as the time has room for."""
    until = time.monotonic() + bench.task.limit_s - END_S
    used = device_memory(bench)
    with tempfile.TemporaryDirectory(prefix="convoy-gpu-") as folder:
        models = Path(folder) / bench.served.manifest.name
        shutil.copytree(bench.served.directory, models / "1")
        with bench.service(models=models, watch_s=1) as service, loaded(bench, service) as fault:
            duration = min(DURATION_S * bench.seconds / 10, until - time.monotonic())
            if duration < LEAST_S:
                raise RuntimeError(f"{duration:.0f} s are left for it, too few to see anything grow.")
            wanted = max(2, round(SWAPS * duration / DURATION_S))
            held = watched(service, models, duration, wanted, used, fault)
            swaps = served_versions(service) - 1
    _judge(bench, held, swaps, wanted, duration)


def _judge(bench: Bench, held: Held, swaps: int, wanted: int, duration: float) -> None:
    """Compare what is held after the last swap with what is held after the first: that one may leave gaps behind."""
    finding = bench.finding
    finding.told("watched for", duration, "s")
    finding.at_least("swaps that the service made", swaps, wanted)
    calm = {count: calm_median(looks) for count, looks in held.items() if any(look.calm for look in looks)}
    finding.note("held_mb_by_swaps", {count: [round(size / 1e6, 1) for size in sizes] for count, sizes in calm.items()})
    first, last = min((count for count in calm if count), default=0), max(calm, default=0)
    if first == last:
        finding.note("growth", f"left out: {swaps} swaps leave nothing to compare")
        return
    everything = [look for looks in held.values() for look in looks]
    for what, index, bar in (("host", 0, HOST_GROWTH), ("device", 1, DEVICE_GROWTH)):
        early, late = calm[first][index], calm[last][index]
        if early:
            finding.told(f"{what}: held after {first}", early / 1e6, "MB")
            finding.told(
                f"{what}: held at most, old and new", max(look.sizes[index] for look in everything) / 1e6, "MB"
            )
            finding.at_most(f"{what}: growth from swap {first} to swap {last}", late / early - 1, bar)


def calm_median(looks: Sequence[Look]) -> tuple[float, float]:
    """Return the medians of what host and device held, bytes, of the later half of the calm looks: then it is warm."""
    calm = [look.sizes for look in looks if look.calm]
    host, device = zip(*calm[len(calm) // 2 :], strict=True)
    return statistics.median(host), statistics.median(device)


def device_memory(bench: Bench) -> Callable[[], int]:
    """Return what tells the bytes of the device that are taken; without NVML it says 0, and the entry says why."""
    try:
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetMemoryInfo(device)
    except Exception as error:
        bench.finding.left_out("device's memory", error)
        return lambda: 0
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(device).used)


@contextmanager
def loaded(bench: Bench, service: Service) -> Iterator[Callable[[], None]]:
    """Load the service in batches of changing sizes while a block runs; what the block gets raises the load's fault."""
    image = IMAGES["web.jpg"]()
    url = f"{service.url}/models/{bench.served.manifest.name}/predict"
    over, faults = threading.Event(), list[Exception]()

    def load_loop() -> None:
        connections = 1
        try:
            while not over.is_set():
                load(url, image, connections, BURST_S, warm_up_s=0)
                connections = connections * 3 % (bench.connections - 1) + 1
        except Exception as error:
            faults.append(error)

    def check() -> None:
        if faults:
            raise RuntimeError(f"The load ended: {reason_of(faults[0])}") from faults[0]

    thread = threading.Thread(target=load_loop, daemon=True)
    thread.start()
    try:
        yield check
    finally:
        over.set()
        thread.join(BURST_S + 40)
    check()


def watched(
    service: Service, models: Path, duration: float, wanted: int, used: Callable[[], int], check: Callable[[], None]
) -> Held:
    """Put another version there from time to time, and return what was held meanwhile."""
    held: dict[int, list[Look]] = {0: []}
    started, newest, calm_since = time.monotonic(), 1, -math.inf
    while (elapsed := time.monotonic() - started) < duration or (
        elapsed < duration + GRACE_S and not any(look.calm for look in held[newest - 1])
    ):
        check()
        served = served_versions(service) == newest
        calm_since = min(calm_since, elapsed) if served else math.inf
        looked = sum(look.calm for look in held[newest - 1]) >= CALM_LOOKS
        if looked and newest <= wanted and elapsed > newest * duration / (wanted + 1.5):
            put_version(models, newest + 1)
            if newest > 1:
                shutil.rmtree(models / str(newest - 1))
            newest += 1
            held[newest - 1] = []
            served, calm_since = False, math.inf
        held[newest - 1].append(Look((service.rss_bytes(), used()), served and elapsed - calm_since >= SETTLE_S))
        time.sleep(LOOK_S)
    return held


def put_version(models: Path, version: int) -> None:
    """Put the newest version there once more under another number, whole in one step."""
    source, half = models / str(version - 1), models / f".{version}"
    shutil.copytree(source, half)
    manifest = json.loads((half / MANIFEST_FILE).read_text())
    (half / MANIFEST_FILE).write_text(json.dumps({**manifest, "version": str(version)}))
    half.rename(models / str(version))


def served_versions(service: Service) -> int:
    """Return how many versions have become ready, as the service's log says."""
    return len({entry["version"] for entry in service.lines("model ready")})
