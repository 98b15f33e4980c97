"""A steady beat for the open loop, as fine as the kernel has it.

uvloop's and asyncio's own timers count whole milliseconds, which would be in every latency of a small model.
"""

import asyncio
import ctypes
import math
import os
import sys
import time
from collections.abc import Callable

_COARSE_S = 0.001


class Ticker:
    """Calls `tick` at least once in `interval_s`, as long as the loop has time; late beats are not made up for."""

    def __init__(self, interval_s: float, tick: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._interval_s = interval_s
        self._tick = tick
        self._timer: asyncio.TimerHandle | None = None
        self._file = _timer_file(interval_s) if sys.platform == "linux" else -1
        if self._file >= 0:
            self._loop.add_reader(self._file, self._on_file)
        else:
            self._on_timer()

    def close(self) -> None:
        """Stop; no call comes afterwards."""
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1
        if self._timer is not None:
            self._timer.cancel()

    def _on_file(self) -> None:
        os.read(self._file, 8)
        self._tick()

    def _on_timer(self) -> None:
        self._timer = self._loop.call_later(max(self._interval_s, _COARSE_S), self._on_timer)
        self._tick()


def _timer_file(interval_s: float) -> int:
    """Return a file that becomes readable every `interval_s`, or -1: timerfd_create(2), which `os` has since 3.13."""
    libc = ctypes.CDLL(None, use_errno=True)
    file: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    fraction, whole = math.modf(max(interval_s, 1e-6))
    period = (int(whole), int(fraction * 1e9))
    # struct itimerspec: the interval, then the first beat, each as seconds and nanoseconds.
    spec = (ctypes.c_long * 4)(*period, *period)
    if file >= 0 and libc.timerfd_settime(file, 0, ctypes.byref(spec), None) < 0:
        os.close(file)
        return -1
    return file
