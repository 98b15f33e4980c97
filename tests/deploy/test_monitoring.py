"""Prometheus's configuration and the dashboard: every query parses and asks for series that the service exports."""

import itertools
import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector

from app.metrics import Metrics

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
# Labels that Prometheus adds to what it scrapes.
SCRAPE_LABELS = {"instance", "job"}
NAME = re.compile(r"\b(?:convoy|process)_\w+")
WORDS_IN_BRACES = re.compile(r"\{([^}]*)\}")
GROUPING = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")


def exported_series() -> dict[str, set[str]]:
    """Return every series that the service can export, with its labels."""
    series: dict[str, set[str]] = {}
    for family in Metrics().families.values():
        for suffix in SUFFIXES[family.kind]:
            name = family.name.removesuffix("_total") + suffix
            series[name] = {*family.label_names[: family.shown], *(["le"] if suffix == "_bucket" else [])}
    for family in ProcessCollector(registry=CollectorRegistry()).collect():
        series[family.name + SUFFIXES[family.type][0]] = set()
    return series


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return dashboard["panels"] + [inner for panel in dashboard["panels"] for inner in panel.get("panels", ())]


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels(dashboard) for target in panel.get("targets", ())]


def unknown_words(query: str, series: dict[str, set[str]]) -> set[str]:
    """Return the names in a query that no series has: metrics, matched labels and grouping labels."""
    names = set(NAME.findall(query))
    known = SCRAPE_LABELS.union(*(series.get(name, ()) for name in names))
    matched = re.findall(r"(\w+)\s*[=!]", ",".join(WORDS_IN_BRACES.findall(query)))
    grouped = re.findall(r"\w+", ",".join(GROUPING.findall(query)))
    return (names - set(series)) | ({*matched, *grouped} - known)


def without_grafana(query: str) -> str:
    """Return a query with Grafana's variables filled in, as Prometheus would get it."""
    return query.replace("$__rate_interval", "1m").replace("$model", ".*").replace("$instance", ".*")


def _promtool(*arguments: object) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed, so Prometheus cannot judge its own files")
    checked = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_accepts_its_configuration(root):
    _promtool("check", "config", root / "deploy" / "prometheus" / "prometheus.yml")


def test_prometheus_finds_the_services_of_the_compose_file(prometheus_config, compose, dockerfile):
    jobs = {job["job_name"]: job for job in prometheus_config["scrape_configs"]}
    port = dockerfile.find("EXPOSE")[0]
    [static], [dns] = jobs["convoy"]["static_configs"], jobs["convoy"]["dns_sd_configs"]
    assert static["targets"] == [f"convoy:{port}"]
    assert (dns["names"], dns["port"]) == (["convoy-gpu"], int(port))
    assert {"convoy", "convoy-gpu"} <= set(compose["services"])


def test_grafana_finds_prometheus(root, compose, prometheus_config):
    provisioned = yaml.safe_load((root / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    [source] = provisioned["datasources"]
    name, port = re.fullmatch(r"http://([\w-]+):(\d+)", source["url"]).groups()
    assert compose["services"][name]["ports"][0].endswith(f":{port}")
    # Grafana derives $__rate_interval from it: were it shorter than the scrapes, rate() would find one sample.
    assert source["jsonData"]["timeInterval"] == prometheus_config["global"]["scrape_interval"]


def test_grafana_finds_the_dashboards(root, compose):
    provisioned = yaml.safe_load((root / "deploy/grafana/provisioning/dashboards/convoy.yml").read_text())
    [provider] = provisioned["providers"]
    folder = provider["options"]["path"]
    grafana = compose["services"]["grafana"]
    assert f"./deploy/grafana/dashboards:{folder}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/convoy.json"


def test_panel_ids_are_unique(dashboard):
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(ids) == len(set(ids))


def test_panels_fit_and_do_not_overlap(dashboard):
    boxes = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(box["x"] >= 0 and box["w"] > 0 and box["h"] > 0 and box["x"] + box["w"] <= 24 for box in boxes)
    for one, other in itertools.combinations(boxes, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        stacked = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or stacked, (one, other)


def test_panels_say_what_they_show(dashboard):
    for panel in panels(dashboard):
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]


def test_every_query_goes_to_the_chosen_data_source(dashboard):
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    asked = [
        *(variable for variable in variables.values() if variable["type"] == "query"),
        *(panel for panel in panels(dashboard)),
        *(target for panel in panels(dashboard) for target in panel["targets"]),
    ]
    assert all(each["datasource"] == chosen for each in asked)
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"]))) <= {*variables, "__rate_interval"}


def test_rates_span_enough_scrapes(dashboard):
    ranges = [span for query in queries(dashboard) for span in re.findall(r"\[([^\]]*)\]", query)]
    assert set(ranges) == {"$__rate_interval"}


def test_queries_parse(dashboard, tmp_path):
    rules = [
        {"record": f"query:{number}", "expr": without_grafana(query)} for number, query in enumerate(queries(dashboard))
    ]
    assert "$" not in json.dumps(rules)
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    _promtool("check", "rules", "--lint=none", file)


def test_queries_ask_for_what_the_service_exports(dashboard):
    series = exported_series()
    assert {query: words for query in queries(dashboard) if (words := unknown_words(query, series))} == {}


def test_probes_and_scrapes_are_not_counted_as_traffic(dashboard):
    # /readyz answers 503 while a pod starts or drains: counted, each rollout would look like an outage.
    quiet = 'route!~"/(livez|readyz|metrics)"'
    selectors = [
        selector
        for query in queries(dashboard)
        for selector in re.findall(r"convoy_request(?:s_total|_duration_seconds_\w+)\{([^}]*)\}", query)
    ]
    assert selectors
    assert [selector for selector in selectors if quiet not in selector] == []


def test_variables_ask_for_what_the_service_exports(dashboard):
    series = exported_series()
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
            assert label in series[name] | SCRAPE_LABELS


@pytest.mark.parametrize(
    ("query", "unknown"),
    [
        ("rate(convoy_request_total[1m])", {"convoy_request_total"}),
        ("sum by (reson) (convoy_rejected_total)", {"reson"}),
        ('convoy_queue_rows{version="1"}', {"version"}),
        ("process_resident_memory_bytes and on (instance) convoy_model_info", set()),
    ],
)
def test_a_wrong_name_is_seen(query, unknown):
    assert unknown_words(query, exported_series()) == unknown


def test_every_core_series_is_on_the_dashboard(dashboard):
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for query in queries(dashboard) for name in NAME.findall(query)}
    core = {
        "convoy_requests_total", "convoy_images_total", "convoy_request_duration_seconds",
        "convoy_stage_duration_seconds", "convoy_batch_size", "convoy_queue_rows", "convoy_inflight_requests",
        "convoy_rejected_total", "convoy_dropped_total", "convoy_model_info", "convoy_session_busy_seconds_total",
    }  # fmt: skip
    assert core - shown == set()
