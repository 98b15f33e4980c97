"""What the autoscalers ask Prometheus, answered by promtool on made-up series."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.kustomize import K8S, ON_CPU, one, render
from tests.deploy.test_monitoring import exported_series, unknown_words

ADDED_BY_PROMETHEUS = {"namespace", "pod", "job", "instance"}


def keda_query() -> str:
    [trigger] = one(render((*ON_CPU, "autoscaling-keda")), "ScaledObject")["spec"]["triggers"]
    return str(trigger["metadata"]["query"])


def adapter_query() -> str:
    [rule] = yaml.safe_load((K8S / "components/autoscaling-hpa/adapter.yaml").read_text())
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod")
    return str(query.replace("<<.LabelMatchers>>", 'namespace="convoy",pod=~"a|b"'))


def test_the_autoscaler_asks_for_what_the_adapter_makes():
    [rule] = yaml.safe_load((K8S / "components/autoscaling-hpa/adapter.yaml").read_text())
    [metric] = one(render((*ON_CPU, "autoscaling-hpa")), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


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
@pytest.mark.parametrize("query", [keda_query, adapter_query])
def test_demand_is_what_would_be_inside_if_nobody_were_turned_away(
    tmp_path: Path, query, refused_a_minute, run_a_minute, factor
):
    inside = {"a": 3, "b": 5}
    series = []
    for pod, requests in inside.items():
        labels = f'namespace="convoy",pod="{pod}",model="pets"'
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
    if query is keda_query:
        expected = [{"labels": "{}", "value": sum(inside.values()) * factor}]
    else:
        expected = [{"labels": f'{{pod="{pod}"}}', "value": requests * factor} for pod, requests in inside.items()]
    evaluate(tmp_path, query(), series, expected)


@pytest.mark.parametrize("query", [keda_query, adapter_query])
def test_pods_that_nobody_has_asked_yet_have_no_demand_and_pods_that_are_not_seen_no_figure(tmp_path: Path, query):
    series = []
    for pod in ("a", "b"):
        labels = f'namespace="convoy",pod="{pod}",model="pets"'
        series.append({"series": f"convoy_inflight_requests{{{labels}}}", "values": "0x80"})
        series.append({"series": f'convoy_stage_duration_seconds_count{{{labels},stage="infer"}}', "values": "0x80"})
    labels = ["{}"] if query is keda_query else ['{pod="a"}', '{pod="b"}']
    evaluate(tmp_path, query(), series, [{"labels": each, "value": 0} for each in labels])
    evaluate(tmp_path, query(), [], [])


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
