"""The bare loop of decode, resize and session run on every usable processor: what no service over it can beat by much.

Without HTTP and without batches: one session of one thread per processor, one image at a time. Small models are held
up by Python's lock in threads, so processes are measured too, and the better of both is the ceiling.
"""

import multiprocessing
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from app.cpus import usable_cpus
from app.images import decode, forbid_pillow_guesses
from app.manifest import Bundle
from app.sessions import ClassifierSession

WARM_UP_S = 0.5
START_TIMEOUT_S = 60.0
MOST_BYTES = 64_000_000
"""Of images that are taken: every process gets a copy."""


class _Barrier(Protocol):
    def wait(self, timeout: float | None = None) -> int: ...


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Images per second of the bare loop."""

    threads_per_s: float
    processes_per_s: float
    workers: int
    images: int
    """How many of the images were taken, in turn."""

    @property
    def images_per_s(self) -> float:
        """The better of both."""
        return max(self.threads_per_s, self.processes_per_s)


def measure_ceiling(bundle: Bundle, images: Sequence[bytes], seconds: float) -> Ceiling:
    """Measure threads, then processes, for so many seconds each; blocks.

    Raises:
        BadImageError, TooLargeError: an image cannot be decoded.
        BundleError: the graph cannot be loaded.
    """
    forbid_pillow_guesses()
    workers = usable_cpus()
    taken = _within(images, MOST_BYTES)
    threads = ThreadPoolExecutor(workers, initializer=_adopt, initargs=(threading.Barrier(workers),))
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
    processes = ProcessPoolExecutor(workers, spawn, initializer=_adopt, initargs=(spawn.Barrier(workers),))
    rates = []
    for pool in (threads, processes):
        with pool:
            counts: list[Future[int]] = [pool.submit(_count, bundle, taken, seconds) for _ in range(workers)]
            rates.append(round(sum(count.result() for count in counts) / seconds, 2))
    in_threads, in_processes = rates
    return Ceiling(in_threads, in_processes, workers, len(taken))


def _within(images: Sequence[bytes], most_bytes: int) -> list[bytes]:
    taken = [images[0]]
    for image in images[1:]:
        most_bytes -= len(image)
        if most_bytes < 0:
            break
        taken.append(image)
    return taken


_here = threading.local()


def _adopt(barrier: _Barrier) -> None:
    _here.barrier = barrier


def _count(bundle: Bundle, images: Sequence[bytes], seconds: float) -> int:
    """Return how many images this worker classified in `seconds`, all workers starting together.

    The barrier also sees to it that every worker of the pool takes exactly one such task.
    """
    session = ClassifierSession(bundle.model_path, "cpu", 1)
    recipe = bundle.manifest.pixels
    for image in images[:8]:
        session.classify(decode(image, recipe)[None])
    _here.barrier.wait(START_TIMEOUT_S)
    begin = time.monotonic() + WARM_UP_S
    count = 0
    while True:
        for image in images:
            session.classify(decode(image, recipe)[None])
            now = time.monotonic()
            if now >= begin + seconds:
                return count
            count += now >= begin
