"""Every number that the service shows, declared once.

Series are named in docs/metrics.md. Owns a registry of its own, so that two services in one process (tests) do not
mix. On the hot path use `ModelMetrics`, whose children are resolved once per model.
"""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0

CONTENT_TYPE = CONTENT_TYPE_PLAIN_1_0_0

# fmt: off
LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0,
)
# fmt: on
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STAGES = ("decode", "queue", "infer", "post")


class Metrics:
    """The service's series; label sets are bounded by the models and routes that exist."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every one, that nobody reads
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.requests = Counter(
            "convoy_requests_total",
            "Requests answered.",
            ["model", "version", "route", "code"],
            registry=self.registry,
        )
        self.images = Counter("convoy_images_total", "Images classified.", ["model", "version"], registry=self.registry)
        self.request_duration = Histogram(
            "convoy_request_duration_seconds",
            "From a request's headers to the end of its answer.",
            ["model", "route"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.stage_duration = Histogram(
            "convoy_stage_duration_seconds",
            "Time of a request in one stage: decode, queue, infer, post.",
            ["model", "stage"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "convoy_batch_size", "Images per session run.", ["model"], buckets=BATCH_BUCKETS, registry=self.registry
        )
        self.queue_rows = Gauge(
            "convoy_queue_rows", "Decoded images that wait for a session.", ["model"], registry=self.registry
        )
        self.inflight_requests = Gauge(
            "convoy_inflight_requests", "Requests being worked on.", ["model"], registry=self.registry
        )
        self.inflight_images = Gauge(
            "convoy_inflight_images", "Images admitted and unanswered.", registry=self.registry
        )
        self.inflight_bytes = Gauge("convoy_inflight_bytes", "Bytes of request bodies held.", registry=self.registry)
        self.inflight_pixels = Gauge(
            "convoy_inflight_pixels", "Pixels that wait to be decoded.", registry=self.registry
        )
        self.rejected = Counter(
            "convoy_rejected_total", "Requests refused, by reason.", ["model", "reason"], registry=self.registry
        )
        self.dropped = Counter(
            "convoy_dropped_total",
            "Requests given up after they were admitted: deadline passed or client gone.",
            ["model", "stage", "reason"],
            registry=self.registry,
        )
        self.model_info = Gauge(
            "convoy_model_info",
            "1 for the state that a model is in.",
            ["model", "version", "digest", "provider", "state"],
            registry=self.registry,
        )
        self.session_busy = Counter(
            "convoy_session_busy_seconds_total",
            "Time that a session spent running.",
            ["model", "device", "session"],
            registry=self.registry,
        )

    def for_model(self, model: str, version: str) -> "ModelMetrics":
        """Resolve the children of one model."""
        return ModelMetrics(self, model, version)

    def render(self) -> bytes:
        """Return the Prometheus text exposition of every series."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The series of one model, resolved once."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self._metrics, self.model, self.version = metrics, model, version
        self.images = metrics.images.labels(model, version)
        self.batch_size = metrics.batch_size.labels(model)
        self.inflight_requests = metrics.inflight_requests.labels(model)
        stages = {stage: metrics.stage_duration.labels(model, stage) for stage in STAGES}
        self.decode, self.queue, self.infer, self.post = (stages[stage] for stage in STAGES)

    def watch_queue(self, rows: Callable[[], float]) -> None:
        """Read the queue's depth from `rows` at every scrape."""
        self._metrics.queue_rows.labels(self.model).set_function(rows)

    def busy(self, device: str, session: int) -> Counter:
        """Return the busy-time counter of one session."""
        return self._metrics.session_busy.labels(self.model, device, str(session))

    def dropped(self, stage: str, reason: str) -> None:
        """Count one request given up in `stage`."""
        self._metrics.dropped.labels(self.model, stage, reason).inc()
