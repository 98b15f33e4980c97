"""Prometheus's rules and Grafana's dashboards: every query parses, and asks for what the service exports."""

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector

from app.metrics import Metrics
from app.settings import Settings, variable_of

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
# Labels that Prometheus adds to what it scrapes; compose files have no namespace.
SCRAPE_LABELS = {"instance", "job", "namespace"}
ALERT_LABELS = {"alertname", "alertstate"}
NAME = re.compile(r"(?<![\w:])(?:convoy[_:]|process_|python_gc_|up\b|ALERTS\b)[\w:]*")
WORDS_IN_BRACES = re.compile(r"\{([^}]*)\}")
GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left)\s*\(([^)]*)\)")
ALERT_TESTS = ("alerts.yml", "alerts-slow.yml")
VARIABLES = {"$__rate_interval": "1m", "$__range": "30m"}


def exported_series() -> dict[str, set[str]]:
    """Return every series that the service can export, with its labels."""
    series: dict[str, set[str]] = {}
    metrics = Metrics()
    for family in metrics.families.values():
        for suffix in SUFFIXES[family.kind]:
            name = family.name.removesuffix("_total") + suffix
            series[name] = {*family.sample_labels, *(["le"] if suffix == "_bucket" else [])}
    others = CollectorRegistry()
    GCCollector(registry=others)
    for family in (*ProcessCollector(registry=CollectorRegistry()).collect(), *others.collect()):
        series[family.name + SUFFIXES[family.type][0]] = set()
    for family in metrics.registry.collect():
        for suffix in SUFFIXES.get(family.type, ()):
            labels = set().union(*(sample.labels for sample in family.samples))
            series.setdefault(family.name + suffix, labels)
    return series


def known_series(rules: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Return what a query may ask for: what is exported, what rules record (with any label), Prometheus's own."""
    exported = exported_series()
    labels = set().union(*exported.values())
    recorded = {rule["record"]: labels for rule in rules if "record" in rule}
    return exported | recorded | {"up": set(), "ALERTS": ALERT_LABELS}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]


def unknown_words(query: str, series: dict[str, set[str]]) -> set[str]:
    """Return the names in a query that no series has: metrics, matched labels and grouping labels."""
    without_texts = re.sub(r'"[^"]*"', '""', query)
    names = set(NAME.findall(without_texts))
    known = SCRAPE_LABELS.union(*(series.get(name, ()) for name in names))
    matched = re.findall(r"(\w+)\s*[=!]", ",".join(WORDS_IN_BRACES.findall(without_texts)))
    grouped = re.findall(r"\w+", ",".join(GROUPING.findall(query)))
    return (names - set(series)) | ({*matched, *grouped} - known)


def without_grafana(query: str) -> str:
    """Return a query with Grafana's variables filled in, as Prometheus would get it."""
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    return re.sub(r"\$(namespace|job|instance|model)\b", ".*", query)


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
    # By name both: the file is started with either, and a target that nobody started would be an alert for ever.
    assert "static_configs" not in jobs["convoy"]
    [dns] = jobs["convoy"]["dns_sd_configs"]
    assert (dns["names"], dns["port"]) == (["convoy", "convoy-gpu"], int(port))
    assert {"convoy", "convoy-gpu"} <= set(compose["services"])
    [relabel] = jobs["convoy"]["relabel_configs"]
    assert relabel["replacement"] == f"${{1}}:{port}"


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


def test_prometheus_finds_the_rules(prometheus_config, compose):
    assert prometheus_config["rule_files"] == ["rules/*.yml"]
    folders = {volume.split(":")[1]: volume.split(":")[0] for volume in compose["services"]["prometheus"]["volumes"]}
    assert folders["/etc/prometheus/rules"] == "./deploy/prometheus/rules"


def written() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboards", ROOT / "deploy" / "grafana" / "dashboards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dashboards_are_what_their_source_says():
    source = written()
    files = {path.name: path.read_text() for path in source.TARGET.glob("*.json")}
    made = {f"{dashboard.uid}.json": source.render(dashboard) for dashboard in source.DASHBOARDS}
    assert files == made, "run make dashboards"


def test_a_first_start_alerts_nobody_for_as_long_as_tensorrt_may_take(root, rules):
    def probe(folder: str) -> dict[str, Any]:
        pod = yaml.safe_load((root / f"k8s/{folder}/deployment.yaml").read_text())["spec"]["template"]["spec"]
        [container] = pod["containers"]
        return container["startupProbe"]

    allowed = {**probe("base"), **probe("overlays/gpu-tensorrt")}
    minutes = allowed["periodSeconds"] * allowed["failureThreshold"] // 60
    borne = {rule["alert"]: re.findall(r"offset (\w+)", rule["expr"]) for rule in rules if "alert" in rule}
    assert borne["ConvoyNoneReady"] == borne["ConvoyNotReady"] == [f"{minutes}m"]


def test_the_service_and_the_rules_mean_the_same_predictions(server, rules):
    [wanted] = set(re.findall(r'route=~"([^"]*)"', " ".join(rule["expr"] for rule in rules)))
    assert f'route=~"{wanted}"' == written().PREDICTIONS
    posts = {
        path
        for path, methods in server.client.get("/openapi.json").json()["paths"].items()
        if "post" in methods and not path.endswith(("/load", "/unload", "/index"))
    }
    assert posts
    assert {path for path in posts if not re.fullmatch(wanted, path)} == set()
    methods = ("ModelInfer", "ModelStreamInfer", "ServerLive", "ServerReady", "ModelReady", "ModelMetadata")
    matched = [name for name in methods if re.fullmatch(wanted, f"/inference.GRPCInferenceService/{name}")]
    assert matched == ["ModelInfer", "ModelStreamInfer"]
    for probe in (
        "/livez",
        "/readyz",
        "/metrics",
        "/ping",
        "/v2/health/ready",
        "/models/{model}",
        "/v2/models/{model}",
    ):
        assert not re.fullmatch(wanted, probe)


def test_panel_ids_are_unique(dashboards):
    for dashboard in dashboards.values():
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(ids) == len(set(ids))


def test_panels_fit_and_do_not_overlap(dashboards):
    for dashboard in dashboards.values():
        boxes = [panel["gridPos"] for panel in dashboard["panels"]]
        assert all(box["x"] >= 0 and box["w"] > 0 and box["h"] > 0 and box["x"] + box["w"] <= 24 for box in boxes)
        for one, other in itertools.combinations(boxes, 2):
            beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            stacked = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
            assert beside or stacked, (dashboard["uid"], one, other)


def test_panels_say_what_they_show(dashboards):
    for dashboard in dashboards.values():
        titles = [panel["title"] for panel in panels(dashboard)]
        assert len(titles) == len(set(titles))
        for panel in panels(dashboard):
            assert panel["title"]
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_every_query_goes_to_the_chosen_data_source(dashboards):
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for dashboard in dashboards.values():
        variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
        assert variables["datasource"]["type"] == "datasource"
        asked = [
            *(variable for variable in variables.values() if variable["type"] == "query"),
            *dashboard["annotations"]["list"],
            *panels(dashboard),
            *(target for panel in panels(dashboard) for target in panel["targets"]),
        ]
        assert all(each["datasource"] == chosen for each in asked)
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
        assert used - {"__rate_interval", "__range", "1"} <= set(variables)


def test_rates_span_enough_scrapes(dashboards):
    ranges = {span for board in dashboards.values() for q in queries(board) for span in re.findall(r"\[([^\]]*)\]", q)}
    assert ranges == {"$__rate_interval", "$__range", "1h"}


def expressions(dashboards: dict[str, dict[str, Any]], rules: list[dict[str, Any]]) -> list[str]:
    """Return every query that Prometheus is asked, by Grafana or by its own rules."""
    asked = [query for dashboard in dashboards.values() for query in queries(dashboard)]
    asked += [note["expr"] for dashboard in dashboards.values() for note in dashboard["annotations"]["list"]]
    return [*map(without_grafana, asked), *(rule["expr"] for rule in rules)]


def test_queries_parse_in_prometheus_2(dashboards, rules, tmp_path):
    asked = [
        {"record": f"query:{number}", "expr": query} for number, query in enumerate(expressions(dashboards, rules))
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": asked}]}))
    _promtool("check", "rules", "--lint=none", file)


def test_queries_parse_in_the_grammar_of_prometheus_3(dashboards, rules):
    for query in expressions(dashboards, rules):
        promql_parser.parse(query)


def test_queries_ask_for_what_there_is(dashboards, rules):
    series = known_series(rules)
    asked = expressions(dashboards, rules)
    assert len(asked) > 100
    assert {query: words for query in asked if (words := unknown_words(query, series))} == {}


def test_variables_ask_for_what_the_service_exports(dashboards):
    series = exported_series()
    for dashboard in dashboards.values():
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
        ("convoy:drift_psi:2h > 1", {"convoy:drift_psi:2h"}),
        ("process_resident_memory_bytes and on (instance) convoy_model_info", set()),
    ],
)
def test_a_wrong_name_is_seen(query, unknown, rules):
    assert unknown_words(query, known_series(rules)) == unknown


def test_every_series_is_on_a_dashboard(dashboards, rules):
    asked = " ".join(expressions(dashboards, rules))
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in NAME.findall(asked)}
    exported = {family.name for family in Metrics().families.values()}
    # Names beside the figures: the metrics page has them for whoever looks for one device.
    assert exported - names == {"convoy_gpu_info"}


def test_every_alert_has_its_section_in_the_runbook(rules):
    alerts = {rule["alert"]: rule for rule in rules if "alert" in rule}
    sections = dict(re.findall(r"^## (Convoy\w+)\n\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(alerts)
    for name, section in sections.items():
        severity = alerts[name]["labels"]["severity"]
        assert section.startswith(f"`{severity}`."), name
        assert "- **Look at** " in section and "- **Do** " in section, name
        assert set(alerts[name]["annotations"]) == {"summary", "description", "runbook"}
        assert alerts[name]["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"


def test_series_and_settings_in_the_runbook_exist(rules):
    names = {word for text in re.findall(r"`([^`]*)`", RUNBOOK) for word in re.findall(r"convoy[_:][\w:]+", text)}
    assert names
    assert names <= set(known_series(rules))
    settings = set(re.findall(r"CONVOY_\w+", RUNBOOK))
    assert settings <= {variable_of(name) for name in Settings.model_fields}


def test_every_alert_is_fired_and_kept_quiet_in_a_test(rules):
    text = "".join((ROOT / "tests" / "deploy" / name).read_text() for name in ALERT_TESTS)
    fired = set(re.findall(r"alertname: (\w+)\n\s*exp_alerts:\n", text))
    assert fired == {rule["alert"] for rule in rules if "alert" in rule}


@pytest.mark.parametrize("file", ALERT_TESTS)
def test_alerts_fire_when_they_should(root, file):
    _promtool("test", "rules", root / "tests" / "deploy" / file)
