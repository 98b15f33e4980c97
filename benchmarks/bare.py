"""The same work served and bare: what one client waits beyond decode and run, what all clients get of the ceiling.

    python -m benchmarks.bare               # a table, and benchmarks/results/bare.json; about five minutes; needs wrk

Each turn measures, one after the other: decode and run of one image in this process, one client that sends its next
request when its answer is there, the ceiling (`app.bench.ceiling`, in processes), as many clients as keep the service
busy, and the ceiling again. The service is a `convoy serve` with its defaults, except for the access log; it and the
processes of the bare loop stay up, and each is idle while the other works. The load is `wrk`, as for the peers: it
shares the processors with the service, and a client written in Python would take a tenth of them. A ratio is of one
turn, a few seconds long, for the same machine is faster in one minute than in the next: by up to a fifth where this was
written. The figures are medians over turns.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from app.bench import server
from app.bench.ceiling import BareLoop
from app.cpus import machine
from app.images import decode
from app.manifest import Bundle
from app.sessions import ClassifierSession
from benchmarks.others import Others
from benchmarks.peers.__main__ import bundle_of, locked
from benchmarks.peers.load import LoadError, measure, require_wrk
from benchmarks.peers.scenarios import IMAGES
from benchmarks.survival.__main__ import table
from benchmarks.survival.rows import Finding

RESULTS = Path(__file__).parent / "results/bare.json"
IMAGE = "web.jpg"
TURNS = 15
SECONDS = 1.0
"""Of each measurement of a turn; the one with many clients lasts twice as long."""
WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """One model, and what must be seen of it; None: no bar."""

    model: str
    title: str
    connections: int
    most_of_bare: float | None
    least_of_ceiling: float
    workers: int = 1


CASES = {
    "photo": Case("imagenet", "photo 500×375, EfficientNet-Lite0", 16, 1.15, 0.92),
    "photo-workers": Case("imagenet", "photo 500×375, EfficientNet-Lite0, two workers", 16, 1.15, 0.92, workers=2),
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

    @property
    def one_over_bare(self) -> float:
        return self.one_p50_ms / self.bare_ms

    @property
    def served_over_ceiling(self) -> float:
        return self.served_per_s / self.ceiling_per_s


def main() -> int:
    """Measure what is asked for; return 1 if a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each load of a turn")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--lock", type=Path, help="hold this file's lock in each turn, on a machine that is shared")
    options = parser.parse_args()
    require_wrk()
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
        with locked(options.lock), Others() as others, stage(case, bundle, image) as take_turn:
            while len(turns) < options.turns:
                try:
                    turns.append(take_turn(options.seconds))
                except LoadError as error:
                    console.print(f"Taking another turn: {error}.")
                    refused += 1
                    if refused > options.turns:
                        raise SystemExit("No more turns: the machine is too busy to be measured.") from None
                else:
                    console.print(f"[dim]{turns[-1]}")
        finding = finding_of(case, turns, others.cpus)
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


@contextmanager
def stage(case: Case, bundle: Bundle, image: bytes) -> Iterator[Callable[[float], Turn]]:
    """Start the service and the bare loops of a case, warm them up, and yield what takes a turn with them."""
    session, settings = ClassifierSession(bundle.model_path, "cpu", 1), {"access_log": False, "workers": case.workers}
    with (
        server.serving(bundle.directory.parent.parent, settings) as service,
        BareLoop(bundle, [image], in_processes=True) as loop,
        tempfile.NamedTemporaryFile() as file,
    ):
        file.write(image)
        file.flush()
        url, files = f"{service.url}/models/{case.model}/predict", [Path(file.name)]

        def take_turn(seconds: float) -> Turn:
            """Measure everything once, one after the other.

            Raises:
                LoadError: a request was not answered with 200, for which this load gives no reason: others took the
                    machine.
            """
            bare = bare_ms(session, bundle, image, seconds)
            one = measure(url, files, 1, seconds)
            before = loop.measure(seconds, 0.0)
            many = measure(url, files, case.connections, 2 * seconds)
            after = loop.measure(seconds, 0.0)
            ceiling = round((before + after) / 2, 2)
            return Turn(round(bare, 3), one.p50_ms, round(many.per_s, 2), many.p99_ms, ceiling)

        measure(url, files, case.connections, WARM_UP_S)
        loop.measure(WARM_UP_S)
        yield take_turn


def bare_ms(session: ClassifierSession, bundle: Bundle, image: bytes, seconds: float) -> float:
    """Return the median milliseconds of decode and run of one image, in one thread."""
    times, recipe = [], bundle.manifest.pixels
    stop = time.perf_counter() + seconds
    while (started := time.perf_counter()) < stop:
        session.classify(decode(image, recipe)[None])
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def finding_of(case: Case, turns: Sequence[Turn], others_cpus: float | None) -> Finding:
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
    finding.told("the least of the turns", min(turn.served_over_ceiling for turn in turns))
    finding.told("the most of the turns", max(turn.served_over_ceiling for turn in turns))
    if others_cpus is not None:
        finding.told("processors that others took meanwhile", others_cpus)
    return finding


if __name__ == "__main__":
    sys.exit(main())
