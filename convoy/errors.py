"""Every way a call can fail: what the service says, or that nobody did.

Owns the faults and which answer is which of them. Knows nothing of requests, retries or connections.
"""

import re
from typing import Self

_PLACE = re.compile(r"images\[(\d{1,9})\]")


class ConvoyError(Exception):
    """A call failed; each of its kinds is a class below.

    Attributes:
        sentence: what is wrong, for a person; the service's own words where it answered.
        status: the HTTP status of the answer; None if there was none.
        code: the reason, for a program: the service's `code`, or `unreachable`, `deadline`, `unreadable`, `bad_answer`.
        request_id: the id under which the service's log has the request; empty without an answer.
        index: which image it is about, in the order of the call; None: not about one of them.
        retry_after_s: seconds after which the service asks to come back; None: it does not say.
    """

    def __init__(
        self,
        sentence: str,
        *,
        status: int | None = None,
        code: str = "",
        request_id: str = "",
        index: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.status = status
        self.code = code
        self.request_id = request_id
        self.index = index
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:  # without it an error does not come back from another process
        return type(self), (self.sentence,), vars(self)

    def of_image(self, index: int, *, among: bool) -> Self:
        """Return the same fault, told of the image that is at `index` in the call.

        The service counts within a request, the caller within all its images; `among` several the sentence says which.
        """
        rest = _PLACE.sub("", self.sentence, count=1).removeprefix(": ") if _PLACE.match(self.sentence) else ""
        sentence = rest or self.sentence
        fault = type(self)(f"images[{index}]: {sentence}" if among else sentence)
        vars(fault).update(vars(self) | {"sentence": str(fault), "index": index})
        return fault


class RequestError(ConvoyError):
    """The service refuses the request, and would again: 400, 405, 415 and whatever has no class of its own."""


class AuthenticationError(RequestError):
    """401 or 403: no key, a wrong one, or one that may not do this."""


class UnknownModelError(RequestError):
    """404: no model, or no version of it, has that name."""


class TooLargeError(RequestError):
    """413: an image, the number of images or the whole body is above a limit of the service."""


class BadImageError(RequestError):
    """422: not an image that can be decoded; or, without a status, one that cannot be read or encoded here."""


class ServerError(ConvoyError):
    """500 and its kin: the service, or a proxy before it, failed at this request."""


class OverloadedError(ServerError):
    """429: the service is full, or could not have met the deadline; retries, if there were any, came to the same."""


class UnavailableError(ServerError):
    """502 or 503: the model is loading or failed, the service is stopping, or a proxy finds none."""


class DeadlineError(ConvoyError):
    """504, or no answer before the deadline of the call."""


class UnreachableError(ConvoyError):
    """No connection, or it broke before there was an answer."""


class BadAnswerError(ConvoyError):
    """There is an answer, and it is not one of Convoy's."""


_KINDS: dict[int, type[ConvoyError]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    404: UnknownModelError,
    413: TooLargeError,
    422: BadImageError,
    429: OverloadedError,
    502: UnavailableError,
    503: UnavailableError,
    504: DeadlineError,
}


def kind_of(status: int) -> type[ConvoyError]:
    """Return the class of an answer's fault."""
    if status in _KINDS:
        return _KINDS[status]
    if status < 400:
        return BadAnswerError
    return RequestError if status < 500 else ServerError


def place_of(sentence: str) -> int | None:
    """Return which image of its request a sentence of the service is about: `images[3]: …`."""
    found = _PLACE.match(sentence)
    return int(found[1]) if found else None
