"""The horizontal pod autoscaler's decision, as Kubernetes documents it and its controller computes it.

Pure: knows no clock, no pods, no Prometheus; replicas, metrics and times are given. Source of the rules:
https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/ (algorithm details, configurable
scaling behaviour), and `pkg/controller/podautoscaler` of Kubernetes for what the page leaves open.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SYNC_S = 15.0
"""`--horizontal-pod-autoscaler-sync-period`, its default."""
TOLERANCE = 0.1
"""`--horizontal-pod-autoscaler-tolerance`, its default."""
EXACT = 1e-9
"""What a quotient may be beyond a whole number, by rounding alone, without counting as more."""


@dataclass(frozen=True)
class Policy:
    """How much may change within a time."""

    kind: Literal["Pods", "Percent"]
    value: int
    period_s: float


@dataclass(frozen=True)
class Direction:
    """The rules for one direction.

    Attributes:
        window_s: the recommendation that changes least of so many seconds counts.
        policies: each allows so much.
        select: which of them counts. Disabled: no change in this direction.
    """

    window_s: float
    policies: tuple[Policy, ...]
    select: Literal["Max", "Min", "Disabled"] = "Max"

    @classmethod
    def read(cls, written: Mapping[str, Any] | None, default: "Direction") -> "Direction":
        """Return what a manifest says; what it does not say is the default."""
        if written is None:
            return default
        policies = [Policy(each["type"], each["value"], each["periodSeconds"]) for each in written.get("policies", ())]
        return cls(
            written.get("stabilizationWindowSeconds", default.window_s),
            tuple(policies) or default.policies,
            written.get("selectPolicy", "Max"),
        )


UP = Direction(0, (Policy("Percent", 100, 15), Policy("Pods", 4, 15)))
DOWN = Direction(300, (Policy("Percent", 100, 15),))
"""The API's defaults."""


def by_pods(current: int, values: Sequence[float], target: float) -> int:
    """Return the replicas that a metric of type Pods asks for.

    Args:
        current: replicas that there should be.
        values: of those pods that have one. The others are starting: on the way up they count as doing nothing, on the
            way down as doing what they should, and where that turns the direction, nothing changes.
        target: average that a pod should have.
    """
    if not values:
        return current
    ratio = sum(values) / len(values) / target
    missing = max(0, current - len(values))
    if not missing:
        return current if _is_close(ratio) else _whole(ratio * len(values))
    assumed = 0.0 if ratio > 1 else target
    weighed = (sum(values) + missing * assumed) / (len(values) + missing) / target
    if _is_close(weighed) or (weighed > 1) != (ratio > 1):
        return current
    wanted = _whole(weighed * (len(values) + missing))
    if (weighed > 1) != (wanted > current):
        return current
    return wanted


def by_total(current: int, total: float, target: float) -> int:
    """Return the replicas that an External metric with an AverageValue asks for, as KEDA's is."""
    if _is_close(total / (target * current)):
        return current
    return _whole(total / target)


class Autoscaler:
    """One autoscaler's memory: what it has recommended, and what it has done."""

    def __init__(self, least: int, most: int, behavior: Mapping[str, Any]) -> None:
        """Take bounds, and `behavior` as it is in a manifest of autoscaling/v2."""
        self._least, self._most = least, most
        self._up = Direction.read(behavior.get("scaleUp"), UP)
        self._down = Direction.read(behavior.get("scaleDown"), DOWN)
        self._recommended: list[tuple[float, int]] = []
        self._changes: list[tuple[float, int]] = []

    def decide(self, now: float, current: int, wanted: int) -> int:
        """Return how many replicas there shall be.

        Args:
            now: seconds.
            current: replicas there are to be by now.
            wanted: what the metric asks for.
        """
        wanted = self._stabilized(now, current, wanted)
        if wanted > current:
            wanted = min(wanted, max(self._most_up(now, current), current))
        elif wanted < current:
            wanted = max(wanted, min(self._least_down(now, current), current))
        wanted = min(max(wanted, self._least), self._most)
        if wanted != current:
            self._changes.append((now, wanted - current))
        return wanted

    def _stabilized(self, now: float, current: int, wanted: int) -> int:
        """Return the least change that was recommended within the windows."""
        self._recommended.append((now, wanted))
        longest = max(self._up.window_s, self._down.window_s)
        self._recommended = [(at, each) for at, each in self._recommended if at > now - longest or at == now]
        low = min(each for at, each in self._recommended if at > now - self._up.window_s or at == now)
        high = max(each for at, each in self._recommended if at > now - self._down.window_s or at == now)
        return min(max(current, low), high)

    def _most_up(self, now: float, current: int) -> int:
        limits = []
        for policy in self._up.policies:
            begin = self._begin(now, current, policy)
            more: float = policy.value if policy.kind == "Pods" else begin * policy.value / 100
            limits.append(_whole(begin + more))
        return current if self._up.select == "Disabled" else (max if self._up.select == "Max" else min)(limits)

    def _least_down(self, now: float, current: int) -> int:
        limits = []
        for policy in self._down.policies:
            begin = self._begin(now, current, policy)
            less: float = policy.value if policy.kind == "Pods" else begin * policy.value / 100
            limits.append(math.floor(begin - less + EXACT))
        return current if self._down.select == "Disabled" else (min if self._down.select == "Max" else max)(limits)

    def _begin(self, now: float, current: int, policy: Policy) -> int:
        """Return how many replicas there were when the policy's period began."""
        return current - self._changed(now, policy.period_s, 1) + self._changed(now, policy.period_s, -1)

    def _changed(self, now: float, period_s: float, sign: int) -> int:
        """Return how many replicas were added (1) or taken away (-1) within a period."""
        return sum(abs(change) for at, change in self._changes if at > now - period_s and change * sign > 0)


def _is_close(ratio: float) -> bool:
    return abs(ratio - 1) <= TOLERANCE + EXACT


def _whole(replicas: float) -> int:
    return math.ceil(replicas - EXACT)
