"""How many processors this process may really use, and what machine this is.

Affinity and control-group quotas, versions 1 and 2, of this process's group and of its parents; the host's count only
bounds them. ONNX Runtime looks at neither (measured: 2 threads under `taskset -c 0`), so every thread count of the
service starts here.
"""

import math
import os
import platform
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

COMPUTING_NICENESS = 5
"""Of 0 (as the event loop) to 19. Beside a busy stranger on the same processors it costs some of the computing."""
CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Throttling:
    """What a CPU quota has cost since the control group was made.

    Attributes:
        periods, throttled: periods (of 0.1 s, usually) in which it ran, and those in which it was halted.
        seconds: for how long, summed over processors.
    """

    periods: int
    throttled: int
    seconds: float


def usable_cpus(root: Path = CGROUP_ROOT, own_groups: Path = OWN_GROUPS) -> int:
    """Return the number of processors to plan threads for: at least 1, quota rounded up, never above the affinity."""
    return max(1, math.ceil(cpu_limit(root, own_groups)))


def share_of_cpus(workers: int) -> int:
    """Return the number of processors to plan for in one of so many processes: at least 1; 0: a process for each."""
    usable = usable_cpus()
    return max(1, usable // (workers or usable))


def cpu_limit(root: Path = CGROUP_ROOT, own_groups: Path = OWN_GROUPS) -> float:
    """Return what `usable_cpus` rounds up: processors, as in 1.5."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(float(affinity), cgroup_quota(root, own_groups) or math.inf)


def cgroup_quota(root: Path = CGROUP_ROOT, own_groups: Path = OWN_GROUPS) -> float | None:
    """Return the CPU quota in processors (1.5 = one and a half), or None where there is none.

    A group is also held by what its parents may use, so the smallest quota of all counts.

    Args:
        root: where the control groups are mounted.
        own_groups: the kernel's list of the groups that this process is in.
    """
    v2, v1 = _own_groups(root, own_groups)
    quotas = [*map(_quota_v2, v2), *map(_quota_v1, v1)]
    return min((quota for quota in quotas if quota is not None), default=None)


def throttling(root: Path = CGROUP_ROOT, own_groups: Path = OWN_GROUPS) -> Throttling | None:
    """Return what the CPU quota has cost, of the group on the way to this process that was halted longest."""
    groups = [group for version in _own_groups(root, own_groups) for group in version]
    found = [cost for cost in map(_throttling, groups) if cost is not None]
    return max(found, key=lambda cost: (cost.seconds, cost.periods), default=None)


def _own_groups(root: Path, own_groups: Path) -> tuple[list[Path], list[Path]]:
    """Return the directories of this process's groups and of their parents, of version 2 and of version 1."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        lines = []
    v2, v1 = [root], [root / "cpu"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            v2 += _groups(root, path)
        elif "cpu" in controllers.split(","):
            v1 += _groups(root / "cpu", path)
    return v2, v1


def _groups(mount: Path, path: str) -> list[Path]:
    """Return the directories of a group and of its parents below `mount`.

    In a container the mount is often the process's own group, and the path the host's: what is then looked for below
    the mount is not there, and the mount itself counts. Nor is a group above the mount, `/../…`, to be seen.
    """
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        return []
    return [mount.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]


def _quota_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(group: Path) -> float | None:
    try:
        microseconds = int((group / "cpu.cfs_quota_us").read_text())
        period_microseconds = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return None if microseconds <= 0 else microseconds / period_microseconds


def _throttling(group: Path) -> Throttling | None:
    try:
        fields = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
        nanoseconds = int(fields.get("throttled_time", 0)) or 1000 * int(fields.get("throttled_usec", 0))
        return Throttling(int(fields["nr_periods"]), int(fields["nr_throttled"]), nanoseconds / 1e9)
    except (OSError, ValueError, KeyError):
        return None


def machine() -> dict[str, str | int]:
    """Return what a reader of measured figures wants to know: `cpu`, `usable_cpus` and `python`."""
    return {"cpu": cpu_name(), "usable_cpus": usable_cpus(), "python": platform.python_version()}


def cpu_name() -> str:
    """Return the processor's name as Linux has it, elsewhere the machine's kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def step_back() -> None:
    """Have the scheduler prefer the event loop, and whatever else is short, to the calling thread, which computes."""
    with suppress(AttributeError, OSError):  # not Linux; or not allowed
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), COMPUTING_NICENESS)
