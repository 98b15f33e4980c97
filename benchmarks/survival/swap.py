"""Hot swaps under full load: nobody fails, latencies hold, and every connection sees each of them once."""

import asyncio
import itertools
import json
import math
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
MANY, EVERY = 50, 5
"""Swaps at most, and after how many of them the service is looked at."""
SETTLE_S = 2.0
"""Before that, so that what was replaced is gone, and several requests of each client have been answered."""
P99_RATIO = 2.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it; an empty version: it failed."""

    client: int
    sent_s: float
    ended_s: float
    version: str


def run(seconds: float = 18.0) -> Finding:
    """Load the service for `seconds`, and then for as long with a swap after the other."""
    finding = Finding()
    load = swapped(seconds, until_s=2 * seconds)
    during = [
        answer
        for answer in load.answers
        if any(answer.ended_s > begin and answer.sent_s < end for begin, end in load.spans)
    ]
    calm_ms = [1000 * (answer.ended_s - answer.sent_s) for answer in load.answers if answer.ended_s < load.spans[0][0]]
    during_ms = [1000 * (answer.ended_s - answer.sent_s) for answer in during if answer.version]
    judge_answers(finding, load)
    finding.told("p99 without swaps", p99(calm_ms), "ms")
    finding.told("p99 of requests that were inside during a swap", p99(during_ms), "ms")
    finding.at_most("p99 during swaps to p99 without", p99(during_ms) / p99(calm_ms), P99_RATIO)
    finding.told("a swap takes, median", sorted(end - begin for begin, end in load.spans)[len(load.spans) // 2], "s")
    finding.evidence = {"model": PHOTO, "clients": CLIENTS, "answers_during_swaps": len(during)}
    return finding


def judge_answers(finding: Finding, load: "Load") -> None:
    """Add what holds whatever else is looked at: nobody failed, and nobody was sent back to an older version."""
    finding.told("requests", len(load.answers))
    finding.told("swaps", len(load.spans))
    finding.exactly("requests that failed", sum(not answer.version for answer in load.answers), 0)
    finding.exactly("connections that saw a version twice, or out of turn", out_of_turn(load.answers), 0)
    finding.exactly("exit status", load.status, 0)


def swapped(calm_s: float, *, until_s: float = math.inf, swaps: int = MANY) -> "Load":
    """Load a service of its own, calmly at first, then with swaps until a time or a number is reached."""
    with tempfile.TemporaryDirectory(prefix="convoy-swap-") as scratch:
        key, line = make_key("benchmark", frozenset(Access))
        keys = Path(scratch, "keys.txt")
        keys.write_text(line + "\n")
        models = Path(scratch, "models")
        put_version(models, PHOTO, 1)
        with serving(models=models, keys=keys) as service, new_runner() as runner:
            load = Load(service, models, PHOTO, key)
            runner.run(load.run(calm_s, until_s, swaps))
            load.status = service.end()
    return load


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


class Load:
    """The clients and the swaps.

    Attributes:
        answers: what the clients saw.
        spans: beginning and end of each swap, as whoever asked for it saw them.
        held: by number of swaps, what the service held then: bytes of memory, threads, descriptors.
        peak_bytes: the most memory that it was seen to hold.
        status: its exit status.
    """

    def __init__(self, service: Service, models: Path, model: str, key: str) -> None:
        self._service, self._models, self._model, self._key = service, models, model, key
        self._over = asyncio.Event()
        self.answers: list[Answer] = []
        self.spans: list[tuple[float, float]] = []
        self.held: dict[int, tuple[int, int, int]] = {}
        self.peak_bytes = 0
        self.status = -1

    async def run(self, calm_s: float, until_s: float, swaps: int) -> None:
        """Let clients ask; swap after `calm_s`, until `until_s` from the beginning or so many times."""
        began = time.monotonic()
        requests = build_requests(Endpoint.of(self._service.url, self._model), photos(), api_key=self._key)
        clients = [asyncio.create_task(self._client(number, requests)) for number in range(CLIENTS)]
        watching = asyncio.create_task(self._watch())
        await asyncio.sleep(calm_s)
        while len(self.spans) < swaps and time.monotonic() < began + until_s:
            await asyncio.to_thread(put_version, self._models, self._model, len(self.spans) + 2)
            begin = time.monotonic()
            await asyncio.to_thread(self._load)
            self.spans.append((begin, time.monotonic()))
            await asyncio.to_thread(shutil.rmtree, self._models / self._model / str(len(self.spans)))
            if len(self.spans) % EVERY == 0:
                await asyncio.sleep(SETTLE_S)
                threads = len(list(Path(f"/proc/{self._service.pid}/task").iterdir()))
                self.held[len(self.spans)] = self._service.rss_bytes(), threads, self._service.descriptors()
        self._over.set()
        await asyncio.gather(*clients, watching)

    def _load(self) -> None:
        url = f"{self._service.url}/models/{self._model}/load"
        request = urllib.request.Request(url, b"", {"X-API-Key": self._key})
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["state"] == "ready"

    async def _watch(self) -> None:
        while not self._over.is_set():
            self.peak_bytes = max(self.peak_bytes, self._service.rss_bytes())
            await asyncio.sleep(0.05)

    async def _client(self, number: int, requests: Sequence[bytes]) -> None:
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
            self.answers.append(Answer(number, sent, time.monotonic(), version))
