"""Figures of a run as a file. The only room that loads matplotlib, and only when it draws."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.bench.report import Report
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


def _percentiles(axes: "Axes", report: Report) -> None:
    latencies = np.sort(report.observed.latency_ms[report.observed.status == 200])
    shares = (np.arange(len(latencies)) + 0.5) / max(len(latencies), 1)
    axes.plot(1 / (1 - shares), latencies, color="tab:blue")
    axes.set_xscale("log")
    axes.set_xticks([1 / (1 - nine) for nine in NINES], [f"p{nine * 100:g}" for nine in NINES])
    axes.minorticks_off()
    axes.set(xlabel="percentile of accepted requests", ylabel="latency (ms)", ylim=(0, None))
    axes.grid(alpha=0.3)


def _over_time(axes: "Axes", report: Report) -> None:
    seconds = [second.second + 0.5 for second in report.per_second]
    for name, colour in (("accepted", "tab:blue"), ("rejected", "tab:orange"), ("failed", "tab:red")):
        values = [getattr(second, name) for second in report.per_second]
        if name == "accepted" or any(values):
            axes.plot(seconds, values, color=colour, marker="o", markersize=3, label=name)
    axes.set(xlabel="seconds", ylabel="answers per second", ylim=(0, None))
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
