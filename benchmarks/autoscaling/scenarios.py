"""What the autoscalers are put through: the manifests as they are, and what else one might have written there.

Owns the demand and the figures that are kept. A scenario is run twenty times, since scrapes come at chance moments.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.autoscaling import manifests
from benchmarks.autoscaling.manifests import Scaler
from benchmarks.autoscaling.pods import WINDOW_S, Level, read_levels
from benchmarks.autoscaling.simulate import Run, Signal, World, simulate

ROOT = Path(__file__).parents[2]
RECORDING = ROOT / "benchmarks/results/autoscaling-load.json"
RESULTS = ROOT / "benchmarks/results/autoscaling.json"
TIMES_PODS, TIMES_LONGER = 4, 4
"""The recorded demand is one pod's, over eight minutes. So many times as much comes over so many times as long: the
autoscalers' windows are minutes, and a replica is a small part."""
SHARE, SMALL_SHARE = 0.7, 0.25
"""Of a pod's capacity, at which the target is taken: about what `convoy tune` calls 0.8 of the sustainable rate; and
where the target is well below one request, as with models that are fast for their p99."""
START_S = 60.0
"""From a decision to a ready pod: the start itself, which was recorded, and its place, image and probe."""
SEEDS = range(20)
TURNS = 5
"""Of the demand itself: up, down, burst, down, up, down."""
TOLD_AFTER_S = 2 * 15 + WINDOW_S
"""Until a rise is wholly in the metric: a scrape, the window, a look of the autoscaler."""
BEARABLE = 0.005
"""Share of requests that may be refused outside of the burst, which is over before pods for it have started."""


class Outcomes:
    """Every scenario's runs, and what they come to."""

    def __init__(self, recording: Mapping[str, Any]) -> None:
        self.levels = read_levels(recording)
        self.capacity: float = recording["capacity_per_s"]
        self.target = inside_at(self.levels, SHARE * self.capacity)
        self.demand = demand_of(recording)
        self.burst = self.demand.index(max(self.demand)), len(self.demand) - self.demand[::-1].index(max(self.demand))
        self.small_target = inside_at(self.levels, SMALL_SHARE * self.capacity)
        self.small_gauge = gauge_at(self.levels, SMALL_SHARE * self.capacity)
        self.small_demand = [rate * SMALL_SHARE / SHARE for rate in self.demand]
        self.world = World(self.levels, manifests.scrape_interval_s(), START_S)
        self.runs: dict[str, list[Run]] = {}
        self.rows: dict[str, dict[str, float]] = {}

    def run(self) -> None:
        """Run them all."""
        hpa, keda = manifests.hpa(), manifests.keda()
        self._add("HPA", hpa)
        self._add("KEDA", keda)
        for name in ("gauge", "mean gauge"):
            self._add(f"HPA, {name}", hpa, signal=name)
            self._add(f"KEDA, {name}", keda, signal=name)
        for kind, scaler in (("HPA", hpa), ("KEDA", keda)):
            self._add(f"{kind}, small target", scaler, target=self.small_target, share=SMALL_SHARE)
            self._add(
                f"{kind}, small target, gauge", scaler, signal="gauge", target=self.small_gauge, share=SMALL_SHARE
            )
        for times in (0.25, 0.5, 2.0, 4.0, 16.0):
            self._add(f"HPA, target × {times:g}", hpa, target=times * self.target)
        self._add(f"HPA, target {hpa.target:g} as shipped", hpa, target=hpa.target)
        for start_s in (20.0, 180.0):
            self._add(f"HPA, start in {start_s:g} s", hpa, world=replace(self.world, start_s=start_s))
        quick = [
            {"type": "Percent", "value": 100, "periodSeconds": 30},
            {"type": "Pods", "value": 2, "periodSeconds": 30},
        ]
        self._add("HPA, twofold in 30 s", replace(hpa, behavior=hpa.behavior | {"scaleUp": {"policies": quick}}))
        eager = replace(hpa, behavior={"scaleDown": {"stabilizationWindowSeconds": 0}})
        self._add("HPA, no stabilisation", eager)
        self._add("HPA, no stabilisation, gauge", eager, signal="gauge")
        silent = replace(self.world, outage=(600.0, 900.0))
        self._add("HPA, Prometheus silent for 5 min", hpa, world=silent)
        self._add("KEDA, Prometheus silent for 5 min", keda, world=silent)

    def needed(self, rate: float, scaler: Scaler, share: float = SHARE) -> int:
        """Return the replicas that a rate needs at the share of their capacity, within bounds."""
        return min(max(scaler.least, math.ceil(rate / (share * self.capacity))), scaler.most)

    def faults(self) -> list[str]:
        """Return what is wrong with the manifests' own autoscalers, a sentence each."""
        found = []
        for name in ("HPA", "KEDA"):
            row = self.rows[name]
            if row["turns"] > TURNS:
                found.append(f"{name} turned {row['turns']:g} times, the demand {TURNS}: it flaps.")
            if row["refused_percent_but_for_burst"] > 100 * BEARABLE:
                found.append(f"{name} had {row['refused_percent_but_for_burst']:g} % refused outside of the burst.")
            if row["short_s"] > TOLD_AFTER_S + START_S:
                found.append(
                    f"{name} had too few pods for {row['short_s']:g} s: more than to see it and to start some."
                )
        return found

    def _add(
        self,
        name: str,
        scaler: Scaler,
        *,
        signal: Signal = "request seconds",
        target: float | None = None,
        world: World | None = None,
        share: float = SHARE,
    ) -> None:
        demand = self.demand if share == SHARE else self.small_demand
        runs = [
            simulate(demand, scaler, world or self.world, signal=signal, target=target or self.target, seed=seed)
            for seed in SEEDS
        ]
        begin, end = self.burst
        self.runs[name] = runs
        self.rows[name] = {
            "turns": max(run.turns for run in runs),
            "most": max(max(run.replicas) for run in runs),
            "pod_hours": round(statistics.mean(run.pod_hours for run in runs), 2),
            "needed_pod_hours": round(sum(self.needed(rate, scaler, share) for rate in demand) / 3600, 2),
            "refused_percent": round(100 * statistics.mean(run.refused_share for run in runs), 2),
            "refused_percent_but_for_burst": round(
                100
                * statistics.mean(
                    (sum(run.refused[:begin]) + sum(run.refused[end:])) / (sum(demand[:begin]) + sum(demand[end:]))
                    for run in runs
                ),
                2,
            ),
            "short_s": max(
                sum(rate > ready * self.capacity for rate, ready in zip(demand, run.ready, strict=True)) for run in runs
            ),
            "changes": round(statistics.mean(run.changes for run in runs), 1),
        }


def inside_at(levels: Sequence[Level], rate: float) -> float:
    """Return the requests inside a pod at a rate, between the recorded ones on a straight line."""
    return _between([(level.rate, level.inside) for level in levels], rate)


def gauge_at(levels: Sequence[Level], rate: float) -> float:
    """Return the mean of the gauge of requests inside a pod at a rate."""
    return _between([(level.rate, level.gauge) for level in levels], rate)


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    for below, above in itertools.pairwise(points):
        if below[0] <= at <= above[0]:
            return below[1] + (at - below[0]) / (above[0] - below[0]) * (above[1] - below[1])
    raise ValueError(f"No rate of {at} was recorded.")


def demand_of(recording: Mapping[str, Any]) -> list[float]:
    """Return the demand, requests a second for each second: the recorded shape, for more pods and longer."""
    return [
        step["offered_per_s"] * TIMES_PODS
        for step in recording["shape"]["sent"]
        for _ in range(round(step["seconds"] * TIMES_LONGER))
    ]
