"""Every dashboard as a picture of what Prometheus answered. Drawn by matplotlib: Grafana itself is not run here."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""By query, the series that it had."""
ROW_INCHES, COLUMN_INCHES = 0.32, 0.6
UNITS = {"s": " s", "percentunit": " %", "bytes": "B", "reqps": "/s", "ops": "/s", "watt": " W", "celsius": " °C"}


def draw(dashboard: Mapping[str, Any], found: Found, began: float, path: Path) -> None:
    """Draw a dashboard's panels on its grid, from the answers to its queries."""
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = pyplot.figure(figsize=(24 * COLUMN_INCHES, rows * ROW_INCHES + 0.6), dpi=80)
    figure.text(0.01, 0.997, dashboard["title"], fontsize=13, fontweight="bold", va="top")
    figure.text(
        0.99, 0.997, "drawn with matplotlib from Prometheus's answers, not by Grafana", fontsize=8, va="top", ha="right"
    )
    for panel in panels:
        box = panel["gridPos"]
        whole = rows + 1.5
        axes = figure.add_axes((
            (box["x"] + 0.9) / 24.3,
            1 - (box["y"] + 1.5 + box["h"] - 1.3) / whole,
            (box["w"] - 1.4) / 24.3,
            (box["h"] - 2.6) / whole,
        ))  # fmt: skip
        axes.set_title(panel["title"], fontsize=8, loc="left")
        _KINDS[panel["type"]](axes, panel, found, began)
    figure.savefig(path)
    pyplot.close(figure)


def _lines(axes: Axes, panel: Mapping[str, Any], found: Found, began: float) -> None:
    lines = [
        (_legend(target["legendFormat"], series["metric"]), *_points(series, began))
        for target in panel["targets"]
        for series in found[target["expr"]]
    ]
    if not lines:
        _say(axes, "nothing here")
        return
    if panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal":
        moments = sorted({moment for _, line, _ in lines for moment in line})
        values = [[dict(zip(line, heights, strict=True)).get(at, 0.0) for at in moments] for _, line, heights in lines]
        axes.stackplot(moments, values, labels=[legend for legend, _, _ in lines], alpha=0.7)
    else:
        for legend, moments, values in lines:
            axes.plot(moments, values, label=legend, linewidth=1)
    axes.set_ylim(bottom=0)
    _scale(axes, panel)
    if len(lines) <= 12:
        axes.legend(fontsize=5, loc="upper left", ncols=3, frameon=False)


def _heat(axes: Axes, panel: Mapping[str, Any], found: Found, began: float) -> None:
    series = sorted(found[panel["targets"][0]["expr"]], key=lambda one: float(one["metric"]["le"]))
    if not series:
        _say(axes, "nothing here")
        return
    moments = sorted({float(at) for one in series for at, _ in one["values"]})
    heights = [{float(at): float(value) for at, value in one["values"]} for one in series]
    cumulated = [[row.get(at, 0.0) for at in moments] for row in heights]
    single = [
        cumulated[0],
        *([max(0.0, b - a) for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(cumulated)),
    ]
    axes.imshow(single, aspect="auto", origin="lower", cmap="Oranges", interpolation="nearest")
    axes.set_yticks(range(len(series)), [one["metric"]["le"] for one in series], fontsize=4)
    axes.set_xticks([])


def _figure(axes: Axes, panel: Mapping[str, Any], found: Found, began: float) -> None:
    values = [series["values"][-1][1] for target in panel["targets"] for series in found[target["expr"]]]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    _say(axes, _shown(float(values[-1]), unit) if values else "–", size=14)


def _table(axes: Axes, panel: Mapping[str, Any], found: Found, began: float) -> None:
    rows = [
        {name: value[:12] for name, value in series["metric"].items() if name not in ("__name__", "job")}
        for target in panel["targets"]
        for series in found[target["expr"]]
    ]
    axes.axis("off")
    if rows:
        names = sorted({name for row in rows for name in row})
        cells = [[row.get(name, "") for name in names] for row in rows]
        table = axes.table(cells, colLabels=names, loc="upper center", cellLoc="left", edges="horizontal")
        table.auto_set_font_size(False)
        table.set_fontsize(6)


_KINDS = {"timeseries": _lines, "heatmap": _heat, "stat": _figure, "table": _table}


def _points(series: Mapping[str, Any], began: float) -> tuple[list[float], list[float]]:
    return [(at - began) / 60 for at, _ in series["values"]], [float(value) for _, value in series["values"]]


def _legend(text: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def _scale(axes: Axes, panel: Mapping[str, Any]) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _shown(value, unit)))
    axes.tick_params(labelsize=6)
    axes.set_xlabel("minutes", fontsize=6, labelpad=1)
    axes.grid(alpha=0.3)


def _shown(value: float, unit: str) -> str:
    if unit == "bool_yes_no":
        return "yes" if value else "no"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s" and value and abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    if unit == "bytes" and value >= 1e6:
        return f"{value / 1e6:.4g} MB"
    return f"{value:.4g}{UNITS.get(unit, '')}"


def _say(axes: Axes, text: str, size: int = 8) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=size)
