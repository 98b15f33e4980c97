"""`convoy.AsyncClient`: the shell that does what the core says, on asyncio's loop, several requests at once."""

import asyncio
import os
import ssl
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import httpx

from convoy.core import (
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    MAX_BODY_BYTES,
    MAX_IMAGES_PER_REQUEST,
    Ask,
    Core,
    Lost,
    Options,
    Outcome,
    Reply,
    Send,
    Sleep,
    Steps,
    base_headers,
    from_environment,
    in_order,
    only_predictions,
)
from convoy.errors import ConvoyError
from convoy.images import ImageLike, encoded
from convoy.results import Model, Prediction, Readiness
from convoy.wire import lost, pool, prepared, trusts_environment

if TYPE_CHECKING:  # at run time it is the caller's to load
    from numpy.typing import NDArray

T = TypeVar("T")

DEFAULT_CONCURRENCY = 4


class AsyncClient:
    """A service to ask from asyncio. Connections are kept for the next call; any number of tasks may share a client."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        max_images_per_request: int = MAX_IMAGES_PER_REQUEST,
        max_body_bytes: int = MAX_BODY_BYTES,
        concurrency: int = DEFAULT_CONCURRENCY,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Prepare a client; nothing is sent. `concurrency` requests of one call are under way at once at most.

        All other arguments are those of `convoy.Client`.

        Raises:
            ValueError: one of these is impossible.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency cannot be {concurrency}: at least 1.")
        self._core = Core(
            url,
            model=model,
            timeout_s=timeout_s,
            retries=retries,
            max_images_per_request=max_images_per_request,
            max_body_bytes=max_body_bytes,
        )
        self._http = httpx.AsyncClient(
            headers=base_headers(api_key),
            verify=verify,
            transport=transport,
            limits=pool(),
            trust_env=trusts_environment(self._core.url),
        )
        self._concurrency = concurrency
        self._sleep = asyncio.sleep

    @classmethod
    def from_environment(cls, **options: Any) -> Self:
        """Make a client for the service of `CONVOY_URL` with the key in `CONVOY_API_KEY`; options win over both."""
        return cls(**(from_environment(os.environ) | options))

    async def predict(self, image: ImageLike, top_k: int | None = None, **options: Unpack[Options]) -> Prediction:
        """Classify one image; arguments and errors are those of `Client.predict`."""
        ask = self._core.ask(top_k, **options)
        data = image if isinstance(image, bytes) and image else await asyncio.to_thread(encoded, image)
        return await self._run(self._core.predict(data, ask))

    async def predict_many(
        self, images: Iterable[ImageLike], top_k: int | None = None, **options: Unpack[Options]
    ) -> list[Prediction]:
        """Classify any number of images, in as many requests as it takes, up to `concurrency` of them at once.

        Arguments, result and errors are those of `Client.predict_many`. `images` is read in threads, one image at a
        time, so that neither files nor PNG encoding hold up the loop.
        """
        found = await self._many(images, self._core.ask(top_k, **options), keep_faults=False)
        return only_predictions(found)

    async def predict_each(
        self, images: Iterable[ImageLike], top_k: int | None = None, **options: Unpack[Options]
    ) -> list[Prediction | ConvoyError]:
        """Classify any number of images, as `predict_many`, and leave an error in the place of each that is refused."""
        return await self._many(images, self._core.ask(top_k, **options), keep_faults=True)

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, "NDArray[Any]"],
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        priority: int | None = None,
    ) -> dict[str, "NDArray[Any]"]:
        """Run a model on tensors; arguments, result and errors are those of `Client.infer`."""
        ask = self._core.ask_tensors(model, version, deadline_s, priority)
        return await self._run(self._core.infer(inputs, ask))

    async def models(self) -> list[Model]:
        """Return the models of the service, in whatever state; errors are those of `Client.models`."""
        return await self._run(self._core.models())

    async def model(self, name: str) -> Model:
        """Return one model, with its manifest if it is loaded; errors are those of `Client.model`."""
        return await self._run(self._core.model(name))

    async def ready(self) -> Readiness:
        """Return whether the service wants traffic, and why not; raises nothing, tries once."""
        return await self._run(self._core.ready())

    async def live(self) -> bool:
        """Return whether the service's process answers; raises nothing, tries once."""
        return await self._run(self._core.live())

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _many(
        self, images: Iterable[ImageLike], ask: Ask, *, keep_faults: bool
    ) -> list[Prediction | ConvoyError]:
        parts = self._core.parts(images, keep_faults=keep_faults)
        turn = asyncio.Lock()
        found: dict[int, Prediction | ConvoyError] = {}

        async def work() -> None:
            while True:
                async with turn:
                    part = await asyncio.to_thread(next, parts, None)
                if part is None:
                    return
                found.update(await self._run(self._core.predict_part(part, ask, keep_faults=keep_faults)))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as faults:
            raise faults.exceptions[0] from None
        return in_order(found)

    async def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if isinstance(step, Sleep):
                await self._sleep(step.seconds)
                outcome = None
            else:
                outcome = await self._send(step)

    async def _send(self, step: Send) -> Reply | Lost:
        try:
            async with asyncio.timeout(step.timeout_s):
                response = await self._http.request(**prepared(self._core.url, step, self._core.clock))
            return Reply(response.status_code, response.headers, response.content)
        except TimeoutError:
            return Lost("", late=True)
        except httpx.RequestError as error:
            return lost(error)
