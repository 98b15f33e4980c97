"""The bare loop of decode, resize and session run on every usable processor: what no service over it can beat by much.

Without HTTP and without batches: one session of one thread per processor, one image at a time. Small models are held
up by Python's lock in threads, so processes are measured too, and the better of both is the ceiling.
"""

import multiprocessing
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, Self

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
    rates = []
    for in_processes in (False, True):
        with BareLoop(bundle, images, in_processes=in_processes) as loop:
            rates.append(loop.measure(seconds))
    threads, processes = rates
    return Ceiling(threads, processes, loop.workers, len(loop.images))


class BareLoop:
    """The loop in threads or processes that stay, in a `with` block, so that it can be measured again and again."""

    def __init__(self, bundle: Bundle, images: Sequence[bytes], *, in_processes: bool) -> None:
        forbid_pillow_guesses()
        self.workers = usable_cpus()
        self.images = _within(images, MOST_BYTES)
        """Which of the images are taken, in turn."""
        self._pool: Executor
        if in_processes:
            spawn = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
            adopted = (spawn.Barrier(self.workers), bundle, self.images)
            self._pool = ProcessPoolExecutor(self.workers, spawn, initializer=_adopt, initargs=adopted)
        else:
            barrier = threading.Barrier(self.workers)
            self._pool = ThreadPoolExecutor(self.workers, initializer=_adopt, initargs=(barrier, bundle, self.images))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def measure(self, seconds: float, warm_up_s: float = WARM_UP_S) -> float:
        """Return images per second, counted for so many seconds; blocks.

        Raises:
            BadImageError, TooLargeError: an image cannot be decoded.
            BundleError: the graph cannot be loaded.
        """
        counts = [self._pool.submit(_count, seconds, warm_up_s) for _ in range(self.workers)]
        return round(sum(count.result() for count in counts) / seconds, 2)


def _within(images: Sequence[bytes], most_bytes: int) -> list[bytes]:
    taken = [images[0]]
    for image in images[1:]:
        most_bytes -= len(image)
        if most_bytes < 0:
            break
        taken.append(image)
    return taken


_here = threading.local()


def _adopt(barrier: _Barrier, bundle: Bundle, images: list[bytes]) -> None:
    _here.barrier, _here.bundle, _here.images, _here.session = barrier, bundle, images, None


def _count(seconds: float, warm_up_s: float) -> int:
    """Return how many images this worker classified in `seconds`, all workers starting together.

    The barrier also sees to it that every worker of the pool takes exactly one such task.
    """
    images, recipe = _here.images, _here.bundle.manifest.pixels
    if _here.session is None:
        _here.session = ClassifierSession(_here.bundle.model_path, "cpu", 1)
    session = _here.session
    for image in images[:8]:
        session.classify(decode(image, recipe)[None])
    _here.barrier.wait(START_TIMEOUT_S)
    begin = time.monotonic() + warm_up_s
    count = 0
    while True:
        for image in images:
            session.classify(decode(image, recipe)[None])
            now = time.monotonic()
            if now >= begin + seconds:
                return count
            count += now >= begin
