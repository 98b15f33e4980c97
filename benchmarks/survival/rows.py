"""What the scenarios find: figures beside their bars, and the judgements that make figures of observations.

Pure functions: nothing here starts, sends or waits.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW_S = 0.25
NORMAL_WINDOWS = 4


@dataclass(frozen=True)
class Row:
    """One figure beside its bar; `met` None: a figure without a bar, shown for what the others mean."""

    figure: str
    value: float | None
    """None: there is none, which meets no bar."""
    unit: str
    bar: str
    met: bool | None


@dataclass
class Finding:
    """What one scenario found: its rows, and what it looked at."""

    rows: list[Row] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""
    """Why it could not be done here; empty where it was."""

    def at_most(self, figure: str, value: float, bar: float, unit: str = "") -> None:
        """Add a figure that must not be above its bar."""
        self._add(figure, value, unit, f"≤ {shown(bar)}", value <= bar)

    def at_least(self, figure: str, value: float, bar: float, unit: str = "") -> None:
        """Add a figure that must not be below its bar."""
        self._add(figure, value, unit, f"≥ {shown(bar)}", value >= bar)

    def exactly(self, figure: str, value: float, bar: float, unit: str = "") -> None:
        """Add a figure that has one right value."""
        self._add(figure, value, unit, f"= {shown(bar)}", value == bar)

    def told(self, figure: str, value: float, unit: str = "") -> None:
        """Add a figure that has no bar."""
        self._add(figure, value, unit, "", None)

    def _add(self, figure: str, value: float, unit: str, bar: str, met: bool | None) -> None:
        known = round(float(value), 4) if math.isfinite(value) else None
        self.rows.append(Row(figure, known, unit, bar, None if met is None else bool(met)))


def shown(value: float) -> str:
    """Return a number with at most four digits, as a person writes it."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def p99(values: Sequence[float]) -> float:
    """Return the 99th percentile by nearest rank; NaN of nothing, which meets no bar."""
    return float(np.quantile(values, 0.99, method="inverted_cdf")) if len(values) else float("nan")


def recovery_s(
    due_s: NDArray[np.float64], latency_ms: NDArray[np.float64], status: NDArray[np.int16], normal_ms: float
) -> float:
    """Return when latencies are normal again, in seconds since `due_s` counts; infinite: not in this time.

    Normal is a second whose quarters are all so: every request accepted, nine of ten within `normal_ms`.
    """
    normal_for = 0
    for window in range(int(np.ceil(due_s.max() / WINDOW_S)) if due_s.size else 0):
        here = (due_s >= window * WINDOW_S) & (due_s < (window + 1) * WINDOW_S)
        if not here.any():
            continue
        good = (status[here] == 200).all() and np.quantile(latency_ms[here], 0.9, method="inverted_cdf") <= normal_ms
        normal_for = normal_for + 1 if good else 0
        if normal_for == NORMAL_WINDOWS:
            return (window + 1 - NORMAL_WINDOWS) * WINDOW_S
    return float("inf")


def went_backwards(earlier: Mapping[str, float], later: Mapping[str, float], counters: Iterable[str]) -> list[str]:
    """Return the series of `counters` (names of families) that are smaller or gone in the later scrape.

    Args:
        earlier: samples as in the text format, `name{label="value"}` → value.
        later: the same, of a later scrape.
        counters: a series counts if its name is one of these, or one of these with `_bucket`, `_count` or `_sum`.
    """
    names = {name + ending for name in counters for ending in ("", "_bucket", "_count", "_sum")}
    return [
        series
        for series, value in earlier.items()
        if series.partition("{")[0] in names and later.get(series, -1.0) < value
    ]


def rows_unaccounted(delta: Mapping[str, float]) -> float:
    """Return images that were run for nobody: run, less answered, less those whose client left while they ran.

    Args:
        delta: growth of each sample since the load began; of requests of one image each.
    """
    run = sum(value for series, value in delta.items() if series.startswith("convoy_batch_size_sum"))
    answered = sum(value for series, value in delta.items() if series.startswith("convoy_images_total"))
    left = sum(
        value
        for series, value in delta.items()
        if series.startswith("convoy_dropped_total") and 'stage="infer"' in series
    )
    return run - answered - left


def growth_of(earlier: Mapping[str, float], later: Mapping[str, float]) -> dict[str, float]:
    """Return by how much each sample grew."""
    return {series: value - earlier.get(series, 0.0) for series, value in later.items()}


def first_and_last(
    times_s: Sequence[float], values: Sequence[float], warm_up_s: float, span_s: float
) -> tuple[float, float]:
    """Return the means of the first `span_s` after the warm-up, and of the last `span_s`."""
    times, sizes = np.asarray(times_s), np.asarray(values)
    first = sizes[(times >= warm_up_s) & (times < warm_up_s + span_s)]
    last = sizes[times >= times[-1] - span_s]
    return float(first.mean()), float(last.mean())


@dataclass(frozen=True)
class Exchange:
    """One request as its client saw it; times are seconds of one clock, status 0 is no whole answer."""

    sent_s: float
    """When all of it had been handed to the system."""
    ended_s: float
    status: int
    port: int
    """The client's own."""
    fresh: bool = False
    """Over a connection of its own."""


def lost(exchanges: Iterable[Exchange], at_s: float) -> list[Exchange]:
    """Return the requests that had been sent whole before `at_s`, and were never answered."""
    return [exchange for exchange in exchanges if exchange.sent_s < at_s and exchange.status == 0]
