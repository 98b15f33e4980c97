"""What both shells tell httpx, and what its faults mean to the core."""

import re
from collections.abc import Callable
from typing import Any

import httpx

from convoy.core import Lost, Send, is_loopback

CONNECT_TIMEOUT_S = 5.0
"""A host that is gone says nothing: to try again is better than to wait for it until the deadline."""
KEEP_ALIVE_S = 60.0
"""Less than the service's 75 s, so that no request meets a connection that is just being closed."""
_LEAST_S = 0.001
"""Zero would mean not to wait at all, not even for what is there."""


class Countdown(dict[str, float]):
    """The time limits of a request as httpx passes them down, each looked up when its wait begins: what is then left.

    Fixed ones would add up: so long to connect, as long again to send, and again for the first byte of the answer.
    """

    def __init__(self, clock: Callable[[], float], until: float) -> None:
        super().__init__()
        self._clock = clock
        self._until = until

    def get(self, name: str, default: object = None) -> float:
        """Return how long a wait of this kind (connect, read, write, pool) may take, seconds."""
        left_s = max(_LEAST_S, self._until - self._clock())
        return min(left_s, CONNECT_TIMEOUT_S) if name == "connect" else left_s


def pool() -> httpx.Limits:
    """Return how connections are kept: as many as there are calls, for the next ones."""
    return httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S)


def trusts_environment(url: str) -> bool:
    """Return whether the usual proxy variables count: not on the way to this machine itself."""
    return not is_loopback(url)


def prepared(url: str, step: Send, clock: Callable[[], float]) -> dict[str, Any]:
    """Return the arguments of httpx for a request to the service at `url`."""
    request = step.request
    return {
        "method": request.method,
        "url": url + request.path,
        "headers": dict(request.headers),
        "content": request.body or None,
        "extensions": {"timeout": Countdown(clock, clock() + step.timeout_s)},
    }


def lost(error: httpx.RequestError) -> Lost:
    """Return what a fault of httpx is to the core. What it waits for lasts until the deadline, save the connecting."""
    late = isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout)
    reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)).strip().rstrip(".")
    return Lost(reason or type(error).__name__, late=late)
