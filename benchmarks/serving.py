"""How fast the service answers here, beside the bare loop of decode and run on the same processors.

    python -m benchmarks.serving            # a table, and benchmarks/results/serving.json

For every shipped model: the ceiling (threads that decode and run, no HTTP), then a real `convoy serve` under a closed
loop of raw-socket clients on the same processors. The ratio served ÷ ceiling is what carries over between machines.
"""

import asyncio
import json
import platform
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from app import images
from app.cpus import usable_cpus
from app.manifest import Bundle, read_bundle
from app.repository import find_models
from app.sessions import OnnxSession
from benchmarks.server import serving

ROOT = Path(__file__).parent.parent
SECONDS = 8.0
WARM_UP_S = 2.0
CONNECTIONS = 16
IMAGES = {"cifar10-article": "golden/rotated.jpg"}
"""What a model is asked, where its first golden image is no typical one: here 32×40 pixels instead of a photo."""


@dataclass
class Row:
    model: str
    image: str
    connections: int
    ceiling_per_s: float
    served_per_s: float
    served_over_ceiling: float
    p50_ms: float
    p99_ms: float
    mean_batch: float


def main() -> None:
    rows = [measure(bundle) for bundle in (read_bundle(entry.directory) for entry in find_models(ROOT / "models"))]
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": cpu_name(), "usable_cpus": usable_cpus(), "python": platform.python_version()},
        "seconds": SECONDS,
        "rows": [asdict(row) for row in rows],
    }
    target = ROOT / "benchmarks/results/serving.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{report['machine']}")
    print(
        f"{'model':18}{'image':26}{'ceiling/s':>10}{'served/s':>10}{'ratio':>7}{'p50 ms':>8}{'p99 ms':>8}{'batch':>7}"
    )
    for row in rows:
        print(
            f"{row.model:18}{row.image:26}{row.ceiling_per_s:10.0f}{row.served_per_s:10.0f}"
            f"{row.served_over_ceiling:7.2f}{row.p50_ms:8.2f}{row.p99_ms:8.2f}{row.mean_batch:7.1f}"
        )


def measure(bundle: Bundle) -> Row:
    manifest = bundle.manifest
    file = IMAGES.get(manifest.name, manifest.golden.images[0].file)
    image = (bundle.directory / file).read_bytes()
    ceiling = ceiling_per_s(bundle, image)
    latencies, mean_batch = served(manifest.name, image)
    rate = len(latencies) / SECONDS
    return Row(
        model=manifest.name,
        image=f"{Path(file).name} {len(image) / 1000:.1f} kB",
        connections=CONNECTIONS,
        ceiling_per_s=round(ceiling, 1),
        served_per_s=round(rate, 1),
        served_over_ceiling=round(rate / ceiling, 3),
        p50_ms=round(statistics.median(latencies) * 1000, 2),
        p99_ms=round(statistics.quantiles(latencies, n=100)[98] * 1000, 2),
        mean_batch=round(mean_batch, 2),
    )


def ceiling_per_s(bundle: Bundle, image: bytes) -> float:
    """Images per second of one thread per processor that decodes and runs, nothing else."""
    stop = time.monotonic() + WARM_UP_S + SECONDS
    counts = []

    def loop() -> None:
        session = OnnxSession(bundle.model_path, "cpu", 1)
        count = 0
        while (now := time.monotonic()) < stop:
            session.run(images.decode(image, bundle.manifest.pixels)[None])
            count += now > stop - SECONDS
        counts.append(count)

    threads = [threading.Thread(target=loop) for _ in range(usable_cpus())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / SECONDS


def served(model: str, image: bytes) -> tuple[list[float], float]:
    """Latencies in seconds of all answers within `SECONDS`, and the mean batch."""
    with serving() as server:
        return asyncio.run(load(server.port, model, image))


async def load(port: int, model: str, image: bytes) -> tuple[list[float], float]:
    head = f"POST /models/{model}/predict HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(image)}\r\n\r\n"
    request = head.encode() + image
    start = time.monotonic() + WARM_UP_S
    stop = start + SECONDS
    latencies: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (sent := time.monotonic()) < stop:
            writer.write(request)
            await answer(reader)
            done = time.monotonic()
            if start <= sent and done < stop:
                latencies.append(done - sent)
        writer.close()

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    metrics = await get(port, "/metrics")
    sums = {line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if line.startswith("convoy_batch")}
    label = f'{{model="{model}"}}'
    return latencies, sums[f"convoy_batch_size_sum{label}"] / sums[f"convoy_batch_size_count{label}"]


async def answer(reader: asyncio.StreamReader) -> bytes:
    """Read one response and return its body; anything but 200 ends the measurement."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return await reader.readexactly(int(length))


async def get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
    body = await answer(reader)
    writer.close()
    return body.decode()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
