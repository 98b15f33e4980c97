"""Answers on the command line from a running service: what `offline.py` gives, through the Python client."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import convoy
from app.errors import BadRequestError, ConvoyError, UnavailableError, UnknownModelError
from app.offline import Answer
from app.scores import Score

REQUESTS_AT_ONCE = 16
"""One image each, so that a bad one fails alone; the service makes batches of them."""
RETRIES = 8
"""Files wait longer than people do."""

_OF_ONE_FILE = (convoy.BadImageError, convoy.TooLargeError, convoy.ServerError, convoy.DeadlineError)


class RemoteClassifier:
    """One model of a service, to classify files with."""

    def __init__(self, url: str, name: str | None, api_key: str | None) -> None:
        """Ask the service for the model `name` (None: its default one).

        Raises:
            BadRequestError: the URL or the key is none, or the service refuses.
            UnknownModelError: there is no such model.
            UnavailableError: the service does not answer.
        """
        try:
            with convoy.Client(url, api_key=api_key) as client:
                self._model = client.model(name) if name else _default_of(client.models())
            self._client = convoy.Client(url, api_key=api_key, model=self._model.name, retries=RETRIES)
        except convoy.ConvoyError as fault:
            raise _told(fault) from fault
        except ValueError as error:
            raise BadRequestError(str(error)) from None

    def classify(self, paths: Iterable[Path], k: int) -> Iterator[Answer]:
        """Yield the answer for each file, in order, several being under way at once.

        Raises:
            ConvoyError: the service is gone, or refuses whatever is asked.
        """
        top_k = min(k, self._model.classes) if self._model.classes else None
        with self._client, ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            yield from pool.map(lambda path: self._classify_one(path, top_k), paths)

    def _classify_one(self, path: Path, top_k: int | None) -> Answer:
        try:
            found = self._client.predict(path, top_k)
        except _OF_ONE_FILE as fault:
            return Answer(path, (), fault.sentence)
        except convoy.ConvoyError as fault:
            raise _told(fault) from fault
        return Answer(path, [Score(entry.label, entry.index, entry.probability) for entry in found.top])


def _default_of(models: Sequence[convoy.Model]) -> convoy.Model:
    for model in models:
        if model.default:
            return model
    names = ", ".join(model.name for model in models)
    raise UnknownModelError(f"No model is the default one of the service: give --model, one of {names}.")


def _told(fault: convoy.ConvoyError) -> ConvoyError:
    """Return the client's fault as one of the command's."""
    if isinstance(fault, convoy.UnknownModelError):
        return UnknownModelError(fault.sentence)
    kind = BadRequestError if isinstance(fault, convoy.RequestError) else UnavailableError
    return kind(fault.sentence)
