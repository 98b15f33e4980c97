"""Figures of a run as a file. The only room that loads matplotlib, and only when it draws."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.bench.report import Report
from app.bench.search import Candidate, Search
from app.errors import BadRequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
NINES = (0.5, 0.9, 0.99, 0.999, 0.9999)


def check_can_draw(path: Path) -> None:
    """Say before anything is measured that a picture could not be written.

    Raises:
        BadRequestError: the name is neither SVG nor PNG, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BadRequestError(f"--plot cannot be {path}: its name ends in .svg or .png.")
    _figure(lambda _: None, 1)


def draw_report(report: Report, path: Path) -> None:
    """Draw latency by percentile, and what was answered over time.

    Raises:
        BadRequestError: the file cannot be written.
    """

    def draw(axes: "list[Axes]") -> None:
        _percentiles(axes[0], report)
        _over_time(axes[1], report)

    save(_figure(draw, 2), path)


def draw_search(search: Search, path: Path) -> None:
    """Draw the throughput of every candidate, and the p99 of every rate that was probed.

    Raises:
        BadRequestError: the file cannot be written.
    """

    def draw(axes: "list[Axes]") -> None:
        _throughputs(axes[0], search)
        _probes(axes[1], search)

    save(_figure(draw, 2), path)


def _throughputs(axes: "Axes", search: Search) -> None:
    last = {tuple(trial.candidate.values()): trial for trial in search.trials if trial.loop == "closed"}
    ranked = sorted(last.values(), key=lambda trial: trial.requests_per_s)
    colours = ["tab:orange" if trial.candidate == search.best else "tab:blue" for trial in ranked]
    places = range(len(ranked))
    axes.barh(places, [trial.requests_per_s for trial in ranked], color=colours)
    axes.set_yticks(places, [_named(trial.candidate) for trial in ranked], fontsize=6)
    axes.set(xlabel="requests per second, closed loop", title=" · ".join(search.candidates[0]))
    axes.title.set_fontsize(7)


def _probes(axes: "Axes", search: Search) -> None:
    probes = [trial for trial in search.trials if trial.loop == "open" and trial.p99_ms is not None]
    for candidate in {tuple(trial.candidate.values()): trial.candidate for trial in probes}.values():
        mine = sorted((trial.asked, trial.p99_ms or 0) for trial in probes if trial.candidate == candidate)
        colour = "tab:orange" if candidate == search.best else "tab:blue"
        axes.plot(*zip(*mine, strict=True), marker="o", linestyle="none", color=colour, label=_named(candidate))
    axes.axhline(search.limit_ms, color="tab:red", linestyle="--", label=f"limit, {search.limit_ms:g} ms")
    axes.set(xlabel="requests per second, open loop", ylabel="p99 (ms)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _named(candidate: Candidate) -> str:
    return " · ".join(str(value) for value in candidate.values())


def _percentiles(axes: "Axes", report: Report) -> None:
    latencies = np.sort(report.observed.latency_ms[report.observed.status == 200])
    shares = (np.arange(len(latencies)) + 0.5) / max(len(latencies), 1)
    axes.plot(1 / (1 - shares), latencies, color="tab:blue")
    axes.set_xscale("log")
    nines = [nine for nine in NINES if nine <= max(shares, default=1)]
    axes.set_xticks([1 / (1 - nine) for nine in nines], [f"p{nine * 100:g}" for nine in nines])
    axes.minorticks_off()
    axes.set(xlabel="percentile of accepted requests", ylabel="latency (ms)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _over_time(axes: "Axes", report: Report) -> None:
    seconds = [second.second + 0.5 for second in report.per_second]
    for name, colour in (("accepted", "tab:blue"), ("rejected", "tab:orange"), ("failed", "tab:red")):
        values = [getattr(second, name) for second in report.per_second]
        if name == "accepted" or any(values):
            axes.plot(seconds, values, color=colour, marker="o", markersize=3, label=name)
    axes.set(xlabel="seconds", ylabel="answers per second")
    axes.margins(y=0.2)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _figure(draw: "Callable[[list[Axes]], None]", columns: int) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadRequestError("--plot needs matplotlib: pip install 'convoy-serve[bench]'.") from None
    figure = Figure(figsize=(4.6 * columns, 3.6), layout="constrained")
    draw(list(figure.subplots(1, columns, squeeze=False)[0]))
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write a figure.

    Raises:
        BadRequestError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise BadRequestError(f"The picture {path} cannot be written: {error.strerror or error}.") from error
