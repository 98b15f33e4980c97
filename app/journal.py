"""What is known of a request, whatever it came by, and what is written down when it is over: metrics, one log line.

A front makes a `Trace` when a request begins; whoever works on it leaves there what is learned (model, images, error
code). Nothing here decides anything.
"""

import itertools
import logging
import random
import re
import secrets
import time
from dataclasses import dataclass

from app.metrics import Metrics, ModelMetrics
from app.tracing import Marks, Story, Tracer

log = logging.getLogger("convoy.access")

CLIENT_GONE = 499
"""Not sent to anybody: counted for clients that disconnect before their answer (nginx's number for it)."""
WENT_WRONG = 400
MAX_PATH = 1024
"""Characters of a path that log and spans have: whoever asks chooses its length."""
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
        trace_id: of the distributed trace that it is part of, 32 hexadecimal digits; empty: of none.
        marks: what it notes for its spans; None: it is not sampled.
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
    trace_id: str = ""
    marks: Marks | None = None

    def wrote(self, metrics: ModelMetrics, started: float) -> None:
        """Count the time since `started` as that of writing the answer."""
        now = time.monotonic()
        metrics.post.observe(now - started)
        if self.marks is not None:
            self.marks.post_at, self.marks.posted_at = started, now

    @property
    def ids(self) -> dict[str, object]:
        """What every line of the log about this request has."""
        ids: dict[str, object] = {"request_id": self.request_id}
        if self.trace_id:
            ids["trace_id"] = self.trace_id
        return ids


class Journal:
    """Counts, times, logs and traces requests that are over."""

    def __init__(
        self, metrics: Metrics, access_log: bool, access_log_ratio: float = 1.0, tracer: Tracer | None = None
    ) -> None:
        """Begin.

        Args:
            metrics: where requests are counted.
            access_log: whether requests get a line in the log.
            access_log_ratio: share of those that do, 0 to 1, of requests that went well; the others all do.
            tracer: samples requests and takes what they note; None: nobody asked for tracing.
        """
        self._metrics = metrics
        self._access_log = access_log
        self._access_log_ratio = access_log_ratio
        self.tracer = tracer

    def record(self, trace: Trace, method: str, path: str, *, quiet: bool = False) -> None:
        """Write down a request that is over; `quiet`: without a line in the log, and without spans."""
        ended = time.monotonic()
        seconds = ended - trace.started
        path = path[:MAX_PATH]
        route = trace.route
        self._metrics.requests.labels(trace.model, trace.version, route, trace.status).inc()
        labels = trace.model, route, trace.version, trace.status
        self._metrics.request_duration.labels(*labels).observe(seconds)
        # Counted when it happens: a bucket that ends at the promise would be another one when the promise is.
        self._metrics.slow.labels(trace.model, route).inc(seconds > self._metrics.slo_s)
        if trace.code and trace.status not in _FAILED_INSIDE:
            self._metrics.rejected.labels(trace.model, trace.code).inc()
        if trace.marks is not None and not quiet:
            self._metrics.keep_exemplars(trace.marks.trace_id, labels, seconds, trace.marks.stage_seconds())
            trace.marks.end(_story_of(trace, trace.marks, method, path, ended))
        if self._access_log and not quiet and self._is_worth_a_line(trace):
            fields = trace.ids | {
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

    def _is_worth_a_line(self, trace: Trace) -> bool:
        ratio = self._access_log_ratio
        return ratio >= 1 or trace.status >= WENT_WRONG or random.random() < ratio


def _story_of(trace: Trace, marks: Marks, method: str, path: str, ended: float) -> Story:
    return Story(
        marks=marks,
        method=method,
        path=path,
        route=trace.route,
        started=trace.started,
        ended=ended,
        status=trace.status,
        code=trace.code,
        request_id=trace.request_id,
        model=trace.model,
        version=trace.version,
        rows=trace.images,
    )


def id_for(wanted: bytes | None) -> str:
    """Return the id that a client wants where it is short printable ASCII, else a new one."""
    if wanted is not None and _GOOD_ID.fullmatch(wanted):
        return wanted.decode()
    return f"{_ID_START}{next(_ids):012x}"
