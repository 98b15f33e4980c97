"""`convoy.Client`: the shell that does what the core says, in the calling thread."""

import os
import ssl
import time
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


class Client:
    """A service to ask. Connections are kept for the next call; any number of threads may share one client."""

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
        verify: ssl.SSLContext | bool = True,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Prepare a client; nothing is sent. No environment variable of Convoy is read: see `from_environment`.

        Args:
            url: where the service is: scheme, host, port, and the path of a proxy before it.
            model: who answers where a call names no model; None: the service's default model.
            api_key: sent as `Authorization: Bearer`.
            timeout_s: of each request with its retries, seconds; a call's `deadline_s` can shorten it.
            retries: of a request, where the service is full or stopping, or the connection broke.
            max_images_per_request: the service's limit; more images are split into several requests.
            max_body_bytes: the service's limit for all images of a request together.
            verify: how TLS certificates are checked; a context of `ssl` brings an authority of your own.
            transport: httpx's, in place of its usual one: a test's, or a Unix socket's.

        Raises:
            ValueError: one of these is impossible.
        """
        self._core = Core(
            url,
            model=model,
            timeout_s=timeout_s,
            retries=retries,
            max_images_per_request=max_images_per_request,
            max_body_bytes=max_body_bytes,
        )
        self._http = httpx.Client(
            headers=base_headers(api_key),
            verify=verify,
            transport=transport,
            limits=pool(),
            trust_env=trusts_environment(self._core.url),
        )
        self._sleep = time.sleep

    @classmethod
    def from_environment(cls, **options: Any) -> Self:
        """Make a client for the service of `CONVOY_URL` with the key in `CONVOY_API_KEY`; options win over both."""
        return cls(**(from_environment(os.environ) | options))

    def predict(self, image: ImageLike, top_k: int | None = None, **options: Unpack[Options]) -> Prediction:
        """Classify one image.

        Args:
            image: a path, encoded bytes, a binary file, a Pillow image, or uint8 `[height, width, 3]`.
            top_k: how many classes, at most the model's; None: five, or as many as there are.
            **options: `model`, `version`, `deadline_s` and `priority`, as in `convoy.core.Options`.

        Raises:
            ConvoyError: no prediction was to be had; its class says why.
            ValueError, TypeError: an argument is impossible.
        """
        ask = self._core.ask(top_k, **options)
        return self._run(self._core.predict(encoded(image), ask))

    def predict_many(
        self, images: Iterable[ImageLike], top_k: int | None = None, **options: Unpack[Options]
    ) -> list[Prediction]:
        """Classify any number of images, in as many requests as it takes, one after the other.

        Args:
            images: each as `predict` takes it; read only when its request is due, so a generator will do.
            top_k: as in `predict`.
            **options: as in `predict`; `deadline_s` is for the whole call.

        Returns:
            one prediction for each image, in order.

        Raises:
            ConvoyError: as `predict`; its `index` is that of the image, if it is about one.
            ValueError, TypeError: an argument is impossible.
        """
        found = self._many(images, self._core.ask(top_k, **options), keep_faults=False)
        return only_predictions(found)

    def predict_each(
        self, images: Iterable[ImageLike], top_k: int | None = None, **options: Unpack[Options]
    ) -> list[Prediction | ConvoyError]:
        """Classify any number of images, as `predict_many`, and leave an error in the place of each that is refused.

        That is an image that cannot be read or decoded, or is too large. Whatever else fails is raised.
        """
        return self._many(images, self._core.ask(top_k, **options), keep_faults=True)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, "NDArray[Any]"],
        version: str | None = None,
        *,
        deadline_s: float | None = None,
        priority: int | None = None,
    ) -> dict[str, "NDArray[Any]"]:
        """Run a model on tensors, over the Open Inference Protocol, with binary tensors both ways.

        Args:
            model: its name: any model of the service, whether it knows images and labels or not.
            inputs: an array for each input of the model, by name; strings as an array of objects, `str` or `bytes`.
            version: which version; None: the active one.
            deadline_s: as in `predict`.
            priority: as in `predict`.

        Returns:
            an array for each output, by name; the elements of strings are `bytes`.

        Raises:
            ConvoyError: they were not to be had; its class says why.
            ValueError, TypeError: an argument is impossible.
        """
        ask = self._core.ask_tensors(model, version, deadline_s, priority)
        return self._run(self._core.infer(inputs, ask))

    def models(self) -> list[Model]:
        """Return the models of the service, in whatever state.

        Raises:
            ConvoyError: they cannot be had.
        """
        return self._run(self._core.models())

    def model(self, name: str) -> Model:
        """Return one model, with its manifest if it is loaded.

        Raises:
            UnknownModelError: there is none of that name.
            ConvoyError: it cannot be had.
        """
        return self._run(self._core.model(name))

    def ready(self) -> Readiness:
        """Return whether the service wants traffic, and why not; raises nothing, tries once."""
        return self._run(self._core.ready())

    def live(self) -> bool:
        """Return whether the service's process answers; raises nothing, tries once."""
        return self._run(self._core.live())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _many(self, images: Iterable[ImageLike], ask: Ask, *, keep_faults: bool) -> list[Prediction | ConvoyError]:
        found: dict[int, Prediction | ConvoyError] = {}
        for part in self._core.parts(images, keep_faults=keep_faults):
            found |= self._run(self._core.predict_part(part, ask, keep_faults=keep_faults))
        return in_order(found)

    def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if isinstance(step, Sleep):
                self._sleep(step.seconds)
                outcome = None
            else:
                outcome = self._send(step)

    def _send(self, step: Send) -> Reply | Lost:
        until = self._core.clock() + step.timeout_s
        try:
            with self._http.stream(**prepared(self._core.url, step, self._core.clock)) as response:
                body = bytearray()
                for piece in response.iter_bytes():
                    body += piece
                    if self._core.clock() > until:  # httpx times single reads: pieces could drip for ever
                        return Lost("", late=True)
                return Reply(response.status_code, response.headers, bytes(body))
        except httpx.RequestError as error:
            return lost(error)
