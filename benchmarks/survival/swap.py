"""Hot swaps under full load: nobody fails, latencies hold, a connection sees each once, and memory does not grow."""

import asyncio
import itertools
import json
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.bench.load import new_runner
from app.bench.requests import Endpoint, build_requests
from app.keys import Access, make_key
from benchmarks.survival.clients import Wire
from benchmarks.survival.material import PHOTO, photos
from benchmarks.survival.rows import Finding, p99
from benchmarks.survival.service import ROOT, Service, serving

CLIENTS = 8
"""Each waits for its answer, then asks again: all processors are busy, and nobody is turned away."""
PAUSE_S = 1.0
EARLY, LATE = 5, 50
SETTLE_S = 2.0
"""Before memory is read, so that what was replaced is gone, and several requests of each client have been answered."""
P99_RATIO, RSS_GROWTH = 2.0, 0.05


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it; an empty version: it failed."""

    client: int
    sent_s: float
    ended_s: float
    version: str


def run(seconds: float = 20.0, model: str = PHOTO, swaps: int = LATE) -> Finding:
    """Load the service for `seconds`, then for as long with a swap after the other, and on until there were enough."""
    finding = Finding()
    with tempfile.TemporaryDirectory(prefix="convoy-swap-") as scratch:
        key, line = make_key("benchmark", frozenset(Access))
        keys = Path(scratch, "keys.txt")
        keys.write_text(line + "\n")
        models = Path(scratch, "models")
        put_version(models, model, 1)
        with serving(models=models, keys=keys) as service, new_runner() as runner:
            swapping = _Swapping(service, models, model, key)
            answers, steady, spans = runner.run(swapping.run(seconds, swaps))
            status = service.end()
    during = [
        answer for answer in answers if any(answer.ended_s > begin and answer.sent_s < end for begin, end in spans)
    ]
    steady_ms = [1000 * (answer.ended_s - answer.sent_s) for answer in answers if answer.ended_s < steady]
    during_ms = [1000 * (answer.ended_s - answer.sent_s) for answer in during if answer.version]
    finding.told("requests", len(answers))
    finding.exactly("requests that failed", sum(not answer.version for answer in answers), 0)
    finding.exactly("connections that saw a version twice, or out of turn", out_of_turn(answers), 0)
    finding.told("p99 without swaps", p99(steady_ms), "ms")
    finding.told("p99 of requests that were inside during a swap", p99(during_ms), "ms")
    finding.at_most("p99 during swaps to p99 without", p99(during_ms) / p99(steady_ms), P99_RATIO)
    finding.told("a swap takes, median", sorted(end - begin for begin, end in spans)[len(spans) // 2], "s")
    early, late = (swapping.rss[min(count, swaps)] for count in (EARLY, LATE))
    finding.told(f"memory after {EARLY} swaps", early / 1e6, "MB")
    finding.at_most(f"growth of memory from swap {EARLY} to swap {min(LATE, swaps)}", late / early - 1, RSS_GROWTH)
    finding.exactly("exit status", status, 0)
    finding.evidence = {
        "model": model,
        "clients": CLIENTS,
        "swaps": len(spans),
        "peak_rss_mb": round(swapping.peak / 1e6, 1),
        "rss_mb_by_swaps": {count: round(size / 1e6, 1) for count, size in swapping.rss.items()},
        "threads_by_swaps": swapping.threads,
        "descriptors_by_swaps": swapping.descriptors,
        "answers_during_swaps": len(during),
    }
    return finding


def put_version(models: Path, model: str, version: int) -> None:
    """Put the shipped bundle there once more, as another version, whole in one step."""
    [source] = (ROOT / "models" / model).glob("[0-9]*")
    target = models / model / str(version)
    half = target.with_name(f".{version}")
    shutil.copytree(source, half)
    manifest = json.loads((half / "model.json").read_text())
    (half / "model.json").write_text(json.dumps({**manifest, "version": str(version)}))
    half.rename(target)


def out_of_turn(answers: Sequence[Answer]) -> int:
    """Return how many clients saw a version that was older than one they had seen before."""
    by_client = itertools.groupby(
        sorted(answers, key=lambda answer: (answer.client, answer.sent_s)), lambda a: a.client
    )
    seen = [[int(answer.version) for answer in group if answer.version] for _, group in by_client]
    return sum(versions != sorted(versions) for versions in seen)


class _Swapping:
    """The load, the swaps, and what the service holds after some of them."""

    def __init__(self, service: Service, models: Path, model: str, key: str) -> None:
        self._service, self._models, self._model, self._key = service, models, model, key
        self._over = asyncio.Event()
        self.rss: dict[int, int] = {}
        self.threads: dict[int, int] = {}
        self.descriptors: dict[int, int] = {}
        self.peak = 0

    async def run(self, seconds: float, swaps: int) -> tuple[list[Answer], float, list[tuple[float, float]]]:
        """Return all answers, when the time without swaps ended, and beginning and end of the swaps that count."""
        answers: list[Answer] = []
        requests = build_requests(Endpoint.of(self._service.url, self._model), photos(), api_key=self._key)
        clients = [asyncio.create_task(self._client(number, requests, answers)) for number in range(CLIENTS)]
        watching = asyncio.create_task(self._watch())
        await asyncio.sleep(seconds)
        steady = time.monotonic()
        spans: list[tuple[float, float]] = []
        for count in range(1, swaps + 1):
            await asyncio.to_thread(put_version, self._models, self._model, count + 1)
            begin = time.monotonic()
            await asyncio.to_thread(self._load)
            spans.append((begin, time.monotonic()))
            await asyncio.to_thread(shutil.rmtree, self._models / self._model / str(count))
            if time.monotonic() < steady + seconds:
                await asyncio.sleep(PAUSE_S)
            if count % 5 == 0 or count == swaps:
                await asyncio.sleep(SETTLE_S)
                self.rss[count] = self._service.rss_bytes()
                self.threads[count] = len(list(Path(f"/proc/{self._service.pid}/task").iterdir()))
                self.descriptors[count] = self._service.descriptors()
        self._over.set()
        await asyncio.gather(*clients, watching)
        return answers, steady, spans

    def _load(self) -> None:
        url = f"{self._service.url}/models/{self._model}/load"
        request = urllib.request.Request(url, b"", {"X-API-Key": self._key})
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["state"] == "ready"

    async def _watch(self) -> None:
        while not self._over.is_set():
            self.peak = max(self.peak, self._service.rss_bytes())
            await asyncio.sleep(0.05)

    async def _client(self, number: int, requests: Sequence[bytes], answers: list[Answer]) -> None:
        wire = await Wire.open(self._service.url)
        for request in itertools.cycle(requests):
            if self._over.is_set():
                return
            sent, version = time.monotonic(), ""
            try:
                await wire.send(request)
                answer = await wire.answer()
                if answer.status == 200:
                    version = json.loads(answer.body)["version"]
            except (OSError, EOFError):
                wire.leave()
                wire = await Wire.open(self._service.url)
            answers.append(Answer(number, sent, time.monotonic(), version))
