"""The same work served and bare: what one client waits beyond decode and run, what all clients get of the ceiling.

    python -m benchmarks.bare               # a table, and benchmarks/results/bare.json; about four minutes

Each turn measures, one after the other: decode and run of one image in this process, one client that sends its next
request when its answer is there, as many clients as keep the service busy, and the ceiling (`app.bench.ceiling`). The
service is a `convoy serve` with its defaults, except for the access log, and it is idle while the bare loops run. A
ratio is of one turn, for the same machine is faster in one minute than in the next; the figures are medians over turns.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from app.bench import server
from app.bench.ceiling import measure_ceiling
from app.bench.load import Plan, measure
from app.bench.report import Latency, Report
from app.bench.requests import Endpoint, build_requests
from app.cpus import machine
from app.images import decode
from app.manifest import Bundle
from app.sessions import ClassifierSession
from benchmarks.others import Others
from benchmarks.peers.__main__ import bundle_of, locked
from benchmarks.peers.scenarios import IMAGES
from benchmarks.survival.__main__ import table
from benchmarks.survival.rows import Finding

RESULTS = Path(__file__).parent / "results/bare.json"
IMAGE = "web.jpg"
TURNS = 3
SECONDS = 4.0
"""Of each of the five loads of a turn; the one with many clients lasts twice as long."""
WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """One model, and what must be seen of it; None: no bar."""

    model: str
    title: str
    connections: int
    most_of_bare: float | None
    least_of_ceiling: float


CASES = {
    "photo": Case("imagenet", "photo 500×375, EfficientNet-Lite0", 16, 1.15, 0.92),
    "resnet50": Case("resnet50", "photo 500×375, ResNet-50 with random weights", 8, None, 0.95),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn measured: milliseconds of one image, images per second of many."""

    bare_ms: float
    one_p50_ms: float
    served_per_s: float
    served_p99_ms: float
    ceiling_per_s: float
    others_cpus: float | None = None
    """Processors that others took meanwhile; None: not known on this system."""

    @property
    def one_over_bare(self) -> float:
        return self.one_p50_ms / self.bare_ms

    @property
    def served_over_ceiling(self) -> float:
        return self.served_per_s / self.ceiling_per_s


class RefusedError(Exception):
    """The service had to refuse requests, which this load gives it no reason for: others took the machine."""


def main() -> int:
    """Measure what is asked for; return 1 if a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each load of a turn")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--lock", type=Path, help="hold this file's lock in each turn, on a machine that is shared")
    options = parser.parse_args()
    console = Console(highlight=False)
    image = IMAGES[IMAGE]()
    document = json.loads(options.output.read_text()) if options.output.exists() else {}
    missed = False
    for name in options.only:
        case = CASES[name]
        console.print(f"[dim]{name}: {case.title}, {options.turns} turns …")
        bundle = bundle_of(case.model)
        turns: list[Turn] = []
        refused = 0
        while len(turns) < options.turns:
            try:
                with locked(options.lock), Others() as others:
                    turn = take_turn(case, bundle, image, options.seconds)
            except RefusedError as error:
                console.print(f"Taking another turn: {error}.")
                refused += 1
                if refused > options.turns:
                    raise SystemExit("No more turns: the machine is too busy to be measured.") from None
            else:
                turns.append(replace(turn, others_cpus=others.cpus))
                console.print(f"[dim]{turns[-1]}")
        finding = finding_of(case, turns)
        document[name] = {
            "scenario": case.title,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "image_bytes": len(image),
            "connections": case.connections,
            "seconds": options.seconds,
            "skipped": finding.skipped,
            "refused_turns": refused,
            "rows": [asdict(row) for row in finding.rows],
            "turns": [asdict(turn) for turn in turns],
        }
        options.output.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        console.print(table({name: document[name]}))
        missed |= any(row.met is False for row in finding.rows)
    return int(missed)


def take_turn(case: Case, bundle: Bundle, image: bytes, seconds: float) -> Turn:
    """Measure everything once, one after the other.

    Raises:
        RefusedError: not every request was accepted.
    """
    with server.serving(bundle.directory.parent.parent, {"access_log": False}) as service:
        endpoint = Endpoint.of(service.url, case.model)
        plan = Plan(endpoint, build_requests(endpoint, [image]), connections=1, seconds=seconds, warm_up_s=WARM_UP_S)
        bare = bare_ms(bundle, image, seconds)
        one, _ = all_accepted(measure(plan))
        many_plan = Plan(
            endpoint, plan.requests, connections=case.connections, seconds=2 * seconds, warm_up_s=WARM_UP_S
        )
        many, report = all_accepted(measure(many_plan))
        ceiling = measure_ceiling(bundle, [image], seconds).images_per_s
    return Turn(round(bare, 3), one.p50, report.images_per_s, many.p99, ceiling)


def bare_ms(bundle: Bundle, image: bytes, seconds: float) -> float:
    """Return the median milliseconds of decode and run of one image, in one thread."""
    session, recipe = ClassifierSession(bundle.model_path, "cpu", 1), bundle.manifest.pixels
    times = []
    begin = time.perf_counter() + min(WARM_UP_S, seconds)
    stop = begin + seconds
    while (started := time.perf_counter()) < stop:
        session.classify(decode(image, recipe)[None])
        if started >= begin:
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def all_accepted(report: Report) -> tuple[Latency, Report]:
    """Return a report whose every request was accepted, and its latencies.

    Raises:
        RefusedError: it is another one, and no figure to compare.
    """
    if report.latency_ms is None or report.accepted != report.due:
        raise RefusedError(f"of {report.due} requests only {report.accepted} were accepted; {report.first_bodies}")
    return report.latency_ms, report


def finding_of(case: Case, turns: Sequence[Turn]) -> Finding:
    """Return the medians over the turns, beside the bars."""

    def median(figure: str) -> float:
        return statistics.median(getattr(turn, figure) for turn in turns)

    finding = Finding()
    finding.told("bare decode and run of one image", median("bare_ms"), "ms")
    finding.told("one connection, p50", median("one_p50_ms"), "ms")
    if case.most_of_bare is None:
        finding.told("one connection ÷ bare", median("one_over_bare"))
    else:
        finding.at_most("one connection ÷ bare", median("one_over_bare"), case.most_of_bare)
    finding.told(f"served, {case.connections} connections", median("served_per_s"), "images/s")
    finding.told("their p99", median("served_p99_ms"), "ms")
    finding.told("ceiling", median("ceiling_per_s"), "images/s")
    finding.at_least("served ÷ ceiling", median("served_over_ceiling"), case.least_of_ceiling)
    finding.told("processors that others took meanwhile, at most", max(turn.others_cpus or 0.0 for turn in turns))
    return finding


if __name__ == "__main__":
    sys.exit(main())
