"""A quarter of an hour of everything that clients do: what the service holds at the end is what it held at first."""

import asyncio
import random
import time
from collections import Counter
from contextlib import suppress

from app.bench.load import new_runner
from benchmarks.survival.clients import Wire
from benchmarks.survival.material import mixture
from benchmarks.survival.rows import Finding, first_and_last
from benchmarks.survival.service import Service, serving

SHARES = {"small": 40, "photo": 28, "form": 4, "json": 4, "bad": 11, "oversized": 1, "leave": 12}
CLIENTS = 4
PAUSE_S = 0.08
"""Mean of the pause between two requests of a client: about half of what two processors can do."""
WARM_UP_S = 120.0
SAMPLE_S = 1.0
RSS_GROWTH = 0.03


def run(seconds: float = 900.0, workers: int = 1) -> Finding:
    """Load the service for a warm-up and `seconds`, and compare the memory of the last third with that of the first."""
    finding = Finding()
    warm_up_s = min(WARM_UP_S, seconds / 4)
    with serving(workers=workers) as service, new_runner() as runner:
        counts, wrong, samples = runner.run(_soak(service, warm_up_s + seconds))
        dead = len(service.lines("worker died"))
        status = service.end()
    times, sizes, descriptors = zip(*samples, strict=True)
    first, last = first_and_last(times, sizes, warm_up_s, seconds / 3)
    opened, still_open = first_and_last(times, descriptors, warm_up_s, seconds / 3)
    finding.told("requests", sum(counts.values()))
    finding.exactly("requests with another outcome than the right one", sum(wrong.values()), 0)
    finding.told("memory, mean of the first third", first / 1e6, "MB")
    finding.at_most("growth of memory, last third against first", last / first - 1, RSS_GROWTH)
    finding.at_most("growth of file descriptors, last third against first", still_open - opened, CLIENTS)
    finding.exactly("workers that died", dead, 0)
    finding.exactly("exit status", status, 0)
    finding.evidence = {
        "workers": workers,
        "warm_up_s": warm_up_s,
        "outcomes": dict(sorted(counts.items())),
        "wrong": dict(wrong),
        "rss_mb_every_ten_seconds": [round(size / 1e6, 1) for size in sizes[::10]],
    }
    return finding


async def _soak(
    service: Service, seconds: float
) -> tuple[Counter[str], Counter[str], list[tuple[float, float, float]]]:
    """Return outcomes by kind and status, those that were not right, and samples of time, memory and descriptors."""
    began = time.monotonic()
    end = began + seconds
    counts, wrong = Counter[str](), Counter[str]()
    clients = [asyncio.create_task(_client(service.url, end, number, counts, wrong)) for number in range(CLIENTS)]
    samples = []
    while time.monotonic() < end:
        samples.append((time.monotonic() - began, float(service.rss_bytes()), float(service.descriptors())))
        await asyncio.sleep(SAMPLE_S)
    await asyncio.gather(*clients)
    return counts, wrong, samples


async def _client(url: str, end: float, seed: int, counts: Counter[str], wrong: Counter[str]) -> None:
    dice = random.Random(seed)
    kinds = mixture(url)
    wire: Wire | None = None
    while time.monotonic() < end:
        kind = dice.choices(list(SHARES), list(SHARES.values()))[0]
        request, right = dice.choice(kinds["photo" if kind == "leave" else kind])
        outcome = "lost"
        try:
            wire = wire or await Wire.open(url)
            if kind == "leave":
                await wire.send(request[: dice.randrange(1, 2 * len(request))])
                await asyncio.sleep(dice.random() * 0.1)
                wire.leave(at_once=dice.random() < 0.5)
                wire, outcome = None, "left"
            else:
                await wire.send(request)
                answer = await wire.answer()
                outcome = str(answer.status)
                if answer.closes or dice.random() < 0.05:
                    wire.leave(at_once=False)
                    wire = None
        except (OSError, EOFError):
            if wire is not None:
                wire.leave()
            wire = None
        counts[f"{kind} {outcome}"] += 1
        if kind != "leave" and outcome != "429" and outcome not in map(str, right):
            wrong[f"{kind} {outcome}"] += 1
        await asyncio.sleep(dice.expovariate(1 / PAUSE_S))
    if wire is not None:
        with suppress(OSError):
            wire.leave(at_once=False)
