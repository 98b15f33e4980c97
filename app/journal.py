"""What is known of a request, whatever it came by, and what is written down when it is over: metrics, one log line.

A front makes a `Trace` when a request begins; whoever works on it leaves there what is learned (model, images, error
code). Nothing here decides anything.
"""

import itertools
import logging
import re
import secrets
import time
from dataclasses import dataclass

from app.metrics import Metrics

log = logging.getLogger("convoy.access")

CLIENT_GONE = 499
"""Not sent to anybody: counted for clients that disconnect before their answer (nginx's number for it)."""
BROKEN = "Something broke inside; the log has it under this request's id."

_GOOD_ID = re.compile(rb"[\x21-\x7e]{1,128}")
# Unique over processes by 80 random bits, and in this one by counting: a fifth of the cost of a UUID.
_ID_START = secrets.token_hex(10)
_ids = itertools.count()
_FAILED_INSIDE = frozenset({500, 504})
"""Statuses of requests that were admitted: not refusals, so not in `convoy_rejected_total`."""


@dataclass(slots=True)
class Trace:
    """One request, as metrics and log see it.

    Attributes:
        request_id: the client's own, or a new one.
        started: when it came, `time.monotonic()`.
        route: HTTP's path template, or the full name of a gRPC method.
        model, version, images: what was found out.
        status: HTTP's number for how it ended, on every protocol.
        code: the fault's; empty where there was none.
        key: name of the key that it came with; the key itself is in no log.
    """

    request_id: str
    started: float
    route: str = ""
    model: str = ""
    version: str = ""
    images: int = 0
    status: int = CLIENT_GONE
    code: str = ""
    key: str = ""


class Journal:
    """Counts, times and logs requests that are over."""

    def __init__(self, metrics: Metrics, access_log: bool) -> None:
        self._metrics = metrics
        self._access_log = access_log

    def record(self, trace: Trace, method: str, path: str, *, quiet: bool = False) -> None:
        """Write down a request that is over; `quiet`: without a line in the log."""
        seconds = time.monotonic() - trace.started
        route = trace.route
        self._metrics.requests.labels(trace.model, trace.version, route, trace.status).inc()
        self._metrics.request_duration.labels(trace.model, route, trace.version, trace.status).observe(seconds)
        if trace.code and trace.status not in _FAILED_INSIDE:
            self._metrics.rejected.labels(trace.model, trace.code).inc()
        if self._access_log and not quiet:
            fields: dict[str, object] = {
                "request_id": trace.request_id,
                "method": method,
                "path": path,
                "status": trace.status,
                "ms": round(seconds * 1000, 2),
            }
            if trace.model:
                fields |= {"model": trace.model, "images": trace.images}
            if trace.key:
                fields["key"] = trace.key
            if trace.code:
                fields["code"] = trace.code
            log.info("request", extra=fields)


def id_for(wanted: bytes | None) -> str:
    """Return the id that a client wants where it is short printable ASCII, else a new one."""
    if wanted is not None and _GOOD_ID.fullmatch(wanted):
        return wanted.decode()
    return f"{_ID_START}{next(_ids):012x}"
