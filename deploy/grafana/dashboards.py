"""The dashboards, written down once: `make dashboards` makes Grafana's JSON of this, and a test holds both together.

A panel is what it shows, and a query for each of its legends; places on the grid, ids, variables and links follow. The
times of rates are Grafana's ($__rate_interval, $__range); what a rule has computed already is taken from the rule.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24

HERE = 'namespace=~"$namespace", job=~"$job"'
INSTANCE = HERE + ', instance=~"$instance"'
MODEL = INSTANCE + ', model=~"$model"'
RULED = HERE + ', model=~"$model"'
PREDICTIONS = 'route=~".*(predict|infer|predictions/.*|Infer)"'
RATE = "$__rate_interval"
LEAST = float("-inf")


@dataclass(frozen=True)
class Panel:
    """One panel: what it is called, what it shows, in which unit, and its queries by their legends."""

    title: str
    description: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    most: float | None = None
    steps: tuple[tuple[float, str], ...] = ()
    """Values from which on a figure has another colour than green."""


@dataclass(frozen=True)
class Dashboard:
    """One dashboard: its file and id, its title, and its rows of panels."""

    uid: str
    title: str
    rows: dict[str, tuple[Panel, ...]]
    variables: tuple[str, ...] = ("namespace", "job", "instance", "model")


def stat(title: str, description: str, unit: str, query: str, **options: Any) -> Panel:
    """Return a panel of one figure."""
    return Panel(title, description, unit, {"": query}, "stat", **{"width": 4, "height": 4, **options})


def rate(series: str, by: str, labels: str = MODEL) -> str:
    """Return the rate of a counter, summed by labels."""
    return f"sum by ({by}) (rate({series}{{{labels}}}[{RATE}]))"


def quantile(share: float, histogram: str, by: str = "", labels: str = MODEL) -> str:
    """Return a quantile of a histogram, by labels."""
    grouped = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(histogram + '_bucket', grouped, labels)})"


def ratio(one: str, other: str) -> str:
    """Return one by another; nothing where that is 0."""
    return f"{one} / ({other} > 0)"


def mean(histogram: str, by: str, labels: str = MODEL) -> str:
    """Return the mean of what a histogram has counted, by labels."""
    return ratio(rate(histogram + "_sum", by, labels), rate(histogram + "_count", by, labels))


def of_convoy(joined: str, query: str) -> str:
    """Return by instance what a query finds of Convoy's processes; every program has series of these names."""
    return f"{joined} by (instance) ({query} and on (namespace, job, instance) convoy_build_info)"


def bad_share(span: str) -> str:
    """Return the share of predictions that ended in a fault or a refusal."""
    asked = f"sum(increase(convoy_requests_total{{{INSTANCE}, {PREDICTIONS}}}[{span}]))"
    bad = f'sum(increase(convoy_requests_total{{{INSTANCE}, {PREDICTIONS}, code=~"5..|429"}}[{span}]))'
    return f"({bad} or vector(0)) / ({asked} > 0)"


def slow_share(span: str) -> str:
    """Return the share of predictions that took longer than `CONVOY_SLO_MS`."""
    asked = f"sum(increase(convoy_request_duration_seconds_count{{{INSTANCE}, {PREDICTIONS}}}[{span}]))"
    slow = f"sum(increase(convoy_slow_requests_total{{{INSTANCE}, {PREDICTIONS}}}[{span}]))"
    return f"{slow} / ({asked} > 0)"


def budget_left(share: str, kind: str) -> str:
    """Return how much is left of an objective's budget, 1 to below 0."""
    return f"1 - ({share}) / on () (1 - convoy:{kind}_objective:ratio)"


RED_FROM = ((0.001, "orange"), (0.01, "red"))
SHORT_OF_BUDGET = ((LEAST, "red"), (0.0, "orange"), (0.25, "green"))
ASKED = f"{MODEL}, {PREDICTIONS}"
VERSION = "{{model}} {{version}}"

# fmt: off
OVERVIEW = Dashboard("convoy", "Convoy", {
    "Users": (
        stat("Requests", "Predictions asked for, with whatever answer.", "reqps",
             f"sum(rate(convoy_requests_total{{{ASKED}}}[{RATE}]))"),
        stat("Images", "Images classified.", "ops", f"sum(rate(convoy_images_total{{{MODEL}}}[{RATE}]))"),
        stat("Errors and refusals", "Share of predictions that got 5xx or 429.", "percentunit", bad_share(RATE),
             steps=RED_FROM),
        stat("Slow answers", "Share of predictions beyond CONVOY_SLO_MS.", "percentunit", slow_share(RATE),
             steps=((0.01, "orange"), (0.1, "red"))),
        stat("99th percentile", "Of 100 predictions, 99 are answered within this.", "s",
             quantile(0.99, "convoy_request_duration_seconds", labels=ASKED)),
        stat("Ready", "Instances that want traffic.", "none", f"sum(convoy_ready{{{INSTANCE}}})",
             steps=((LEAST, "red"), (1, "green"))),
    ),
    "Objectives": (
        stat("Error budget left", "Of the dashboard's time span. 100 %: no error; below 0: the objective is missed.",
             "percentunit", budget_left(bad_share("$__range"), "availability"), width=6, steps=SHORT_OF_BUDGET),
        stat("Slowness budget left", "Of the dashboard's time span, for answers beyond CONVOY_SLO_MS.",
             "percentunit", budget_left(slow_share("$__range"), "latency"), width=6, steps=SHORT_OF_BUDGET),
        stat("Alerts", "Convoy's alerts that fire.", "none",
             'count(ALERTS{alertname=~"Convoy.*", alertstate="firing"}) or vector(0)', width=6, steps=((1, "orange"),)),
        stat("Promised time", "CONVOY_SLO_MS: an answer within it is a good one.", "s",
             f"max(convoy_slo_seconds{{{INSTANCE}}})", width=6),
        Panel("Error budget: burn rate", "How many times faster than the objective allows; at 1 it lasts a month. "
              "Pages at 14.4 (1h and 5m) and at 6 (6h and 30m).", "none",
              {span: f"convoy:availability_burn:rate{span}{{{HERE}}}" for span in ("5m", "1h", "6h")}, width=12),
        Panel("Slowness budget: burn rate", "The same for answers beyond CONVOY_SLO_MS.", "none",
              {span: f"convoy:latency_burn:rate{span}{{{HERE}}}" for span in ("5m", "1h", "6h")}, width=12),
    ),
    "Traffic": (
        Panel("Requests by status", "499: the client left first.", "reqps",
              {"{{code}}": rate("convoy_requests_total", "code", ASKED)}, stacked=True),
        Panel("Latency", "From a request's headers to the end of its answer, beside the promise.", "s", {
            "p50": quantile(0.5, "convoy_request_duration_seconds", labels=ASKED),
            "p95": quantile(0.95, "convoy_request_duration_seconds", labels=ASKED),
            "p99": quantile(0.99, "convoy_request_duration_seconds", labels=ASKED),
            "promise": f"max(convoy_slo_seconds{{{INSTANCE}}})",
        }),
        Panel("Requests inside", "Queued and running, by instance; and the demand, for autoscaling: what would "
              "be inside if nobody were turned away.", "none", {
            "{{instance}}": f"sum by (instance) (convoy_inflight_requests{{{MODEL}}})",
            "demand": f"convoy:demand_requests:sum{{{HERE}}}",
        }),
    ),
})

STAGES = Dashboard("convoy-stages", "Convoy: stages", {
    "Where the time goes": (
        Panel("Mean time by stage", "Of one request: decoding, waiting, running, writing the answer.", "s",
              {"{{stage}}": mean("convoy_stage_duration_seconds", "stage")}, stacked=True, width=12),
        Panel("99th percentile by stage", "The stages' own percentiles do not add up to the request's.", "s",
              {"{{stage}}": quantile(0.99, "convoy_stage_duration_seconds", "stage")}, width=12),
        Panel("99th percentile by route", "All that a route does, on every protocol.", "s",
              {"{{route}}": quantile(0.99, "convoy_request_duration_seconds", "route", ASKED)}, width=12),
        Panel("Latencies", "Requests a second by how long they took.", "s",
              {"{{le}}": rate("convoy_request_duration_seconds_bucket", "le", ASKED)}, "heatmap", width=12),
    ),
    "Waiting": (
        Panel("Images that wait", "Decoded images without a session.", "none",
              {"{{model}}": f"sum by (model) (convoy_queue_rows{{{MODEL}}})"}),
        Panel("Age of the first that waits", "By instance, the longest.", "s",
              {"{{instance}} {{model}}": f"max by (instance, model) (convoy_queue_age_seconds{{{MODEL}}})"}),
        Panel("How full", "What is inside, as a share of what may be.", "percentunit", {
            f"{what} {{{{instance}}}}":
                f"sum by (instance) (convoy_inflight_{what}{{{INSTANCE}}})"
                f' / sum by (instance) (convoy_inflight_limit{{{INSTANCE}, resource="{what}"}})'
            for what in ("images", "bytes", "pixels")
        }, most=1),
    ),
    "Turned away": (
        Panel("Refused, by reason", "The code of the error that the client got.", "reqps",
              {"{{reason}}": rate("convoy_rejected_total", "reason")}, stacked=True, width=12),
        Panel("Given up, by stage and reason", "After they had been let in: deadline passed or client gone.", "reqps",
              {"{{stage}}: {{reason}}": rate("convoy_dropped_total", "stage, reason")}, stacked=True, width=12),
    ),
})

BATCHING = Dashboard("convoy-batching", "Convoy: batching", {
    "Batches": (
        Panel("Mean batch", "Images in a session run; grows with the load, because a session takes what waits.", "none",
              {"{{model}}": mean("convoy_batch_size", "model")}),
        Panel("Batch size", "Session runs a second, by images.", "none",
              {"{{le}}": rate("convoy_batch_size_bucket", "le")}, "heatmap"),
        Panel("Runs by rows", "Session runs a second.", "ops",
              {"{{rows}}": rate("convoy_batches_total", "rows")}, stacked=True),
        Panel("Padding", "Rows that a GPU runs for nobody, beside each image: batches are filled up.", "percentunit", {
            "{{model}}": ratio(rate("convoy_padding_rows_total", "model"), rate("convoy_images_total", "model")),
        }),
        Panel("Time of a run", "Mean, by its rows.", "s", {
            "{{model}}: {{rows}}": ratio(rate("convoy_batch_seconds_total", "model, rows"),
                                         rate("convoy_batches_total", "model, rows")),
        }),
        Panel("Time of a row", "What an image costs a session; falls with the batch where batching pays.", "s", {
            "{{model}}": ratio(rate("convoy_batch_seconds_total", "model"), rate("convoy_images_total", "model")),
        }),
        Panel("Images", "Images classified, by model.", "ops", {"{{model}}": rate("convoy_images_total", "model")}),
    ),
    "Sessions": (
        Panel("Busy", "Share of their time in which a model's sessions run; at 100 % there is no more.", "percentunit",
              {"{{model}}": f"convoy:session_busy:ratio_rate5m{{{RULED}}}"}, most=1, width=12),
        Panel("Busy sessions", "Of those that there are, how many run on average.", "none", {
            "{{model}} busy": rate("convoy_session_busy_seconds_total", "model"),
            "{{model}} copying": rate("convoy_session_copy_seconds_total", "model"),
            "{{model}} there": f"sum by (model) (convoy_sessions{{{MODEL}}})",
        }, width=12),
    ),
})

RESOURCES = Dashboard("convoy-resources", "Convoy: resources", {
    "Processors": (
        Panel("CPU", "Processors used by all processes of an instance, and how many they may use.", "none", {
            "{{instance}}": of_convoy("sum", f"rate(process_cpu_seconds_total{{{INSTANCE}}}[{RATE}])"),
            "{{instance}} limit": f"max by (instance) (convoy_cpu_limit_cores{{{INSTANCE}}})",
        }),
        Panel("Halted by the quota", "Share of the periods in which the container ran into its CPU limit.",
              "percentunit", {"{{instance}}": f"convoy:cpu_throttled:ratio_rate5m{{{INSTANCE}}}"}, most=1),
        Panel("Halted for", "Seconds a second, summed over processors.", "s",
              {"{{instance}}": rate("convoy_cpu_throttled_seconds_total", "instance", INSTANCE)}),
        Panel("Threads that compute", "Beside the processors that there are for them.", "none", {
            "{{pool}}": f"sum by (pool) (convoy_threads{{{INSTANCE}}})",
            "processors": f"sum(convoy_cpu_limit_cores{{{INSTANCE}}})",
        }),
        Panel("Event loop", "How late it wakes up.", "s", {
            "{{instance}} p50": quantile(0.5, "convoy_event_loop_lag_seconds", "instance", INSTANCE),
            "{{instance}} p99": quantile(0.99, "convoy_event_loop_lag_seconds", "instance", INSTANCE),
        }),
        Panel("Garbage collection", "Runs a second, of any generation.", "ops", {
            "{{instance}}": of_convoy("sum", f"rate(python_gc_collections_total{{{INSTANCE}}}[{RATE}])"),
        }),
    ),
    "Processes": (
        Panel("Memory", "Resident, of all processes of an instance; pages that they share count in each.", "bytes",
              {"{{instance}}": of_convoy("sum", f"process_resident_memory_bytes{{{INSTANCE}}}")}),
        Panel("Open files and connections", "As a share of how many a process may have.", "percentunit",
              {"{{instance}}": of_convoy("max", f"process_open_fds{{{INSTANCE}}} / process_max_fds")}),
        Panel("Processes by state", "Those that serve, and engines, if there are any.", "none", {
            "{{state}}": f"sum by (state) (convoy_workers{{{INSTANCE}}})",
            "engine, {{state}}": f"sum by (state) (convoy_engines{{{INSTANCE}}})",
        }, stacked=True),
        Panel("Restarts", "Of processes, within an hour.", "none",
              {"{{instance}}": of_convoy("sum", f"changes(process_start_time_seconds{{{INSTANCE}}}[1h])")}),
        Panel("Workers that ended", "Without being told to, within the dashboard's time span.", "none", {
            "{{instance}} {{cause}}":
                f"sum by (instance, cause) (increase(convoy_worker_exits_total{{{INSTANCE}}}[$__range]))",
        }),
        Panel("Bodies held", "Bytes of requests in memory.", "bytes",
              {"{{instance}}": f"sum by (instance) (convoy_inflight_bytes{{{INSTANCE}}})"}),
    ),
    "GPUs": (
        Panel("Load", "Share of time in which something ran.", "percentunit",
              {"{{instance}} {{gpu}}": f"convoy_gpu_utilization_ratio{{{INSTANCE}}}"}, most=1, width=6),
        Panel("GPU memory", "Taken, by whomever.", "percentunit", {
            "{{instance}} {{gpu}}": f"convoy_gpu_memory_used_bytes{{{INSTANCE}}} / convoy_gpu_memory_total_bytes",
        }, most=1, width=6),
        Panel("Power", "Beside what it may draw.", "watt", {
            "{{instance}} {{gpu}}": f"convoy_gpu_power_watts{{{INSTANCE}}}",
            "{{instance}} {{gpu}} limit": f"convoy_gpu_power_limit_watts{{{INSTANCE}}}",
        }, width=6),
        Panel("Temperature", "Of the chip.", "celsius",
              {"{{instance}} {{gpu}}": f"convoy_gpu_temperature_celsius{{{INSTANCE}}}"}, width=6),
    ),
}, ("namespace", "job", "instance"))

MODELS = Dashboard("convoy-models", "Convoy: models", {
    "What is served": (
        Panel("Models and versions", "Where each runs, in which state, and the digest of its file.", "none",
              {"": f"convoy_model_info{{{MODEL}}} == 1"}, "table", width=16),
        Panel("Service", "Version, and the runtime under it.", "none",
              {"": f"convoy_build_info{{{INSTANCE}}}"}, "table", width=8),
        Panel("Images by version", "Classified.", "ops",
              {VERSION: rate("convoy_images_total", "model, version")}, stacked=True),
        Panel("Versions by state", "Over all instances.", "none",
              {"{{state}}": f"count by (state) (convoy_model_info{{{MODEL}}})"}),
        Panel("Since the last run", "How long a version has had nothing to do.", "s", {
            VERSION: f"time() - max by (model, version) (convoy_last_inference_timestamp_seconds{{{MODEL}}})",
        }),
    ),
    "Changes": (
        stat("Last reload", "Whether all that should be served was, everywhere.", "bool_yes_no",
             f"min(convoy_last_reload_success{{{MODEL}}})", width=6, steps=((LEAST, "red"), (1, "green"))),
        stat("Ago", "When a model's folder was last looked at.", "s",
             f"time() - max(convoy_last_reload_timestamp_seconds{{{MODEL}}})", width=6),
        stat("On another device", "Versions on the CPU that were to run on a GPU.", "none",
             f'count(convoy_model_info{{{MODEL}, provider="cpu"}} and on (namespace, job, instance)'
             f' convoy_wanted_device_info{{{INSTANCE}, device="cuda"}}) or vector(0)', width=6, steps=((1, "red"),)),
        stat("Digests", "Files under one name and version, at most: 2 is a rollout that has not ended.", "none",
             "max(count by (model, version) (count by (model, version, digest)"
             f' (convoy_model_info{{{MODEL}, state="ready"}})))', width=6, steps=((2, "orange"),)),
        Panel("Reloads", "Of models by workers, within the dashboard's time span.", "none", {
            "{{model}}: {{result}}": f"sum by (model, result) (increase(convoy_reloads_total{{{MODEL}}}[$__range]))",
        }, width=12),
        Panel("Time to load", "Load, prove, warm up.", "s",
              {VERSION: f"max by (model, version) (convoy_model_load_seconds{{{MODEL}}})"}, width=12),
    ),
})

QUALITY = Dashboard("convoy-predictions", "Convoy: predictions", {
    "Against the bundle's reference": (
        Panel("Change", "Population stability index of each feature over an hour: below 0.1 nothing, above 0.25 much.",
              "none", {VERSION + " {{feature}}": f"convoy:drift_psi:1h{{{RULED}}}"}, width=12),
        Panel("Change by chance", "The index that as many images like the reference's would show.", "none",
              {VERSION + " {{feature}}": f"convoy:drift_psi_chance:1h{{{RULED}}}"}, width=12),
        Panel("Classes", "Share of the likeliest classes among sampled images, last hour.", "percentunit",
              {"{{bin}}": f'convoy:feature_images:ratio1h{{{RULED}, feature="class"}}'}, stacked=True, width=12),
        Panel("Classes of the reference", "The same in the bundle's reference.", "percentunit",
              {"{{bin}}": f'convoy:feature_reference:ratio{{{RULED}, feature="class"}}'}, stacked=True, width=12),
    ),
    "Answers": (
        Panel("Mean confidence", "Probability of the likeliest class.", "percentunit",
              {VERSION: mean("convoy_prediction_confidence", "model, version")}, most=1),
        Panel("Unsure answers", "Share of images whose likeliest class has at most half.", "percentunit", {
            VERSION: ratio(rate("convoy_prediction_confidence_bucket", "model, version", MODEL + ', le="0.5"'),
                           rate("convoy_prediction_confidence_count", "model, version")),
        }),
        Panel("Mean entropy", "As a share of what not knowing anything would be.", "percentunit",
              {VERSION: mean("convoy_prediction_entropy_ratio", "model, version")}),
    ),
    "Images": (
        Panel("Brightness", "Mean luma, 0 to 255.", "none",
              {VERSION: mean("convoy_image_brightness", "model, version")}, width=6),
        Panel("Encoded size", "Mean.", "bytes", {VERSION: mean("convoy_image_size_bytes", "model, version")}, width=6),
        Panel("Short side", "Mean, pixels, before the resize.", "none",
              {VERSION: mean("convoy_image_short_side_pixels", "model, version")}, width=6),
        Panel("Looked at", "Images a second that all this is made of: ten of each version and worker at most.", "ops",
              {VERSION: rate("convoy_prediction_confidence_count", "model, version")}, width=6),
    ),
})
# fmt: on

DASHBOARDS = (OVERVIEW, STAGES, BATCHING, RESOURCES, MODELS, QUALITY)


def render(dashboard: Dashboard) -> str:
    """Return a dashboard as Grafana reads it."""
    document = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": "Made by deploy/grafana/dashboards.py: change it there, and run make dashboards.",
        "tags": ["convoy"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-30m", "to": "now"},
        "refresh": "10s",
        "timezone": "browser",
        "templating": {"list": [_source(), *map(_variable, dashboard.variables)]},
        "annotations": {"list": [_reloads()]},
        "links": [
            {"type": "dashboards", "title": "Convoy", "tags": ["convoy"], "asDropdown": False, "includeVars": True,
             "keepTime": True}
        ],
        "panels": list(_placed(dashboard)),
    }  # fmt: skip
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _placed(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    """Return rows and panels with their ids, from left to right and downwards."""
    number, top = 0, 0
    for title, panels in dashboard.rows.items():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": _box(0, top, 24, 1),
        }
        left, top, tallest = 0, top + 1, 0
        for panel in panels:
            if left + panel.width > COLUMNS:
                left, top, tallest = 0, top + tallest, 0
            number += 1
            yield _panel(panel, number, _box(left, top, panel.width, panel.height))
            left, tallest = left + panel.width, max(tallest, panel.height)
        top += tallest


def _box(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _panel(panel: Panel, number: int, box: dict[str, int]) -> dict[str, Any]:
    thresholds = panel.steps if panel.steps[:1] and panel.steps[0][0] == LEAST else ((LEAST, "green"), *panel.steps)
    steps = [{"color": colour, "value": None if value == LEAST else value} for value, colour in thresholds]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "noValue": "–",
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.kind == "stat":
        del defaults["min"]
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 25 if panel.stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none"},
        }
    formats = {"table": "table", "heatmap": "heatmap"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": box,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": SOURCE,
                "expr": query,
                "legendFormat": legend or "__auto",
                "format": formats.get(panel.kind, "time_series"),
                "instant": panel.kind in ("table", "stat"),
                "range": panel.kind not in ("table", "stat"),
            }
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
        **({"transformations": [{"id": "labelsToFields", "options": {}}, {"id": "merge", "options": {}}]}
           if panel.kind == "table" else {}),
    }  # fmt: skip


_OPTIONS: dict[str, dict[str, Any]] = {
    "stat": {
        "colorMode": "value",
        "graphMode": "none",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "value",
    },
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "heatmap": {"calculate": False, "cellGap": 1, "color": {"mode": "scheme", "scheme": "Oranges"}},
    "table": {"showHeader": True},
}


def _source() -> dict[str, Any]:
    name = {"name": "datasource", "label": "Data source", "type": "datasource"}
    return {**name, "query": "prometheus", "current": {}, "hide": 0}


def _variable(name: str) -> dict[str, Any]:
    series = "convoy_model_info" if name == "model" else "convoy_build_info"
    query = f"label_values({series}, {name})"
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _reloads() -> dict[str, Any]:
    return {
        "name": "Reloads",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "blue",
        "expr": f"changes(convoy_last_reload_timestamp_seconds{{{INSTANCE}}}[{RATE}]) > 0",
        "titleFormat": "reload",
        "textFormat": "{{model}} on {{instance}}",
    }


def main() -> None:
    """Write every dashboard."""
    for dashboard in DASHBOARDS:
        (TARGET / f"{dashboard.uid}.json").write_text(render(dashboard), encoding="utf-8")


if __name__ == "__main__":
    main()
