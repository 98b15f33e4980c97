"""The picture of docs/operations.md: what a real pod said of its load, and what autoscalers made of many such pods."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.autoscaling import manifests
from benchmarks.autoscaling.scenarios import SHARE, SMALL_SHARE, Outcomes
from benchmarks.autoscaling.simulate import Run

DEMAND, COLOURS = "#b4bcc6", ("#1f77b4", "#ff7f0e", "#d62728")


def draw(recording: Mapping[str, Any], outcomes: Outcomes, path: Path) -> None:
    """Draw what the real pod said, the manifests' autoscalers, what was refused, and three sets of others."""
    figure, panels = pyplot.subplots(3, 2, figsize=(13, 10.5), dpi=80, layout="constrained")
    (signal, scaled), (refused, small), (slow, bad) = panels
    minutes = [second / 60 for second in range(len(outcomes.demand))]
    _signal(signal, recording)
    for axes, share, demand in (
        (scaled, SHARE, outcomes.demand),
        (slow, SHARE, outcomes.demand),
        (bad, SHARE, outcomes.demand),
        (small, SMALL_SHARE, outcomes.small_demand),
    ):
        needed = [outcomes.needed(rate, manifests.hpa(), share) for rate in demand]
        axes.step(minutes, needed, color=DEMAND, linewidth=3, label=f"needed at {share:g} of capacity", where="post")
        axes.set_ylabel("replicas")
        axes.set_ylim(0, 13)
    for axes, title, names in (
        (scaled, "By the manifests", ("HPA", "KEDA")),
        (small, "With a target below one request a pod", ("HPA, small target", "HPA, small target, gauge")),
        (
            slow,
            "By how soon pods are ready, and how fast more may be asked for",
            ("HPA, start in 20 s", "HPA, twofold in 30 s", "HPA, start in 180 s"),
        ),
        (bad, "Bad settings", ("HPA, target × 0.25", "HPA, target × 16", "HPA, no stabilisation, gauge")),
    ):
        axes.set_title(title)
        for name, colour in zip(names, COLOURS, strict=False):
            _runs(axes, minutes, outcomes.runs[name], name, colour)
    refused.plot(minutes, outcomes.demand, color=DEMAND, linewidth=3, label="demand")
    for name, colour in zip(("HPA", "KEDA", "HPA, target × 16"), COLOURS, strict=True):
        refused.plot(
            minutes, _smooth(outcomes.runs[name][0].refused), color=colour, label=f"refused: {name}", linewidth=1.2
        )
    refused.set_title("Requests a second")
    for axes in panels.flat:
        axes.set_xlabel("minutes")
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        axes.legend(fontsize=8, frameon=False, loc="upper right" if axes in (signal, refused) else "upper left")
        axes.title.set_fontsize(10)
    figure.savefig(path)
    pyplot.close(figure)


def _signal(axes: Axes, recording: Mapping[str, Any]) -> None:
    part = recording["shape"]
    seconds = range(len(part["seconds"]["keda"]))
    minutes = [second / 60 for second in seconds]
    every = range(0, len(minutes), 15)
    gauge = part["seconds"]["inflight"]
    axes.plot([minutes[at] for at in every], [gauge[at] for at in every], ".-", color=COLOURS[1], linewidth=0.7,
              label="gauge of requests inside, every 15 s")  # fmt: skip
    axes.plot(minutes, part["seconds"]["keda"], color=COLOURS[0], linewidth=2, label="the query of the manifests")
    axes.set_title("One real pod: what Prometheus answered")
    load = axes.twinx()
    steps = [step["offered_per_s"] / recording["capacity_per_s"] for step in part["sent"]]
    at = [step["at_s"] / 60 for step in part["sent"]] + [minutes[-1]]
    load.stairs(steps, at, color=DEMAND, linewidth=2)
    load.set_ylabel("offered, of its capacity", color=DEMAND)
    load.set_ylim(0, 2.2)


def _runs(axes: Axes, minutes: Sequence[float], runs: Sequence[Run], name: str, colour: str) -> None:
    columns = list(zip(*(run.replicas for run in runs), strict=True))
    axes.fill_between(minutes, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.2, step="post")
    axes.step(minutes, runs[0].replicas, color=colour, linewidth=1.5, label=name, where="post")


def _smooth(values: Sequence[float], window: int = 15) -> list[float]:
    sums = list(itertools.accumulate(values, initial=0.0))
    return [(sums[at + 1] - sums[max(0, at + 1 - window)]) / min(window, at + 1) for at in range(len(values))]
