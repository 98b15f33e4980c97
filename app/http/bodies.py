"""A request's body becomes a list of encoded images: raw, multipart or JSON, within the limits.

Bytes are held against the admission as they arrive, and nothing is decoded here. Whatever is wrong raises an error
that names it.
"""

import asyncio
import base64
import binascii
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive

from app.errors import (
    AbandonedError,
    BadRequestError,
    BodyTooLargeError,
    TooLargeError,
    UnsupportedMediaTypeError,
)
from app.http.schemas import ImagesBody
from app.runs import DEFAULT_URGENCY
from app.tickets import Ticket

if TYPE_CHECKING:  # exists for type checkers only
    from python_multipart.multipart import MultipartCallbacks

# curl --data-binary says x-www-form-urlencoded unless told otherwise, and a bare client says nothing.
RAW_TYPES = frozenset(
    {
        "image/jpeg",
        "image/jpg",
        "image/png",
        "image/webp",
        "application/octet-stream",
        "application/x-www-form-urlencoded",
        "",
    }
)
_URGENCY = re.compile(rb"(?:^|[,\s])u=([0-7])(?![0-9])")
PARSE_IN_THREAD_BYTES = 1_000_000
"""Larger JSON and forms are taken apart off the event loop: 30 MB of base64 take about 100 ms."""
MAX_FORM_FIELDS = 32
"""Parts of a form beside its images."""
SWALLOW_BODIES = 4
"""How many times the limit of a too large body is read and thrown away, so that its client gets to read the 413."""
SWALLOW_PAUSE_S = 2.0
"""How long nothing may come of such a body before its client is told: it may not send it, but wait for the answer."""


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """What one request may bring."""

    max_body_bytes: int
    max_images: int


@dataclass(slots=True)
class Head:
    """The request headers that a prediction looks at."""

    content_type: str = ""
    content_encoding: str = "identity"
    content_length: int = 0
    timeout_ms: int | None = None
    waits_for_100: bool = False
    urgency: int = DEFAULT_URGENCY

    @classmethod
    def of(cls, fields: Iterable[tuple[bytes, bytes]]) -> Self:
        """Read them from all headers, as an ASGI scope has them.

        Raises:
            BadRequestError: Timeout-Ms is no whole number above 0.
        """
        head = cls()
        headers = dict(fields)
        if value := headers.get(b"content-type"):
            head.content_type = value.decode("latin-1")
        if value := headers.get(b"content-length"):
            head.content_length = int(value)  # the server refuses what is not a number
        if value := headers.get(b"content-encoding"):
            head.content_encoding = value.decode("latin-1").lower()
        if value := headers.get(b"expect"):
            head.waits_for_100 = value.lower() == b"100-continue"
        if (value := headers.get(b"priority")) and (found := _URGENCY.search(value)):
            head.urgency = int(found[1])  # RFC 9218: what cannot be read is passed over
        if (value := headers.get(b"timeout-ms")) is not None:
            if not value.isdigit() or not int(value[:9]):
                shown = value[:40].decode("latin-1")
                raise BadRequestError(f"The header Timeout-Ms = {shown!r} is not a whole number above 0.")
            head.timeout_ms = int(value[:9])
        return head


async def read_images(head: Head, receive: Receive, ticket: Ticket, limits: BodyLimits) -> list[bytes]:
    """Read a request's body and return its encoded images, in order, at least one.

    Raises:
        UnsupportedMediaTypeError: the Content-Type or Content-Encoding is none of ours.
        TooLargeError: body or number of images is beyond the limits.
        QueueFullError: the service holds too many bytes already.
        BadRequestError: the body is empty, or not what its Content-Type says.
        AbandonedError: the client left before its body was complete.
    """
    kind, boundary = _content_type(head)
    body = await read_body(head, receive, ticket, limits.max_body_bytes)
    if len(body) > PARSE_IN_THREAD_BYTES and kind not in RAW_TYPES:
        return await asyncio.to_thread(_take_apart, head, kind, boundary, body, limits)
    return _take_apart(head, kind, boundary, body, limits)


def _take_apart(head: Head, kind: str, boundary: bytes, body: bytes, limits: BodyLimits) -> list[bytes]:
    if not body:
        raise BadRequestError("The body is empty: send an image, a form with files, or JSON with images.")
    if kind in RAW_TYPES:
        return [body]
    _refuse_too_many(kind, boundary, body, limits.max_images)
    images = _json_images(body) if kind == "application/json" else _form_files(body, boundary)
    if len(images) > limits.max_images:
        raise too_many(limits.max_images)
    return images


def _refuse_too_many(kind: str, boundary: bytes, body: bytes, limit: int) -> None:
    """Bound the work of taking a body apart before it begins: neither base64 nor a boundary has the separator in it.

    Parsing 1 MB of short JSON numbers took 2 s, and 30 MB of them 7 GB.
    """
    if kind == "application/json":
        beyond = body.count(b",") >= limit
        if beyond and b'"images"' not in body:  # the pixels of another protocol, say, which are not parsed either
            raise BadRequestError('The JSON body should be {"images": ["<base64>", …]}, but has no "images".')
    else:
        beyond = bool(boundary) and body.count(b"--" + boundary) > limit + MAX_FORM_FIELDS
    if beyond:
        raise too_many(limit)


def too_large(limit: int) -> BodyTooLargeError:
    """Return the error for a body of more than `limit` bytes."""
    return BodyTooLargeError(f"The body is too large: at most {limit:,} bytes are taken.")


def too_many(limit: int) -> TooLargeError:
    """Return the error for a request of more than `limit` images."""
    return TooLargeError(
        f"The request has more than {limit} images: send them in several requests.", code="too_many_images"
    )


def _content_type(head: Head) -> tuple[str, bytes]:
    """Return the media type in lower case and, for a form, its boundary."""
    if head.content_encoding != "identity":
        raise UnsupportedMediaTypeError(
            f"Content-Encoding {head.content_encoding} is not taken: send the body as it is."
        )
    if head.content_type in RAW_TYPES:
        return head.content_type, b""
    raw, options = parse_options_header(head.content_type)
    kind = raw.decode("latin-1").strip().lower()
    if kind not in RAW_TYPES and kind not in ("application/json", "multipart/form-data"):
        raise UnsupportedMediaTypeError(
            f"Content-Type {kind} is not taken: send image/jpeg, image/png, image/webp, application/octet-stream, "
            "multipart/form-data or application/json."
        )
    return kind, options.get(b"boundary", b"")


async def read_body(head: Head, receive: Receive, ticket: Ticket, limit: int) -> bytes:
    """Read the body, held against the ticket as it arrives: a client that announces and does not send holds nothing.

    Raises:
        BodyTooLargeError: it has more than `limit` bytes.
        QueueFullError: the service holds too many bytes already.
        AbandonedError: the client left before its body was complete.
    """
    if head.content_length > limit:
        if not head.waits_for_100:  # else the client has not sent it, and will not
            await _swallow(True, receive, ticket, SWALLOW_BODIES * limit)
        raise too_large(limit)
    ticket.expect_bytes(head.content_length)
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        chunk, more = await _receive_chunk(receive)
        size += len(chunk)
        if size > limit:
            chunks.clear()
            await _swallow(more, receive, ticket, SWALLOW_BODIES * limit)
            raise too_large(limit)
        ticket.hold_bytes(len(chunk))
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _receive_chunk(receive: Receive) -> tuple[bytes, bool]:
    """Return the next piece of the body, and whether there are more."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise AbandonedError
    return message.get("body", b""), message.get("more_body", False)


async def _swallow(more: bool, receive: Receive, ticket: Ticket, limit: int) -> None:
    """Read on until there is no more, more than `limit` bytes came, nothing comes, or the deadline has passed.

    The request is refused already: at its deadline it is told that, not that it is late.
    """
    ticket.forget_deadline()
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(None) as patience:
            while more and size <= limit:
                patience.reschedule(_until(ticket.deadline))
                chunk, more = await _receive_chunk(receive)
                size += len(chunk)


def _until(deadline: float) -> float:
    """Return when a pause is too long, by the loop's clock."""
    return asyncio.get_running_loop().time() + min(SWALLOW_PAUSE_S, deadline - time.monotonic())


def _json_images(body: bytes) -> list[bytes]:
    try:
        parsed = ImagesBody.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        where = f"{place}: " if place else ""
        raise BadRequestError(
            f'The JSON body should be {{"images": ["<base64>", …]}}, but {where}{problem["msg"]}.'
        ) from None
    images = []
    for index, text in enumerate(parsed.images):
        try:
            images.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise BadRequestError(f"images[{index}] is not base64: {error}.") from None
    return images


def _form_files(body: bytes, boundary: bytes) -> list[bytes]:
    """Return the content of every part that has a file name, in order; other fields are passed over."""
    if not boundary:
        raise BadRequestError("The Content-Type multipart/form-data lacks its boundary.")
    form = _Form()
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequestError(f"The form is broken: {error}.") from None
    if not form.ended:
        raise BadRequestError("The form is broken: it ends before its last boundary.")
    if not form.files:
        raise BadRequestError("The form holds no file: send each image as a file, for example curl -F file=@photo.jpg.")
    return form.files


class _Form:
    """Collects the files of a form in memory, whose size the body limit bounds; nothing is spooled to disk."""

    def __init__(self) -> None:
        self.files: list[bytes] = []
        self.ended = False
        self._name = b""
        self._value = b""
        self._is_file = False
        self._data: list[bytes] = []

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _part_begin(self) -> None:
        self._is_file, self._data = False, []

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._is_file = b"filename" in parse_options_header(self._value)[1]
        self._name = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._data.append(data[start:end])

    def _part_end(self) -> None:
        if self._is_file:
            self.files.append(b"".join(self._data))

    def _end(self) -> None:
        self.ended = True
