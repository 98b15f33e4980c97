"""The engine: the way of one request through the stages.

`Engine` is the seam between every front (HTTP, gRPC) and the work, in sessions of this process or in engines. Owns the
decode pool and what happens between a request's bytes and its probabilities; how much may be inside is
`admission.py`'s. Knows nothing of HTTP.
"""

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from app.admission import Admission
from app.cpus import step_back
from app.errors import ConvoyError, TooLargeError
from app.images import count_pixels, decode, decode_into
from app.loading import LoadedModel
from app.manifest import PixelRecipe
from app.repository import Repository
from app.runs import DEFAULT_URGENCY, Job, Room
from app.tensors import Array
from app.tickets import Ticket

INLINE_BYTES = 4096
INLINE_PIXELS = 128 * 128


@dataclass(slots=True)
class Stages:
    """Time that one request spent in each stage, seconds."""

    decode_s: float = 0.0
    queue_s: float = 0.0
    infer_s: float = 0.0


@dataclass(slots=True)
class Prediction:
    """The answer to one request: float32 `[n, classes]`, in the order of its images."""

    model: LoadedModel
    probabilities: NDArray[np.float32]
    stages: Stages


@dataclass(slots=True)
class Inference:
    """The answer to one request of tensors: an array per output of the model, in its order."""

    model: LoadedModel
    outputs: tuple[Array, ...]
    stages: Stages


Tell = Callable[[Prediction | Exception], None]
GiveUp = Callable[[], None]


class Engine(Protocol):
    """What a front may ask for."""

    def model(self, name: str | None, version: str | None = None) -> LoadedModel:
        """Return a model that takes work.

        Args:
            name: the model's; None: the default one.
            version: None: the one that is served to whoever does not ask for one.

        Raises:
            UnknownModelError: there is no such model, or version.
            UnavailableError: it is loading, or it failed to load.
        """
        ...

    def admit(self, model: LoadedModel, deadline: float, urgency: int = DEFAULT_URGENCY) -> Ticket:
        """Let one request come in, or turn it away at the door.

        Args:
            model: from `model()`.
            deadline: `time.monotonic()` after which the answer is worthless, seconds.
            urgency: 0 (first) to 7 (last), as in the header `Priority: u=3`.

        Returns:
            The request's stay, to be used in a `with` block around all that it does.

        Raises:
            QueueFullError: it could not be served in time, or the model is overloaded.
        """
        ...

    async def classify(self, model: LoadedModel, images: Sequence[bytes], ticket: Ticket) -> Prediction:
        """Decode and classify encoded images.

        Args:
            model: from `model()`.
            images: encoded images, at least one.
            ticket: the request's own, whose block this runs in.

        Returns:
            Probabilities in the order of the images.

        Raises:
            BadRequestError: the model takes tensors, not images.
            QueueFullError: the images do not fit in.
            BadImageError, TooLargeError: an image is refused; with several images the sentence names its index.
            InferenceError: the session failed on these images.
        """
        ...

    def begin(self, model: LoadedModel, image: bytes, ticket: Ticket, tell: Tell) -> GiveUp:
        """Do what `classify` does with one image, without a task to wait in.

        Args:
            model: from `model()`.
            image: an encoded image.
            ticket: the request's own, open.
            tell: called once with the prediction, or what went wrong; never before this returns.

        Returns:
            What gives the image up, after which nobody is told.

        Raises:
            As `classify`, of what can be told at once.
        """
        ...

    def begin_pixels(self, model: LoadedModel, pixels: NDArray[np.uint8], ticket: Ticket, tell: Tell) -> GiveUp:
        """Do what `begin` does with images that are decoded: uint8 `[n, height, width, 3]`."""
        ...

    async def infer(self, model: LoadedModel, inputs: Sequence[Array], ticket: Ticket) -> Inference:
        """Run tensors through a model.

        Args:
            model: from `model()`.
            inputs: an array per input of the model, in its order, of its datatype and a shape that it takes. Where the
                model batches, all have the same first dimension, at least 1.
            ticket: the request's own, whose block this runs in.

        Returns:
            An array per output, in the model's order.

        Raises:
            QueueFullError: the rows do not fit in.
            InferenceError: the session failed on these rows.
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
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode", initializer=step_back)

    def model(self, name: str | None, version: str | None = None) -> LoadedModel:
        """See `Engine.model`."""
        return self._repository.get(name, version)

    def admit(self, model: LoadedModel, deadline: float, urgency: int = DEFAULT_URGENCY) -> Ticket:
        """See `Engine.admit`."""
        lane = self._admission.lane(model.metrics)
        lane.knock(model.batcher.parallel, deadline, urgency)
        return Ticket(self._admission, lane, deadline, urgency)

    async def classify(self, model: LoadedModel, images: Sequence[bytes], ticket: Ticket) -> Prediction:
        """See `Engine.classify`."""
        if ticket.marks is not None:
            ticket.marks.asked_at = time.monotonic()
        recipe = model.classifier.pixels
        ticket.hold_images(len(images))
        ticket.stage = "decode"
        stages = Stages()
        started = time.monotonic()
        pixels, room = _decode_small(images, recipe), None
        if pixels is None:
            room = await self._decode(model, images, ticket)
            pixels = room.pixels
        stages.decode_s = time.monotonic() - started
        model.metrics.decode.observe(stages.decode_s)
        looked_at = pixels.copy() if model.sampler is not None and model.sampler.take(started) else None
        outputs = await self._run(model, (pixels,), len(images), None, ticket, stages, room)
        if looked_at is not None and model.sampler is not None:
            model.sampler.look(looked_at, _probabilities(outputs), images)
        return Prediction(model, _probabilities(outputs), stages)

    async def infer(self, model: LoadedModel, inputs: Sequence[Array], ticket: Ticket) -> Inference:
        """See `Engine.infer`."""
        if ticket.marks is not None:
            ticket.marks.asked_at = time.monotonic()
        rows = len(inputs[0]) if model.max_batch else 1
        ticket.hold_images(rows)
        stages = Stages()
        outputs = await self._run(model, tuple(inputs), rows, model.kind_of(inputs), ticket, stages)
        if model.sampler is not None and model.sampler.take(time.monotonic()):
            model.sampler.look(cast("NDArray[np.uint8]", inputs[0]), _probabilities(outputs), None)
        return Inference(model, outputs, stages)

    def begin(self, model: LoadedModel, image: bytes, ticket: Ticket, tell: Tell) -> GiveUp:
        """See `Engine.begin`."""
        if ticket.marks is not None:
            ticket.marks.asked_at = time.monotonic()
        recipe = model.classifier.pixels
        ticket.hold_images(1)
        ticket.stage = "decode"
        started = time.monotonic()
        pixels = _decode_small([image], recipe)
        sampled = [image] if model.sampler is not None and model.sampler.take(started) else None
        if pixels is not None:
            return _submit(model, pixels, ticket, tell, Stages(time.monotonic() - started), sampled).give_up
        ticket.hold_pixels(count_pixels(image, self._max_image_pixels))
        room = model.batcher.room((1, recipe.height, recipe.width, 3))
        decoding = self._decoders.submit(decode_into, room.pixels[0], image, recipe, self._max_image_pixels)
        return _Decoding(model, ticket, tell, decoding, room, started, sampled).give_up

    def begin_pixels(self, model: LoadedModel, pixels: NDArray[np.uint8], ticket: Ticket, tell: Tell) -> GiveUp:
        """See `Engine.begin_pixels`."""
        if ticket.marks is not None:
            ticket.marks.asked_at = time.monotonic()
        ticket.hold_images(len(pixels))
        return _submit(model, pixels, ticket, tell, Stages()).give_up

    def close(self) -> None:
        """Stop the decode pool; a decode that runs cannot be interrupted, and is not waited for."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def _decode(self, model: LoadedModel, images: Sequence[bytes], ticket: Ticket) -> Room:
        """Decode all images in the pool; on cancellation those that have not started never do."""
        recipe = model.classifier.pixels
        for index, image in enumerate(images):
            try:
                pixels = count_pixels(image, self._max_image_pixels)
            except ConvoyError as error:
                raise _naming(error, index, images) from None
            ticket.hold_pixels(pixels)
        room = model.batcher.room((len(images), recipe.height, recipe.width, 3))
        running = [
            self._decoders.submit(decode_into, row, image, recipe, self._max_image_pixels)
            for row, image in zip(room.pixels, images, strict=True)
        ]
        try:
            ended = await asyncio.gather(*map(asyncio.wrap_future, running), return_exceptions=True)
        except asyncio.CancelledError:
            _keep_counting(running, ticket, room)
            raise
        ticket.give_back_pixels()
        try:
            for index, fault in enumerate(ended):
                if isinstance(fault, ConvoyError):
                    raise _naming(fault, index, images)
                if fault is not None:
                    raise fault
        except BaseException:
            room.let_go()
            raise
        finally:  # an error holds this frame, which must not hold the error: only collecting garbage would end that
            del fault
            ended.clear()
            running.clear()
        return room

    async def _run(
        self,
        model: LoadedModel,
        inputs: tuple[Array, ...],
        rows: int,
        kind: Hashable,
        ticket: Ticket,
        stages: Stages,
        room: Room | None = None,
    ) -> tuple[Array, ...]:
        ticket.stage = "queue"
        answer: asyncio.Future[tuple[Array, ...]] = asyncio.get_running_loop().create_future()
        if ticket.marks is not None:
            ticket.marks.queue(stages.decode_s)
        try:
            job = model.batcher.submit(inputs, rows, ticket.deadline, ticket.urgency, kind, answer, ticket.marks, room)
        except ConvoyError:
            if room is not None:
                room.let_go()
            raise
        try:
            outputs = await answer
        finally:
            stages.queue_s, stages.infer_s = job.queued_s, job.infer_s
            if job.waiting_rows:
                model.batcher.abandon(job)
            if job.taken:  # only now: until it was abandoned, a session may have taken it
                ticket.stage = "infer"
            del answer, job  # an error that comes out of them holds this frame
        _count(model, stages, rows)
        return outputs


class _Decoding:
    """An image in the decode pool, for whom no task waits; decoded, it goes on to the model by itself."""

    __slots__ = (
        "_decoding",
        "_give_back",
        "_loop",
        "_model",
        "_room",
        "_sampled",
        "_started",
        "_tell",
        "_ticket",
        "_waiting",
    )

    def __init__(
        self,
        model: LoadedModel,
        ticket: Ticket,
        tell: Tell,
        decoding: Future[None],
        room: Room,
        started: float,
        sampled: Sequence[bytes] | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._model = model
        self._ticket = ticket
        self._tell: Tell | None = tell
        self._decoding: Future[None] | None = decoding
        self._room = room
        self._started = started
        self._sampled = sampled
        self._waiting: _Waiting | None = None
        self._give_back: Callable[[], None] | None = None
        decoding.add_done_callback(self._cross)

    def give_up(self) -> None:
        """Wait no longer; an image whose decoding cannot be interrupted is counted until that has ended."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.give_up()
            return
        self._tell = None
        if self._decoding is not None and not self._decoding.cancel():
            self._give_back = self._ticket.lend_image()

    def _cross(self, _: Future[None]) -> None:
        """Go on from the pool's thread to the event loop."""
        with suppress(RuntimeError):  # the loop is closed: the service has stopped
            self._loop.call_soon_threadsafe(self._go_on)

    def _go_on(self) -> None:
        """Hand the pixels to the model, or tell what is wrong with the image."""
        tell, self._tell = self._tell, None
        decoding, self._decoding = self._decoding, None  # which holds this as whom to call, and so would stay
        if self._give_back is not None:
            self._give_back()
        if tell is None or decoding is None:
            self._room.let_go()  # only now: a decoder that could not be interrupted has written into it
            return
        self._ticket.give_back_pixels()
        stages = Stages(time.monotonic() - self._started)
        error = decoding.exception()
        if error is None:
            try:
                pixels = self._room.pixels
                self._waiting = _submit(self._model, pixels, self._ticket, tell, stages, self._sampled, self._room)
                return
            except Exception as fault:  # the loop, which called, has nobody to tell
                error = fault
        self._room.let_go()
        tell(cast(Exception, error))
        del error  # raised here, it holds this frame


def _submit(
    model: LoadedModel,
    pixels: NDArray[np.uint8],
    ticket: Ticket,
    tell: Tell,
    stages: Stages,
    sampled: Sequence[bytes] | None = None,
    room: Room | None = None,
) -> "_Waiting":
    ticket.stage = "queue"
    waiting = _Waiting(model, ticket, tell, stages, None if sampled is None else (pixels.copy(), sampled))
    if ticket.marks is not None:
        ticket.marks.queue(stages.decode_s)
    waiting.job = model.batcher.submit(
        (pixels,), len(pixels), ticket.deadline, ticket.urgency, None, waiting, ticket.marks, room
    )
    return waiting


class _Waiting:
    """Images on their way through a model, for whom no task waits: the batcher answers it as it answers a future."""

    __slots__ = ("_model", "_sampled", "_stages", "_tell", "_ticket", "job")

    job: Job | None

    def __init__(
        self,
        model: LoadedModel,
        ticket: Ticket,
        tell: Tell,
        stages: Stages,
        sampled: tuple[NDArray[np.uint8], Sequence[bytes]] | None,
    ) -> None:
        self._model = model
        self._sampled = sampled
        self._ticket = ticket
        self._tell: Tell | None = tell
        self._stages = stages

    def done(self) -> bool:
        """Tell whether nobody waits any more."""
        return self._tell is None

    def set_result(self, outputs: tuple[Array, ...], /) -> None:
        """Tell the prediction."""
        stages, job = self._stages, self.job
        assert job is not None, "it was submitted, and nothing told yet"
        stages.queue_s, stages.infer_s = job.queued_s, job.infer_s
        self._model.metrics.decode.observe(stages.decode_s)
        _count(self._model, stages, job.rows)
        self._end(Prediction(self._model, _probabilities(outputs), stages))
        if self._sampled is not None and self._model.sampler is not None:
            pixels, images = self._sampled
            self._model.sampler.look(pixels, _probabilities(outputs), images)

    def set_exception(self, error: Exception, /) -> None:
        """Tell what went wrong."""
        self._end(error)

    def give_up(self) -> None:
        """Wait no longer."""
        job = self.job
        self._tell = self.job = None
        if job is not None:
            if job.waiting_rows:
                self._model.batcher.abandon(job)
            if job.taken:  # only now: until it was abandoned, a session may have taken it
                self._ticket.stage = "infer"

    def _end(self, result: Prediction | Exception) -> None:
        tell = self._tell
        assert tell is not None, "nobody is told twice"
        self._tell = self.job = None  # a job and who waits for it hold each other
        tell(result)


def _probabilities(outputs: tuple[Array, ...]) -> NDArray[np.float32]:
    """Return a classifier's first output."""
    return cast("NDArray[np.float32]", outputs[0])


def _count(model: LoadedModel, stages: Stages, rows: int) -> None:
    """Count rows that have their answer, and the time that they took."""
    metrics = model.metrics
    metrics.queue.observe(stages.queue_s)
    metrics.infer.observe(stages.infer_s)
    metrics.images.inc(rows)


def _decode_small(images: Sequence[bytes], recipe: PixelRecipe) -> NDArray[np.uint8] | None:
    """Decode one small image at once, on the event loop: uint8 `[1, height, width, 3]`. None: it is not small.

    To hand a 32×32 JPEG to a thread and back costs more than to decode it, and the interpreter lock more yet.
    """
    if len(images) > 1 or len(images[0]) > INLINE_BYTES:
        return None
    try:
        return decode(images[0], recipe, max_pixels=INLINE_PIXELS)[None]
    except TooLargeError:  # few bytes may hold many pixels
        return None


def _naming(error: ConvoyError, index: int, images: Sequence[bytes]) -> ConvoyError:
    """Return the error, told for one of several images."""
    return error if len(images) == 1 else error.prefixed(f"images[{index}]")


def _keep_counting(given_up: Sequence[Future[None]], ticket: Ticket, room: Room) -> None:
    """Count images that nobody waits for until their decoding, which cannot be interrupted, has ended.

    Only after the last of them has ended is their room free.
    """
    loop = asyncio.get_running_loop()
    running = [future for future in given_up if future.running()]
    left = len(running)

    def ended(give_back: Callable[[], None]) -> None:
        nonlocal left
        give_back()
        left -= 1
        if not left:
            room.let_go()

    if not running:
        room.let_go()
    for future in running:
        give_back = ticket.lend_image()

        def tell(_: Future[None], give_back: Callable[[], None] = give_back) -> None:
            with suppress(RuntimeError):  # the loop is closed: the service has stopped
                loop.call_soon_threadsafe(ended, give_back)

        future.add_done_callback(tell)
