"""Let the autoscalers of k8s/ scale pods that behave as a real one did.

    python -m benchmarks.autoscaling            # simulate over the kept recording: a minute
    python -m benchmarks.autoscaling --record   # record it anew first: 17 minutes; needs prometheus and two processors

Fails if replicas flap, or if a demand that the most replicas can serve is refused for longer than pods take to start.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.autoscaling import manifests
from benchmarks.autoscaling.pods import WINDOW_S, Level, Sample, rates
from benchmarks.autoscaling.scenarios import BEARABLE, RECORDING, RESULTS, Outcomes

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs/pictures/autoscaling.png"

console = Console(highlight=False)


def main() -> int:
    """Simulate; return 1 if the manifests' autoscalers flap or fail."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="load a real pod anew")
    options = parser.parse_args()
    if options.record:
        from benchmarks.autoscaling.record import record

        RECORDING.write_text(json.dumps(record()) + "\n")
    recording = json.loads(RECORDING.read_text())
    outcomes = Outcomes(recording)
    outcomes.run()
    table = Table("", "turns", "most", "pod hours", "needed", "refused %", "but for burst", "short s", box=None)
    for name, row in outcomes.rows.items():
        table.add_row(name, *(f"{value:g}" for key, value in row.items() if key != "changes"))
    console.print(table)
    kept = {
        "recording": {name: recording[name] for name in ("date", "machine", "others_cpus", "model", "capacity_per_s")},
        "queries": {name: recording["queries"][name] for name in ("keda", "adapter")},
        "behavior": manifests.hpa().behavior,
        "targets": {"HPA": round(outcomes.target, 2), "small": round(outcomes.small_target, 2)},
        "levels": [
            {"per_s": level.rate, "inside": round(level.inside, 2), "refused": round(level.refused, 3)}
            for level in outcomes.levels
        ],
        "little": little(recording, outcomes.levels),
        "model_beside_prometheus": beside_prometheus(recording),
        "scenarios": outcomes.rows,
    }
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    from benchmarks.autoscaling.pictures import draw

    draw(recording, outcomes, PICTURE)
    for sentence in outcomes.faults():
        console.print(f"[red]{sentence}")
    return 1 if outcomes.faults() else 0


def little(recording: Mapping[str, Any], levels: Sequence[Level]) -> list[dict[str, float]]:
    """Return, for each rate that was served, the requests inside as clients, service and gauge have them.

    Clients: rate × mean latency. Service: seconds that it has counted, each second. The gauge: once it has settled.
    """
    busy = recording["stair"]["seconds"]["busy_s"]
    return [
        {
            "per_s": level.rate,
            "clients": round(step["accepted_per_s"] * step["mean_ms"] / 1000, 2),
            "service": round(
                (busy[int(step["at_s"] + step["seconds"])] - busy[int(step["at_s"])]) / step["seconds"], 2
            ),
            "gauge_mean": round(level.gauge, 2),
            "gauge_deviation": round(statistics.pstdev(moment.inflight for moment in level.moments), 2),
        }
        for step, level in zip(recording["stair"]["sent"], levels, strict=True)
        if level.refused < BEARABLE
    ]


def beside_prometheus(recording: Mapping[str, Any]) -> dict[str, float]:
    """Compare the simulator's evaluation of the query with Prometheus's own, second by second of the recorded shape."""
    columns = recording["shape"]["seconds"]
    samples, differences = [], []
    for second, found in enumerate(
        zip(*(columns[name] for name in ("inflight", "busy_s", "ran", "refused")), strict=True)
    ):
        samples.append(Sample(float(second), *found))
        parts = rates(samples, float(second))
        if second > WINDOW_S and parts is not None and columns["keda"][second] is not None:
            own = parts.busy_s * (1 + parts.refused / max(parts.ran, 0.1))
            differences.append(abs(own - columns["keda"][second]) / max(columns["keda"][second], 0.1))
    return {
        "seconds": len(differences),
        "median_difference": round(statistics.median(differences), 4),
        "most_difference": round(max(differences), 4),
    }


if __name__ == "__main__":
    sys.exit(main())
