"""Tracing on the hot path: which requests are sampled, and what a sampled one notes on its way.

A sampled request carries `Marks`: moments that its stages measure anyway, taken down where they are known. Spans are
made of them when the request is over, on a thread of their own, by a sink (`app/otlp.py`) of which this module knows
nothing more. Of a request that is not sampled, and of all where nobody asked for tracing, the stages see `None`.
"""

import logging
import random
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from app.cpus import step_back

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
"""How long something that is over waits until spans are made of it."""
CHUNK = 64
"""Requests and batches whose spans are made and sent together: some 400 spans."""
MAX_WAITING = 4096
"""Requests and batches that may wait; what comes beyond them is dropped and told of in the log."""
TELL_EVERY_S = 60.0
MAX_STATE_BYTES = 512
"""Of a caller's `tracestate`: what W3C has everybody pass on at least; a longer one is left out."""
CLOSE_S = 2.0
"""How long a drain waits for the last spans, whatever their receiver does."""

_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE, _NO_SPAN = b"0" * 32, b"0" * 16


def asked_by(environment: Mapping[str, str]) -> bool:
    """Tell whether OpenTelemetry's own variables name a collector, and a protocol that is spoken here."""
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    endpoint = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if endpoint and protocol not in (None, "", "http/protobuf"):
        log.warning("no traces: OTEL_EXPORTER_OTLP_PROTOCOL is another than http/protobuf; set CONVOY_TRACE_ENDPOINT")
        return False
    return bool(endpoint)


def is_switched_off(environment: Mapping[str, str]) -> bool:
    """Tell whether OpenTelemetry's own variables forbid traces, whoever asks for them."""
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return disabled or environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none"


@dataclass(frozen=True, slots=True)
class Parent:
    """The span of a caller, as W3C's `traceparent` has it.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: the caller's span.
        sampled: whether the caller records its part of the trace.
    """

    trace_id: str
    span_id: int
    sampled: bool


def parent_of(traceparent: bytes) -> Parent | None:
    """Read a `traceparent` (W3C Trace Context, level 2); None: it is none, and a trace begins here."""
    found = _PARENT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == b"ff" or (version == b"00" and rest) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return Parent(trace_id.decode(), int(span_id, 16), bool(int(flags, 16) & 1))


@dataclass(slots=True)
class Stay:
    """Rows of one request in one batch.

    Attributes:
        batch: the batch, which other requests' rows may share.
        rows: how many of the request's.
        span_id: of the request's span of this run.
    """

    batch: "BatchMarks"
    rows: int
    span_id: int


class Marks:
    """What a sampled request notes on its way; moments are `time.monotonic()`, and 0 where the request never came.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: of the request's own span.
        parent_id: the caller's span; 0: the trace begins here.
        state: the caller's `tracestate`, as it came; empty where it is too long to be kept.
        asked_at: when work began on what the body holds; before that was the body.
        decode_s: how long images were decoded from then on, seconds; 0: nothing was.
        queued_at: when the rows were put in line.
        stays: the batches that rows ran in; written by session threads, under their line's lock.
        post_at, posted_at: from when until when the answer was written.
        admitted: whether it is a prediction, and was let in.
        outcome: the status, by a name that the request's protocol has for it; empty: the number says it.
    """

    __slots__ = (
        "_tracer",
        "admitted",
        "asked_at",
        "decode_s",
        "outcome",
        "parent_id",
        "post_at",
        "posted_at",
        "queued_at",
        "span_id",
        "state",
        "stays",
        "trace_id",
    )

    def __init__(self, tracer: "Tracer", trace_id: str, span_id: int, parent_id: int, state: str) -> None:
        self._tracer = tracer
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_id = parent_id
        self.state = state
        self.asked_at = self.decode_s = self.queued_at = self.post_at = self.posted_at = 0.0
        self.stays: list[Stay] = []
        self.admitted = False
        self.outcome = ""

    def take(self, batch: "BatchMarks | None", taken_at: float, rows: int) -> "BatchMarks":
        """Note that a session has taken some rows, and return the marks of their batch, begun where there were none."""
        batch = batch or BatchMarks(self._tracer, taken_at)
        stay = Stay(batch, rows, self._tracer.new_id())
        self.stays.append(stay)
        batch.links.append((self.trace_id, stay))
        return batch

    def queue(self, decode_s: float) -> None:
        """Note that the rows are put in line, and how long they were decoded."""
        self.decode_s, self.queued_at = decode_s, time.monotonic()

    def stage_seconds(self) -> dict[str, float]:
        """Return how long each stage took, seconds, by name; none of one that the request never came to the end of."""
        batches = [stay.batch for stay in self.stays if stay.batch.ended]
        seconds = {
            "decode": self.decode_s,
            "queue": batches[0].taken_at - self.queued_at if batches else 0.0,
            "infer": max((batch.ended - batch.started for batch in batches), default=0.0),
            "post": self.posted_at - self.post_at,
        }
        return {stage: duration for stage, duration in seconds.items() if duration > 0}

    def end(self, story: "Story") -> None:
        """Hand over what was noted: the request is over."""
        self._tracer.put(story)


class BatchMarks:
    """What a batch notes in which a sampled request has rows.

    Attributes:
        trace_id, span_id: of the batch's span, which begins a trace: it belongs to no request more than to another.
        started, ended: of the run, `time.monotonic()`; 0: not yet.
        rows, requests: how many there were, sampled or not.
        model, version, provider, session: what ran it.
        links: the sampled requests' trace ids and stays.
    """

    __slots__ = (
        "_tracer",
        "ended",
        "links",
        "model",
        "provider",
        "requests",
        "rows",
        "session",
        "span_id",
        "started",
        "taken_at",
        "trace_id",
        "version",
    )

    def __init__(self, tracer: "Tracer", taken_at: float) -> None:
        self._tracer = tracer
        self.trace_id = tracer.new_trace_id()
        self.span_id = tracer.new_id()
        self.taken_at = taken_at
        self.started = self.ended = 0.0
        self.rows = self.requests = self.session = 0
        self.model = self.version = self.provider = ""
        self.links: list[tuple[str, Stay]] = []

    def end(
        self,
        started: float,
        seconds: float,
        *,
        rows: int,
        requests: int,
        model: str,
        version: str,
        provider: str,
        session: int,
    ) -> None:
        """Hand over what was noted: the batch has run."""
        self.started, self.ended = started, started + seconds
        self.rows, self.requests = rows, requests
        self.model, self.version, self.provider, self.session = model, version, provider, session
        self._tracer.put(self)


@dataclass(frozen=True, slots=True)
class Story:
    """A sampled request that is over.

    Attributes:
        marks: what it noted.
        method: HTTP's, or gRPC.
        path: what was asked for.
        route: the path's template, or the full name of a gRPC method; `unmatched` where there is none.
        started, ended: `time.monotonic()`.
        status: HTTP's number for how it ended, on every protocol.
        code: the fault's; empty where there was none.
        request_id: as in the log and in `x-request-id`.
        model, version, rows: what was found out.
    """

    marks: Marks
    method: str
    path: str
    route: str
    started: float
    ended: float
    status: int
    code: str
    request_id: str
    model: str
    version: str
    rows: int


class Sink(Protocol):
    """Makes spans, and sends them."""

    def send(self, over: Sequence[Story | BatchMarks]) -> bool:
        """Make spans of what is over and send them; False: they did not arrive. Blocks; called on one thread."""
        ...

    def close(self) -> None:
        """Give up what is being sent; called on another thread."""
        ...


class Tracer:
    """Decides which requests are sampled, and has spans made of what they noted, beside the event loop."""

    def __init__(self, sink: Sink, ratio: float) -> None:
        """Prepare; nothing is sent yet.

        Args:
            sink: gets all that is over.
            ratio: share of requests that are sampled, of those that come without a caller's decision; 0 to 1.
        """
        self._sink = sink
        self._ratio = ratio
        self._random = random.Random()
        self._waiting: deque[Story | BatchMarks] = deque()
        self._wake = threading.Event()
        self._closed = False
        self._lost = 0
        self._told_at = float("-inf")
        self._thread = threading.Thread(target=self._work, name="traces", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def sample(self, traceparent: bytes | None, tracestate: bytes | None) -> tuple[str, Marks | None]:
        """Return a request's trace id, empty where it has none, and its marks, if it is sampled.

        Whoever has a caller does as the caller does; of the others a share is sampled.
        """
        parent = None if traceparent is None else parent_of(traceparent)
        if parent is None:
            if self._random.random() >= self._ratio:
                return "", None
            trace_id = self.new_trace_id()
            return trace_id, Marks(self, trace_id, self.new_id(), 0, "")
        if not parent.sampled:
            return parent.trace_id, None
        # It waits with its request for a collector that may be away, and whoever asks chooses its length.
        state = "" if tracestate is None or len(tracestate) > MAX_STATE_BYTES else tracestate.decode("latin-1")
        return parent.trace_id, Marks(self, parent.trace_id, self.new_id(), parent.span_id, state)

    def new_trace_id(self) -> str:
        """Return 32 random hexadecimal digits."""
        return f"{self._random.getrandbits(128) or 1:032x}"

    def new_id(self) -> int:
        """Return the id of a span: 64 random bits, not all 0."""
        return self._random.getrandbits(64) or 1

    def put(self, over: Story | BatchMarks) -> None:
        """Take what is over; on any thread, and never blocking."""
        if len(self._waiting) >= MAX_WAITING:
            self._lost += 1
            return
        self._waiting.append(over)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Send what waits, and stop; blocks, but no longer than `timeout_s`: then what is left is given up."""
        self._closed = True
        self._wake.set()
        self._thread.join(timeout_s)
        self._sink.close()

    def _work(self) -> None:
        step_back()
        while not self._closed:
            self._wake.wait(INTERVAL_S)
            self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting:
            chunk = [self._waiting.popleft() for _ in range(min(CHUNK, len(self._waiting)))]
            try:
                arrived = self._sink.send(chunk)
            except Exception:
                log.exception("no spans could be made")
                arrived = False
            if not arrived:
                self._lost += len(chunk)
            if self._closed and not arrived:
                break
        if self._lost and time.monotonic() - self._told_at >= TELL_EVERY_S:
            log.warning("traces lost", extra={"requests_and_batches": self._lost})
            self._told_at, self._lost = time.monotonic(), 0
