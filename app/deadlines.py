"""Deadlines: one timer for all that wait, whatever waits. Used on the event loop only."""

import asyncio
import math
import time
from typing import Protocol


class Stay(Protocol):
    """Whatever has a deadline."""

    deadline: float
    """`time.monotonic()`, seconds."""

    def expire(self) -> None:
        """End: the deadline has passed."""
        ...


class Deadlines:
    """Ends the stays whose deadline passes, with one timer for all instead of one that is set and unset a request.

    Most requests have the same time to live, so the timer is set anew about once in that time.
    """

    def __init__(self) -> None:
        self._stays: set[Stay] = set()
        self._next = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stay: Stay) -> None:
        """Watch a stay."""
        self._stays.add(stay)
        if stay.deadline < self._next:
            self._set(stay.deadline)

    def remove(self, stay: Stay) -> None:
        """Watch it no longer; without any, the timer stays as it is, for the next ones."""
        self._stays.discard(stay)

    def _set(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = deadline
        # Never early: the loop rounds to whole milliseconds.
        wait_s = max(0.0, deadline - time.monotonic()) + 0.001
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._ring)

    def _ring(self) -> None:
        now = time.monotonic()
        late = [stay for stay in self._stays if stay.deadline <= now]
        self._stays.difference_update(late)
        self._next, self._timer = math.inf, None
        if self._stays:
            self._set(min(stay.deadline for stay in self._stays))
        for stay in late:
            stay.expire()
