"""What it costs to have the sessions in a process of their own, and how busy workers keep a device.

    python -m benchmarks.cluster            # a table, and benchmarks/results/cluster.json; three minutes; needs wrk

The device is simulated: a session that sleeps a fixed time for each batch, whatever is in it, and uses no processor
meanwhile, one batch after the other, as a GPU does. Two session threads share it, so that one gathers rows while the
other's run. It is *busy* for that time. Three parts:

- `boundary`: one process that only hands rows over and takes scores, 224×224 images, each of which is written into its
  room and from there into its batch: with a device that costs nothing, and with ever slower ones.
- `http`: the real service with two workers, 32×32 JPEGs over HTTP, and ever slower devices: the fastest one that is at
  least 95 % busy is what two processors can feed.
- `overhead`: the real service, its sessions in its workers and in an engine, in turns: latency of one client, and
  processor time of one request under load.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from app import workers
from app.accept import listen
from app.batcher import Batcher
from app.cluster import engine
from app.cluster.front import Links
from app.cluster.remote_batcher import RemoteBatcher
from app.cluster.wire import Mailbox, introduce
from app.cpus import machine
from app.loading import LoadedModel, manifest_of
from app.manifest import Manifest
from app.metrics import Metrics
from app.pages import create_shared, open_common, open_engines, open_shared
from app.runs import Job
from app.sessions import PlainSession
from app.settings import Settings
from app.tensors import Array, TensorSpec
from benchmarks.peers.load import measure, require_wrk
from benchmarks.peers.scenarios import IMAGES
from benchmarks.survival.__main__ import table
from benchmarks.survival.rows import Finding
from benchmarks.survival.service import Service, cpu_s, serving

RESULTS = Path(__file__).parent / "results/cluster.json"
MODEL = "cifar10-article"
BATCH_VARIABLE, SECONDS_VARIABLE = "SIMULATED_BATCH", "SIMULATED_BATCH_S"
IN_FLIGHT = 256
CONNECTIONS = 128
BATCH = 64
SIDE, CLASSES = 224, 1000
BUSY = 0.95


class Device:
    """Something that runs one batch at a time, and takes as long for each."""

    def __init__(self, batch_s: float, metrics: Metrics) -> None:
        self._batch_s = batch_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._busy = metrics.session_busy.labels("simulated", "device", 0)

    def run(self) -> None:
        """Put a batch behind those that it has, as into a GPU's stream, and wait until it has run."""
        if not self._batch_s:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + self._batch_s
            self._busy.inc(self._batch_s)
            until = self._free_at
        time.sleep(max(0.0, until - time.monotonic()))


class Asleep(PlainSession):
    """A session on such a device; its scores are all alike."""

    provider = "cpu"

    def __init__(self, device: Device, classes: int) -> None:
        self._device, self._classes = device, classes

    def run(self, pixels: Array) -> tuple[Array, ...]:
        """Take the device's time."""
        self._device.run()
        return (np.full((len(pixels), self._classes), 1 / self._classes, np.float32),)


def run_engine(number: int, memory: int, mailbox: int) -> None:
    """Be an engine over a simulated device; started by the supervisor, or by `boundary`."""
    batch, batch_s = int(os.environ[BATCH_VARIABLE]), float(os.environ[SECONDS_VARIABLE])

    def run(settings: Settings, metrics: Metrics, lifeline: int, connection: socket.socket) -> None:
        device = Device(batch_s, metrics)

        def load(
            name: str, version: str, directory: Path, loop: asyncio.AbstractEventLoop
        ) -> tuple[LoadedModel, float | None]:
            side, classes, digest = SIDE, CLASSES, "simulated"
            manifest = manifest_of(name, version, directory, False)
            if isinstance(manifest, Manifest):
                side, classes, digest = manifest.pixels.height, len(manifest.labels), manifest.model.sha256
            sessions = [Asleep(device, classes) for _ in range(2)]
            own = metrics.for_model(name, version)
            return LoadedModel(
                name,
                version,
                digest,
                "cpu",
                (TensorSpec("image", "UINT8", (-1, side, side, 3)),),
                (TensorSpec("probabilities", "FP32", (-1, classes)),),
                batch,
                "",
                None,
                None,
                Batcher(sessions, max_batch=batch, linger_s=0, loop=loop, metrics=own),
                own,
            ), None

        asyncio.run(engine.serve(metrics, load, connection, lifeline, device="cpu", threads_per_session=1))

    workers.be_engine(run, number, memory, mailbox)


class SimulatedSupervisor(workers.Supervisor):
    """The real one, with such engines."""

    engine_entry = "benchmarks.cluster", "run_engine"


def serve_simulated(port: int, count: int, model: str) -> None:
    """Be a service with simulated engines."""
    from app import logs

    settings = Settings(port=port, workers=count, engines=1, default_model=model, access_log=False, log_format="json")
    logs.configure("json", "info")
    with listen(settings.host, settings.port) as listener:
        SimulatedSupervisor(settings, count, listener, None).run()


@contextmanager
def simulated_service(count: int, batch: int, batch_s: float) -> Iterator[Service]:
    """Run such a service until the block ends."""
    command = [sys.executable, "-m", "benchmarks.cluster", "--serve", str(count)]
    environment = os.environ | {BATCH_VARIABLE: str(batch), SECONDS_VARIABLE: str(batch_s)}
    with tempfile.NamedTemporaryFile(prefix="convoy-log-") as log:
        process = subprocess.Popen(command, stderr=log, env=environment, start_new_session=True)
        service = Service(process, Path(log.name))
        try:
            service.wait_until_ready()
            yield service
        finally:
            service.end()


class _Client:
    """Somebody who asks again as soon as he has his answer, without a task."""

    def __init__(self, runs: RemoteBatcher, pixels: NDArray[np.uint8]) -> None:
        self._runs, self._pixels = runs, pixels
        self.answered = 0
        self.over = False

    def ask(self) -> Job:
        """Hand one image over."""
        return self._runs.submit((self._pixels,), 1, float("inf"), answer=self)

    def done(self) -> bool:
        """Always waits."""
        return False

    def set_result(self, outputs: tuple[Array, ...], /) -> None:
        """Count an answer, and ask again."""
        assert outputs[0].shape == (1, CLASSES)
        self.answered += 1
        if not self.over:
            self.ask()

    def set_exception(self, error: Exception, /) -> None:
        """Fail."""
        raise error


async def cross(batch: int, batch_s: float, seconds: float, directory: Path) -> tuple[float, float]:
    """Return requests a second through one process and one engine, and how busy the device was."""
    memory = create_shared(1, 1)
    [page], [engine_page], common = open_shared(memory, 1), open_engines(memory, 1), open_common(memory)
    metrics = Metrics(page, [page], common, engines=[engine_page])
    mailbox, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own, mine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = "import sys; from benchmarks.cluster import run_engine; run_engine(*map(int, sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(engine_page.number), str(memory), str(theirs.fileno())],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[memory, theirs.fileno()],
        env=os.environ | {BATCH_VARIABLE: str(batch), SECONDS_VARIABLE: str(batch_s)},
    )
    assert process.stdin is not None
    process.stdin.write(Settings(engines=1, workers=1).model_dump_json().encode() + b"\n")
    process.stdin.flush()
    loop = asyncio.get_running_loop()
    links = Links(metrics)
    meetings = Mailbox(mine, links.meet)
    introduce((own, 1), (mailbox, engine_page.number))
    try:
        model, _ = await asyncio.to_thread(links.load, "simulated", "1", directory, loop)
        assert isinstance(model.batcher, RemoteBatcher)
        pixels = np.zeros((1, SIDE, SIDE, 3), np.uint8)
        clients = [_Client(model.batcher, pixels) for _ in range(IN_FLIGHT)]
        for client in clients:
            client.ask()
        await asyncio.sleep(1)
        before, busy, started = sum(client.answered for client in clients), _busy(metrics), time.perf_counter()
        await asyncio.sleep(seconds)
        answered = sum(client.answered for client in clients) - before
        elapsed, busy = time.perf_counter() - started, _busy(metrics) - busy
        for client in clients:
            client.over = True
        await asyncio.sleep(0.2)
        return answered / elapsed, busy / elapsed
    finally:
        links.close()
        meetings.close()
        process.terminate()
        process.wait(10)
        process.stdin.close()
        for end in (mailbox, theirs, own):
            end.close()
        os.close(memory)


def _busy(metrics: Metrics) -> float:
    name = "convoy_session_busy_seconds_total"
    return metrics.sums(name)[name].get(("simulated", "device", "0"), [0.0])[0]


def boundary(finding: Finding, seconds: float) -> None:
    """Measure the way to an engine and back, alone."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "model.onnx").touch()
        free, _ = asyncio.run(cross(BATCH, 0.0, seconds, Path(directory)))
        tried = []
        for share in (1.0, 0.9, 0.8, 0.7, 0.6):
            rate = share * free
            fed, busy = asyncio.run(cross(BATCH, BATCH / rate, seconds, Path(directory)))
            tried.append({"device_per_s": round(rate), "fed_per_s": round(fed), "busy": round(busy, 3)})
            if busy >= BUSY:
                break
    finding.told("boundary: images of 224×224 a second, a device that costs nothing", free)
    finding.told("boundary: images a second of the fastest device that is kept busy", rate)
    finding.at_least("boundary: share of time in which it is busy", busy, BUSY)
    finding.evidence["boundary"] = tried


def http(finding: Finding, image: Path, seconds: float) -> None:
    """Look for the fastest device that the real service keeps busy."""
    batch = 16
    tried = []
    for rate in (16_000, 12_000, 10_000, 8_000, 7_000, 6_000, 5_000, 4_000, 3_000):
        with simulated_service(2, batch, batch / rate) as service:
            url = f"{service.url}/models/{MODEL}/predict"
            measure(url, [image], CONNECTIONS, 1)
            before, started = service.metrics(), time.perf_counter()
            figures = measure(url, [image], CONNECTIONS, seconds)
            elapsed, after = time.perf_counter() - started, service.metrics()
        key = 'convoy_session_busy_seconds_total{device="device",model="simulated",session="0"}'
        busy = (after[key] - before.get(key, 0.0)) / elapsed
        tried.append({"device_per_s": rate, "served_per_s": figures.per_s, "busy": round(busy, 3)})
        if busy >= BUSY:
            break
    finding.told("http: images a second of the fastest device that is kept busy", rate, "images/s")
    finding.told("http: 32×32 JPEGs answered a second with it", figures.per_s, "requests/s")
    finding.at_least("http: share of time in which it is busy", busy, BUSY)
    finding.evidence["http"] = tried


def overhead(finding: Finding, image: Path, seconds: float, turns: int) -> None:
    """Measure the real service, with its sessions inside and in an engine."""
    rows: dict[str, list[tuple[float, float, float]]] = {"inside": [], "engine": []}
    with serving(workers=1) as inside, serving(workers=1, engines=1) as apart:
        for _ in range(turns):
            for name, service in (("inside", inside), ("engine", apart)):
                url = f"{service.url}/models/{MODEL}/predict"
                one = measure(url, [image], 1, seconds)
                before = sum(map(cpu_s, service.pids()))
                many = measure(url, [image], 32, seconds)
                spent = sum(map(cpu_s, service.pids())) - before
                rows[name].append((one.p50_ms, many.per_s, spent / (many.per_s * seconds) * 1e6))
    medians = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in rows.items()}
    own, far = medians["inside"], medians["engine"]
    finding.told("overhead: p50 of one client, sessions in the worker", own[0], "ms")
    finding.told("overhead: p50 of one client, sessions in an engine", far[0], "ms")
    finding.told("overhead: latency that the way adds", (far[0] - own[0]) * 1000, "µs")
    finding.told("overhead: processor time of a request, sessions in the worker", own[2], "µs")
    finding.told("overhead: processor time that the way adds", far[2] - own[2], "µs")
    finding.told("overhead: requests a second, engine ÷ worker, one of each", far[1] / own[1])
    finding.evidence["overhead"] = {
        name: [[round(value, 3) for value in row] for row in found] for name, found in rows.items()
    }


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=6, help="of each measurement, whole ones")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_simulated(0, options.serve, MODEL)
        return 0
    require_wrk()
    finding = Finding()
    boundary(finding, options.seconds)
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "small.jpg"
        image.write_bytes(IMAGES["small.jpg"]())
        http(finding, image, options.seconds)
        overhead(finding, image, max(1, options.seconds // 2), options.turns)
    entry = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "skipped": "",
        "rows": [asdict(row) for row in finding.rows],
        "evidence": finding.evidence,
    }
    options.output.write_text(json.dumps(entry, indent=2, ensure_ascii=False) + "\n")
    Console().print(table({"cluster": entry}))
    return int(any(row.met is False for row in finding.rows))


if __name__ == "__main__":
    sys.exit(main())
