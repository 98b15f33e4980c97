"""One real pod under real load, and what a real Prometheus answers to the autoscalers' queries meanwhile.

Owns the load. A pod here is a `convoy serve` bound to one processor; the load generator and Prometheus take the others.
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.bench.load import Plan, measure, new_runner, run_load
from app.bench.report import Report
from app.bench.requests import Endpoint, build_requests, read_bodies
from app.bench.server import Server, serving
from app.cpus import machine
from app.offline import image_files
from benchmarks.autoscaling.manifests import adapter_query, keda_query
from benchmarks.others import Others
from benchmarks.watch.prometheus import Prometheus, watching

MODEL = Path(__file__).parents[2] / "models/imagenet/1"
POD = {"namespace": "convoy", "pod": "convoy-0"}
CAPACITY_S, LEVEL_S = 20.0, 30.0
QUIET_S = 65.0
"""After which no window of the queries holds what was before."""
LEVELS = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.6, 2.4)
"""Requests a second offered, over what a closed loop gets."""
STREAMS = 12
"""A demand is so many clients of slightly different rates: together their requests come almost as by chance, while the
load generator's own are evenly spaced, which no queue would mind."""
CONNECTIONS = 12
"""Of each stream: the queue that the pod allows, a second's work, has room in them."""
RAMP_STEP_S = 20.0


@dataclass(frozen=True)
class Stretch:
    """A part of a demand: from one rate to another, over the capacity."""

    seconds: float
    begin: float
    end: float


SHAPE = (
    Stretch(60, 0.15, 0.15),
    Stretch(120, 0.15, 0.9),
    Stretch(60, 0.9, 0.9),
    Stretch(60, 0.4, 0.4),
    Stretch(30, 2.0, 2.0),
    Stretch(60, 0.4, 0.4),
    Stretch(60, 0.75, 0.75),
    Stretch(60, 0.1, 0.1),
)
"""Quiet, a ramp, a plateau, a step down, a burst beyond what the pod can do, a step up, quiet."""

# By name of the column: what is asked of Prometheus for each second.
QUERIES: dict[str, Callable[[], str]] = {
    "keda": keda_query,
    "adapter": lambda: adapter_query(**POD),
    "inflight": lambda: "sum(convoy_inflight_requests)",
    "busy_s": lambda: 'sum(convoy_request_duration_seconds_sum{model!=""})',
    "ran": lambda: 'sum(convoy_stage_duration_seconds_count{stage="infer"})',
    "refused": lambda: 'sum(convoy_rejected_total{reason=~"overloaded|queue_full|too_late"}) or vector(0)',
}


def record() -> dict[str, Any]:
    """Return the recording: capacity, a stair of rates, and a demand's shape, with every query's value each second."""
    with (
        Others() as others,
        tempfile.TemporaryDirectory(prefix="convoy-models-") as folder,
        watching(scrape_s=1, evaluate_s=15) as prometheus,
        _pod(Path(folder)) as (server, start_s),
    ):
        prometheus.scrape("convoy", server.url, POD)
        requests = _requests(server.url)
        capacity = measure(_plan(server.url, requests, None, CAPACITY_S)).requests_per_s
        stair = [Stretch(LEVEL_S, level, level) for level in LEVELS]
        parts = {name: _play(prometheus, server.url, requests, capacity, shape) for name, shape in
                 (("stair", stair), ("shape", SHAPE))}  # fmt: skip
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "others_cpus": others.cpus,
        "model": "imagenet",
        "start_s": round(start_s, 1),
        "capacity_per_s": round(capacity, 2),
        "queries": {name: query() for name, query in QUERIES.items()},
    } | parts


@contextmanager
def _pod(folder: Path) -> Iterator[tuple[Server, float]]:
    """Run the service on the first of this process's processors, and this process on the others."""
    processors = sorted(os.sched_getaffinity(0))
    shutil.copytree(MODEL, folder / "models/imagenet/1")
    os.sched_setaffinity(0, processors[:1])
    began = time.monotonic()
    with serving(folder / "models", {"access_log": False}) as server:
        start_s = time.monotonic() - began
        os.sched_setaffinity(0, processors[1:] or processors)
        yield server, start_s
    os.sched_setaffinity(0, processors)


def _requests(url: str) -> list[bytes]:
    endpoint = Endpoint.of(url, "")
    return build_requests(endpoint, read_bodies(image_files([MODEL / "golden"])))


def _plan(url: str, requests: Sequence[bytes], rate: float | None, seconds: float) -> Plan:
    endpoint = Endpoint.of(url, "")
    if rate is None:
        return Plan(endpoint, requests, seconds=seconds)
    return Plan(endpoint, requests, connections=CONNECTIONS, rate=rate, seconds=seconds, warm_up_s=0.0)


def _play(
    prometheus: Prometheus, url: str, requests: Sequence[bytes], capacity: float, shape: Sequence[Stretch]
) -> dict[str, Any]:
    """Send a demand, and return what was sent and what Prometheus then answered, a row each second."""
    time.sleep(QUIET_S)
    began = time.time()
    with new_runner() as runner:
        reports = runner.run(_send(url, requests, capacity, shape))
    ended = time.time()
    columns = {name: _column(prometheus, query(), began, ended) for name, query in QUERIES.items()}
    return {"sent": reports, "seconds": columns}


async def _send(
    url: str, requests: Sequence[bytes], capacity: float, shape: Sequence[Stretch]
) -> list[dict[str, float]]:
    """Send stretch after stretch; the last answers of one are awaited while the next is under way."""
    begin = asyncio.get_running_loop().time()
    due_s = 0.0
    running: list[tuple[float, float, float, list[asyncio.Task[Report]]]] = []
    for rate, seconds in _steps(shape):
        await asyncio.sleep(begin + due_s - asyncio.get_running_loop().time())
        tasks = []
        for stream in range(STREAMS):
            # Between 0.89 and 1.11 of a twelfth, together a whole.
            share = (1 + 0.02 * (stream - (STREAMS - 1) / 2)) / STREAMS
            turned = [*requests[stream % len(requests) :], *requests[: stream % len(requests)]]
            plan = _plan(url, turned, rate * capacity * share, seconds)
            tasks.append(asyncio.create_task(run_load(plan)))
            await asyncio.sleep(0.013)
        running.append((due_s, rate, seconds, tasks))
        due_s += seconds
    sent = []
    for at_s, rate, seconds, tasks in running:
        reports = await asyncio.gather(*tasks)
        accepted = sum(report.requests_per_s for report in reports)
        latencies = [(report.latency_ms.mean, report.requests_per_s) for report in reports if report.latency_ms]
        mean_ms = sum(mean * weight for mean, weight in latencies) / max(1e-9, sum(weight for _, weight in latencies))
        sent.append({
            "at_s": at_s,
            "seconds": seconds,
            "offered_per_s": round(rate * capacity, 2),
            "accepted_per_s": round(accepted, 2),
            "mean_ms": round(mean_ms, 1),
        })  # fmt: skip
    return sent


def _steps(shape: Sequence[Stretch]) -> Iterator[tuple[float, float]]:
    """Yield rate and seconds of every step: a ramp is made of short ones."""
    for stretch in shape:
        if stretch.begin == stretch.end:
            yield stretch.begin, stretch.seconds
            continue
        count = round(stretch.seconds / RAMP_STEP_S)
        for step in range(count):
            yield stretch.begin + (stretch.end - stretch.begin) * (step + 0.5) / count, RAMP_STEP_S


def _column(prometheus: Prometheus, query: str, began: float, ended: float) -> list[float | None]:
    """Return a query's value for each second, None where it had none."""
    found = prometheus.over(query, began, ended, 1.0)
    assert len(found) <= 1, f"{query} has {len(found)} series"
    values = {round(float(at) - began): float(value) for at, value in (found[0]["values"] if found else [])}
    return [round(values[second], 4) if second in values else None for second in range(round(ended - began) + 1)]
