"""What k8s/ says of autoscaling, as it is written there: queries, targets, behaviour. Nothing is repeated here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

COMPONENTS = Path(__file__).parents[2] / "k8s/components"
HPA = COMPONENTS / "autoscaling-hpa/hpa.yaml"
ADAPTER = COMPONENTS / "autoscaling-hpa/adapter.yaml"
SCALED_OBJECT = COMPONENTS / "autoscaling-keda/scaledobject.yaml"
POD_MONITOR = COMPONENTS / "monitoring/podmonitor.yaml"


@dataclass(frozen=True)
class Fallback:
    """What KEDA does when Prometheus does not answer.

    Attributes:
        failures: polls that must have failed before.
        replicas: how many then.
        keeps_more: no fewer than there are.
    """

    failures: int
    replicas: int
    keeps_more: bool


@dataclass(frozen=True)
class Scaler:
    """An autoscaler's part of a manifest.

    Attributes:
        least, most: replicas.
        target: of the metric, a replica.
        behavior: `behavior` of the autoscaling/v2 API, as written.
        fallback: KEDA's; None: the HPA's, which then does nothing.
    """

    least: int
    most: int
    target: float
    behavior: dict[str, Any]
    fallback: Fallback | None


def hpa() -> Scaler:
    """Return the HorizontalPodAutoscaler's."""
    spec = _read(HPA)["spec"]
    [metric] = spec["metrics"]
    target = metric["pods"]["target"]
    assert target["type"] == "AverageValue"
    return Scaler(spec["minReplicas"], spec["maxReplicas"], float(target["averageValue"]), spec["behavior"], None)


def keda() -> Scaler:
    """Return the ScaledObject's, of which KEDA makes an HPA with an External metric."""
    spec = _read(SCALED_OBJECT)["spec"]
    [trigger] = spec["triggers"]
    assert trigger["metricType"] == "AverageValue"
    fallback = spec["fallback"]
    return Scaler(
        spec["minReplicaCount"],
        spec["maxReplicaCount"],
        float(trigger["metadata"]["threshold"]),
        spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
        Fallback(fallback["failureThreshold"], fallback["replicas"], fallback["behavior"] == "currentReplicasIfHigher"),
    )


def keda_query() -> str:
    """Return what KEDA asks Prometheus."""
    [trigger] = _read(SCALED_OBJECT)["spec"]["triggers"]
    return str(trigger["metadata"]["query"])


def adapter_query(**labels: str) -> str:
    """Return what prometheus-adapter asks for the pods that labels choose, with its templates filled in."""
    [rule] = _read(ADAPTER)
    matchers = ",".join(f'{name}="{value}"' for name, value in labels.items())
    query: str = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", matchers)
    return query


def scrape_interval_s() -> float:
    """Return how often the pods' figures are taken, seconds."""
    [endpoint] = _read(POD_MONITOR)["spec"]["podMetricsEndpoints"]
    return float(endpoint["interval"].removesuffix("s"))


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())
