"""A CPU quota: the service plans for what it may use, and what it may use less of costs no more than that."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.cpus import usable_cpus
from benchmarks.survival.material import PHOTO
from benchmarks.survival.overload import capacity_and_p99, p99_of
from benchmarks.survival.rows import Finding
from benchmarks.survival.service import Service, serving

CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
QUOTAS = (0.5, 1.5)
PERIOD_US = 100_000
SLACK = 2.0
"""How much worse than in proportion the p99 may be: throttling stops every thread for what is left of a period."""


def run(seconds: float = 5.0) -> Finding:
    """Measure capacity and p99 at 0.8 of it without a quota and under each."""
    finding = Finding()
    try:
        with _group(1.0):
            pass
    except OSError as error:
        finding.skipped = f"no control group of version 1 with a CPU quota can be made here: {error}"
        return finding
    cpus = usable_cpus()
    with serving() as service:
        closed, normal = capacity_and_p99(service.url, 4 * cpus, seconds)
    free_p99_ms, free_capacity = p99_of(normal), closed.requests_per_s
    finding.told("no quota: capacity", free_capacity, "requests/s")
    finding.told("no quota: p99 at 0.8 of capacity", free_p99_ms, "ms")
    finding.evidence["none"] = {"closed": closed.to_json()["latency_ms"], "normal": normal.to_json()["latency_ms"]}
    for quota in QUOTAS:
        planned = min(cpus, -(-quota // 1))
        with _group(quota) as group, serving(group=group) as service:
            sessions, decoders = _threads(service)
            before = _throttling(group)
            closed, normal = capacity_and_p99(service.url, max(3, round(4 * quota)), seconds)
            after = _throttling(group)
        share = min(quota / cpus, 1.0)
        name = f"quota {quota:g}"
        finding.exactly(f"{name}: sessions of a model", sessions, planned)
        finding.exactly(f"{name}: processors planned for", decoders, planned)
        finding.told(f"{name}: capacity", closed.requests_per_s, "requests/s")
        finding.told(
            f"{name}: capacity ÷ capacity without, in proportion", closed.requests_per_s / free_capacity / share
        )
        finding.told(f"{name}: p99 at 0.8 of its capacity", p99_of(normal), "ms")
        finding.at_most(f"{name}: p99 ÷ p99 without, in proportion", p99_of(normal) / (free_p99_ms / share), SLACK)
        periods = max(1, after["nr_periods"] - before["nr_periods"])
        finding.told(f"{name}: share of periods throttled", (after["nr_throttled"] - before["nr_throttled"]) / periods)
        finding.evidence[name] = {
            "closed": closed.to_json()["latency_ms"],
            "normal": normal.to_json()["latency_ms"],
            "rejected": [closed.rejected, normal.rejected],
            "throttling": {key: after[key] - before[key] for key in after},
        }
    return finding


@contextmanager
def _group(quota: float) -> Iterator[Path]:
    """Make a control group with that CPU quota, in processors.

    Raises:
        OSError: it cannot be made here.
    """
    group = CPU_GROUPS / f"convoy-survival-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(round(quota * PERIOD_US)))
        yield group
    finally:
        group.rmdir()


def _threads(service: Service) -> tuple[int, int]:
    """Return the sessions of the photo model, and the processors that the service says it plans for."""
    sessions = sum(
        series.startswith("convoy_session_busy_seconds_total") and f'model="{PHOTO}"' in series
        for series in service.metrics()
    )
    return sessions, int(service.lines("ready")[0]["cpus"])


def _throttling(group: Path) -> dict[str, int]:
    """Return the kernel's counts: periods, those in which the group was stopped, and for how many nanoseconds."""
    return {name: int(value) for name, value in map(str.split, (group / "cpu.stat").read_text().splitlines())}
