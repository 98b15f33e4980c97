"""How many processors others took while something was measured: whether its figures are worth keeping."""

import os
import time
from pathlib import Path
from typing import Self

STAT = Path("/proc/stat")


class Others:
    """Watches the machine in a `with` block; processes that were started in it must have ended before it does."""

    cpus: float | None = None
    """Processors that others took on average; None: not known yet, or not on this system."""

    def __enter__(self) -> Self:
        self._began, self._busy_s, self._own_s = time.monotonic(), busy_s(STAT), own_s()
        return self

    def __exit__(self, *_: object) -> None:
        if self._busy_s is not None and (busy := busy_s(STAT)) is not None:
            foreign = busy - self._busy_s - (own_s() - self._own_s)
            # Both clocks count in hundredths of a second, so nothing can come out as a little less than nothing.
            self.cpus = round(max(foreign, 0.0) / (time.monotonic() - self._began), 2)


def busy_s(stat: Path) -> float | None:
    """Return the processor seconds that the machine has spent on programs and on the system for them; None: unknown."""
    try:
        user, nice, system = map(int, stat.read_text().split(maxsplit=4)[1:4])
    except (OSError, ValueError):
        return None
    return (user + nice + system) / float(os.sysconf("SC_CLK_TCK"))


def own_s() -> float:
    """Return the processor seconds of this process and of those that it started and that have ended."""
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system
