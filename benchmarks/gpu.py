"""What a GPU can do, what the service gets of it, and what its settings change: one command for the whole table.

    make bench-gpu              # on a machine with a GPU: benchmarks/results/gpu-<device>.json and a picture
    python -m benchmarks.gpu --device cpu --seconds 2 --only ceiling one      # a look, without one

ResNet-50 with random weights, 224×224, in float32 and in half precision. Needs wrk for what goes over HTTP, and the
extra `train` for the bundles. The parts:

| part | measures |
|---|---|
| `ceiling` | the device alone: batches that lie in its memory, for each size, precision and provider |
| `tensors` | uint8 tensors over binary V2, several workers, one engine, ÷ the ceiling |
| `photos` | photos of 500×375 over HTTP, ÷ the smaller of the ceilings of device and decoding |
| `one` | one photo on an idle service, beside bare decode and run |
| `peers` | LitServe and mosec with the same runtime on the same device; needs their environment (`make bench-peers`) |
| `answers` | differences from the CPU, in float32, with TF32, in half precision |
| `memory` | the device's memory over ten minutes of changing batches and twenty hot swaps |
| `options` | sessions, search, layout, recorded launches: from this table the defaults are chosen |

Every ratio is of one run. Where a part cannot be done it says why, and nothing takes its place.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from app import runtime
from app.cpus import machine, usable_cpus
from app.cuda import Cuda, batch_sizes
from app.images import decode
from app.manifest import Bundle, read_bundle, write_bundle
from app.sessions import ClassifierSession, Device
from benchmarks.networks import CACHE, resnet50
from benchmarks.peers.load import LoadError, measure, require_wrk
from benchmarks.peers.scenarios import IMAGES, Setting
from benchmarks.peers.servers import PeerError, peer
from benchmarks.peers.servers import serving as peer_serving
from benchmarks.survival.__main__ import table
from benchmarks.survival.rows import Finding
from benchmarks.survival.service import Service, serving
from convoy.tensors import LENGTH_HEADER, pack

RESULTS = Path(__file__).parent / "results"
LARGEST = 64
SIZES = batch_sizes(LARGEST)
PROVIDER = "PEER_PROVIDER"
"""What the peers' runners read."""
PEERS_PYTHON = Path(__file__).parents[1] / ".venv-peers/bin/python"
HALF = "resnet50-fp16"
HALF_TOLERANCE = 0.02
MEMORY_S, SWAPS = 600.0, 20
MEMORY_GROWTH = 0.03


class Bench:
    """What all parts share: device, time, bundles, and what was found."""

    def __init__(self, device: Device, seconds: int) -> None:
        self.device: Device = device
        self.seconds = seconds
        self.finding = Finding()
        self.full, self.half = resnet50(), half_of(resnet50())
        # A processor computes in float32, and converts half precision at every layer.
        self.served = self.full if device == "cpu" else self.half
        self.connections = 4 * usable_cpus() if device == "cpu" else 512
        self.best: dict[str, float] = {}
        """Images a second of the device alone, by model."""

    @property
    def workers(self) -> int:
        """Processes that decode: all processors but those of the engine's sessions and of the load."""
        return max(1, usable_cpus() - 3)

    @contextmanager
    def service(self, model: str, **settings: object) -> Iterator[Service]:
        """Run the service with an engine on the device."""
        fixed: dict[str, object] = {
            "models": CACHE,
            "default_model": model,
            "device": self.device,
            "engines": 1,
            "workers": self.workers,
            "max_batch": LARGEST,
            "sessions": 2,
            "max_inflight_images": 4096,
            "max_inflight_bytes": 2_000_000_000,
        }
        with serving(**(fixed | settings)) as running:
            yield running

    def throughput(
        self, service: Service, path: str, body: bytes, headers: Mapping[str, str], connections: int
    ) -> float:
        """Return answers a second of a closed loop."""
        threads = min(4, max(1, usable_cpus() // 4))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "body"
            file.write_bytes(body)
            measure(service.url + path, [file], connections, 2, headers, threads)
            return measure(service.url + path, [file], connections, self.seconds, headers, threads).per_s


def half_of(parent: Bundle) -> Bundle:
    """Return the bundle in half precision, written first where it is not there."""
    from training.compress.fp16 import halve

    target = CACHE / HALF / "1"
    if (target / "model.json").exists():
        return read_bundle(target)
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / "model.onnx"
        halve(parent.model_path, graph)
        golden = {name: (parent.directory / "golden" / name).read_bytes() for name in _golden_names(parent)}
        pixels = np.stack([decode(image, parent.manifest.pixels) for image in golden.values()])
        found = ClassifierSession(graph, "cpu", usable_cpus()).classify(pixels)
        manifest = parent.manifest
        fields = manifest.model_dump(mode="json", exclude={"model", "golden", "schema_version"}, exclude_none=True)
        fields |= {
            "name": HALF,
            "opset": manifest.model.opset,
            "tolerance": HALF_TOLERANCE,
            "golden_labels": [manifest.labels[int(row.argmax())] for row in found],
        }
        return write_bundle(target, fields, graph, golden, found)


def _golden_names(bundle: Bundle) -> list[str]:
    return [Path(image.file).name for image in bundle.manifest.golden.images]


def resident(session: ClassifierSession, device: str, rows: int, seconds: float) -> float:
    """Return images a second of batches whose input and output stay in the device's memory."""
    ort = runtime.load()
    place = "cpu" if device == "cpu" else "cuda"
    binding = session._session.io_binding()
    shape = session.inputs[0].shape[1:]
    pixels = np.random.default_rng(0).integers(0, 256, (rows, *shape), np.uint8)
    binding.bind_ortvalue_input(session.inputs[0].name, ort.OrtValue.ortvalue_from_numpy(pixels, place, 0))
    binding.bind_output(session.outputs[0].name, place)
    for _ in range(3):
        session._session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        session._session.run_with_iobinding(binding)
        count += 1
    binding.synchronize_outputs()
    return rows * count / elapsed


def ceiling(bench: Bench) -> None:
    """Measure the device alone."""
    providers: list[Device] = [bench.device] if bench.device == "cpu" else ["cuda", "tensorrt"]
    rates: dict[str, dict[int, float]] = {}
    for provider in providers:
        for bundle in (bench.full, bench.half):
            label = f"{provider}, {bundle.manifest.name}"
            try:
                session = ClassifierSession(bundle.model_path, provider, usable_cpus())
            except Exception as error:  # TensorRT is seldom there
                bench.finding.evidence[f"ceiling: {label}"] = f"left out: {error}"
                continue
            rates[label] = {rows: resident(session, provider, rows, bench.seconds / 2) for rows in SIZES}
            best = max(rates[label].values())
            bench.finding.told(f"ceiling: {label}, best batch", best, "images/s")
            name = bundle.manifest.name
            bench.best[name] = (
                max(bench.best.get(name, 0.0), best) if provider == bench.device else bench.best.get(name, 0.0)
            )
            del session
    bench.finding.evidence["ceiling"] = {
        label: {str(rows): round(rate, 1) for rows, rate in found.items()} for label, found in rates.items()
    }


def tensors(bench: Bench) -> None:
    """Measure raw pixels over binary V2."""
    pixels = decode(IMAGES["web.jpg"](), bench.served.manifest.pixels)
    body, json_length = pack({"image": pixels[None]})
    headers = {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(json_length)}
    with bench.service(bench.served.manifest.name) as service:
        rate = bench.throughput(
            service, f"/v2/models/{bench.served.manifest.name}/infer", body, headers, bench.connections
        )
    bench.finding.told("tensors: requests a second", rate, "requests/s")
    if bench.served.manifest.name in bench.best:
        bench.finding.at_least("tensors: ÷ ceiling of the device", rate / bench.best[bench.served.manifest.name], 0.8)


def photos(bench: Bench) -> None:
    """Measure encoded photos."""
    image = IMAGES["web.jpg"]()
    decoding = decode_ceiling(image, bench.served, bench.seconds)
    with bench.service(bench.served.manifest.name) as service:
        rate = bench.throughput(service, f"/models/{bench.served.manifest.name}/predict", image, {}, bench.connections)
        metrics = service.metrics()
    bench.finding.told("photos: decoded on all processors", decoding, "images/s")
    bench.finding.told("photos: requests a second", rate, "requests/s")
    padding = sum(value for key, value in metrics.items() if key.startswith("convoy_padding_rows_total"))
    images = sum(value for key, value in metrics.items() if key.startswith("convoy_images_total"))
    bench.finding.told("photos: rows of padding ÷ images", padding / max(1.0, images))
    if bench.served.manifest.name in bench.best:
        bound = min(bench.best[bench.served.manifest.name], decoding)
        bench.finding.at_least("photos: ÷ the smaller ceiling, device or decoding", rate / bound, 0.9)


def decode_ceiling(image: bytes, bundle: Bundle, seconds: float) -> float:
    """Return images a second of nothing but decoding, on all processors."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(usable_cpus()) as pool:
        counts = pool.starmap(_decode_for, [(image, bundle.directory, seconds)] * usable_cpus(), chunksize=1)
    return sum(counts)


def _decode_for(image: bytes, directory: Path, seconds: float) -> float:
    recipe = read_bundle(directory).manifest.pixels
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        decode(image, recipe)
        count += 1
    return count / elapsed


def one(bench: Bench) -> None:
    """Measure one photo on an idle service."""
    image = IMAGES["web.jpg"]()
    session = ClassifierSession(bench.served.model_path, bench.device, usable_cpus())
    session.bind(SIZES)
    bare = []
    for _ in range(100):
        started = time.perf_counter()
        session.classify(decode(image, bench.served.manifest.pixels)[None])
        bare.append(time.perf_counter() - started)
    del session
    with bench.service(bench.served.manifest.name, workers=1) as service, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "photo.jpg"
        file.write_bytes(image)
        url = f"{service.url}/models/{bench.served.manifest.name}/predict"
        measure(url, [file], 1, 1)
        found = measure(url, [file], 1, bench.seconds)
    bench.finding.told("one: bare decode and run, p50", statistics.median(bare) * 1000, "ms")
    bench.finding.told("one: bare decode and run, p99", float(np.quantile(bare, 0.99)) * 1000, "ms")
    bench.finding.told("one: served, p50", found.p50_ms, "ms")
    bench.finding.told("one: served, p99", found.p99_ms, "ms")


def peers(bench: Bench) -> None:
    """Measure the servers that others made, on the same graph and device."""
    if not PEERS_PYTHON.exists():
        bench.finding.evidence["peers"] = "left out: there is no environment for them (make bench-peers makes it)"
        return
    image = IMAGES["web.jpg"]()
    label = bench.served.manifest.labels[int(_cpu_answer(bench.served, image).argmax())]
    os.environ[PROVIDER] = "CPUExecutionProvider" if bench.device == "cpu" else "CUDAExecutionProvider"
    rates = {}
    for name in ("litserve", "mosec"):
        launch = peer(name, PEERS_PYTHON, bench.served, Setting(workers=2, batch=32, wait_ms=1), "plain")
        try:
            with peer_serving(launch, [(image, label)]) as url, tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "photo.jpg"
                file.write_bytes(image)
                measure(url, [file], 128, 2, threads=4)
                rates[name] = measure(url, [file], 128, bench.seconds, threads=4).per_s
        except (PeerError, LoadError) as error:
            bench.finding.evidence[f"peers: {name}"] = f"left out: {error}"
    with bench.service(bench.served.manifest.name) as service:
        own = bench.throughput(service, f"/models/{bench.served.manifest.name}/predict", image, {}, bench.connections)
    for name, rate in rates.items():
        bench.finding.told(f"peers: {name}", rate, "requests/s")
    if rates:
        bench.finding.at_least("peers: Convoy ÷ the better", own / max(rates.values()), 2.0)


def _cpu_answer(bundle: Bundle, image: bytes) -> NDArray[np.float32]:
    session = ClassifierSession(bundle.model_path, "cpu", usable_cpus())
    return session.classify(decode(image, bundle.manifest.pixels)[None])[0]


def answers(bench: Bench) -> None:
    """Compare with the CPU."""
    names = ("web.jpg", "web.png", "large.jpg", "phone.jpg")
    for bundle, tf32 in ((bench.full, False), (bench.full, True), (bench.half, True)):
        pixels = np.stack([decode(IMAGES[name](), bundle.manifest.pixels) for name in names])
        expected = ClassifierSession(bundle.model_path, "cpu", usable_cpus()).classify(pixels)
        found = ClassifierSession(bundle.model_path, bench.device, 1, gpu=Cuda(tf32=tf32)).classify(pixels)
        what = f"{bundle.manifest.name}{', TF32' if tf32 and bundle is bench.full else ''}"
        tolerance = bundle.manifest.golden.tolerance
        bench.finding.at_most(f"answers: largest difference, {what}", float(abs(found - expected).max()), tolerance)


def memory(bench: Bench) -> None:
    """Watch the device's memory through changing batches and hot swaps."""
    try:
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception as error:
        bench.finding.evidence["memory"] = f"left out: {error}"
        return
    image = IMAGES["web.jpg"]()
    duration = min(MEMORY_S, bench.seconds * MEMORY_S / 10)
    with tempfile.TemporaryDirectory() as folder:
        models, file = Path(folder) / "models", Path(folder) / "photo.jpg"
        shutil.copytree(CACHE / HALF, models / HALF)
        file.write_bytes(image)
        used: list[int] = []
        with bench.service(HALF, models=models, watch_s=1) as service:
            over = threading.Event()

            def load() -> None:
                connections = 1
                while not over.is_set():
                    connections = connections * 3 % 509 + 1
                    measure(f"{service.url}/models/{HALF}/predict", [file], connections, 5)

            loading = threading.Thread(target=load)
            loading.start()
            started, swapped = time.monotonic(), 0
            while (elapsed := time.monotonic() - started) < duration:
                if elapsed > swapped * duration / (SWAPS + 1) + duration / (SWAPS + 1) and swapped < SWAPS:
                    swapped += 1
                    (models / HALF / "1").touch()
                    manifest = models / HALF / "1" / "model.json"
                    manifest.write_text(manifest.read_text() + "\n")
                used.append(int(pynvml.nvmlDeviceGetMemoryInfo(device).used))
                time.sleep(0.5)
            over.set()
            loading.join()
    third = len(used) // 3
    early, late = statistics.median(used[third // 2 : third]), statistics.median(used[-third // 2 :])
    bench.finding.told("memory: of the device, median of the first third", early / 1e6, "MB")
    bench.finding.at_most(f"memory: growth over {SWAPS} swaps", late / early - 1, MEMORY_GROWTH)


def options(bench: Bench) -> None:
    """Measure what each setting changes, each against the default, with full batches out of ordinary memory."""
    cases: dict[str, tuple[int, Cuda]] = {
        "default": (1, Cuda()),
        "2 sessions": (2, Cuda()),
        "3 sessions": (3, Cuda()),
        "search heuristic": (1, Cuda(search="heuristic")),
        "search default": (1, Cuda(search="default")),
        "NHWC": (1, Cuda(nhwc=True)),
        "without TF32": (1, Cuda(tf32=False)),
        "recorded launches": (1, Cuda(graphs=True)),
        "NHWC, recorded": (1, Cuda(nhwc=True, graphs=True)),
    }
    rows: dict[str, dict[str, float]] = {}
    for bundle in (bench.full, bench.half):
        for label, (count, gpu) in cases.items():
            sessions = [ClassifierSession(bundle.model_path, bench.device, 1, gpu=gpu) for _ in range(count)]
            for session in sessions:
                session.bind(SIZES)
            name = f"{bundle.manifest.name}, {label}"
            rows[name] = {str(size): round(_together(sessions, size, bench.seconds / 4), 1) for size in (1, 8, LARGEST)}
            del sessions, session
    bench.finding.evidence["options"] = rows
    for bundle in (bench.full, bench.half):
        best = max(
            (name for name in rows if name.startswith(f"{bundle.manifest.name},")),
            key=lambda name: rows[name][str(LARGEST)],
        )
        bench.finding.told(
            f"options: best of {bundle.manifest.name}: {best.partition(', ')[2]}", rows[best][str(LARGEST)], "images/s"
        )


def _together(sessions: Sequence[ClassifierSession], rows: int, seconds: float) -> float:
    """Return images a second of several sessions, each on its thread."""
    shape = sessions[0].inputs[0].shape[1:]
    pixels = np.random.default_rng(0).integers(0, 256, (rows, *shape), np.uint8)
    counts = [0] * len(sessions)
    started, until = 0.0, math.inf

    def work(index: int) -> None:
        while time.perf_counter() < until:
            sessions[index].run(pixels)
            counts[index] += 1

    for session in sessions:
        session.run(pixels)
    started = time.perf_counter()
    until = started + seconds
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(sessions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rows * sum(counts) / (time.perf_counter() - started)


PARTS: dict[str, Callable[[Bench], None]] = {
    "ceiling": ceiling,
    "tensors": tensors,
    "photos": photos,
    "one": one,
    "peers": peers,
    "answers": answers,
    "memory": memory,
    "options": options,
}


def device_name(device: Device) -> str:
    """Return the device's name, as it goes into the name of a file."""
    if device == "cpu":
        return "none"
    import pynvml

    pynvml.nvmlInit()
    name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def picture(entry: Mapping[str, Any], file: Path) -> None:
    """Draw the ceiling by batch size, and what was served."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for label, rates in entry["evidence"].get("ceiling", {}).items():
        axes.plot([int(rows) for rows in rates], list(rates.values()), marker="o", label=label)
    for row in entry["rows"]:
        if row["figure"] in ("photos: requests a second", "tensors: requests a second"):
            axes.axhline(row["value"], linestyle="--", linewidth=1, color="grey")
            axes.annotate(row["figure"], (1, row["value"]), fontsize=8, va="bottom")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("images in a batch")
    axes.set_ylabel("images/s")
    axes.set_title(f"ResNet-50 on {entry['device']}")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "tensorrt", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=int, default=10, help="of each measurement")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="instead of benchmarks/results/gpu-<device>.json")
    chosen = parser.parse_args()
    require_wrk()
    name = device_name(chosen.device)
    output = chosen.output or RESULTS / f"gpu-{name}.json"
    if chosen.device == "cpu" and chosen.output is None:
        parser.error("--device cpu is for a look: say with --output where its figures go, which are no GPU's")
    bench = Bench(chosen.device, chosen.seconds)
    console = Console(highlight=False)
    entry: dict[str, Any] = {}
    failed = False
    for part in chosen.only:
        console.print(f"[dim]{part} …")
        try:
            PARTS[part](bench)
        except (LoadError, RuntimeError, OSError) as error:
            bench.finding.evidence[part] = f"left out: {error}"
            failed = True
        entry = {
            "date": time.strftime("%Y-%m-%d"),
            "device": name,
            "machine": machine(),
            "onnxruntime": runtime.load().__version__,
            "skipped": "",
            "rows": [asdict(row) for row in bench.finding.rows],
            "evidence": bench.finding.evidence,
        }
        output.write_text(json.dumps(entry, indent=2, ensure_ascii=False) + "\n")  # a later part may fail
    picture(entry, output.with_suffix(".png"))
    console.print(table({"gpu": entry}))
    return int(failed or any(row.met is False for row in bench.finding.rows))


if __name__ == "__main__":
    sys.exit(main())
