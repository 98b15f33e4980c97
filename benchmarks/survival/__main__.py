"""Run the scenarios, print a table, keep the figures.

All of them take about an hour, most of it the two soaks: `python -m benchmarks.survival`; a part, for a look:
`python -m benchmarks.survival --only overload --seconds 10`.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.cpus import machine
from benchmarks.survival.rows import shown as number

RESULTS = Path(__file__).parents[1] / "results/survival.json"
SCENARIOS = {
    "overload": "twice the capacity, open loop",
    "leavers": "half of the clients disconnect",
    "stop": "SIGTERM under full load",
    "kill": "kill -9 of one of several workers",
    "kill50": "kill -9 of workers and engines, fifty times",
    "swap": "hot swaps under full load",
    "swap50": "fifty hot swaps under full load: memory",
    "quota": "CPU quotas of 0.5 and 1.5",
    "soak": "fifteen minutes of everything, one worker",
    "soak2": "fifteen minutes of everything, two workers",
}


def main() -> int:
    """Run what is asked for; return 1 if a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survival", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--seconds", type=float, metavar="N", help="of load in each scenario, instead of its own")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args()
    console = Console(highlight=False)
    missed = False
    for name in options.only:
        console.print(f"[dim]{name}: {SCENARIOS[name]} …")
        finding = importlib.import_module(f"benchmarks.survival.{name}").run(
            *([options.seconds] if options.seconds else [])
        )
        entry = {
            "scenario": SCENARIOS[name],
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "seconds": options.seconds,
            "skipped": finding.skipped,
            "rows": [asdict(row) for row in finding.rows],
            "evidence": finding.evidence,
        }
        document = keep(options.output, name, entry)
        console.print(table({name: document[name]}))
        missed |= any(row.met is False for row in finding.rows)
    return int(missed)


def keep(file: Path, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Put one scenario's entry into the file, beside those of the others, and return them all in order."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[name] = entry
    ordered = {scenario: kept[scenario] for scenario in SCENARIOS if scenario in kept}
    file.write_text(json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")
    return ordered


def table(document: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the rows of all scenarios."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("scenario", "figure", "value", "bar", "met"):
        shown.add_column(heading, justify="right" if heading == "value" else "left")
    for name, entry in document.items():
        if entry["skipped"]:
            shown.add_row(name, escape(f"skipped: {entry['skipped']}"))
        for row in entry["rows"]:
            met = {None: "", True: "yes", False: "[bold red]no"}[row["met"]]
            value = "none" if row["value"] is None else f"{number(row['value'])} {row['unit']}".strip()
            shown.add_row(name, row["figure"], value, row["bar"], met)
    return shown


if __name__ == "__main__":
    sys.exit(main())
