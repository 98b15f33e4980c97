"""How fast the service answers here, beside the bare loop of decode and run on the same processors.

    python -m benchmarks.serving            # a table, and benchmarks/results/serving.json

Each scenario is what `convoy bench IMAGE --ceiling` measures of a real `convoy serve`: the bare loop without HTTP, then
a closed loop of clients on the same processors. The ratio served ÷ ceiling is what carries over between machines.
"""

import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.bench.ceiling import Ceiling, measure_ceiling
from app.bench.load import Plan, measure
from app.bench.report import Report
from app.bench.requests import Endpoint, build_requests
from app.cpus import machine
from app.manifest import read_bundle
from app.versions import Shelf, find_models
from benchmarks.server import serving

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/serving.json"
SECONDS = 8.0
CEILING_S = 5.0
IMAGES = {"cifar10-article": "golden/rotated.jpg"}
"""What a model is asked, where its first golden image is no typical one: here 32×40 pixels instead of a photo."""


@dataclass(frozen=True)
class Scenario:
    """What every server of a comparison is asked, in the same way."""

    model: str
    image: Path
    connections: int = 16

    @property
    def name(self) -> str:
        return f"{self.model}, {self.image.stat().st_size / 1000:.1f} kB"


@dataclass(frozen=True)
class Row:
    """One server in one scenario; `served_over_ceiling` is against the ceiling of the same run."""

    scenario: str
    image: str
    server: str
    connections: int
    ceiling_per_s: float
    ceiling_threads_per_s: float
    ceiling_processes_per_s: float
    served_per_s: float
    served_over_ceiling: float
    p50_ms: float
    p99_ms: float
    mean_batch: float


def main() -> None:
    rows = [convoy(scenario, ceiling_of(scenario)) for scenario in scenarios()]
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "seconds": SECONDS,
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    show(rows)


def scenarios() -> list[Scenario]:
    """Return one scenario for each shipped model."""
    found = []
    for entry in find_models(Shelf(ROOT / "models")):
        bundle = read_bundle(entry.directory)
        file = IMAGES.get(entry.name, bundle.manifest.golden.images[0].file)
        found.append(Scenario(entry.name, bundle.directory / file))
    return found


def ceiling_of(scenario: Scenario) -> Ceiling:
    directory = next(entry.directory for entry in find_models(Shelf(ROOT / "models")) if entry.name == scenario.model)
    return measure_ceiling(read_bundle(directory), [scenario.image.read_bytes()], CEILING_S)


def convoy(scenario: Scenario, ceiling: Ceiling) -> Row:
    with serving() as server:
        endpoint = Endpoint.of(server.url, scenario.model)
        plan = Plan(
            endpoint,
            build_requests(endpoint, [scenario.image.read_bytes()]),
            connections=scenario.connections,
            seconds=SECONDS,
        )
        report = measure(plan)
        return row_of("convoy", scenario, ceiling, report, mean_batch(server.url, scenario.model))


def row_of(server: str, scenario: Scenario, ceiling: Ceiling, report: Report, mean_batch: float) -> Row:
    """Make a row of a run in which every request was accepted; any other is no figure to compare."""
    assert report.accepted == report.due and report.latency_ms is not None, report
    if report.saturated:
        print(f"{scenario.name}: {report.saturated}")
    return Row(
        scenario=scenario.name,
        image=str(scenario.image.relative_to(ROOT)),
        server=server,
        connections=scenario.connections,
        ceiling_per_s=ceiling.images_per_s,
        ceiling_threads_per_s=ceiling.threads_per_s,
        ceiling_processes_per_s=ceiling.processes_per_s,
        served_per_s=report.images_per_s,
        served_over_ceiling=round(report.images_per_s / ceiling.images_per_s, 3),
        p50_ms=report.latency_ms.p50,
        p99_ms=report.latency_ms.p99,
        mean_batch=round(mean_batch, 2),
    )


def mean_batch(url: str, model: str) -> float:
    """Return images per session run since the service started, from its metrics."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        samples = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    label = f'{{model="{model}"}}'
    return float(samples[f"convoy_batch_size_sum{label}"]) / float(samples[f"convoy_batch_size_count{label}"])


def show(rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("scenario", "server", "ceiling/s", "served/s", "ratio", "p50 ms", "p99 ms", "batch"):
        table.add_column(heading, justify="left" if heading in ("scenario", "server") else "right")
    for row in rows:
        figures = (row.ceiling_per_s, row.served_per_s)
        table.add_row(
            row.scenario,
            row.server,
            *(f"{figure:,.0f}" for figure in figures),
            f"{row.served_over_ceiling:.2f}",
            f"{row.p50_ms:.1f}",
            f"{row.p99_ms:.1f}",
            f"{row.mean_batch:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
