"""Spans of what sampled requests and their batches noted, sent by OTLP over HTTP (extra `otel`).

The only module that imports OpenTelemetry, and imported only where tracing is asked for. Spans are made when all is
over, with ids that the marks have already; so they are `ReadableSpan`s from the start, and no span is ever open.
"""

import logging
import time
from collections.abc import Iterator, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from app import __version__
from app.tracing import BatchMarks, Marks, Story

TRACES_PATH = "/v1/traces"
NOTHING_SENT = 499
"""Status of whoever left before the answer."""
_SCOPE = InstrumentationScope("convoy", __version__)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_NS = 1_000_000_000
_Attributes = dict[str, str | int]


class OtlpSink:
    """Makes spans and sends them to one collector."""

    def __init__(self, exporter: SpanExporter, resource: Resource, scheme: str) -> None:
        """Send by an exporter.

        Args:
            exporter: sends.
            resource: what all spans come from.
            scheme: http or https, by which requests came.
        """
        self._exporter = exporter
        self._resource = resource
        self._scheme = scheme

    def send(self, over: Sequence[Story | BatchMarks]) -> bool:
        """See `Sink.send`."""
        # One offset for all of a chunk, taken late: a clock that was set meanwhile moves spans, and bends none.
        offset_ns = time.time_ns() - time.monotonic_ns()
        spans: list[ReadableSpan] = []
        for one in over:
            spans += self._of_request(one, offset_ns) if isinstance(one, Story) else [self._of_batch(one, offset_ns)]
            time.sleep(0)  # lets the event loop have the interpreter between two requests
        return self._exporter.export(spans) is SpanExportResult.SUCCESS

    def close(self) -> None:
        """See `Sink.close`."""
        self._exporter.shutdown()

    def _of_request(self, story: Story, offset_ns: int) -> Iterator[ReadableSpan]:
        marks = story.marks
        trace_id = int(marks.trace_id, 16)
        state = TraceState.from_header([marks.state]) if marks.state else None
        own = SpanContext(trace_id, marks.span_id, False, _SAMPLED, state)
        failed = story.status >= 500
        yield ReadableSpan(
            _name_of(story),
            own,
            SpanContext(trace_id, marks.parent_id, True, _SAMPLED, state) if marks.parent_id else None,
            self._resource,
            self._attributes_of(story),
            kind=SpanKind.SERVER,
            instrumentation_scope=_SCOPE,
            # The server's fault only: what a client did wrong is no error of this span.
            status=Status(StatusCode.ERROR, story.code) if failed else Status(),
            start_time=_ns(story.started, offset_ns),
            end_time=_ns(story.ended, offset_ns),
        )
        for name, started, ended, span_id, attributes, links in _stages_of(story):
            yield ReadableSpan(
                name,
                SpanContext(trace_id, span_id, False, _SAMPLED, state),
                own,
                self._resource,
                attributes,
                links=links,
                instrumentation_scope=_SCOPE,
                start_time=_ns(started, offset_ns),
                end_time=_ns(ended, offset_ns),
            )

    def _attributes_of(self, story: Story) -> _Attributes:
        attributes: _Attributes = {"convoy.request.id": story.request_id}
        if story.model:
            attributes |= {
                "convoy.model.name": story.model,
                "convoy.model.version": story.version,
                "convoy.rows": story.rows,
            }
        if story.method == "gRPC":
            attributes |= {
                "rpc.system.name": "grpc",
                "rpc.method": story.route.removeprefix("/"),
                "rpc.response.status_code": story.marks.outcome,
            }
        else:
            attributes |= {
                "http.request.method": story.method,
                "url.path": story.path,
                "url.scheme": self._scheme,
            }
            if story.route != "unmatched":
                attributes["http.route"] = story.route
            if story.status != NOTHING_SENT:
                attributes["http.response.status_code"] = story.status
        if story.code:
            attributes["convoy.code"] = story.code
        if story.status >= NOTHING_SENT:
            attributes["error.type"] = story.code or "disconnected"
        return attributes

    def _of_batch(self, batch: BatchMarks, offset_ns: int) -> ReadableSpan:
        return ReadableSpan(
            "batch",
            SpanContext(int(batch.trace_id, 16), batch.span_id, False, _SAMPLED),
            None,
            self._resource,
            {
                "convoy.model.name": batch.model,
                "convoy.model.version": batch.version,
                "convoy.batch.rows": batch.rows,
                "convoy.batch.requests": batch.requests,
                "convoy.provider": batch.provider,
                "convoy.session": batch.session,
            },
            links=[
                Link(SpanContext(int(trace_id, 16), stay.span_id, False, _SAMPLED), {"convoy.rows": stay.rows})
                for trace_id, stay in batch.links
            ],
            instrumentation_scope=_SCOPE,
            start_time=_ns(batch.started, offset_ns),
            end_time=_ns(batch.ended, offset_ns),
        )


_Stage = tuple[str, float, float, int, _Attributes | None, Sequence[Link]]


def _stages_of(story: Story) -> Iterator[_Stage]:
    """Give name, start, end, span id, attributes and links of each stage that a request came to.

    One that failed or was given up ended in its last stage.
    """
    marks, ended = story.marks, story.ended
    if not marks.admitted:
        return
    yield "body", story.started, marks.asked_at or ended, _id(marks, 0), None, ()
    if not marks.asked_at:
        return
    if marks.decode_s:
        yield "decode", marks.asked_at, marks.asked_at + marks.decode_s, _id(marks, 1), None, ()
    elif not marks.queued_at:
        yield "decode", marks.asked_at, ended, _id(marks, 1), None, ()
    if not marks.queued_at:
        return
    taken_at = marks.stays[0].batch.taken_at if marks.stays else ended
    yield "queue", marks.queued_at, taken_at, _id(marks, 2), None, ()
    for stay in marks.stays:
        batch = stay.batch
        link = Link(SpanContext(int(batch.trace_id, 16), batch.span_id, False, _SAMPLED))
        # A run that outlives its request is as long as the request.
        yield (
            "infer",
            batch.started or batch.taken_at,
            batch.ended or ended,
            stay.span_id,
            {"convoy.rows": stay.rows},
            [link],
        )
    if marks.post_at:
        yield "post", marks.post_at, marks.posted_at, _id(marks, 3), None, ()


def _id(marks: Marks, stage: int) -> int:
    """Return the id of a stage's span: the request's own is random, and its neighbours are as rare."""
    return (marks.span_id ^ (stage + 1)) or 1


def _name_of(story: Story) -> str:
    if story.method == "gRPC":
        return story.route.removeprefix("/")
    return story.method if story.route == "unmatched" else f"{story.method} {story.route}"


def _ns(moment: float, offset_ns: int) -> int:
    return int(moment * _NS) + offset_ns


def create_sink(endpoint: str, scheme: str, worker: int) -> OtlpSink:
    """Return a sink.

    Args:
        endpoint: of a collector: its base, to which `/v1/traces` is added, or the whole address of its traces; empty:
            as OpenTelemetry's own variables say.
        scheme: http or https, by which requests come.
        worker: number of this process among the service's.
    """
    # Of a collector that is away it has a line for each attempt; the tracer tells of what was lost, once a minute.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    # Of a `tracestate` that is none it has a line for each request, with the caller's text in it.
    logging.getLogger("opentelemetry.trace").setLevel(logging.CRITICAL)
    base = endpoint.rstrip("/")
    exporter = OTLPSpanExporter((base if base.endswith(TRACES_PATH) else base + TRACES_PATH) if base else None)
    own: _Attributes = {"service.version": __version__, "convoy.worker": worker}
    if str(Resource.create().attributes["service.name"]).startswith("unknown_service"):  # nobody has named it
        own["service.name"] = "convoy"
    return OtlpSink(exporter, Resource.create(own), scheme)
