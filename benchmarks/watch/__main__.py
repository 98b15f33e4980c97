"""Watch a real service with a real Prometheus 2.42, then break it.

    python -m benchmarks.watch                       # ten minutes each for one worker and two, then every way
    python -m benchmarks.watch --seconds 60 --quiet  # a look, which keeps nothing

The service is under a constant load. Every query of every dashboard is asked over the whole time and must have found
something; recorded rates are compared with the load generator's own. Windows of the rules are shortened where the time
is shorter than they need, and always while the service is broken: an hour then is three minutes.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from app.bench.load import measure
from app.bench.report import Report
from app.cpus import machine
from app.errors import ConvoyError
from benchmarks.watch.breaking import WAYS, Broken, load, plan, service
from benchmarks.watch.prometheus import Prometheus, wait_until, watching

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "deploy/grafana/dashboards"
RESULTS = ROOT / "benchmarks/results/watch.json"
PICTURES = ROOT / "docs/pictures"
JOB = "convoy"
TOLERANCE = 0.02
LAPSE = 20.0
PATIENCE_S = 240.0
WHOLE_WINDOW_S = 360.0
"""A load that goes on for less cannot fill a window of five minutes."""
ODD_EVERY_S, LATE_EVERY = 4.0, 20
"""Seconds between requests that are refused; of so many one is given up, an error: fewer than the budget has."""
# What a service that does well on a machine without a GPU has nothing to say about, and what only several workers have.
QUIET = ("convoy_gpu_",)
ONLY_SEVERAL = ("convoy_worker_exits_total",)

console = Console(highlight=False)


@dataclass(frozen=True)
class Compared:
    """A figure of the load generator beside the recorded one."""

    figure: str
    sent: float
    recorded: float

    @property
    def is_close(self) -> bool:
        return abs(self.recorded - self.sent) <= TOLERANCE * max(abs(self.sent), 1.0)


def main() -> int:
    """Run both parts; return 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watch", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, metavar="N", help="of load, for each number of workers")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], metavar="N")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), metavar="WAY", help="of breaking")
    parser.add_argument("--quiet", action="store_true", help="keep no results and no pictures")
    options = parser.parse_args()
    if shutil.which("prometheus") is None:
        sys.exit("prometheus is not installed: apt install prometheus")
    findings: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "seconds": options.seconds}
    good = True
    for workers in options.workers:
        console.print(f"[dim]{workers} workers, {options.seconds:.0f} s of load …")
        finding, is_good = watch(workers, options.seconds, pictures=not options.quiet and workers == 2)
        findings[f"{workers} workers"] = finding
        good &= is_good
        console.print_json(json.dumps(finding))
    if options.ways:
        findings["broken"], is_good = break_all({name: WAYS[name] for name in options.ways})
        good &= is_good
    if not options.quiet:
        RESULTS.write_text(json.dumps(findings, indent=2, ensure_ascii=False) + "\n")
    return 0 if good else 1


def watch(workers: int, seconds: float, *, pictures: bool) -> tuple[dict[str, Any], bool]:
    """Scrape a service under constant load, ask what the dashboards ask, and compare what rules have recorded."""
    lapse = 1.0 if seconds >= WHOLE_WINDOW_S else WHOLE_WINDOW_S / seconds
    scrape_s = 5 if lapse == 1 else 1
    with (
        tempfile.TemporaryDirectory(prefix="convoy-models-") as folder,
        watching(scrape_s=scrape_s, evaluate_s=scrape_s, lapse=lapse) as prometheus,
        service(Path(folder), {"workers": workers}) as (server, _),
        _odd_requests(server.url),
    ):
        prometheus.scrape(JOB, server.url)
        began = time.time()
        report, compared = _load_and_compare(prometheus, server.url, seconds)
        found = _ask_everything(prometheus, began, time.time(), lapse)
    skipped = QUIET if workers > 1 else (*QUIET, *ONLY_SEVERAL)
    empty = [query for query, series in found.items() if not series and not any(name in query for name in skipped)]
    if pictures:
        from benchmarks.watch.pictures import draw

        for uid, dashboard in _dashboards().items():
            draw(dashboard, found, began, PICTURES / f"{uid}.png")
    finding = {
        "lapse": round(lapse, 2),
        "requests": report.due,
        "queries": len(found),
        "queries without data": empty,
        "compared": [asdict(one) | {"is_close": one.is_close} for one in compared],
    }
    return finding, not empty and all(one.is_close for one in compared)


def _load_and_compare(prometheus: Prometheus, url: str, seconds: float) -> tuple[Report, list[Compared]]:
    """Load a service, and ask for the recorded rates while the load still goes on."""
    recorded: dict[str, float] = {}
    queries = {
        "answers a second": f'sum(convoy:requests:rate5m{{job="{JOB}", model!="", code="200"}})',
        "images a second": f'sum(convoy:images:rate5m{{job="{JOB}"}})',
        "share of slow answers": f'convoy:slow_requests:ratio_rate5m{{job="{JOB}"}}',
    }

    def ask() -> None:
        recorded.update({figure: prometheus.value(query) for figure, query in queries.items()})

    timer = threading.Timer(seconds + 2, ask)
    timer.start()
    report = measure(plan(url, seconds))
    timer.join()
    sent = {
        "answers a second": report.requests_per_s,
        "images a second": report.images_per_s,
        "share of slow answers": 1 - report.share_within(250.0),
    }
    return report, [Compared(figure, sent[figure], recorded[figure]) for figure in queries]


@contextmanager
def _odd_requests(url: str) -> Iterator[None]:
    """Send, now and then, what is refused or given up, so that there is something to see of that too."""
    ended = threading.Event()

    def send() -> None:
        with httpx.Client(base_url=url) as client:
            for turn in itertools.count():
                if turn % LATE_EVERY == 0:
                    with suppress(httpx.TransportError):  # a body that is not whole at its deadline
                        client.post("/predict", content=_slowly(), headers={"Timeout-Ms": "50"})
                client.post("/predict", content=b"no image")
                if ended.wait(ODD_EVERY_S):
                    return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _slowly() -> Iterator[bytes]:
    yield b"\xff\xd8"
    time.sleep(0.2)
    yield b"\xff"


def _dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def _ask_everything(
    prometheus: Prometheus, began: float, ended: float, lapse: float
) -> dict[str, list[dict[str, Any]]]:
    """Return what every query of every dashboard had over the time, by query."""
    span_s = ended - began
    step_s = max(1.0, span_s / 200)
    found = {}
    for dashboard in _dashboards().values():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"]
                for name, value in {
                    "$__rate_interval": "60s" if lapse == 1 else "10s",
                    "$__range": f"{round(span_s)}s",
                    "$namespace": ".*", "$job": ".*", "$instance": ".*", "$model": ".*",
                }.items():  # fmt: skip
                    query = query.replace(name, value)
                found[target["expr"]] = prometheus.over(query, began, ended, step_s)
    return found


def break_all(ways: dict[str, Broken]) -> tuple[dict[str, Any], bool]:
    """Break a service in each way, wait for the alerts, mend it, and wait until they resolve; last, have none."""
    findings: dict[str, Any] = {}
    good = True
    with watching(scrape_s=1, evaluate_s=1, lapse=LAPSE) as prometheus:
        for name, way in ways.items():
            console.print(f"[dim]{name} …")
            finding: dict[str, Any] = {"alerts": sorted(way.alerts)}
            try:
                finding |= _break(prometheus, name, way)
            except (AssertionError, ConvoyError) as error:
                finding["failed"] = str(error)
                good = False
            findings[name] = finding
            console.print_json(json.dumps({name: finding}))
        findings["gone"] = _be_gone(prometheus)
        console.print_json(json.dumps({"gone": findings["gone"]}))
    return findings, good


def _be_gone(prometheus: Prometheus) -> dict[str, Any]:
    """Have nobody where a service should be, and then one, at another address, as a pod that comes anew."""
    job, alerts = "convoy-gone", {"ConvoyTargetDown", "ConvoyAbsent"}
    prometheus.scrape(job, "http://127.0.0.1:9")
    fired = wait_until(lambda: alerts <= prometheus.firing(job), PATIENCE_S, f"{alerts} did not fire")
    with tempfile.TemporaryDirectory(prefix="convoy-models-") as folder, service(Path(folder), {}) as (server, _):
        prometheus.scrape(job, server.url)
        resolved = wait_until(lambda: not alerts & prometheus.firing(job), PATIENCE_S, f"{alerts} did not resolve")
    return {"alerts": sorted(alerts), "fired_after_s": round(fired, 1), "resolved_after_s": round(resolved, 1)}


def _break(prometheus: Prometheus, name: str, way: Broken) -> dict[str, Any]:
    job = f"convoy-{name}"
    with (
        tempfile.TemporaryDirectory(prefix="convoy-models-") as folder,
        service(Path(folder), way.settings) as (server, models),
        load(server.url),
    ):
        prometheus.scrape(job, server.url)
        try:
            wait_until(lambda: prometheus.query(f'convoy_ready{{job="{job}"}} == 1'), PATIENCE_S, "it was never ready")
            time.sleep(10)
            early = prometheus.firing(job) & way.alerts
            assert not early, f"{early} fired before anything was broken"
            began = time.monotonic()  # some ways take a while, and are seen before they are done
            with way.breaking(server, models):
                wait_until(
                    lambda: way.alerts <= prometheus.firing(job),
                    PATIENCE_S,
                    f"of {sorted(way.alerts)} only {sorted(prometheus.firing(job))} fired",
                )
                fired = time.monotonic() - began
            also = sorted(prometheus.firing(job) - way.alerts - {"ConvoyDrift"})
            resolved = wait_until(
                lambda: not way.alerts & prometheus.firing(job),
                2 * PATIENCE_S,
                "it did not resolve after it was mended",
            )
        finally:
            prometheus.forget(job)
    return {"fired_after_s": round(fired, 1), "resolved_after_s": round(resolved, 1), "also_fired": also}


if __name__ == "__main__":
    sys.exit(main())
