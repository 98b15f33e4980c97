"""The engine: how much work may be inside, until when, and the way of one request through the stages.

`Engine` is the seam between every front (HTTP now, gRPC and front processes later) and the work. Owns admission,
deadlines and the decode pool; knows nothing of HTTP.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from app.errors import ConvoyError, DeadlineError, QueueFullError, TooLargeError
from app.images import decode
from app.manifest import PixelRecipe
from app.metrics import Metrics
from app.repository import LoadedModel, Repository

INLINE_BYTES = 4096
INLINE_PIXELS = 128 * 128
RATE_WINDOW_S = 5.0
MAX_RETRY_AFTER_S = 30


@dataclass(slots=True)
class Stages:
    """Time that one request spent in each stage, seconds, and the stage that it is in."""

    now_in: str = "decode"
    decode_s: float = 0.0
    queue_s: float = 0.0
    infer_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one request: float32 `[n, classes]`, in the order of its images."""

    model: LoadedModel
    probabilities: NDArray[np.float32]
    stages: Stages


class DrainRate:
    """Images finished per second, weighted towards the last few seconds."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._at = time.monotonic()

    def add(self, images: int) -> None:
        """Count images that were just finished."""
        self._rate = self.per_second() + images / RATE_WINDOW_S
        self._at = time.monotonic()

    def per_second(self) -> float:
        """Return the rate now; it fades while nothing finishes."""
        return self._rate * math.exp((self._at - time.monotonic()) / RATE_WINDOW_S)


class Admission:
    """The one bounded resource: images and body bytes inside. Used on the event loop only."""

    def __init__(self, max_images: int, max_bytes: int, metrics: Metrics) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self._images, self._shown_images = 0, metrics.inflight_images
        self._bytes, self._shown_bytes = 0, metrics.inflight_bytes
        self.rate = DrainRate()

    @property
    def images(self) -> int:
        """Images inside."""
        return self._images

    @images.setter
    def images(self, count: int) -> None:
        self._images = count
        self._shown_images.set(count)

    @property
    def bytes(self) -> int:
        """Bytes of request bodies inside."""
        return self._bytes

    @bytes.setter
    def bytes(self, count: int) -> None:
        self._bytes = count
        self._shown_bytes.set(count)

    def give_back(self, images: int) -> None:
        """Let go of images that were held without a ticket."""
        self.images -= images

    def retry_after_s(self) -> int:
        """Return how long it takes to drain what is inside at the measured rate, whole seconds from 1 to 30."""
        rate = self.rate.per_second()
        # After a long silence the rate is so small that the quotient may be infinite: bound it before rounding.
        seconds = min(MAX_RETRY_AFTER_S, self.images / rate) if rate > 0 else 1
        return max(1, math.ceil(seconds))


class Ticket:
    """What one request holds of the admission; given back when the `with` block ends."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.images = 0
        self.bytes = 0

    def expect_bytes(self, count: int) -> None:
        """Check that `count` more bytes of body would fit now, without holding them: announced is not sent.

        Raises:
            QueueFullError: they do not fit.
        """
        admission = self._admission
        if admission.bytes + count > admission.max_bytes:
            raise QueueFullError(
                "The service is full: it holds as many bytes of images as it may.",
                retry_after_s=admission.retry_after_s(),
            )

    def hold_bytes(self, count: int) -> None:
        """Hold `count` more bytes of body.

        Raises:
            QueueFullError: they do not fit.
        """
        self.expect_bytes(count)
        self._admission.bytes += count
        self.bytes += count

    def hold_images(self, count: int) -> None:
        """Hold `count` images.

        Raises:
            QueueFullError: they do not fit.
        """
        admission = self._admission
        if admission.images + count > admission.max_images:
            raise QueueFullError(
                f"The service is full: {admission.images} images are inside, {admission.max_images} may be.",
                retry_after_s=admission.retry_after_s(),
            )
        admission.images += count
        self.images += count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._admission.images -= self.images
        self._admission.bytes -= self.bytes
        if kind is None and self.images:
            self._admission.rate.add(self.images)


class Engine(Protocol):
    """What a front may ask for."""

    def model(self, name: str | None) -> LoadedModel:
        """Return a model that takes work, or raise UnknownModelError or UnavailableError; None: the default one."""
        ...

    def admit(self) -> Ticket:
        """Return a ticket for one request, to be used in a `with` block."""
        ...

    async def classify(
        self, model: LoadedModel, images: Sequence[bytes], deadline: float, ticket: Ticket
    ) -> Prediction:
        """Decode and classify encoded images.

        Args:
            model: from `model()`.
            images: encoded images, at least one.
            deadline: `time.monotonic()` after which the answer is worthless, seconds.
            ticket: the request's own.

        Returns:
            Probabilities in the order of the images.

        Raises:
            QueueFullError: the images do not fit in.
            BadImageError, TooLargeError: an image is refused; with several images the sentence names its index.
            DeadlineError: the deadline passed first.
            InferenceError: the session failed on these images.
        """
        ...


class LocalEngine:
    """The engine inside this process: a decode pool and the repository's batchers."""

    def __init__(
        self, repository: Repository, admission: Admission, *, decode_threads: int, max_image_pixels: int
    ) -> None:
        self._repository = repository
        self._admission = admission
        self._max_image_pixels = max_image_pixels
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")

    def model(self, name: str | None) -> LoadedModel:
        """See `Engine.model`."""
        return self._repository.get(name)

    def admit(self) -> Ticket:
        """See `Engine.admit`."""
        return Ticket(self._admission)

    async def classify(
        self, model: LoadedModel, images: Sequence[bytes], deadline: float, ticket: Ticket
    ) -> Prediction:
        """See `Engine.classify`."""
        ticket.hold_images(len(images))
        stages = Stages()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                pixels = await self._decode(model, images, stages)
                probabilities = await self._infer(model, pixels, deadline, stages)
        except TimeoutError:
            model.metrics.dropped(stages.now_in, "deadline")
            raise DeadlineError(f"The deadline passed in the stage '{stages.now_in}'.") from None
        except asyncio.CancelledError:
            model.metrics.dropped(stages.now_in, "disconnected")
            raise
        observe(model, stages, len(images))
        return Prediction(model, probabilities, stages)

    def close(self) -> None:
        """Stop the decode pool; a decode that runs cannot be interrupted, and is not waited for."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def _decode(self, model: LoadedModel, images: Sequence[bytes], stages: Stages) -> NDArray[np.uint8]:
        """Decode all images in the pool; on cancellation those that have not started never do."""
        started = time.monotonic()
        recipe = model.manifest.pixels
        if len(images) == 1 and (small := _decode_small(images[0], recipe)) is not None:
            stages.decode_s = time.monotonic() - started
            return small[None]
        running = [self._decoders.submit(decode, image, recipe, self._max_image_pixels) for image in images]
        try:
            decoded = await asyncio.gather(*map(asyncio.wrap_future, running), return_exceptions=True)
        except asyncio.CancelledError:
            self._keep_counting(running)
            raise
        stages.decode_s = time.monotonic() - started
        for index, result in enumerate(decoded):
            if isinstance(result, ConvoyError):
                raise result if len(images) == 1 else result.prefixed(f"images[{index}]")
            if isinstance(result, BaseException):
                raise result
        return np.stack(decoded)  # type: ignore[arg-type]  # no exception is left in it

    def _keep_counting(self, given_up: Sequence[Future[NDArray[np.uint8]]]) -> None:
        """Count images that nobody waits for until their decoding, which cannot be interrupted, has ended."""
        loop, admission = asyncio.get_running_loop(), self._admission

        def give_back(_: Future[NDArray[np.uint8]]) -> None:
            with suppress(RuntimeError):  # the loop is closed: the service has stopped
                loop.call_soon_threadsafe(admission.give_back, 1)

        for future in given_up:
            if future.running():
                admission.images += 1
                future.add_done_callback(give_back)

    async def _infer(
        self, model: LoadedModel, pixels: NDArray[np.uint8], deadline: float, stages: Stages
    ) -> NDArray[np.float32]:
        stages.now_in = "queue"
        job = model.batcher.submit(pixels, deadline)
        try:
            return await job.answer
        finally:
            stages.queue_s, stages.infer_s = job.queued_s, job.infer_s
            if job.taken:
                stages.now_in = "infer"
            model.batcher.abandon(job)


def _decode_small(image: bytes, recipe: PixelRecipe) -> NDArray[np.uint8] | None:
    """Decode a small image at once, on the event loop; None: it is not small.

    A 32×32 JPEG takes 0.1 ms; to hand it to a thread and back costs as much again, and the interpreter lock more.
    """
    if len(image) > INLINE_BYTES:
        return None
    try:
        return decode(image, recipe, max_pixels=INLINE_PIXELS)
    except TooLargeError:  # few bytes may hold many pixels
        return None


def observe(model: LoadedModel, stages: Stages, images: int) -> None:
    """Show a finished request's stages and images in the model's metrics."""
    metrics = model.metrics
    metrics.decode.observe(stages.decode_s)
    metrics.queue.observe(stages.queue_s)
    metrics.infer.observe(stages.infer_s)
    metrics.images.inc(images)
