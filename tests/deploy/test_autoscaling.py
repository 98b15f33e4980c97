"""What the autoscalers ask Prometheus, answered by promtool on made-up series."""

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from tests.deploy.kustomize import K8S, ON_CPU, one, render
from tests.deploy.rules import groups
from tests.deploy.test_monitoring import exported_series, unknown_words

ADDED_BY_PROMETHEUS = {"namespace", "pod", "job", "instance"}


def keda_query() -> str:
    [trigger] = one(render((*ON_CPU, "autoscaling-keda")), "ScaledObject")["spec"]["triggers"]
    return str(trigger["metadata"]["query"])


def adapter_query() -> str:
    [rule] = yaml.safe_load((K8S / "components/autoscaling-hpa/adapter.yaml").read_text())
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod")
    return str(query.replace("<<.LabelMatchers>>", 'namespace="convoy",pod=~"a|b"'))


def recorded_query() -> str:
    """Return what the dashboard's demand is recorded from."""
    [found] = [
        rule["expr"]
        for group in groups()
        for rule in group["rules"]
        if rule.get("record") == "convoy:demand_requests:sum"
    ]
    return str(found)


def figures(query: Callable[[], str], by_pod: Mapping[str, float]) -> list[dict[str, object]]:
    """Return what a query makes of these figures: a sum, or each pod's."""
    if query is adapter_query:
        return [{"labels": f'{{pod="{pod}"}}', "value": value} for pod, value in by_pod.items()]
    labels = '{namespace="convoy"}' if query is recorded_query else "{}"
    return [{"labels": labels, "value": sum(by_pod.values())}]


def test_the_autoscaler_asks_for_what_the_adapter_makes():
    [rule] = yaml.safe_load((K8S / "components/autoscaling-hpa/adapter.yaml").read_text())
    [metric] = one(render((*ON_CPU, "autoscaling-hpa")), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


QUERIES = [keda_query, adapter_query, recorded_query]


@pytest.mark.parametrize("query", [keda_query, adapter_query])
def test_queries_ask_for_what_the_service_exports(query):
    assert unknown_words(query(), exported_series()) <= ADDED_BY_PROMETHEUS


@pytest.mark.parametrize(
    ("refused_a_minute", "run_a_minute", "factor"),
    [
        (None, 600, 1),  # nothing was ever refused: the series is not there
        (0, 600, 1),
        (600, 600, 2),
        (1800, 600, 4),
    ],
)
@pytest.mark.parametrize("query", QUERIES)
def test_demand_is_what_would_be_inside_if_nobody_were_turned_away(
    tmp_path: Path, query, refused_a_minute, run_a_minute, factor
):
    inside = {"a": 3, "b": 5}
    series = []
    for pod, requests in inside.items():
        labels = f'namespace="convoy",pod="{pod}",model="pets"'
        series.append({"series": f'convoy_ready{{namespace="convoy",pod="{pod}"}}', "values": "1x80"})
        # Seconds that requests were inside, together: as many in a second as were inside. The gauge of one moment says
        # another number.
        busy = {"series": f"convoy_request_duration_seconds_sum{{{labels}}}"}
        series.append(busy | {"values": f"0+{requests * 15}x80"})
        series.append({"series": f"convoy_inflight_requests{{{labels}}}", "values": "99x80"})
        ran = {"series": f'convoy_stage_duration_seconds_count{{{labels},stage="infer"}}'}
        series.append(ran | {"values": f"0+{run_a_minute / 4}x80"})
        if refused_a_minute is not None:
            # What the client did wrong is no demand.
            for reason, rate in (("overloaded", refused_a_minute), ("bad_image", 9999)):
                refused = {"series": f'convoy_rejected_total{{{labels},reason="{reason}"}}'}
                series.append(refused | {"values": f"0+{rate / 4}x80"})
    expected = figures(query, {pod: requests * factor for pod, requests in inside.items()})
    evaluate(tmp_path, query(), series, expected)


@pytest.mark.parametrize("query", QUERIES)
def test_pods_that_nobody_has_asked_yet_have_no_demand_and_pods_that_are_not_seen_no_figure(tmp_path: Path, query):
    series = []
    for pod in ("a", "b"):
        labels = f'namespace="convoy",pod="{pod}",model="pets"'
        series.append({"series": f'convoy_ready{{namespace="convoy",pod="{pod}"}}', "values": "1x80"})
        series.append({"series": f"convoy_inflight_requests{{{labels}}}", "values": "0x80"})
        series.append({"series": f'convoy_stage_duration_seconds_count{{{labels},stage="infer"}}', "values": "0x80"})
    evaluate(tmp_path, query(), series, figures(query, {"a": 0, "b": 0}))
    evaluate(tmp_path, query(), [], [])


def test_while_all_pods_load_autoscalers_have_no_figure_and_take_none_away(tmp_path: Path):
    """What is asked for then reaches nobody: a 0 would take away pods that have built for a quarter of an hour."""
    series = [{"series": 'convoy_ready{namespace="convoy",pod="a"}', "values": "0x80"}]
    evaluate(tmp_path, keda_query(), series, [])
    evaluate(tmp_path, adapter_query(), series, [])
    evaluate(tmp_path, recorded_query(), series, figures(recorded_query, {"a": 0}))


def evaluate(directory: Path, query: str, series: list[dict[str, str]], expected: list[dict[str, object]]) -> None:
    """Have promtool say what a query finds in series after five minutes."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed, so no query can be evaluated")
    test = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": series,
                "promql_expr_test": [{"expr": query, "eval_time": "5m", "exp_samples": expected}],
            }
        ],
    }
    (directory / "test.yml").write_text(yaml.safe_dump(test))
    ran = subprocess.run(
        [promtool, "test", "rules", directory / "test.yml"], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
