"""The closed loop: demand, as many pods as there are by now, what Prometheus sees of them, what the autoscaler decides.

A step is a second. Pods share the demand evenly, start in so many seconds and leave at once; Prometheus scrapes each at
its own moment; the autoscaler looks every 15 s. Requests that were refused do not come back.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.autoscaling.hpa import SYNC_S, Autoscaler, by_pods, by_total
from benchmarks.autoscaling.manifests import Scaler
from benchmarks.autoscaling.pods import WINDOW_S, Level, Pod, Rates, rates

Signal = Literal["request seconds", "gauge", "mean gauge"]
"""What is multiplied by the refused: the rate of the requests' seconds inside (the manifests'), the gauge of requests
inside at the last scrape, or its mean over a minute's scrapes."""
SIGNALS: dict[Signal, Callable[[Rates], float]] = {
    "request seconds": lambda found: found.busy_s,
    "gauge": lambda found: found.inflight,
    "mean gauge": lambda found: found.mean_inflight,
}
LEAST_RAN = 0.1
"""`clamp_min` of the queries."""


@dataclass(frozen=True)
class World:
    """What is not the autoscaler's to choose.

    Attributes:
        levels: what a pod does at each rate.
        scrape_s: between scrapes of one pod.
        start_s: from the decision for a pod until it is ready.
        outage: first and last second of Prometheus not answering; None: it always does.
    """

    levels: Sequence[Level]
    scrape_s: float
    start_s: float
    outage: tuple[float, float] | None = None


@dataclass
class Run:
    """What happened, second by second."""

    replicas: list[int] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    offered: float = 0.0

    @property
    def turns(self) -> int:
        """How often replicas changed from growing to shrinking, or back: flapping makes it many."""
        return count_turns(self.replicas)

    @property
    def changes(self) -> int:
        """How often their number changed."""
        return sum(before != after for before, after in itertools.pairwise(self.replicas))

    @property
    def refused_share(self) -> float:
        """Of all requests, those that were turned away."""
        return sum(self.refused) / self.offered

    @property
    def pod_hours(self) -> float:
        """What it cost."""
        return sum(self.replicas) / 3600


def simulate(demand: Sequence[float], scaler: Scaler, world: World, *, signal: Signal, target: float, seed: int) -> Run:
    """Run an autoscaler over a demand.

    Args:
        demand: requests a second, for each second.
        scaler: what the manifest says; with a fallback it is KEDA's, else an HPA over pods.
        world: pods, scrapes, start.
        signal: what is measured.
        target: of it for each pod, in place of the manifest's.
        seed: of what is left to chance: when pods are scraped, and which recorded seconds they live through.
    """
    chance = random.Random(seed)
    autoscaler = Autoscaler(scaler.least, scaler.most, scaler.behavior)
    replicas = scaler.least
    pods = [Pod(world.levels, chance, world.scrape_s) for _ in range(replicas)]
    starting: list[float] = []
    gone: list[tuple[float, Pod]] = []
    next_look, failures = chance.uniform(0, SYNC_S), 0
    run = Run()
    for second, rate in enumerate(demand):
        now = float(second)
        pods += [Pod(world.levels, chance, world.scrape_s) for at in starting if at <= now]
        starting = [at for at in starting if at > now]
        gone = [(at, pod) for at, pod in gone if at > now - WINDOW_S]
        for pod in pods:
            pod.live(now, rate / len(pods))
        if now >= next_look:
            next_look += SYNC_S
            silent = world.outage is not None and world.outage[0] <= now <= world.outage[1]
            failures = failures + 1 if silent else 0
            wanted = _look(now, replicas, pods, gone, scaler, SIGNALS[signal], target, failures)
            if wanted is not None:
                decided = autoscaler.decide(now, replicas, wanted)
                starting += [now + world.start_s] * max(0, decided - replicas)
                for _ in range(max(0, replicas - decided)):
                    if starting:
                        starting.pop()
                    else:
                        gone.append((now, pods.pop(0)))
                replicas = decided
        run.replicas.append(replicas)
        run.ready.append(len(pods))
        run.refused.append(sum(pod.refused for pod in pods))
        run.offered += rate
    return run


def _look(
    now: float,
    replicas: int,
    pods: Sequence[Pod],
    gone: Sequence[tuple[float, Pod]],
    scaler: Scaler,
    signal: Callable[[Rates], float],
    target: float,
    failures: int,
) -> int | None:
    """Return the replicas that the metric asks for; None: it is not known."""
    if failures:
        fallback = scaler.fallback
        if fallback is None or failures < fallback.failures:
            return None
        return max(fallback.replicas, replicas if fallback.keeps_more else 0)
    found = [each for pod in pods if (each := rates(pod.samples, now)) is not None]
    if scaler.fallback is None:
        values = [signal(each) * (1 + each.refused / max(each.ran, LEAST_RAN)) for each in found]
        return by_pods(replicas, values, target)
    # The sum also has pods that are gone, for as long as the window has scrapes of them.
    found += [each for _, pod in gone if (each := rates(pod.samples, now)) is not None]
    ran, refused = sum(each.ran for each in found), sum(each.refused for each in found)
    total = sum(map(signal, found)) * (1 + refused / max(ran, LEAST_RAN))
    return by_total(replicas, total, target)


def count_turns(replicas: Sequence[int]) -> int:
    """Return how often a series changes direction."""
    changes = [after - before for before, after in itertools.pairwise(replicas) if after != before]
    return sum((one > 0) != (other > 0) for one, other in itertools.pairwise(changes))
