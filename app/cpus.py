"""How many processors this process may really use, and what machine this is.

Affinity and control-group quotas, versions 1 and 2; the host's count only bounds them. ONNX Runtime looks at neither
(measured: 2 threads under `taskset -c 0`), so every thread count of the service starts here.
"""

import math
import os
import platform
import threading
from contextlib import suppress
from pathlib import Path

COMPUTING_NICENESS = int(os.environ.get("XNICE", "5"))
CGROUP_ROOT = Path("/sys/fs/cgroup")


def usable_cpus(cgroup_root: Path = CGROUP_ROOT) -> int:
    """Return the number of processors to plan threads for: at least 1, quota rounded up, never above the affinity."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(cgroup_root)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def cgroup_quota(root: Path = CGROUP_ROOT) -> float | None:
    """Return the control group's CPU quota in processors (1.5 = one and a half), or None where there is none."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        microseconds = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period_microseconds = int((root / "cpu" / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return None if microseconds <= 0 else microseconds / period_microseconds


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
