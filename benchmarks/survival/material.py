"""What the clients send: images of several sizes and formats, good and bad, as whole HTTP/1.1 requests."""

import base64
import functools
import io
import json
from pathlib import Path

from PIL import Image

from app.bench.requests import Endpoint, build_requests

PHOTOS = Path(__file__).parents[2] / "examples/photos"
PHOTO, SMALL = "imagenet", "cifar10-article"
"""The models of the two kinds of image."""
DEADLINE_MS = 5000


@functools.cache
def image(name: str = "coffee", size: tuple[int, int] = (500, 375), kind: str = "JPEG", quality: int = 85) -> bytes:
    """Return one of the example photos in another size and format."""
    with Image.open(PHOTOS / f"{name}.jpg") as photo:
        buffer = io.BytesIO()
        photo.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, kind, quality=quality)
        return buffer.getvalue()


def photos() -> list[bytes]:
    """Return three photos of 500×375 pixels."""
    return [image(name) for name in ("coffee", "cat", "rocket")]


def smalls() -> list[bytes]:
    """Return three JPEGs of 32×32 pixels."""
    return [image(name, (32, 32)) for name in ("coffee", "cat", "rocket")]


def requests_of(url: str, model: str, images: list[bytes]) -> list[bytes]:
    """Return a request with a deadline for each image."""
    return build_requests(Endpoint.of(url, model), images, timeout_ms=DEADLINE_MS)


def post(url: str, model: str, body: bytes, kind: str, announced: int | None = None) -> bytes:
    """Return a request with that body; `announced`: the length that its headers claim, where it is not the body's."""
    endpoint = Endpoint.of(url, model)
    head = (
        f"POST {endpoint.path} HTTP/1.1\r\nHost: {endpoint.host}:{endpoint.port}\r\nTimeout-Ms: {DEADLINE_MS}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(body) if announced is None else announced}\r\n\r\n"
    )
    return head.encode() + body


def mixture(url: str) -> dict[str, list[tuple[bytes, frozenset[int]]]]:
    """Return, by kind, requests and the statuses that are right for them; 429 is right for all."""
    ok = frozenset({200})
    raw = "application/octet-stream"
    formats: list[bytes] = [
        image(name, size, kind)
        for name in ("coffee", "cat", "rocket")
        for size, kind in (
            ((500, 375), "JPEG"),
            ((320, 240), "PNG"),
            ((640, 480), "WEBP"),
            ((1600, 1200), "JPEG"),
            ((61, 41), "JPEG"),
        )
    ]
    huge = io.BytesIO()
    Image.new("L", (9000, 6000)).save(huge, "PNG")  # 54 million pixels in some kilobytes
    encoded = [base64.b64encode(body).decode() for body in photos()]
    return {
        "small": [(request, ok) for request in requests_of(url, SMALL, smalls())],
        "photo": [(request, ok) for request in requests_of(url, PHOTO, formats)],
        "form": [
            (request, ok)
            for count in (2, 5)
            for request in build_requests(Endpoint.of(url, PHOTO), formats, images_per_request=count)
        ],
        "json": [
            (post(url, PHOTO, json.dumps({"images": encoded[:count]}).encode(), "application/json"), ok)
            for count in (1, 3)
        ],
        "bad": [
            (post(url, PHOTO, photos()[0][:9000], raw), frozenset({422})),
            (post(url, PHOTO, b"no image at all", raw), frozenset({422})),
            (post(url, SMALL, smalls()[0][:300], raw), frozenset({422})),
            (post(url, PHOTO, b'{"images": ["%%%"]}', "application/json"), frozenset({400, 422})),
            (post(url, PHOTO, b"--x\r\nnothing", "multipart/form-data; boundary=x"), frozenset({400})),
            (post(url, PHOTO, photos()[0], "text/plain"), frozenset({415})),
            (post(url, "no-such-model", smalls()[0], raw), frozenset({404})),
        ],
        "oversized": [
            (post(url, PHOTO, huge.getvalue(), raw), frozenset({413})),
            (post(url, PHOTO, bytes(33_000_000), raw), frozenset({413})),
        ],
    }
