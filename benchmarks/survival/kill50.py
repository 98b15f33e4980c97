"""kill -9 of workers and engines under load, 50 times: what they had is lost, and nothing is left behind.

Half of the time workers die and the engines live on, then engines die and the workers live on: who lives on shows what
the others have left with it.
"""

import asyncio
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from app.bench.load import new_runner
from benchmarks.survival.clients import caller
from benchmarks.survival.material import SMALL, requests_of, smalls
from benchmarks.survival.rows import Exchange, Finding
from benchmarks.survival.service import Service, peers_of, rss_bytes, serving

WORKERS, ENGINES, CLIENTS = 2, 2, 8
KILLS = 50
EVERY_S = 5.5
"""Between two kills, of two processes in turn: one that dies younger than ten seconds is not replaced at once."""
SETTLE_S = 11.0
RSS_GROWTH = 0.05


def run(seconds: float = EVERY_S) -> Finding:
    """Kill, every so many seconds."""
    finding = Finding()
    with serving(workers=WORKERS, engines=ENGINES) as service, new_runner() as runner:
        for kind, others in (("worker", "engine"), ("engine", "worker")):
            seen, ports, held, late = runner.run(_kill(service, kind, others, seconds))
            lost = [exchange for exchange in seen if exchange.status != 200]
            inside = [exchange for exchange in lost if exchange.status == 0 and exchange.port in ports]
            told = [exchange for exchange in lost if exchange.status == 503]
            finding.told(f"requests answered, {KILLS // 2} kills of a {kind}", len(seen) - len(lost))
            finding.told(f"requests lost with a {kind}, for each kill", len(lost) / (KILLS // 2))
            expected = inside if kind == "worker" else told
            finding.exactly(f"requests lost otherwise ({kind})", len(lost) - len(expected), 0)
            finding.at_most(f"requests lost for each kill of a {kind}", len(lost) / (KILLS // 2), CLIENTS)
            finding.at_most(f"replaced, the slowest {kind}", late, 5.0, "s")
            (rss, descriptors, slabs), (rss_late, descriptors_late, slabs_late) = held
            finding.at_most(f"growth of memory of each {others}", rss_late / rss - 1, RSS_GROWTH)
            finding.at_most(f"growth of file descriptors of each {others}", descriptors_late - descriptors, 0)
            finding.exactly(f"slabs too many in each {others}", slabs_late - slabs, 0)
        inside_now = service.metrics()["convoy_inflight_images"]
        finding.exactly("images still counted as inside", inside_now, 0)
        finding.exactly("exit status", service.end(), 0)
    return finding


Held = tuple[float, float, float]


async def _kill(
    service: Service, kind: str, others: str, every_s: float
) -> tuple[list[Exchange], set[int], tuple[Held, Held], float]:
    """Return what clients saw, the ports of the killed ones' clients, what the others held, and the slowest return."""
    seen: list[Exchange] = []
    ports: set[int] = set()
    over = asyncio.Event()
    requests = requests_of(service.url, SMALL, smalls())
    clients = [
        asyncio.create_task(caller(service.url, requests, over.is_set, seen, start=number)) for number in range(CLIENTS)
    ]
    await asyncio.sleep(SETTLE_S)
    before: Held | None = None
    slowest = 0.0
    for number in range(KILLS // 2):
        victim = _pids(service, kind)[0]
        # Held still, so that nobody connects to it between the list of its clients and its end.
        os.kill(victim, signal.SIGSTOP)
        if kind == "worker":
            ports |= peers_of(victim, service.url)
        os.kill(victim, signal.SIGKILL)
        started = time.monotonic()
        while not _whole(service, kind) and time.monotonic() < started + 30:
            await asyncio.sleep(0.05)
        slowest = max(slowest, time.monotonic() - started)
        await asyncio.sleep(max(0.0, started + every_s - time.monotonic()))
        if number == 4:
            before = _held(service, others)
    over.set()
    await asyncio.gather(*clients)
    await asyncio.sleep(1)
    assert before is not None
    return seen, ports, (before, _held(service, others)), slowest


def _pids(service: Service, kind: str) -> list[int]:
    """Return the processes of a kind, the oldest first."""
    started = {line["pid"] for line in service.lines(f"{kind} started")}
    return sorted((pid for pid in service.pids() if pid in started), key=_age)


def _age(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _whole(service: Service, kind: str) -> bool:
    """Tell whether all are there again, and work."""
    if len(_pids(service, kind)) < (WORKERS if kind == "worker" else ENGINES):
        return False
    with suppress(OSError, KeyError):
        metrics = service.metrics()
        ready = metrics[f'convoy_{kind}s{{state="ready"}}']
        # An engine is ready before it has opened any model: sessions tell.
        sessions = metrics[f'convoy_sessions{{model="{SMALL}"}}']
        return ready >= 2 and (kind == "worker" or sessions >= ENGINES)
    return False


def _held(service: Service, kind: str) -> Held:
    """Return what each process of a kind holds: memory, descriptors, slabs."""
    pids = _pids(service, kind)
    count = len(pids)
    return (
        sum(map(rss_bytes, pids)) / count,
        sum(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) for pid in pids) / count,
        sum(Path(f"/proc/{pid}/maps").read_text().count("convoy-slab") for pid in pids) / count,
    )
