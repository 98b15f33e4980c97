"""How fast graphs answer, measured in turns so that their ratio holds on a machine that does other work too.

Owns stopwatch and sessions of the measurement, which are those of the service: sessions of one thread, as many as
there are processors, and small batches. Knows nothing of accuracy, bundles or training.
"""

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app import runtime
from app.cpus import usable_cpus
from app.manifest import INPUT_NAME, OUTPUT_NAME

BATCH = 8
ROUNDS = 5
TURN_S = 0.5
"""Of one model's latency or throughput; three models take a quarter of a minute in all."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Of ONNX Runtime alone, without HTTP or decoding; medians over the rounds."""

    latency_ms: float
    """One image, one session of one thread."""
    images_per_s: float
    """Batches of 8, on a CPU one session of one thread for each processor, on a GPU one session."""
    provider: str


def measure_in_turns(models: Sequence[Path], images: NDArray[np.uint8]) -> list[Speed]:
    """Measure several graphs on the same images, one after the other in every round.

    Args:
        models: ONNX files from `image` to `probabilities`.
        images: uint8 `[n, height, width, 3]`, of which the first 8 are taken, again and again where there are fewer.
    """
    batch = np.ascontiguousarray(np.resize(images[:BATCH], (BATCH, *images.shape[1:])))
    alike = [_Sessions(model, batch) for model in models]
    latencies: list[list[float]] = [[] for _ in models]
    rates: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS):
        for place, sessions in enumerate(alike):
            latencies[place].append(sessions.latency_ms(TURN_S))
            rates[place].append(sessions.images_per_s(TURN_S))
    return [
        Speed(statistics.median(latency), statistics.median(rate), sessions.provider)
        for latency, rate, sessions in zip(latencies, rates, alike, strict=True)
    ]


class _Sessions:
    """One graph, loaded as the service would load it, and warm."""

    def __init__(self, model: Path, batch: NDArray[np.uint8]) -> None:
        first = _session(model)
        self.provider: str = first.get_providers()[0]
        more = 0 if self.provider.startswith("CUDA") else usable_cpus() - 1
        self._sessions = [first, *(_session(model) for _ in range(more))]
        self._batch = batch
        for session in self._sessions:
            self._run(session, batch)
        self._run(first, batch[:1])

    def latency_ms(self, seconds: float) -> float:
        """Return the median time of one image."""
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while not taken or time.perf_counter() < end:
            begun = time.perf_counter()
            self._run(self._sessions[0], self._batch[:1])
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken) * 1e3

    def images_per_s(self, seconds: float) -> float:
        """Return the rate of all sessions at once."""
        done = [0] * len(self._sessions)
        begun = time.perf_counter()

        def work(place: int) -> None:
            while not done[place] or time.perf_counter() < begun + seconds:
                self._run(self._sessions[place], self._batch)
                done[place] += len(self._batch)

        threads = [threading.Thread(target=work, args=(place,)) for place in range(len(done))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done) / (time.perf_counter() - begun)

    @staticmethod
    def _run(session: Any, images: NDArray[np.uint8]) -> None:
        session.run([OUTPUT_NAME], {INPUT_NAME: images})


def _session(model: Path) -> Any:
    ort = runtime.load()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A wheel with CUDA names it on machines that have none, and falls back: what was got is asked of the session.
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in ort.get_available_providers()]
    return ort.InferenceSession(str(model), options, providers=providers)
