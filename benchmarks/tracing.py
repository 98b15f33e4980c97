"""What traces cost where requests are small and many: the same service without them, and sampling different shares.

    python -m benchmarks.tracing                    # a table, and benchmarks/results/tracing.json
    python -m benchmarks.tracing --before CHECKOUT  # beside another state of the repository, which knows no traces

All services run at once and are asked in turns, one at a time, so that what else the machine does falls on all of them.
Two figures of each turn, both as a ratio to the service that does not trace: requests a second, and the processor time
that the service took for one request, in which other programs do not show. Traces go to a collector that only counts.
"""

import argparse
import http.server
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, chdir
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.bench.load import Plan, measure
from app.bench.requests import Endpoint, build_requests
from app.bench.server import Server
from app.cpus import machine
from benchmarks.server import ROOT, serving
from benchmarks.serving import scenarios

RESULTS = ROOT / "benchmarks/results/tracing.json"
MODEL = "cifar10-article"
ROUNDS, SECONDS, WARM_UP_S = 10, 2.0, 0.5
OFF = "off"
SHARES = {"on, 0 %": 0.0, "on, 1 %": 0.01, "on, 10 %": 0.1, "on, 100 %": 1.0}


@dataclass(frozen=True)
class Row:
    """One service; the ratios are medians over the turns, to the service without traces in the same turn."""

    service: str
    requests_per_s: float
    requests_ratio: float
    cpu_us_per_request: float
    cpu_ratio: float
    p99_ms: float
    p99_ratio: float


@dataclass(frozen=True)
class Turn:
    """What one service did in one turn."""

    requests_per_s: float
    cpu_us: float
    p99_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of this repository, to be measured beside")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    turns: dict[str, list[Turn]] = {}
    with ExitStack() as stack:
        port, posts, received = collector(stack)
        servers = {OFF: stack.enter_context(serving())}
        for name, share in SHARES.items():
            settings = {"trace_endpoint": f"http://127.0.0.1:{port}", "trace_ratio": share}
            servers[name] = stack.enter_context(serving(**settings))
        if options.before:
            with chdir(options.before):
                servers["before"] = stack.enter_context(serving())
        for number in range(options.rounds):
            # Each round begins with another, so that none is always the one that comes after the costliest.
            names = list(servers)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                turns.setdefault(name, []).append(turn(servers[name]))
                time.sleep(WARM_UP_S)  # what is still to be sent goes before the next one's turn
    rows = [row_of(name, own, turns[OFF]) for name, own in turns.items()]
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "model": MODEL,
        "rounds": options.rounds,
        "seconds": SECONDS,
        "posts": posts.value,
        "bytes": received.value,
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    show(rows)


def turn(server: Server) -> Turn:
    [scenario] = [scenario for scenario in scenarios() if scenario.model == MODEL]
    endpoint = Endpoint.of(server.url, MODEL)
    requests = build_requests(endpoint, [scenario.image.read_bytes()])
    before = cpu_s(server.pid)
    report = measure(Plan(endpoint, requests, connections=16, seconds=SECONDS, warm_up_s=WARM_UP_S))
    assert report.accepted == report.due and report.latency_ms is not None, report
    # The warm-up's requests took processor time too, at the same rate.
    answered = report.requests_per_s * (SECONDS + WARM_UP_S)
    return Turn(report.requests_per_s, (cpu_s(server.pid) - before) / answered * 1e6, report.latency_ms.p99)


def cpu_s(pid: int) -> float:
    """Return the processor time of a process so far, all its threads, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def row_of(name: str, own: Sequence[Turn], off: Sequence[Turn]) -> Row:
    pairs = list(zip(own, off, strict=True))
    return Row(
        name,
        round(statistics.median(turn.requests_per_s for turn in own)),
        round(statistics.median(turn.requests_per_s / base.requests_per_s for turn, base in pairs), 3),
        round(statistics.median(turn.cpu_us for turn in own), 1),
        round(statistics.median(turn.cpu_us / base.cpu_us for turn, base in pairs), 3),
        round(statistics.median(turn.p99_ms for turn in own), 2),
        round(statistics.median(turn.p99_ms / base.p99_ms for turn, base in pairs), 2),
    )


def collector(stack: ExitStack) -> "tuple[int, Synchronized[int], Synchronized[int]]":
    """Run a collector that counts, in a process of its own, until the stack is unwound; return its port and counts."""
    posts, received, port = (multiprocessing.Value("q", 0) for _ in range(3))
    process = multiprocessing.Process(target=collect, args=(port, posts, received), daemon=True)
    process.start()
    stack.callback(process.join)
    stack.callback(process.terminate)
    while not port.value:
        time.sleep(0.01)
    return port.value, posts, received


def collect(port: "Synchronized[int]", posts: "Synchronized[int]", received: "Synchronized[int]") -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            received.value += len(self.rfile.read(int(self.headers["Content-Length"])))
            posts.value += 1
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.value = server.server_port
    server.serve_forever()


def show(rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("traces", "requests/s", "ratio", "CPU µs/request", "ratio", "p99 ms", "ratio"):
        table.add_column(heading, justify="left" if heading == "traces" else "right")
    for row in rows:
        table.add_row(*map(str, asdict(row).values()))
    Console().print(table)


if __name__ == "__main__":
    main()
