"""SIGTERM in the middle of full load: whoever had sent a request gets an answer, and the process ends with status 0."""

import asyncio
import os
import signal
import time

from app.bench.load import new_runner
from benchmarks.survival.clients import caller
from benchmarks.survival.material import PHOTO, photos, requests_of
from benchmarks.survival.rows import Exchange, Finding, lost
from benchmarks.survival.service import Service, serving

KEPT, FRESH = 8, 4
"""Clients that keep their connection, and clients that open one for each request."""
ROUNDS = 4
DRAIN_S = 30.0
"""The limit that the service has by default."""


def run(seconds: float = 4.0) -> Finding:
    """Stop a loaded service several times, with one worker and with two; `seconds` of load before each signal."""
    finding = Finding()
    for workers in (1, 2):
        statuses, drains, missing, crossed, answered = [], [], 0, 0, 0
        for _ in range(ROUNDS):
            with serving(workers=workers, drain_timeout_s=int(DRAIN_S)) as service, new_runner() as runner:
                seen, stopped, ended = runner.run(_stop(service, seconds))
                statuses.append(service.end())
            drains.append(ended - stopped)
            missing += len(lost(seen, stopped))
            crossed += sum(exchange.status == 0 and stopped <= exchange.sent_s < float("inf") for exchange in seen)
            answered += sum(exchange.status == 200 for exchange in seen)
        name = f"{workers} worker{'s' if workers > 1 else ''}"
        finding.told(f"{name}: requests answered, {ROUNDS} stops", answered)
        finding.exactly(f"{name}: requests sent before SIGTERM and lost", missing, 0)
        finding.told(f"{name}: requests sent after SIGTERM and cut off", crossed)
        finding.exactly(f"{name}: stops with another exit status than 0", sum(map(bool, statuses)), 0)
        finding.at_most(f"{name}: longest drain", max(drains), DRAIN_S, "s")
        finding.evidence[name] = {"exit_statuses": statuses, "drains_s": [round(drain, 2) for drain in drains]}
    return finding


async def _stop(service: Service, seconds: float) -> tuple[list[Exchange], float, float]:
    """Return what the clients saw, when the signal was sent, and when the process had ended."""
    seen: list[Exchange] = []
    requests = requests_of(service.url, PHOTO, photos())
    clients = [
        asyncio.create_task(
            caller(service.url, requests, lambda: service.ended() is not None, seen, fresh=number >= KEPT, start=number)
        )
        for number in range(KEPT + FRESH)
    ]
    await asyncio.sleep(seconds)
    stopped = time.monotonic()
    os.kill(service.pid, signal.SIGTERM)
    while service.ended() is None:
        await asyncio.sleep(0.01)
    ended = time.monotonic()
    await asyncio.gather(*clients)
    return seen, stopped, ended
