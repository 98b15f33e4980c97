"""Every number that the service shows, declared once.

Series are named in docs/metrics.md. A number is a slot in this process's page (`app/pages.py`): counting is one
addition in memory, and whoever has the pages shows the sum over all processes. On the hot path use `ModelMetrics`,
whose children are resolved once per model.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

from app.board import Board
from app.cpus import throttling
from app.families import (
    Age,
    AnyFamily,
    BatchCounter,
    Bins,
    Counter,
    Family,
    Gauge,
    Histogram,
    Largest,
    Number,
    Shares,
    Smallest,
    joined,
    shown,
)
from app.pages import Page, Series, WriterState, private_page

CONTENT_TYPE = CONTENT_TYPE_PLAIN_1_0_0
OPENMETRICS = "application/openmetrics-text"
CONTENT_TYPE_OPENMETRICS = f"{OPENMETRICS}; version=1.0.0; charset=utf-8"
DEFAULT_SLO_S = 0.25

# fmt: off
LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0,
)
LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
SHARE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
# fmt: on
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BRIGHTNESS_BUCKETS = (16, 32, 64, 96, 128, 160, 192, 224, 255)
SIZE_BUCKETS_BYTES = tuple(4**power for power in range(5, 13))
SIDE_BUCKETS = tuple(2**power for power in range(4, 14))
STAGES = ("decode", "queue", "infer", "post")
CAUSES = ("died", "hung")

AFamily = TypeVar("AFamily", bound=Family[Any])


class Metrics:
    """The service's series; label sets are bounded by the models and routes that exist."""

    def __init__(
        self,
        page: Page | None = None,
        pages: Sequence[Page] | None = None,
        common: Page | None = None,
        *,
        engines: Sequence[Page] = (),
        slo_s: float = DEFAULT_SLO_S,
    ) -> None:
        """Declare every series.

        Args:
            page: where this process counts; None: a page of its own.
            pages: of the processes that serve, which `render` sums up; None: that page alone.
            common: the page in which the supervisor counts, if there is one.
            engines: pages of the processes that run models for those.
            slo_s: within which an answer is a good one: a bucket of the histograms of time ends there.
        """
        self.page = page or private_page()
        self.pages = pages or [self.page]
        self.engines = engines
        self._counted = [*self.pages, *engines, *([common] if common else [])]
        self._board = Board(common) if common else None
        self.families: dict[str, AnyFamily] = {}
        self.slo_s = slo_s
        self._declare_requests(tuple(sorted({*LATENCY_BUCKETS_S, slo_s})))
        self._declare_models()
        self._declare_process()
        self._declare_gpus()
        self._declare_predictions()
        self._kept = self.families | _exemplars_of(self.families)
        """All families that this process has series of in its page."""
        self.registry = CollectorRegistry()
        if len(self.pages) == 1:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)
            GCCollector(registry=self.registry)
        else:
            PlatformCollector(registry=self.registry)
            self.registry.register(_Processes([*self.pages, *engines]))
        self.registry.register(_Totals(self.families, self._counted, self._board))
        self.registry.register(_States(self.pages, engines))
        self.registry.register(_Throttling())

    def _declare_requests(self, seconds: Sequence[float]) -> None:
        page, add = self.page, self._add
        # fmt: off
        self.requests = add(Counter(
            page, "convoy_requests_total", "Requests answered.", ("model", "version", "route", "code")
        ))
        self.images = add(Counter(page, "convoy_images_total", "Images classified.", ("model", "version")))
        self.request_duration = add(Histogram(
            page, "convoy_request_duration_seconds", "From a request's headers to the end of its answer.",
            ("model", "route", "version", "code"), buckets=seconds, hidden=2,
        ))
        self.stage_duration = add(Histogram(
            page, "convoy_stage_duration_seconds", "Time of a request in one stage: decode, queue, infer, post.",
            ("model", "stage", "version"), buckets=seconds, hidden=1,
        ))
        self.slow = add(Counter(
            page, "convoy_slow_requests_total", "Requests answered later than convoy_slo_seconds.", ("model", "route")
        ))
        self.slo = add(Largest(page, "convoy_slo_seconds", "Time within which an answer is good."))
        self.batch_size = add(Histogram(
            page, "convoy_batch_size", "Images per session run.", ("model",), buckets=BATCH_BUCKETS
        ))
        self.batches = add(BatchCounter(
            page, "convoy_batches_total", "Session runs, by rows.", ("model", "version")
        ))
        self.batch_seconds = add(BatchCounter(
            page, "convoy_batch_seconds_total", "Time that session runs took, by rows.", ("model", "version")
        ))
        self.padding = add(Counter(
            page, "convoy_padding_rows_total", "Rows that batches were filled up with, to a size that a GPU knows.",
            ("model", "version"),
        ))
        self.last_inference = add(Largest(
            page, "convoy_last_inference_timestamp_seconds", "When the last session run ended.", ("model", "version")
        ))
        self.queue_rows = add(Gauge(
            page, "convoy_queue_rows", "Decoded images that wait for a session.", ("model", "version"), hidden=1
        ))
        self.queue_age = add(Age(
            page, "convoy_queue_age_seconds", "How long the first of the images that wait has waited.",
            ("model", "version"), hidden=1,
        ))
        self.inflight_requests = add(Gauge(
            page, "convoy_inflight_requests", "Requests being worked on.", ("model",)
        ))
        self.inflight_images = add(Gauge(
            page, "convoy_inflight_images", "Images admitted and unanswered."
        )).labels()
        self.inflight_bytes = add(Gauge(
            page, "convoy_inflight_bytes", "Bytes of request bodies held."
        )).labels()
        self.inflight_pixels = add(Gauge(
            page, "convoy_inflight_pixels", "Pixels that wait to be decoded."
        )).labels()
        self.inflight_limit = add(Gauge(
            page, "convoy_inflight_limit", "How many images, bytes and pixels may be inside.", ("resource",)
        ))
        self.rejected = add(Counter(
            page, "convoy_rejected_total", "Requests refused, by reason.", ("model", "reason")
        ))
        self.dropped = add(Counter(
            page, "convoy_dropped_total", "Requests given up after they were admitted: deadline passed or client gone.",
            ("model", "stage", "reason"),
        ))
        # fmt: on

    def _declare_models(self) -> None:
        page, add = self.page, self._add
        # fmt: off
        self.model_info = add(Largest(
            page, "convoy_model_info", "1 for the state that a model is in.",
            ("model", "version", "digest", "provider", "state"),
        ))
        self.load_seconds = add(Largest(
            page, "convoy_model_load_seconds", "How long loading, proving and warming up took.", ("model", "version")
        ))
        self.reloads = add(Counter(
            page, "convoy_reloads_total", "Times that a model's folder was looked at, by result.", ("model", "result")
        ))
        self.last_reload = add(Largest(
            page, "convoy_last_reload_timestamp_seconds", "When a model's folder was last looked at.", ("model",)
        ))
        self.last_reload_success = add(Smallest(
            page, "convoy_last_reload_success", "Whether all is served then that should be.", ("model",)
        ))
        self.sessions = add(Gauge(
            page, "convoy_sessions", "Sessions, each of which runs one batch at a time.", ("model", "version"), hidden=1
        ))
        self.session_busy = add(Counter(
            page, "convoy_session_busy_seconds_total", "Time that a session spent running.",
            ("model", "device", "session"),
        ))
        self.session_copying = add(Counter(
            page, "convoy_session_copy_seconds_total",
            "Time of these in which rows were put together for a run, and scores taken apart.",
            ("model", "device", "session"),
        ))
        self.wanted_device = add(Largest(
            page, "convoy_wanted_device_info", "1 for where models should run, with this runtime and these settings.",
            ("device",),
        ))
        # fmt: on

    def _declare_process(self) -> None:
        page, add = self.page, self._add
        # fmt: off
        self.build_info = add(Largest(
            page, "convoy_build_info", "1 for what is running.", ("version", "runtime", "runtime_version")
        ))
        self.loop_lag = add(Histogram(
            page, "convoy_event_loop_lag_seconds", "How late the event loop woke up, ten times a second.",
            buckets=LAG_BUCKETS_S,
        )).labels()
        self.cpu_limit = add(Largest(
            page, "convoy_cpu_limit_cores", "Processors that all processes may use together."
        ))
        self.threads = add(Gauge(
            page, "convoy_threads", "Threads that compute, by what they do.", ("pool",)
        ))
        self.worker_exits = add(Counter(
            page, "convoy_worker_exits_total", "Workers that ended without being told to, by cause.", ("cause",)
        ))
        # fmt: on

    def _declare_gpus(self) -> None:
        page, add, gpu = self.page, self._add, ("gpu",)
        # fmt: off
        self.gpu_info = add(Largest(page, "convoy_gpu_info", "1 for each GPU.", ("gpu", "uuid", "name")))
        self.gpu_utilization = add(Largest(
            page, "convoy_gpu_utilization_ratio", "Share of time in which the GPU ran something.", gpu
        ))
        self.gpu_memory_used = add(Largest(
            page, "convoy_gpu_memory_used_bytes", "Memory of the GPU that is taken, by whomever.", gpu
        ))
        self.gpu_memory_total = add(Largest(page, "convoy_gpu_memory_total_bytes", "Memory of the GPU.", gpu))
        self.gpu_power = add(Largest(page, "convoy_gpu_power_watts", "Power that the GPU draws.", gpu))
        self.gpu_power_limit = add(Largest(page, "convoy_gpu_power_limit_watts", "Power that it may draw.", gpu))
        self.gpu_temperature = add(Largest(page, "convoy_gpu_temperature_celsius", "Temperature of the GPU.", gpu))
        # fmt: on

    def _declare_predictions(self) -> None:
        page, add, which = self.page, self._add, ("model", "version")
        # fmt: off
        self.confidence = add(Histogram(
            page, "convoy_prediction_confidence", "Probability of the likeliest class, of sampled images.", which,
            buckets=SHARE_BUCKETS,
        ))
        self.entropy = add(Histogram(
            page, "convoy_prediction_entropy_ratio", "Entropy of the probabilities as a share of the largest possible.",
            which, buckets=SHARE_BUCKETS,
        ))
        self.brightness = add(Histogram(
            page, "convoy_image_brightness", "Mean luma of sampled images, 0 to 255.", which, buckets=BRIGHTNESS_BUCKETS
        ))
        self.image_bytes = add(Histogram(
            page, "convoy_image_size_bytes", "Encoded size of sampled images.", which, buckets=SIZE_BUCKETS_BYTES
        ))
        self.image_side = add(Histogram(
            page, "convoy_image_short_side_pixels", "Short side of sampled images, before the resize.", which,
            buckets=SIDE_BUCKETS,
        ))
        self.features = add(Bins(
            page, "convoy_feature_images_total", "Sampled images by what they and their answers look like.",
            ("model", "version", "feature", "bins"),
        ))
        self.reference = add(Shares(
            page, "convoy_feature_reference_ratio", "Share of each bin in the reference of the model's bundle.",
            ("model", "version", "feature", "bins"),
        ))
        self.reference_images = add(Largest(
            page, "convoy_feature_reference_images", "Images that the reference was made of.", which
        ))
        # fmt: on

    def show_promise(self) -> None:
        """Show the time within which an answer is a good one: a process that answers does, an engine does not."""
        self.slo.labels().set(self.slo_s)

    def reloaded(self, model: str, ok: bool) -> None:
        """Count that a model's folder was looked at, and whether all is served now that should be.

        Of the model without a name: that all workers were replaced, or not.
        """
        self.reloads.labels(model, "success" if ok else "failure").inc()
        self.last_reload.labels(model).set(time.time())
        self.last_reload_success.labels(model).set(ok)

    def _add(self, family: AFamily) -> AFamily:
        self.families[family.name] = family
        return family

    def for_model(self, model: str, version: str) -> "ModelMetrics":
        """Resolve the children of one model."""
        return ModelMetrics(self, model, version)

    def forget(self, model: str, version: str) -> None:
        """Show nothing of a version any more, and give its place to others; who still counts there counts for nobody.

        Where the version is a hidden label its numbers stay in the sums, under no version: what is shown never falls.
        """
        wanted = {"model": model, "version": version}
        with self.page.lock:
            for family, series in self._placed():
                hidden = family.label_names[family.shown :]
                if "version" in hidden and not series.gauge and family.bears(series.labels, wanted):
                    self._keep_in_sums(family, series)
            self._forget(wanted)

    def forget_model(self, model: str) -> None:
        """Show nothing of a model any more, whatever its version, and give its place to others."""
        self._forget({"model": model})

    def models(self) -> dict[str, set[str]]:
        """Return the versions of each model that this process shows anything of; a series without one counts as "".

        The model without a name is none: under it is counted what reached no model.
        """
        shown: dict[str, set[str]] = {}
        for family, series in self._placed():
            names, values = family.label_names, series.labels
            if len(names) == len(values) and "model" in names and (model := values[names.index("model")]):
                shown.setdefault(model, set()).add(values[names.index("version")] if "version" in names else "")
        return shown

    def _placed(self) -> Iterator[tuple[AnyFamily, Series]]:
        """Yield what this process's page holds, and the family that each is of."""
        for series in self.page.series():
            if series.name in self._kept:
                yield self._kept[series.name], series

    def _forget(self, wanted: Mapping[str, str]) -> None:
        with self.page.lock:
            self.page.forget([series for family, series in self._placed() if family.bears(series.labels, wanted)])
            for family in self._kept.values():
                family.forget(wanted)

    def _keep_in_sums(self, family: AnyFamily, series: Series) -> None:
        hidden = [""] * (len(series.labels) - family.shown)
        kept = self.page.place(series.name, (*series.labels[: family.shown], *hidden), series.width)
        for offset in range(series.width):
            self.page.slots[kept + offset] += self.page.slots[series.first + offset]
            self.page.slots[series.first + offset] = 0

    def render(self, *, openmetrics: bool = False) -> bytes:
        """Return every series, summed over all pages, in Prometheus' text format or in OpenMetrics.

        Only OpenMetrics has exemplars; with five models it takes 9 ms, the other 6.
        """
        if openmetrics:
            return generate_openmetrics(self.registry)  # type: ignore[no-untyped-call,no-any-return]
        return generate_latest(self.registry)

    def keep_exemplars(
        self, trace_id: str, labels: tuple[object, ...], seconds: float, stages: Mapping[str, float]
    ) -> None:
        """Tie a request's time, and that of each of its stages, to its trace.

        Args:
            trace_id: 32 hexadecimal digits.
            labels: of `request_duration`.
            seconds: what was observed there.
            stages: what was observed of `stage_duration`, by stage.
        """
        self.request_duration.exemplars.keep(labels, seconds, trace_id)
        model, _, version, _ = labels
        for stage, duration in stages.items():
            self.stage_duration.exemplars.keep((model, stage, version), duration, trace_id)

    def sums(self, *names: str) -> dict[str, dict[tuple[str, ...], list[float]]]:
        """Return the slots of every series of some families, by all its labels, joined over all pages."""
        return _joined({name: self.families[name] for name in names}, self._counted, self._board)


class ModelMetrics:
    """The series of one model, resolved once."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self._metrics, self.model, self.version = metrics, model, version
        self.images = metrics.images.labels(model, version)
        self.batch_size = metrics.batch_size.labels(model)
        self._batches = metrics.batches.labels(model, version)
        self._batch_seconds = metrics.batch_seconds.labels(model, version)
        self._padding = metrics.padding.labels(model, version)
        self._last_inference = metrics.last_inference.labels(model, version)
        self.queue_rows = metrics.queue_rows.labels(model, version)
        self.sessions = metrics.sessions.labels(model, version)
        self.queue_age = metrics.queue_age.labels(model, version)
        self.inflight_requests = metrics.inflight_requests.labels(model)
        stages = {stage: metrics.stage_duration.labels(model, stage, version) for stage in STAGES}
        self.decode, self.queue, self.infer, self.post = (stages[stage] for stage in STAGES)

    def busy(self, device: str, session: int) -> Number:
        """Return the busy-time counter of one session."""
        return self._metrics.session_busy.labels(self.model, device, session)

    def copying(self, device: str, session: int) -> Number:
        """Return the counter of the time in which one session's rows and scores were copied."""
        return self._metrics.session_copying.labels(self.model, device, session)

    def ran(self, rows: int, seconds: float, padding: int = 0) -> None:
        """Count one session run."""
        self.batch_size.observe(rows)
        self._batches.inc(rows)
        self._batch_seconds.inc(rows, seconds)
        if padding:
            self._padding.inc(padding)
        self._last_inference.set(time.time())

    def dropped(self, stage: str, reason: str) -> None:
        """Count one request given up in `stage`."""
        self._metrics.dropped.labels(self.model, stage, reason).inc()


class _Totals(Collector):
    """The declared families, summed over pages."""

    def __init__(self, families: dict[str, AnyFamily], pages: Sequence[Page], board: Board | None) -> None:
        self._families, self._pages, self._board = families, pages, board

    def collect(self) -> Iterator[Metric]:
        by_name = _joined(self._families, self._pages, self._board)
        exemplars = joined(_exemplars_of(self._families), self._pages)
        for name, family in self._families.items():
            totals = shown(family, by_name[name])
            if isinstance(family, Histogram):
                yield family.expose(totals, shown(family.exemplars, exemplars[family.exemplars.name]))
            else:
                yield family.expose(totals)


def _joined(
    families: Mapping[str, AnyFamily], pages: Sequence[Page], board: Board | None
) -> dict[str, dict[tuple[str, ...], list[float]]]:
    """Return the slots of every series of some families, joined over pages, but for what is hidden.

    That is asked last: what a worker has forgotten meanwhile it has hidden before.
    """
    by_name = joined(families, pages)
    hidden = set() if board is None else set(board.hidden())
    if not hidden:
        return by_name
    for name, family in families.items():
        names = family.label_names
        if "model" not in names:
            continue
        labels = [names.index("model")]
        if "version" in names[: family.shown]:  # else it is in a sum, and stays there
            labels.append(names.index("version"))
        places = [labels[:1], labels]
        by_name[name] = {
            series: values
            for series, values in by_name[name].items()
            if not any(tuple([series[at] for at in place]) in hidden for place in places)
        }
    return by_name


def _exemplars_of(families: Mapping[str, AnyFamily]) -> dict[str, AnyFamily]:
    histograms = (family for family in families.values() if isinstance(family, Histogram))
    return {family.exemplars.name: family.exemplars for family in histograms}


class _States(Collector):
    """What the processes say of themselves, by their pages."""

    def __init__(self, pages: Sequence[Page], engines: Sequence[Page]) -> None:
        self._pages, self._engines = pages, engines

    def collect(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("convoy_ready", "Whether a process is there that wants traffic, as /readyz says.")
        ready.add_metric((), any(page.is_ready for page in self._pages))
        yield ready
        yield _by_state("convoy_workers", "Processes that serve, by state.", self._pages)
        what = "Processes that run models for those that serve, by state."
        yield _by_state("convoy_engines", what, self._engines)


def _by_state(name: str, help_text: str, pages: Sequence[Page]) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=("state",))
    states = [page.state for page in pages if page.pid]
    for state in WriterState:
        if state is not WriterState.FREE:
            family.add_metric((state.name.lower(),), states.count(state))
    return family


class _Throttling(Collector):
    """How often the control group had used up its processor time, as the kernel counts it."""

    def collect(self) -> Iterator[Metric]:
        cost = throttling()
        figures = (cost.periods, cost.throttled, cost.seconds) if cost else (None, None, None)
        for (name, help_text), value in zip(_QUOTA, figures, strict=True):
            family = CounterMetricFamily(name, help_text)
            if value is not None:
                family.add_metric((), value)
            yield family


_QUOTA = (
    ("convoy_cpu_periods", "Periods of the CPU quota in which the container ran."),
    ("convoy_cpu_throttled_periods", "Those of them in which it was halted."),
    ("convoy_cpu_throttled_seconds", "How long threads were halted for that."),
)


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
