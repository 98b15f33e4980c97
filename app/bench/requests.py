"""What the generator sends: where to, and whole requests made from image files before the first one leaves."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote, urlsplit

from app.errors import BadRequestError

MOST_BYTES = 512_000_000
"""Images are held in memory, so that no disk is in the figures; what is beyond this is left out, and told."""
_BOUNDARY = b"convoy-bench-7f3a9c51"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a service answers: an address, and the path of the route that is asked."""

    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str, model: str = "") -> Self:
        """Read `http://host:port`, with a prefix where a proxy has one; `model` empty: the default model.

        Raises:
            BadRequestError: it is no such URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or 80
        except ValueError as error:
            raise BadRequestError(f"{url} is no URL: {error}.") from None
        if parts.scheme != "http" or not parts.hostname:
            raise BadRequestError(f"{url} is no URL that can be measured: only http://HOST:PORT is, without TLS.")
        route = f"/models/{quote(model, safe='')}/predict" if model else "/predict"
        return cls(parts.hostname, port, parts.path.rstrip("/") + route)

    @property
    def address(self) -> str:
        """`http://host:port`, for people."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def read_bodies(files: Sequence[Path], most_bytes: int = MOST_BYTES) -> list[bytes]:
    """Read image files, in order, as many as `most_bytes` hold.

    Raises:
        BadRequestError: a file cannot be read, or already the first one is too large.
    """
    bodies: list[bytes] = []
    room = most_bytes
    for file in files:
        try:
            body = file.read_bytes()
        except OSError as error:
            raise BadRequestError(f"The file {file} cannot be read: {error.strerror}.") from error
        room -= len(body)
        if room < 0:
            break
        bodies.append(body)
    if not bodies:
        raise BadRequestError(f"The file {files[0]} is larger than the {most_bytes:,} bytes that are held in memory.")
    return bodies


def build_requests(
    endpoint: Endpoint,
    images: Sequence[bytes],
    *,
    images_per_request: int = 1,
    timeout_ms: int | None = None,
    api_key: str = "",
) -> list[bytes]:
    """Build whole HTTP/1.1 requests that take the images in turn: a raw body for one image, a form for several.

    Raises:
        BadRequestError: the key cannot be sent in a header.
    """
    if not (api_key.isascii() and api_key.isprintable()):
        raise BadRequestError("The key in CONVOY_API_KEY is none: it has characters that no key has.")
    around = itertools.cycle(images)
    count = -(-len(images) // images_per_request)
    groups = [list(itertools.islice(around, images_per_request)) for _ in range(count)]
    host = endpoint.address.removeprefix("http://")
    head = f"POST {endpoint.path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: convoy-bench\r\n"
    if timeout_ms is not None:
        head += f"Timeout-Ms: {timeout_ms}\r\n"
    if api_key:
        head += f"Authorization: Bearer {api_key}\r\n"
    return [_request(head.encode(), group) for group in groups]


def _request(head: bytes, images: Sequence[bytes]) -> bytes:
    if len(images) == 1:
        body, kind = images[0], b"application/octet-stream"
    else:
        body, kind = _form(images), b"multipart/form-data; boundary=" + _BOUNDARY
    return b"%bContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (head, kind, len(body), body)


def _form(images: Sequence[bytes]) -> bytes:
    part = b'--%b\r\nContent-Disposition: form-data; name="image"; filename="%d"\r\n\r\n%b\r\n'
    parts = (part % (_BOUNDARY, index, image) for index, image in enumerate(images))
    return b"".join(parts) + b"--%b--\r\n" % _BOUNDARY
