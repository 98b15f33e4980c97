"""What client and service say to each other, without sending anything.

Each operation is a generator: it yields what to do (`Send`, `Sleep`), is told what came of it, and returns its result.
The two shells, `client.py` and `aio.py`, only do. So every rule stands here, and once: paths and headers, how long a
call may take, what is tried again and when, and what an answer means. Knows neither sockets nor threads nor asyncio.
"""

import json
import random
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar, Unpack
from urllib.parse import quote, urlencode, urlsplit

from convoy.errors import (
    BadAnswerError,
    BadImageError,
    ConvoyError,
    DeadlineError,
    TooLargeError,
    UnreachableError,
    kind_of,
    place_of,
)
from convoy.images import ImageLike, Part, is_single, split
from convoy.results import (
    Model,
    Prediction,
    Readiness,
    read_model,
    read_models,
    read_predictions,
    read_readiness,
)
from convoy.tensors import LENGTH_HEADER, pack, unpack

if TYPE_CHECKING:  # at run time it is the caller's to load
    from numpy.typing import NDArray

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 30.0
DEFAULT_RETRIES = 3
MAX_IMAGES_PER_REQUEST = 64
MAX_BODY_BYTES = 32_000_000
"""The service's own defaults."""
URL_VARIABLE, KEY_VARIABLE = "CONVOY_URL", "CONVOY_API_KEY"

RETRIED = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE})
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Before the first retry where the service does not say when to come back; doubled each time up to the longest."""
PROBE_TIMEOUT_S = 5.0
MAX_TIMEOUT_MS = 86_400_000
ENVELOPE_BYTES = 256
"""More than a form adds to an image, and than its end adds to the body."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """What goes over the wire, beside what is the same for every request of a client."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Send:
    """Send the request and wait for its whole answer, for so long in all; the outcome is a `Reply` or `Lost`."""

    request: Request
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait; there is no outcome."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; names of headers are looked up in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """No whole answer came; `late`: because the time was up."""

    reason: str
    late: bool = False


Outcome: TypeAlias = Reply | Lost | None
Steps: TypeAlias = Generator[Send | Sleep, Outcome, T]


class Options(TypedDict, total=False):
    """What may be said of a prediction beside its images and `top_k`."""

    model: str | None
    """Who answers; left out: the client's model, or else the service's default one."""
    version: str | None
    """Which version of that model; left out: the active one."""
    deadline_s: float | None
    """How long the call may take in all, retries included; the service is told what is left of it."""
    priority: int | None
    """0 is first, 7 last, 3 usual; 0 to 2 pass an overload, so they are for what people wait for."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of images: by which model, how many classes, until when (clock time, seconds), how urgently."""

    path: str
    headers: Mapping[str, str]
    deadline: float | None


class Core:
    """One service, and the rules of talking to it; shared by any number of threads and tasks."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        max_images_per_request: int = MAX_IMAGES_PER_REQUEST,
        max_body_bytes: int = MAX_BODY_BYTES,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Check what a client was given: see `convoy.Client`. `clock` is in seconds, `jitter` gives 0 to 1.

        Raises:
            ValueError: the URL is none, or a number is impossible.
        """
        self.url = _checked_url(url)
        for name, value, least in (
            ("retries", retries, 0),
            ("max_images_per_request", max_images_per_request, 1),
            ("max_body_bytes", max_body_bytes, 1),
        ):
            if value < least:
                raise ValueError(f"{name} cannot be {value}: at least {least}.")
        self._model = model
        self._timeout_s = _checked_seconds("timeout_s", timeout_s)
        self._retries = retries
        self._max_images = max_images_per_request
        self._max_bytes = max_body_bytes
        self.clock = clock
        self.jitter = jitter

    def ask(self, top_k: int | None = None, **options: Unpack[Options]) -> Ask:
        """Return the question that a prediction's arguments make; its deadline counts from now.

        Raises:
            ValueError: an argument is impossible.
        """
        model, version = options.pop("model", None), options.pop("version", None)
        deadline_s, priority = options.pop("deadline_s", None), options.pop("priority", None)
        if options:
            raise TypeError(f"There is no option {', '.join(options)}: there are {', '.join(Options.__annotations__)}.")
        model = model or self._model
        if version is not None and not model:
            raise ValueError(f"version = {version!r} needs a model: the default one may change.")
        path = f"{_path_of(model, version)}/predict" if model else "/predict"
        if top_k is not None:
            if top_k < 1:
                raise ValueError(f"top_k cannot be {top_k}: at least one class is asked for.")
            path += "?" + urlencode({"top_k": top_k})
        return self._ask(path, deadline_s, priority)

    def ask_tensors(self, model: str, version: str | None, deadline_s: float | None, priority: int | None) -> Ask:
        """Return the question that the arguments of an inference make; its deadline counts from now.

        Raises:
            ValueError: an argument is impossible.
        """
        return self._ask(f"/v2{_path_of(model, version)}/infer", deadline_s, priority)

    def parts(self, images: Iterable[ImageLike], *, keep_faults: bool) -> Iterator[Part]:
        """Yield the images of a call in parts of one request each; see `convoy.images.split`."""
        if is_single(images):
            raise TypeError("Several images are a list, or an array [images, height, width, 3]; for one, call predict.")
        return split(
            images, self._max_images, self._max_bytes - ENVELOPE_BYTES, ENVELOPE_BYTES, keep_faults=keep_faults
        )

    def predict(self, image: bytes, ask: Ask) -> Steps[Prediction]:
        """Ask about one encoded image.

        Raises:
            ConvoyError: no prediction was to be had.
        """
        (prediction,) = yield from self._predict([image], ask)
        return prediction

    def predict_part(self, part: Part, ask: Ask, *, keep_faults: bool) -> Steps[dict[int, Prediction | ConvoyError]]:
        """Ask about the images of a part; return what came of each, by its place in the call.

        Raises:
            ConvoyError: no predictions were to be had; where faults are kept, only for a reason beside the images.
        """
        found: dict[int, Prediction | ConvoyError] = dict(part.faults)
        if part.images:
            found |= yield from self._predict_among(part.images, ask, keep_faults)
        return found

    def infer(self, inputs: Mapping[str, "NDArray[Any]"], ask: Ask) -> "Steps[dict[str, NDArray[Any]]]":
        """Ask for the outputs of a model of tensors.

        Raises:
            ConvoyError: they were not to be had.
            TypeError, ValueError: an input cannot be sent.
        """
        body, json_length = pack(inputs)
        headers = {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(json_length)}
        reply = yield from self._exchange(Request("POST", ask.path, {**ask.headers, **headers}, body), ask.deadline)

        def read() -> "dict[str, NDArray[Any]]":
            return unpack(reply.body, int(reply.headers.get(LENGTH_HEADER.lower(), len(reply.body))))

        return self._read(reply, read)

    def models(self) -> Steps[list[Model]]:
        """Ask which models there are."""
        reply = yield from self._exchange(Request("GET", "/models"), None)
        return self._read(reply, lambda: read_models(_json(reply)))

    def model(self, name: str) -> Steps[Model]:
        """Ask about one model."""
        reply = yield from self._exchange(Request("GET", f"/models/{quote(name, safe='')}"), None)
        return self._read(reply, lambda: read_model(_json(reply)))

    def ready(self) -> Steps[Readiness]:
        """Ask once whether the service wants traffic; that nobody answers is an answer too."""
        outcome = yield Send(Request("GET", "/readyz"), PROBE_TIMEOUT_S)
        if not isinstance(outcome, Reply):
            return Readiness(False, self._fault(outcome).sentence)
        if outcome.status not in (HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE):
            return Readiness(False, self._fault(outcome).sentence)
        try:
            return self._read(outcome, lambda: read_readiness(_json(outcome)))
        except BadAnswerError as fault:
            return Readiness(False, fault.sentence)

    def live(self) -> Steps[bool]:
        """Ask once whether the process answers."""
        outcome = yield Send(Request("GET", "/livez"), PROBE_TIMEOUT_S)
        return isinstance(outcome, Reply) and outcome.status == HTTPStatus.OK

    def _ask(self, path: str, deadline_s: float | None, priority: int | None) -> Ask:
        headers = {}
        if priority is not None:
            if priority not in range(8):
                raise ValueError(f"priority cannot be {priority}: 0 is first, 7 is last.")
            headers["Priority"] = f"u={priority}"
        deadline = None if deadline_s is None else self.clock() + _checked_seconds("deadline_s", deadline_s)
        return Ask(path, headers, deadline)

    def _predict_among(
        self, images: Sequence[tuple[int, bytes]], ask: Ask, keep_faults: bool
    ) -> Steps[dict[int, Prediction | ConvoyError]]:
        """Ask about images that may be refused together; halve what is too large, or what hides the guilty one."""
        try:
            predictions = yield from self._predict([data for _, data in images], ask)
        except (BadImageError, TooLargeError) as fault:
            refused = fault
        else:
            return {index: prediction for (index, _), prediction in zip(images, predictions, strict=True)}
        if len(images) > 1 and (keep_faults or isinstance(refused, TooLargeError)):
            middle = len(images) // 2
            first = yield from self._predict_among(images[:middle], ask, keep_faults)
            return first | (yield from self._predict_among(images[middle:], ask, keep_faults))
        place = 0 if len(images) == 1 else place_of(refused.sentence)
        if place is not None and place < len(images):
            refused = refused.of_image(images[place][0], among=True)
        if keep_faults:
            return {images[0][0]: refused}
        raise refused

    def _predict(self, images: Sequence[bytes], ask: Ask) -> Steps[list[Prediction]]:
        content_type, body = ("application/octet-stream", images[0]) if len(images) == 1 else _form(images)
        request = Request("POST", ask.path, {**ask.headers, "Content-Type": content_type}, body)
        reply = yield from self._exchange(request, ask.deadline)
        return self._read(reply, lambda: read_predictions(_json(reply), reply.headers, len(images)))

    def _exchange(self, request: Request, deadline: float | None) -> Steps[Reply]:
        """Send a request until it is answered, for as long and as often as the client may.

        Asking twice changes nothing in the service, so whatever broke before its answer was whole is sent again.

        Raises:
            ConvoyError: the fault of the last attempt.
        """
        until = self.clock() + self._timeout_s
        if deadline is not None:
            until = min(until, deadline)
        fault: ConvoyError | None = None
        retry = 0
        while (left_s := until - self.clock()) > 0:
            timeout_ms = min(MAX_TIMEOUT_MS, max(1, int(left_s * 1000)))
            timed = replace(request, headers={**request.headers, "Timeout-Ms": str(timeout_ms)})
            outcome = yield Send(timed, left_s)
            if isinstance(outcome, Reply) and outcome.status == HTTPStatus.OK:
                return outcome
            fault = self._fault(outcome)
            pause_s = self._pause_s(fault, retry)
            if not _is_passing(fault) or retry >= self._retries or self.clock() + pause_s >= until:
                raise fault
            retry += 1
            yield Sleep(pause_s)
        raise fault or self._fault(Lost("", late=True))

    def _pause_s(self, fault: ConvoyError, retry: int) -> float:
        """Return how long to wait before a retry: never less than asked for, and not as long as everybody else."""
        usual_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(retry, 32))
        if fault.retry_after_s is None:
            return usual_s * (0.5 + self.jitter() / 2)
        return fault.retry_after_s + usual_s * self.jitter()

    def _fault(self, outcome: Outcome) -> ConvoyError:
        """Return what an outcome that is no success means."""
        if isinstance(outcome, Lost) and outcome.late:
            return DeadlineError(f"{self.url} did not answer before the deadline.", code="deadline")
        if not isinstance(outcome, Reply):
            reason = f": {outcome.reason}" if outcome and outcome.reason else ""
            return UnreachableError(f"{self.url} does not answer{reason}.", code="unreachable")
        kind = kind_of(outcome.status)
        common: dict[str, Any] = {
            "status": outcome.status,
            "request_id": outcome.headers.get("x-request-id", ""),
            "retry_after_s": _retry_after_s(outcome.headers),
        }
        try:
            content = _json(outcome)
            sentence, code = content["error"], str(content.get("code", ""))
            if not (sentence and isinstance(sentence, str)):
                raise ValueError("an error without a sentence")
        except (ValueError, KeyError, TypeError, AttributeError):
            sentence = f"{self.url} answered {_name_of(outcome.status)} without a sentence: it may not be Convoy."
            return kind(sentence, code="bad_answer" if kind is BadAnswerError else "", **common)
        return kind(sentence, code=code, index=place_of(sentence), **common)

    def _read(self, reply: Reply, reader: Callable[[], T]) -> T:
        try:
            return reader()
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BadAnswerError(
                f"{self.url} answered {_name_of(reply.status)} with something that is not Convoy's.",
                status=reply.status,
                code="bad_answer",
                request_id=reply.headers.get("x-request-id", ""),
            ) from error


def in_order(found: Mapping[int, T]) -> list[T]:
    """Return what was found for images by their places."""
    return [found[index] for index in sorted(found)]


def only_predictions(found: Iterable[Prediction | ConvoyError]) -> list[Prediction]:
    """Return the predictions of a call in which faults are raised, so that there are none."""
    return [entry for entry in found if isinstance(entry, Prediction)]


def base_headers(api_key: str | None) -> dict[str, str]:
    """Return the headers that go with every request.

    Raises:
        ValueError: the key has characters that no header can carry.
    """
    headers = {
        "User-Agent": "convoy-client",
        "Accept": "*/*",
        "Accept-Encoding": "identity",  # numbers are little smaller compressed, and take far longer
    }
    if api_key:
        if not all("!" <= character <= "~" for character in api_key):
            raise ValueError("api_key holds a space, a line break or a letter beyond ASCII: no key has one.")
        headers["Authorization"] = f"Bearer {api_key}"
    return headers


def from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `url` and `api_key` as far as CONVOY_URL and CONVOY_API_KEY are set and not empty."""
    found = {"url": environment.get(URL_VARIABLE), "api_key": environment.get(KEY_VARIABLE)}
    return {name: value for name, value in found.items() if value}


def is_loopback(url: str) -> bool:
    """Return whether a URL is of this very machine, where no proxy has a part."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _is_passing(fault: ConvoyError) -> bool:
    return isinstance(fault, UnreachableError) or fault.status in RETRIED


def _path_of(model: str, version: str | None) -> str:
    of_version = "" if version is None else f"/versions/{quote(str(version), safe='')}"
    return f"/models/{quote(model, safe='')}{of_version}"


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        good = False
    if not good or parts.query or parts.fragment or any(character <= " " for character in url):
        raise ValueError(f"url = {url!r} is no address of a service: write it as in {DEFAULT_URL}.")
    return url.rstrip("/")


def _checked_seconds(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} cannot be {value}: a number of seconds above 0.")
    return float(value)


def _form(images: Sequence[bytes]) -> tuple[str, bytes]:
    """Return content type and body of a form with one file for each image."""
    boundary = secrets.token_hex(16)
    pieces = []
    for index, data in enumerate(images):
        disposition = f'Content-Disposition: form-data; name="image"; filename="{index}"'
        pieces += [f"--{boundary}\r\n{disposition}\r\n\r\n".encode(), data, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    return f"multipart/form-data; boundary={boundary}", b"".join(pieces)


def _json(reply: Reply) -> Any:
    return json.loads(reply.body)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return what Retry-After asks for, seconds; a date counts from the answer's own, whatever the clock here says."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value[:9])
    try:
        later, sent = parsedate_to_datetime(value), parsedate_to_datetime(headers.get("date", ""))
        return max(0.0, (later - sent).total_seconds())
    except (ValueError, TypeError):
        return None


def _name_of(status: int) -> str:
    return f"{status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else str(status)
