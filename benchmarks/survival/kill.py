"""kill -9 of one worker of several under load: only what was inside it fails, and soon there is another."""

import asyncio
import itertools
import os
import signal
import time
from contextlib import suppress

from app.bench.load import new_runner
from app.families import Counter, Histogram
from app.metrics import Metrics
from benchmarks.survival.clients import Wire, caller
from benchmarks.survival.material import PHOTO, photos, requests_of
from benchmarks.survival.rows import Exchange, Finding, went_backwards
from benchmarks.survival.service import Service, peers_of, samples_of, serving

WORKERS, CLIENTS, ROUNDS = 2, 8, 2
BEFORE_S = 11.0
"""A worker that dies younger than ten seconds is not replaced at once."""
SCRAPE_S = 0.1
READY_S = 2.0


def run(seconds: float = 8.0) -> Finding:
    """Kill a worker, twice; `seconds` of load after each kill."""
    finding = Finding()
    with serving(workers=WORKERS) as service, new_runner() as runner:
        rounds = [runner.run(_kill(service, seconds)) for _ in range(ROUNDS)]
    families = Metrics().families.values()
    counters = [family.name for family in families if isinstance(family, Counter | Histogram)]
    inside = outside = answered = 0
    backwards: list[str] = []
    for seen, ports, _, scrapes in rounds:
        failed = [exchange for exchange in seen if exchange.status == 0]
        inside += sum(exchange.port in ports for exchange in failed)
        outside += sum(exchange.port not in ports for exchange in failed)
        answered += sum(exchange.status == 200 for exchange in seen)
        for earlier, later in itertools.pairwise(scrapes):
            backwards += went_backwards(earlier, later, counters)
    finding.told(f"requests answered, {ROUNDS} kills", answered)
    finding.told("requests that failed inside the killed worker", inside)
    finding.exactly("requests that failed elsewhere", outside, 0)
    finding.at_most("all workers ready again after", max(ready for _, _, ready, _ in rounds), READY_S, "s")
    finding.told("scrapes", sum(len(scrapes) for *_, scrapes in rounds))
    finding.exactly("counters that went backwards", len(backwards), 0)
    finding.evidence = {"ready_s": [round(ready, 2) for _, _, ready, _ in rounds], "backwards": backwards[:10]}
    return finding


async def _kill(service: Service, seconds: float) -> tuple[list[Exchange], set[int], float, list[dict[str, float]]]:
    """Return what the clients saw, the killed worker's clients, the time to the next ready one, and the scrapes."""
    seen: list[Exchange] = []
    scrapes: list[dict[str, float]] = []
    over = asyncio.Event()
    requests = requests_of(service.url, PHOTO, photos())
    clients = [
        asyncio.create_task(caller(service.url, requests, over.is_set, seen, start=number)) for number in range(CLIENTS)
    ]
    scraping = asyncio.create_task(_scrape(service.url, over, scrapes))
    await asyncio.sleep(BEFORE_S)
    victim = service.pids()[1]
    # Held still, so that nobody connects to it between the list of its clients and its end.
    os.kill(victim, signal.SIGSTOP)
    ports = peers_of(victim, service.url)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    while victim in service.pids() or len(service.pids()) <= WORKERS or not await _all_ready(service.url):
        if time.monotonic() > killed + 60:
            break
        await asyncio.sleep(0.02)
    ready_s = time.monotonic() - killed
    await asyncio.sleep(seconds)
    over.set()
    await asyncio.gather(*clients, scraping)
    return seen, ports, ready_s, scrapes


async def _get(url: str, path: str) -> str:
    wire = await Wire.open(url)
    try:
        await wire.send(f"GET {path} HTTP/1.1\r\nHost: convoy\r\n\r\n".encode())
        return (await wire.answer()).body.decode()
    finally:
        wire.leave(at_once=False)


async def _all_ready(url: str) -> bool:
    with suppress(OSError, EOFError):
        return (await _get(url, "/readyz")).count(':"ready"') >= WORKERS + 2
    return False


async def _scrape(url: str, over: asyncio.Event, scrapes: list[dict[str, float]]) -> None:
    while not over.is_set():
        with suppress(OSError, EOFError):  # it was the killed worker that was asked
            scrapes.append(samples_of(await _get(url, "/metrics")))
        await asyncio.sleep(SCRAPE_S)
