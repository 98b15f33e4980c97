"""What is measured: a model, the images posted to it, how many connections, and how each server is set for it.

A new scenario is one more entry of `SCENARIOS`. The peers' settings come from `python -m benchmarks.peers.tune`.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from benchmarks.costs import jpeg

ROOT = Path(__file__).parent.parent.parent
PHOTOS = ROOT / "examples/photos"
SMALL_SIDE, SMALL_QUALITY = 32, 75
"""As in the JPEG copies of CIFAR-10 that are passed around: about 900 bytes."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a peer is started: see `runners/task.py`."""

    workers: int = 2
    batch: int = 1
    wait_ms: float = 0
    fronts: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    title: str
    model: str
    images: tuple[str, ...]
    """Names in `IMAGES`, posted in turns."""
    connections: int
    convoy: tuple[str, ...] = ()
    """Flags of `convoy serve`; one that this version does not have is left out, and the report says so."""
    peers: dict[str, Setting] = field(default_factory=dict)
    decoders: tuple[str, ...] = ("plain", "convoy")
    """With which each peer is measured."""
    ceiling: bool = True
    """Measure the bare loop of decode and run, too."""
    bar: float | None = None
    """Convoy ÷ best peer as documented that we want to see."""


def small() -> bytes:
    photo = Image.open(PHOTOS / "cat.jpg").convert("RGB")
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    square = photo.crop((left, top, left + side, top + side)).resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=SMALL_QUALITY)
    return buffer.getvalue()


def photo(width: int, height: int) -> bytes:
    return jpeg(Image.open(PHOTOS / "coffee.jpg"), (width, height))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.open(PHOTOS / "coffee.jpg").resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES: dict[str, Callable[[], bytes]] = {
    "small.jpg": small,
    "web.jpg": lambda: photo(500, 375),
    "web.png": png,
    "large.jpg": lambda: photo(1600, 1200),
    "phone.jpg": lambda: photo(4032, 3024),
}

PHOTO = {
    "litserve": Setting(batch=4),
    "mosec": Setting(batch=4, wait_ms=1),
    "triton": Setting(batch=4),
}
# With few connections a large batch takes what the second worker could have begun: mosec gives 17 answers a second with
# batches of four and 40 with batches of one, Triton 39 with four, 41 with two and 30 with one.
PHONE = {
    "litserve": Setting(),
    "mosec": Setting(wait_ms=1),
    "triton": Setting(batch=2),
}

SCENARIOS = (
    Scenario(
        name="small",
        title="32×32 JPEG, the article's network",
        model="cifar10-article",
        images=("small.jpg",),
        connections=32,
        convoy=("--workers", "2"),
        peers={
            "litserve": Setting(batch=16),
            "mosec": Setting(batch=16, wait_ms=1),
            "triton": Setting(batch=16),
        },
        decoders=("plain",),
        ceiling=False,
        bar=1.6,
    ),
    Scenario(
        name="photo",
        title="photo 500×375, EfficientNet-Lite0",
        model="imagenet",
        images=("web.jpg",),
        connections=16,
        convoy=("--workers", "2"),
        peers=PHOTO,
        bar=1.2,
    ),
    Scenario(
        name="phone",
        title="phone photo 4032×3024, EfficientNet-Lite0",
        model="imagenet",
        images=("phone.jpg",),
        connections=4,
        peers=PHONE,
        bar=3.0,
    ),
    Scenario(
        name="phone-16",
        title="phone photo 4032×3024, EfficientNet-Lite0",
        model="imagenet",
        images=("phone.jpg",),
        connections=16,
        convoy=("--workers", "2"),
        peers=PHONE,
        bar=3.0,
    ),
    Scenario(
        name="resnet50",
        title="photo 500×375, ResNet-50",
        model="resnet50",
        images=("web.jpg",),
        connections=8,
        peers=PHOTO,
        decoders=("convoy",),
    ),
    Scenario(
        name="mixed",
        title="32×32, 500×375 JPEG and PNG, 1600×1200 in turns, EfficientNet-Lite0",
        model="imagenet",
        images=("small.jpg", "web.jpg", "web.png", "large.jpg"),
        connections=16,
        convoy=("--workers", "2"),
        peers=PHOTO,
    ),
)
