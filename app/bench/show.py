"""A report on the terminal: one table, a small histogram, and remarks on what a reader should know."""

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.bench.ceiling import Ceiling
from app.bench.report import Report

BARS = 12
WIDTH = 40


def show(report: Report, ceiling: Ceiling | None = None) -> None:
    """Print a report."""
    console = Console(highlight=False)
    console.print(_figures(report, ceiling))
    if report.accepted:
        console.print(_histogram(report))
    for remark in remarks(report):
        console.print(Text(remark, style="yellow"))


def remarks(report: Report) -> list[str]:
    """Return sentences on whatever limits what the figures mean."""
    found = []
    if report.interrupted:
        found.append(f"Interrupted: these are {report.seconds:.1f} s of measured time.")
    if report.saturated:
        found.append(report.saturated)
    if report.held_back:
        found.append(
            f"{report.held_back:,} requests waited for a connection, because all {report.connections} were busy: "
            "the wait is in their latencies; --connections sets the bound."
        )
    if report.rejected_with_retry_after < report.rejected:
        missing = report.rejected - report.rejected_with_retry_after
        found.append(f"{missing:,} of the {report.rejected:,} rejects carried no Retry-After.")
    for status, body in report.first_bodies.items():
        if status in report.statuses:
            found.append(f"The first {status} said: {body}")
    return found


def _figures(report: Report, ceiling: Ceiling | None) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rate = f"{report.requests_per_s:,.1f} requests/s"
    if report.images_per_s != report.requests_per_s:
        rate += f", {report.images_per_s:,.1f} images/s"
    table.add_row("accepted", f"{rate} ({report.accepted:,} in {report.seconds:.1f} s)")
    if ceiling is not None and ceiling.images_per_s:
        share = report.images_per_s / ceiling.images_per_s
        table.add_row(
            "of the ceiling",
            f"{share:.2f} of {ceiling.images_per_s:,.1f} images/s "
            f"({ceiling.workers} threads {ceiling.threads_per_s:,.1f}, "
            f"{ceiling.workers} processes {ceiling.processes_per_s:,.1f})",
        )
    if (latency := report.latency_ms) is not None:
        named = {"p50": latency.p50, "p90": latency.p90, "p99": latency.p99, "p99.9": latency.p99_9, "max": latency.max}
        table.add_row("latency, ms", ", ".join(f"{name} {_ms(value)}" for name, value in named.items()))
    if report.stages_ms:
        table.add_row("stages, mean ms", ", ".join(f"{name} {_ms(value)}" for name, value in report.stages_ms.items()))
    if report.rejected:
        table.add_row("rejected (429)", f"{report.rejected:,}, p99 {_ms(report.rejected_p99_ms or 0)} ms")
    for status, count in report.statuses.items():
        table.add_row(f"status {status}", f"{count:,}")
    for reason, count in report.errors.items():
        table.add_row("failed", f"{count:,}: {reason}")
    if report.unanswered:
        table.add_row("unanswered", f"{report.unanswered:,} when the run ended")
    strain = report.generator
    table.add_row(
        "generator",
        f"{report.connections} connections, {strain.busy_share:.0%} of a processor, "
        f"late by {_ms(strain.lag_p99_ms)} ms (p99)",
    )
    return table


def _histogram(report: Report) -> Table:
    latencies = report.observed.latency_ms[report.observed.status == 200]
    low, high = latencies.min(), np.percentile(latencies, 99.9)
    edges = np.geomspace(max(low, 1e-3), max(high, low * 1.01, 2e-3), BARS + 1)
    counts, _ = np.histogram(np.clip(latencies, edges[0], edges[-1]), edges)
    table = Table(
        box=None, pad_edge=False, show_header=False, title="latency of accepted requests", title_justify="left"
    )
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right", style="dim")
    for edge, count in zip(edges[1:], counts, strict=True):
        bar = "█" * round(WIDTH * count / counts.max()) or ("▏" if count else "")
        table.add_row(f"≤ {_ms(float(edge))} ms", bar, f"{count:,}" if count else "")
    return table


def _ms(value: float) -> str:
    """Return milliseconds with about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
