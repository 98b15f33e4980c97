"""The device without a service: its ceiling, what its answers differ by, and what each setting changes."""

import math
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app import runtime
from app.cpus import usable_cpus
from app.cuda import Cuda
from app.golden import prove
from app.images import decode
from app.manifest import Bundle, Manifest, read_bundle, read_manifest
from app.sessions import ClassifierSession, Device
from app.tensorrt import Engines
from benchmarks.gpu.bench import LARGEST, SIZES, Bench
from benchmarks.peers.scenarios import IMAGES, ROOT

RANDOM_TOLERANCE = 0.1
"""What the golden sets of random weights allow (`benchmarks/networks.py`)."""
WARM_RUNS = 4
"""Kernels are chosen in the first; launches are recorded after that, and replayed."""
SIZES_OF_OPTIONS = (1, 8, 32, LARGEST)
SIZES_OF_A_LOOK = (1, 8)
"""On a processor, where nothing is found but whether it runs."""
GAIN, LOSS = 1.05, 0.97
"""A setting is recommended that gains so much over all sizes and loses no more at any; less is noise."""


def ceiling(bench: Bench) -> None:
    """Measure batches that lie in the device's memory, for each size, precision and provider."""
    rates: dict[str, dict[str, float]] = {}
    for provider, bundle, gpu in _ceilings(bench):
        label = f"{provider}, {bundle.manifest.name}{', TF32' if gpu.tf32 else ''}"
        rates[label] = {}
        try:
            session = ClassifierSession(bundle.model_path, provider, usable_cpus(), Engines(LARGEST), gpu)
        except Exception as error:  # TensorRT is seldom there
            bench.finding.left_out(label, error)
            continue
        for rows in SIZES:
            try:
                rates[label][str(rows)] = round(resident(session, provider, rows, bench.seconds / 2), 1)
            except Exception as error:
                bench.finding.left_out(f"{label}, {rows} rows", error)
        del session
        if rates[label]:
            bench.finding.told(f"{label}, best batch", max(rates[label].values()), "images/s")
        bench.finding.evidence["best"] = _best(bench, rates)
        bench.finding.evidence["images_per_s"] = {label: found for label, found in rates.items() if found}
        bench.finding.note(label, rates[label])
    if not any(rates.values()):
        raise RuntimeError(NOTHING)


def _ceilings(bench: Bench) -> Iterator[tuple[Device, Bundle, Cuda]]:
    if bench.device == "cpu":
        yield from (("cpu", bundle, Cuda()) for bundle in bench.bundles)
        return
    for provider in ("cuda", "tensorrt"):
        for bundle in reversed(bench.bundles):
            yield provider, bundle, Cuda()
        if provider == "cuda":  # TensorRT's is decided when its libraries are loaded, once for the process
            yield provider, bench.bundles[0], Cuda(tf32=True)


def _best(bench: Bench, rates: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the best rate of each model where it is served from, with the settings that it is served with."""
    names = [bundle.manifest.name for bundle in bench.bundles]
    return {name: max(found.values()) for name in names if (found := rates.get(f"{bench.device}, {name}"))}


def resident(session: ClassifierSession, device: str, rows: int, seconds: float) -> float:
    """Return images a second of batches whose input and output stay in the device's memory."""
    ort = runtime.load()
    place = "cpu" if device == "cpu" else "cuda"
    binding = session._session.io_binding()
    pixels = _pixels(session, rows)
    binding.bind_ortvalue_input(session.inputs[0].name, ort.OrtValue.ortvalue_from_numpy(pixels, place, 0))
    binding.bind_output(session.outputs[0].name, place)
    for _ in range(WARM_RUNS):
        session._session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        session._session.run_with_iobinding(binding)
        count += 1
    binding.synchronize_outputs()
    return rows * count / max(elapsed, time.perf_counter() - started)


def _pixels(session: ClassifierSession, rows: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (rows, *session.inputs[0].shape[1:]), np.uint8)


def answers(bench: Bench) -> None:
    """Compare with the processor, and the trained bundles with their golden answers."""
    # TensorRT's TF32 is decided once for the process.
    ways = [Cuda()] if bench.device == "tensorrt" else [Cuda(), Cuda(tf32=True)]
    cases = [(bundle, Cuda()) for bundle in bench.bundles] + [(bench.bundles[0], gpu) for gpu in ways[1:]]
    for bundle, gpu in cases:
        label = f"{bundle.manifest.name}{', TF32' if gpu.tf32 else ''}"
        try:
            _compare(bench, bundle, gpu, label)
        except Exception as error:
            bench.finding.left_out(label, error)
    for directory in sorted((ROOT / "models").glob("*/[0-9]*")):
        for gpu in ways:
            _prove(bench, directory, gpu)
    if not bench.finding.rows:
        raise RuntimeError(NOTHING)


def _compare(bench: Bench, bundle: Bundle, gpu: Cuda, label: str) -> None:
    """Tell the largest difference of a probability from the float32 network on the processor, and from this graph."""
    pixels = np.stack([decode(make(), bundle.manifest.pixels) for make in IMAGES.values()])
    found = ClassifierSession(bundle.model_path, bench.device, 1, gpu=gpu).classify(pixels)
    true = ClassifierSession(bench.bundles[0].model_path, "cpu", usable_cpus()).classify(pixels)
    difference = _worst(found, true)
    bench.finding.at_most(f"largest difference from float32 on the processor, {label}", difference, RANDOM_TOLERANCE)
    bench.finding.told(f"same label, {label}, of {len(pixels)} images", int((_labels(found) == _labels(true)).sum()))
    if bundle is not bench.bundles[0]:
        same = ClassifierSession(bundle.model_path, "cpu", usable_cpus()).classify(pixels)
        bench.finding.told(f"largest difference from the same graph on the processor, {label}", _worst(found, same))
    session = ClassifierSession(bundle.model_path, bench.device, 1, gpu=gpu)
    bench.finding.told(f"golden answers of random weights differ by, {label}", prove(bundle, session.classify))


def _prove(bench: Bench, directory: Path, gpu: Cuda) -> None:
    """Tell by how much a trained bundle's golden answers differ; in float32 they must come out."""
    label = f"{directory.parent.name}{', TF32' if gpu.tf32 else ''}"
    try:
        if not isinstance(read_manifest(directory), Manifest):
            return
        bundle = read_bundle(directory)
        session = ClassifierSession(bundle.model_path, bench.device, 1, gpu=gpu)
        pixels = np.stack([decode(data, bundle.manifest.pixels) for data in bundle.golden_bytes()])
        difference = _worst(session.classify(pixels), bundle.golden_probabilities())
    except Exception as error:
        bench.finding.left_out(f"golden answers, {label}", error)
        return
    tolerance = bundle.manifest.golden.tolerance
    if gpu.tf32:
        bench.finding.told(f"golden answers differ by, {label}, where {tolerance:g} is allowed", difference)
    else:
        bench.finding.at_most(f"golden answers differ by, {label}", difference, tolerance)


def _worst(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max())


def _labels(probabilities: NDArray[np.float32]) -> NDArray[np.intp]:
    indices: NDArray[np.intp] = probabilities.argmax(axis=1)
    return indices


@dataclass(frozen=True, slots=True)
class Case:
    """A way to run sessions: so many, so told, over buffers that stay or over arrays."""

    sessions: int = 1
    gpu: Cuda = field(default_factory=Cuda)
    buffers: bool = True


CASES: dict[str, Case] = {
    "default": Case(),
    "without buffers": Case(buffers=False),
    "2 sessions": Case(2),
    "3 sessions": Case(3),
    "NHWC": Case(gpu=Cuda(nhwc=True)),
    "recorded launches": Case(gpu=Cuda(graphs=True)),
    "search heuristic": Case(gpu=Cuda(search="heuristic")),
    "search default": Case(gpu=Cuda(search="default")),
    "TF32": Case(gpu=Cuda(tf32=True)),
    "NHWC, recorded": Case(gpu=Cuda(nhwc=True, graphs=True)),
    "2 sessions, NHWC": Case(2, Cuda(nhwc=True)),
}
NOTHING = "Nothing runs on this device; why is told of each."
Rates = Mapping[str, float]
"""Images a second, by rows of a batch."""


def options(bench: Bench) -> None:
    """Measure what each setting changes, as the service runs it: rows of single requests, joined into a batch."""
    if bench.device == "tensorrt":
        raise RuntimeError("These are settings of CUDA; TensorRT would build engines for each of them.")
    rows: dict[str, dict[str, Rates]] = {}
    bench.finding.evidence["images_per_s"] = rows
    # A recording that goes wrong may be the end of all CUDA in this process.
    for recorded in (False, True):
        for bundle in reversed(bench.bundles):
            name = bundle.manifest.name
            cases = {label: case for label, case in CASES.items() if case.gpu.graphs == recorded}
            rows[name] = rows.get(name, {}) | _options_of(bench, bundle, cases)
            if rows[name]:
                bench.finding.note(f"recommended for {name}", recommended(rows[name]))
    if not any(rows.values()):
        raise RuntimeError(NOTHING)


def _options_of(bench: Bench, bundle: Bundle, cases: Mapping[str, Case]) -> dict[str, Rates]:
    """Return images a second by rows, of each case that runs."""
    found: dict[str, Rates] = {}
    for label, case in cases.items():
        told = f"{bundle.manifest.name}, {label}"
        try:
            found[label], first_s = _case(bench, bundle, case)
        except Exception as error:
            bench.finding.left_out(told, error)
            continue
        rows, rate = list(found[label].items())[-1]
        bench.finding.told(f"{told}, batch of {rows}", rate, "images/s")
        bench.finding.note(told, {**found[label], "first runs of all sizes, s": first_s})
    return found


def _case(bench: Bench, bundle: Bundle, case: Case) -> tuple[Rates, float]:
    """Return images a second by rows, and how many seconds all first runs took."""
    engines = Engines(LARGEST)
    sessions = [ClassifierSession(bundle.model_path, bench.device, 1, engines, case.gpu) for _ in range(case.sessions)]
    if case.buffers:
        for session in sessions:
            session.bind(SIZES)
    sizes = SIZES_OF_A_LOOK if bench.device == "cpu" else SIZES_OF_OPTIONS
    with Runners(sessions) as runners:
        started = time.perf_counter()
        for rows in sizes:
            runners.warm(rows)
        first_s = time.perf_counter() - started
        rates = {str(rows): round(runners.rate(rows, bench.seconds / 4), 1) for rows in sizes}
    return rates, round(first_s, 2)


class Runners:
    """Sessions, each on a thread of its own from its first run to its last: recordings belong to their thread."""

    def __init__(self, sessions: Sequence[ClassifierSession]) -> None:
        self._sessions = sessions
        self._threads = [ThreadPoolExecutor(1) for _ in sessions]

    def __enter__(self) -> "Runners":
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.shutdown()

    def warm(self, rows: int) -> None:
        """Run a size as often as it takes to be at its best, one session after the other."""
        for session, thread in zip(self._sessions, self._threads, strict=True):
            thread.submit(_run_for, session, rows, 0.0, WARM_RUNS).result()

    def rate(self, rows: int, seconds: float) -> float:
        """Return images a second of all sessions together."""
        together = threading.Barrier(len(self._sessions))

        def work(session: ClassifierSession) -> tuple[int, float]:
            together.wait(60)
            return _run_for(session, rows, seconds, 1)

        running = [thread.submit(work, session) for session, thread in zip(self._sessions, self._threads, strict=True)]
        found = [each.result() for each in running]
        return sum(rows * count / elapsed for count, elapsed in found)


def _run_for(session: ClassifierSession, rows: int, seconds: float, least: int) -> tuple[int, float]:
    """Run batches for so long and so often, at least; return how many, and in how many seconds."""
    parts: list[tuple[Any, ...]] = [(row[None],) for row in _pixels(session, rows)]
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or count < least:
        session.run(*session.join(parts))
        count += 1
    return count, elapsed


def recommended(found: Mapping[str, Rates]) -> dict[str, str]:
    """Return, for each setting, what to have as its default by a table of rates, and what it gains over the other.

    Args:
        found: by the names in `CASES`; one that is missing is not recommended.
    """
    if "default" not in found:
        return {"all": "nothing can be said: the default could not be measured"}
    gains = {label: _gain(rates, found["default"]) for label, rates in found.items()}

    def best(*labels: str, otherwise: str) -> str:
        likely = [label for label in labels if label in gains and gains[label][0] >= GAIN and gains[label][1] >= LOSS]
        chosen = max(likely, key=lambda label: gains[label][0], default=otherwise)
        told = ", ".join(f"{label} ×{gains[label][0]:.2f}" for label in labels if label in gains)
        return f"{chosen} ({told or 'not measured'})"

    return {
        "sessions": best("2 sessions", "3 sessions", otherwise="1 session"),
        "search": best("search heuristic", "search default", otherwise="exhaustive"),
        "nhwc": best("NHWC", otherwise="off"),
        "tf32": best("TF32", otherwise="off") + "; only where golden answers still come out",
        "graphs": best("recorded launches", otherwise="off"),
        "buffers": best("without buffers", otherwise="on"),
    }


def _gain(rates: Rates, base: Rates) -> tuple[float, float]:
    """Return the geometric mean of the ratios over all sizes, and the least of them."""
    ratios = [rates[size] / base[size] for size in base if size in rates and base[size]]
    if not ratios:
        return math.nan, math.nan
    return statistics.geometric_mean(ratios), min(ratios)
