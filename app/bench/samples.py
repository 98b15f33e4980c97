"""What was observed of each request: when it was due, when it ended, and how."""

import time
from array import array
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

MOST_KEPT_BODY_BYTES = 2000

UNANSWERED = 0
"""The `status` of a request that had no answer when the run ended. A failed connection's is below 0."""


class Samples:
    """The requests of one run, as arrays of equal length; times are seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._due = array("d")
        self._done = array("d")
        self._status = array("h")
        self._reasons: list[str] = []
        self.first_bodies: dict[int, str] = {}
        """Of each status other than 200: what the first answer said."""
        self.retry_after = 0
        self.stage_sums_ms: defaultdict[str, float] = defaultdict(float)
        self.stage_answers = 0

    def __len__(self) -> int:
        return len(self._due)

    def add(self, due: float, status: int) -> None:
        """Note the end of the request that was due at `due`."""
        self._due.append(due)
        self._done.append(time.monotonic())
        self._status.append(status)

    def add_failure(self, due: float, reason: str) -> None:
        """Note a request that ended without an answer, because of its connection."""
        if reason not in self._reasons:
            self._reasons.append(reason)
        self.add(due, -1 - self._reasons.index(reason))

    def add_stages(self, server_timing: bytes) -> None:
        """Add up a Server-Timing header: `decode;dur=1.2, queue;dur=0.3`, durations in milliseconds."""
        for stage in server_timing.split(b","):
            name, _, duration = stage.partition(b";dur=")
            try:
                self.stage_sums_ms[name.strip().decode("latin-1")] += float(duration)
            except ValueError:  # a stage of some other service, without a duration
                continue
        self.stage_answers += 1

    def keep_body(self, status: int, body: bytes) -> None:
        """Keep what an answer with that status says, if it is the first one."""
        self.first_bodies.setdefault(status, body[:MOST_KEPT_BODY_BYTES].decode("utf-8", "replace").strip())

    def reason(self, status: int) -> str:
        """Return what ended a request whose `status` is below 0."""
        return self._reasons[-1 - status]

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int16]]:
        """Return due and done (s) and status of every request, in the order in which they ended."""
        return np.array(self._due), np.array(self._done), np.array(self._status, np.int16)
