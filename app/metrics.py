"""Every number that the service shows, declared once.

Series are named in docs/metrics.md. A number is a slot in this process's page (`app/pages.py`): counting is one
addition in memory, and whoever has the pages shows the sum over all processes. On the hot path use `ModelMetrics`,
whose children are resolved once per model.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from math import inf, isnan
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from app.pages import NO_VALUE, Page, Series, private_page

CONTENT_TYPE = CONTENT_TYPE_PLAIN_1_0_0

# fmt: off
LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0,
)
# fmt: on
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH_SIZES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Rows of a run that are counted apart; a number between two of them counts as the larger."""
STAGES = ("decode", "queue", "infer", "post")


class Number:
    """One counter or gauge. One writer at a time: the event loop, or whoever holds the lock that guards it."""

    __slots__ = ("_at", "_slots")

    def __init__(self, page: Page, at: int) -> None:
        self._slots, self._at = page.slots, at

    def inc(self, amount: float = 1.0) -> None:
        """Add to it."""
        self._slots[self._at] += amount

    def set(self, value: float) -> None:
        """Replace it (gauges only)."""
        self._slots[self._at] = value

    def get(self) -> float:
        """Return what this process has counted, and its page's writers before it."""
        return self._slots[self._at]


class Distribution:
    """One histogram: a slot for each bucket, not cumulated, one for what is above them all, and one for the sum."""

    __slots__ = ("_bounds", "_first", "_slots", "_sum")

    def __init__(self, page: Page, first: int, bounds: Sequence[float]) -> None:
        self._slots, self._first, self._bounds = page.slots, first, bounds
        self._sum = first + len(bounds) + 1

    def observe(self, value: float) -> None:
        """Count one value."""
        slots = self._slots
        slots[self._first + bisect_left(self._bounds, value)] += 1
        slots[self._sum] += value


class Steps:
    """A counter for each size of `BATCH_SIZES`, in adjacent slots."""

    __slots__ = ("_first", "_slots")

    def __init__(self, page: Page, first: int) -> None:
        self._slots, self._first = page.slots, first

    def inc(self, size: int, amount: float = 1.0) -> None:
        """Add to the counter of a size; what is above them all counts as the largest."""
        self._slots[self._first + min(bisect_left(BATCH_SIZES, size), len(BATCH_SIZES) - 1)] += amount


Child = TypeVar("Child", Number, Distribution, Steps)


class Family(Generic[Child]):
    """All series of one name: a child for each set of label values.

    The last `hidden` labels are not shown: Prometheus sees the sums over them, statistics of one version see them.
    """

    kind = ""
    width = 1

    def __init__(self, page: Page, name: str, help_text: str, labels: Sequence[str] = (), *, hidden: int = 0) -> None:
        self.name, self.help_text, self.label_names = name, help_text, tuple(labels)
        self.shown = len(self.label_names) - hidden
        self._page = page
        self._children: dict[tuple[object, ...], Child] = {}

    def labels(self, *values: object) -> Child:
        """Return the child with these label values, in the order of the declaration; it is shown from now on."""
        child = self._children.get(values)
        if child is None:
            assert len(values) == len(self.label_names), f"{self.name} has the labels {self.label_names}"
            child = self._children[values] = self._make(tuple(map(str, values)))
        return child

    def forget(self, values: tuple[str, ...]) -> None:
        """Forget the child with these label values, whose place in the page is about to be another's."""
        for known in [known for known in self._children if tuple(map(str, known)) == values]:
            del self._children[known]

    def _make(self, values: tuple[str, ...]) -> Child:
        raise NotImplementedError

    def join(self, one: list[float], other: list[float]) -> list[float]:
        """Return what two processes, or two hidden label values, make together."""
        return [mine + yours for mine, yours in zip(one, other, strict=True)]

    def expose(self, totals: dict[tuple[str, ...], list[float]]) -> Metric:
        """Return the family as Prometheus sees it, from each child's slots."""
        raise NotImplementedError


class Counter(Family[Number]):
    """Numbers that only grow."""

    kind = "counter"

    def _make(self, values: tuple[str, ...]) -> Number:
        return Number(self._page, self._page.place(self.name, values, 1))

    def expose(self, totals: dict[tuple[str, ...], list[float]]) -> Metric:
        """See `Family.expose`."""
        family = CounterMetricFamily(self.name.removesuffix("_total"), self.help_text, labels=self.label_names)
        for values, (total,) in totals.items():
            family.add_metric(values, total)
        return family


class Gauge(Family[Number]):
    """Numbers that rise and fall, and are gone with the process that set them."""

    kind = "gauge"

    def _make(self, values: tuple[str, ...]) -> Number:
        number = Number(self._page, self._page.place(self.name, values, 1, gauge=True))
        number.set(0)
        return number

    def remove(self, *values: object) -> None:
        """Show the child with these label values no longer."""
        self.labels(*values).set(NO_VALUE)
        del self._children[values]

    def expose(self, totals: dict[tuple[str, ...], list[float]]) -> Metric:
        """See `Family.expose`."""
        family = GaugeMetricFamily(self.name, self.help_text, labels=self.label_names[: self.shown])
        for values, (total,) in totals.items():
            # Of a state that several processes are in there is still one.
            family.add_metric(values, min(total, 1) if self.name.endswith("_info") else total)
        return family


class Latest(Gauge):
    """Moments, of which the latest counts, Unix time."""

    def join(self, one: list[float], other: list[float]) -> list[float]:
        """See `Family.join`."""
        return max(one, other)


class BatchCounter(Family[Steps]):
    """Numbers that only grow, one for each batch size, which is the last label, `rows`."""

    kind = "counter"
    width = len(BATCH_SIZES)

    def _make(self, values: tuple[str, ...]) -> Steps:
        return Steps(self._page, self._page.place(self.name, values, self.width))

    def expose(self, totals: dict[tuple[str, ...], list[float]]) -> Metric:
        """See `Family.expose`; sizes that never were are left out."""
        family = CounterMetricFamily(
            self.name.removesuffix("_total"), self.help_text, labels=(*self.label_names, "rows")
        )
        for values, by_size in totals.items():
            for size, total in zip(BATCH_SIZES, by_size, strict=True):
                if total:
                    family.add_metric((*values, str(size)), total)
        return family


class Histogram(Family[Distribution]):
    """Numbers of values by size."""

    kind = "histogram"

    def __init__(
        self,
        page: Page,
        name: str,
        help_text: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        hidden: int = 0,
    ) -> None:
        super().__init__(page, name, help_text, labels, hidden=hidden)
        self._bounds = tuple(map(float, buckets))
        self.width = len(buckets) + 2

    def _make(self, values: tuple[str, ...]) -> Distribution:
        return Distribution(self._page, self._page.place(self.name, values, self.width), self._bounds)

    def expose(self, totals: dict[tuple[str, ...], list[float]]) -> Metric:
        """See `Family.expose`."""
        family = HistogramMetricFamily(self.name, self.help_text, labels=self.label_names[: self.shown])
        names = [floatToGoString(bound) for bound in (*self._bounds, inf)]  # type: ignore[no-untyped-call]
        for values, total in totals.items():
            count, buckets = 0.0, []
            for name, in_bucket in zip(names, total, strict=False):
                count += in_bucket
                buckets.append((name, count))
            family.add_metric(values, buckets, sum_value=total[-1])
        return family


AnyFamily = Family[Number] | Family[Distribution] | Family[Steps]


class Metrics:
    """The service's series; label sets are bounded by the models and routes that exist."""

    def __init__(self, page: Page | None = None, pages: Sequence[Page] | None = None) -> None:
        """Declare every series.

        Args:
            page: where this process counts; None: a page of its own.
            pages: what `render` sums up; None: that page alone.
        """
        self.page = page or private_page()
        self.pages = pages or [self.page]
        self.families: dict[str, AnyFamily] = {}
        self.requests = self._counter(
            "convoy_requests_total", "Requests answered.", "model", "version", "route", "code"
        )
        self.images = self._counter("convoy_images_total", "Images classified.", "model", "version")
        self.request_duration = self._histogram(
            "convoy_request_duration_seconds",
            "From a request's headers to the end of its answer.",
            "model",
            "route",
            "version",
            "code",
            buckets=LATENCY_BUCKETS_S,
            hidden=2,
        )
        self.stage_duration = self._histogram(
            "convoy_stage_duration_seconds",
            "Time of a request in one stage: decode, queue, infer, post.",
            "model",
            "stage",
            "version",
            buckets=LATENCY_BUCKETS_S,
            hidden=1,
        )
        self.batch_size = self._histogram(
            "convoy_batch_size", "Images per session run.", "model", buckets=BATCH_BUCKETS
        )
        self.batches = self._batch_counter("convoy_batches_total", "Session runs, by rows.", "model", "version")
        self.batch_seconds = self._batch_counter(
            "convoy_batch_seconds_total", "Time that session runs took, by rows.", "model", "version"
        )
        self.last_inference = self._latest(
            "convoy_last_inference_timestamp_seconds", "When the last session run ended.", "model", "version"
        )
        self.queue_rows = self._gauge(
            "convoy_queue_rows", "Decoded images that wait for a session.", "model", "version", hidden=1
        )
        self.inflight_requests = self._gauge("convoy_inflight_requests", "Requests being worked on.", "model")
        self.inflight_images = self._gauge("convoy_inflight_images", "Images admitted and unanswered.").labels()
        self.inflight_bytes = self._gauge("convoy_inflight_bytes", "Bytes of request bodies held.").labels()
        self.inflight_pixels = self._gauge("convoy_inflight_pixels", "Pixels that wait to be decoded.").labels()
        self.rejected = self._counter("convoy_rejected_total", "Requests refused, by reason.", "model", "reason")
        self.dropped = self._counter(
            "convoy_dropped_total",
            "Requests given up after they were admitted: deadline passed or client gone.",
            "model",
            "stage",
            "reason",
        )
        self.model_info = self._gauge(
            "convoy_model_info",
            "1 for the state that a model is in.",
            "model",
            "version",
            "digest",
            "provider",
            "state",
        )
        self.session_busy = self._counter(
            "convoy_session_busy_seconds_total", "Time that a session spent running.", "model", "device", "session"
        )
        self.registry = CollectorRegistry()
        if len(self.pages) == 1:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)
            GCCollector(registry=self.registry)
        else:
            PlatformCollector(registry=self.registry)
            self.registry.register(_Processes(self.pages))
        self.registry.register(_Totals(self.families, self.pages))

    def for_model(self, model: str, version: str) -> "ModelMetrics":
        """Resolve the children of one model."""
        return ModelMetrics(self, model, version)

    def forget(self, model: str, version: str) -> None:
        """Show nothing of a version any more, and give its place to others; nobody may count there from now on.

        Where the version is a hidden label its numbers stay in the sums, under no version: what is shown never falls.
        """
        gone = []
        for series in self.page.series():
            family = self.families.get(series.name)
            if family is None or len(family.label_names) != len(series.labels):
                continue
            labels = dict(zip(family.label_names, series.labels, strict=True))
            if (labels.get("model"), labels.get("version")) != (model, version):
                continue
            if "version" in family.label_names[family.shown :] and not series.gauge:
                self._keep_in_sums(family, series)
            family.forget(series.labels)
            gone.append(series)
        self.page.forget(gone)

    def _keep_in_sums(self, family: AnyFamily, series: Series) -> None:
        hidden = [""] * (len(series.labels) - family.shown)
        kept = self.page.place(series.name, (*series.labels[: family.shown], *hidden), series.width)
        for offset in range(series.width):
            self.page.slots[kept + offset] += self.page.slots[series.first + offset]
            self.page.slots[series.first + offset] = 0

    def render(self) -> bytes:
        """Return the Prometheus text exposition of every series, summed over all pages."""
        return generate_latest(self.registry)

    def sums(self, *names: str) -> dict[str, dict[tuple[str, ...], list[float]]]:
        """Return the slots of every series of some families, by all its labels, joined over all pages."""
        return _joined({name: self.families[name] for name in names}, self.pages)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        family = Counter(self.page, name, help_text, labels)
        self.families[name] = family
        return family

    def _gauge(self, name: str, help_text: str, *labels: str, hidden: int = 0) -> Gauge:
        family = Gauge(self.page, name, help_text, labels, hidden=hidden)
        self.families[name] = family
        return family

    def _latest(self, name: str, help_text: str, *labels: str) -> Latest:
        family = Latest(self.page, name, help_text, labels)
        self.families[name] = family
        return family

    def _batch_counter(self, name: str, help_text: str, *labels: str) -> BatchCounter:
        family = BatchCounter(self.page, name, help_text, labels)
        self.families[name] = family
        return family

    def _histogram(
        self, name: str, help_text: str, *labels: str, buckets: Sequence[float], hidden: int = 0
    ) -> Histogram:
        family = Histogram(self.page, name, help_text, labels, buckets=buckets, hidden=hidden)
        self.families[name] = family
        return family


class ModelMetrics:
    """The series of one model, resolved once."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self._metrics, self.model, self.version = metrics, model, version
        self.images = metrics.images.labels(model, version)
        self.batch_size = metrics.batch_size.labels(model)
        self._batches = metrics.batches.labels(model, version)
        self._batch_seconds = metrics.batch_seconds.labels(model, version)
        self._last_inference = metrics.last_inference.labels(model, version)
        self.queue_rows = metrics.queue_rows.labels(model, version)
        self.inflight_requests = metrics.inflight_requests.labels(model)
        stages = {stage: metrics.stage_duration.labels(model, stage, version) for stage in STAGES}
        self.decode, self.queue, self.infer, self.post = (stages[stage] for stage in STAGES)

    def busy(self, device: str, session: int) -> Number:
        """Return the busy-time counter of one session."""
        return self._metrics.session_busy.labels(self.model, device, session)

    def ran(self, rows: int, seconds: float) -> None:
        """Count one session run."""
        self.batch_size.observe(rows)
        self._batches.inc(rows)
        self._batch_seconds.inc(rows, seconds)
        self._last_inference.set(time.time())

    def dropped(self, stage: str, reason: str) -> None:
        """Count one request given up in `stage`."""
        self._metrics.dropped.labels(self.model, stage, reason).inc()


class _Totals(Collector):
    """The declared families, summed over pages."""

    def __init__(self, families: dict[str, AnyFamily], pages: Sequence[Page]) -> None:
        self._families, self._pages = families, pages

    def collect(self) -> Iterator[Metric]:
        joined = _joined(self._families, self._pages)
        for name, family in self._families.items():
            totals: dict[tuple[str, ...], list[float]] = {}
            for labels, values in joined[name].items():
                shown = labels[: family.shown]
                totals[shown] = family.join(totals[shown], values) if shown in totals else values
            yield family.expose(totals)


def _joined(families: Mapping[str, AnyFamily], pages: Sequence[Page]) -> dict[str, dict[tuple[str, ...], list[float]]]:
    """Return the slots of every series of some families, joined over pages."""
    joined: dict[str, dict[tuple[str, ...], list[float]]] = {name: {} for name in families}
    for page in pages:
        for name, labels, width, _, first in page.series():
            family = families.get(name)
            # A page may hold what another version of this program has left there.
            if family is None or family.width != width or len(family.label_names) != len(labels):
                continue
            values = [page.slots[at] for at in range(first, first + width)]
            if isnan(values[0]):  # a gauge that is not shown
                continue
            so_far = joined[name].get(labels)
            joined[name][labels] = values if so_far is None else family.join(so_far, values)
    return joined


class _Processes(Collector):
    """CPU, memory, descriptors and garbage collection of each process, with a label `worker`."""

    def __init__(self, pages: Sequence[Page]) -> None:
        self._collectors = [(page, _process_of(page)) for page in pages]

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for page, collector in self._collectors:
            if not page.pid:
                continue
            for metric in (*collector.collect(), *_garbage(page)):
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.add_sample(sample.name, {**sample.labels, "worker": str(page.number)}, sample.value)
        yield from families.values()


def _process_of(page: Page) -> ProcessCollector:
    return ProcessCollector(pid=lambda: page.pid, registry=None)


def _garbage(page: Page) -> Sequence[Metric]:
    """Return what `GCCollector` returns, of the process that writes a page."""
    families = [
        CounterMetricFamily("python_gc_objects_collected", "Objects collected during gc", labels=["generation"]),
        CounterMetricFamily(
            "python_gc_objects_uncollectable", "Uncollectable objects found during GC", labels=["generation"]
        ),
        CounterMetricFamily(
            "python_gc_collections", "Number of times this generation was collected", labels=["generation"]
        ),
    ]
    for generation, values in enumerate(page.collections):
        for family, value in zip(families, values, strict=True):
            family.add_metric([str(generation)], value)
    return families
