"""The load on a service, a closed loop: wrk, or where that is not installed the project's own generator in processes.

Knows nothing of models. A body that gets anything but 200 is no measurement, whichever of the two sends it.
"""

import multiprocessing
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from app.bench.load import Plan
from app.bench.load import measure as generate
from app.bench.report import Report
from app.bench.requests import Endpoint
from app.cpus import usable_cpus
from benchmarks.peers.load import NO_HEADERS, LoadError, measure, require_wrk

WARM_UP_S = 2.0
START_S = 60.0
"""Until all processes of the generator are there."""
OWN = "convoy bench, for wrk is not installed"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a service answered: a second, and after how many milliseconds."""

    per_s: float
    p50_ms: float
    p99_ms: float
    busiest: float = 0.0
    """Share of a processor that the busiest process of the generator took; 0: wrk does not tell. Near 1 the service may
    be able to do more."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one process of the generator saw; `fault` empty: every answer was 200."""

    per_s: float
    latency_ms: NDArray[np.float64]
    busy_share: float
    fault: str


def generator() -> str:
    """Return what sends the load here."""
    return OWN if shutil.which("wrk") is None else require_wrk()


def processes() -> int:
    """Return how many processors the load may take: a quarter, at most four."""
    return min(4, max(1, usable_cpus() // 4))


def load(
    url: str,
    body: bytes,
    connections: int,
    seconds: float,
    headers: Mapping[str, str] = NO_HEADERS,
    warm_up_s: float = WARM_UP_S,
) -> Loaded:
    """Post a body over and over, and return what was answered after the warm-up.

    Raises:
        LoadError: an answer was not 200, or a connection broke.
    """
    count = min(processes(), connections)
    if shutil.which("wrk") is None:
        return _own(url, body, connections, seconds, headers, warm_up_s, count)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "body"
        file.write_bytes(body)
        if warm_up_s:
            measure(url, [file], connections, warm_up_s, headers, count)
        found = measure(url, [file], connections, seconds, headers, count)
        return Loaded(found.per_s, found.p50_ms, found.p99_ms)


def _own(
    url: str, body: bytes, connections: int, seconds: float, headers: Mapping[str, str], warm_up_s: float, count: int
) -> Loaded:
    parts = urlsplit(url)
    endpoint = Endpoint(parts.hostname or "", parts.port or 80, parts.path)
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(count)
    shares = [connections // count + (number < connections % count) for number in range(count)]
    plans = [
        Plan(endpoint, [request(endpoint, body, headers)], 1, share, None, seconds, warm_up_s, 30.0) for share in shares
    ]
    with ProcessPoolExecutor(count, spawn, initializer=_adopt, initargs=(barrier,)) as pool:
        return joined(list(pool.map(_generate, plans)))


def joined(parts: list[Part]) -> Loaded:
    """Return the figures of all processes together.

    Raises:
        LoadError: one of them says why they are none.
    """
    fault = next((part.fault for part in parts if part.fault), "")
    latencies = np.concatenate([part.latency_ms for part in parts])
    if fault or not latencies.size:
        raise LoadError(fault or "nothing was answered")
    p50, p99 = np.quantile(latencies, [0.5, 0.99], method="inverted_cdf")
    busiest = max(part.busy_share for part in parts)
    return Loaded(sum(part.per_s for part in parts), float(p50), float(p99), busiest)


def request(endpoint: Endpoint, body: bytes, headers: Mapping[str, str]) -> bytes:
    """Return a whole HTTP/1.1 request."""
    named = {"Host": f"{endpoint.host}:{endpoint.port}", "Content-Type": "image/jpeg"} | dict(headers)
    named["Content-Length"] = str(len(body))
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"POST {endpoint.path} HTTP/1.1\r\n{lines}\r\n".encode() + body


_barrier: Any = None


def _adopt(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _generate(plan: Plan) -> Part:
    """Run a plan when all processes are there: so each of them takes exactly one."""
    _barrier.wait(START_S)
    report = generate(plan)
    observed = report.observed
    return Part(
        report.requests_per_s, observed.latency_ms[observed.status == 200], report.generator.busy_share, _fault(report)
    )


def _fault(report: Report) -> str:
    """Return in a few words which answers were not 200; empty: all were."""
    statuses, errors = [(429, report.rejected), *report.statuses.items()], report.errors.items()
    told = {str(kind): count for kind, count in [*statuses, *errors, ("unanswered", report.unanswered)] if count}
    said = next(iter(report.first_bodies.values()), "")[:200]
    return f"besides {report.accepted} right answers: {told} {said}".strip() if told else ""
