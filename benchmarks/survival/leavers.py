"""Half of the clients disconnect at random moments, under batching: nobody else notices, and nothing stays behind."""

import asyncio
import time
from collections.abc import Sequence

from app.bench.load import new_runner
from benchmarks.survival.clients import PAUSE_S, Wire, leaver
from benchmarks.survival.material import DEADLINE_MS, PHOTO, SMALL, photos, requests_of, smalls
from benchmarks.survival.rows import Finding, growth_of, p99, rows_unaccounted
from benchmarks.survival.service import Service, serving

CLIENTS = 4
"""That stay, and as many that leave, for each of two models."""
WARM_UP_S = 10.0
SAME_PROBABILITY = 1e-3
"""A batch may round otherwise than an image alone."""
PHOTO_WITHIN_S, SMALL_WITHIN_S = 0.15, 0.02
"""Those who leave do so at a random moment of this time."""
RSS_GROWTH = 0.03
SETTLE_S = 2.0


class Ledger:
    """What the clients that stay were told."""

    def __init__(self) -> None:
        self.right = 0
        self.wrong: list[str] = []
        self.refused = 0
        self.failed: list[str] = []
        self.latencies_ms: list[float] = []


def run(seconds: float = 60.0) -> Finding:
    """Load the service with both kinds of clients, and compare what it holds before and after."""
    finding = Finding()
    with serving() as service, new_runner() as runner:
        runner.run(_load(service.url, WARM_UP_S, Ledger()))
        time.sleep(SETTLE_S)
        before, counted = _held(service), service.metrics()
        ledger = Ledger()
        left = runner.run(_load(service.url, seconds, ledger))
        time.sleep(SETTLE_S)
        after, delta = _held(service), growth_of(counted, service.metrics())
        gauges = {
            series: value
            for series, value in service.metrics().items()
            if series.startswith(("convoy_inflight_", "convoy_queue_rows"))
        }
    dropped = {series: value for series, value in delta.items() if series.startswith("convoy_dropped_total") and value}
    finding.told("clients that left before their answer", left)
    finding.told("answers to the others", ledger.right)
    finding.told("refusals (429) to the others", ledger.refused)
    finding.told("p99 of the others", p99(ledger.latencies_ms), "ms")
    finding.exactly("wrong answers to the others", len(ledger.wrong), 0)
    finding.exactly("others without an answer within their deadline", len(ledger.failed), 0)
    finding.exactly("images run for nobody", rows_unaccounted(delta), 0)
    finding.exactly("requests, images, bytes, pixels and rows left inside", sum(map(abs, gauges.values())), 0)
    finding.at_most("tasks more than before", after["tasks"] - before["tasks"], 0)
    finding.at_most("file descriptors more than before", after["descriptors"] - before["descriptors"], 0)
    finding.at_most("growth of memory", after["rss_bytes"] / before["rss_bytes"] - 1, RSS_GROWTH)
    finding.evidence = {
        "before": before,
        "after": after,
        "dropped": dropped,
        "wrong": ledger.wrong[:10],
        "failed": ledger.failed[:10],
        "mean_batch": {
            model: delta[f'convoy_batch_size_sum{{model="{model}"}}']
            / max(1.0, delta[f'convoy_batch_size_count{{model="{model}"}}'])
            for model in (PHOTO, SMALL)
        },
    }
    return finding


def _held(service: Service) -> dict[str, float]:
    return {"tasks": service.tasks(), "descriptors": service.descriptors(), "rss_bytes": service.rss_bytes()}


async def _load(url: str, seconds: float, ledger: Ledger) -> int:
    end = time.monotonic() + seconds

    def over() -> bool:
        return time.monotonic() >= end

    kinds = ((requests_of(url, PHOTO, photos()), PHOTO_WITHIN_S), (requests_of(url, SMALL, smalls()), SMALL_WITHIN_S))
    expected = {request: await _alone(url, request) for requests, _ in kinds for request in requests}
    stayers = [
        _stayer(url, requests, expected, end, ledger, number) for requests, _ in kinds for number in range(CLIENTS)
    ]
    leavers = [
        leaver(url, requests, over, within_s, number) for requests, within_s in kinds for number in range(CLIENTS)
    ]
    left = await asyncio.gather(asyncio.gather(*leavers), asyncio.gather(*stayers))
    return sum(left[0])


async def _alone(url: str, request: bytes) -> list[tuple[str, float]]:
    wire = await Wire.open(url)
    await wire.send(request)
    answer = await wire.answer()
    wire.leave(at_once=False)
    assert answer.status == 200, answer
    return answer.tops()


async def _stayer(
    url: str,
    requests: Sequence[bytes],
    expected: dict[bytes, list[tuple[str, float]]],
    end: float,
    ledger: Ledger,
    number: int,
) -> None:
    wire = await Wire.open(url)
    while time.monotonic() < end:
        number += 1
        request = requests[number % len(requests)]
        began = time.monotonic()
        try:
            await wire.send(request)
            answer = await wire.answer()
        except (OSError, EOFError) as error:
            ledger.failed.append(repr(error))
            wire = await Wire.open(url)
            continue
        took_ms = (time.monotonic() - began) * 1000
        if answer.status == 429:
            ledger.refused += 1
            await asyncio.sleep(PAUSE_S)
        elif answer.status != 200 or took_ms > DEADLINE_MS:
            ledger.failed.append(f"{answer.status} after {took_ms:.0f} ms: {answer.body[:200]!r}")
        else:
            ledger.latencies_ms.append(took_ms)
            ((label, probability),), ((right, sure),) = answer.tops(), expected[request]
            if label == right and abs(probability - sure) <= SAME_PROBABILITY:
                ledger.right += 1
            else:
                ledger.wrong.append(f"{label} {probability} instead of {right} {sure}")
    wire.leave(at_once=False)
