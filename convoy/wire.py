"""What both shells tell httpx, and what its faults mean to the core."""

import re
from typing import Any

import httpx

from convoy.core import Lost, Send, is_loopback

CONNECT_TIMEOUT_S = 5.0
"""A host that is gone says nothing: to try again is better than to wait for it until the deadline."""
KEEP_ALIVE_S = 60.0
"""Less than the service's 75 s, so that no request meets a connection that is just being closed."""


def pool() -> httpx.Limits:
    """Return how connections are kept: as many as there are calls, for the next ones."""
    return httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S)


def trusts_environment(url: str) -> bool:
    """Return whether the usual proxy variables count: not on the way to this machine itself."""
    return not is_loopback(url)


def prepared(url: str, step: Send) -> dict[str, Any]:
    """Return the arguments of httpx for a request to the service at `url`."""
    request = step.request
    return {
        "method": request.method,
        "url": url + request.path,
        "headers": dict(request.headers),
        "content": request.body or None,
        "timeout": httpx.Timeout(step.timeout_s, connect=min(step.timeout_s, CONNECT_TIMEOUT_S)),
    }


def lost(error: httpx.RequestError) -> Lost:
    """Return what a fault of httpx is to the core. What it waits for lasts until the deadline, save the connecting."""
    late = isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout)
    reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)).strip().rstrip(".")
    return Lost(reason or type(error).__name__, late=late)
