"""What some of the predictions look like, counted beside what the bundle says is normal: the material to see drift in.

An image now and then, by the clock, so that it costs the same however many there are. A quantity falls into bins that
hold about a tenth of the bundle's reference each; how much the shares differ is Prometheus's to compute, over any time
it likes. Knows nothing of requests; `app/images.py` says what a file holds.
"""

import json
import logging
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.families import MAX_BINS, Slots
from app.images import upright_size
from app.manifest import Manifest
from app.metrics import Metrics
from app.trust import Histogram

log = logging.getLogger(__name__)

PERIOD_S = 0.1
"""Between two images that are looked at, of one version in one process: 36,000 an hour. To look at one takes 0.1 ms."""
BINS = 10
MOST_CLASSES = 20
"""So many classes have a bin of their own, the most frequent of the reference; the rest share one."""
FEWEST_IMAGES = 10
"""A class that the reference has fewer images of has no share that could be compared."""
REST = "(other)"
SIDE = 64
"""Of larger images a grid of at most so many rows and columns is looked at."""
LUMA = np.array([[[0.299]], [[0.587]], [[0.114]]], np.float32)


class Sampler:
    """One version's: says when an image is due, and counts what it and its answer look like.

    Attributes:
        due: `time.monotonic()` from which on the next image is wanted. Read on the hot path.
    """

    def __init__(self, manifest: Manifest, metrics: Metrics) -> None:
        self.due = 0.0
        self._turn = 0
        which = manifest.name, manifest.version
        self._confidence = metrics.confidence.labels(*which)
        self._entropy = metrics.entropy.labels(*which)
        self._brightness = metrics.brightness.labels(*which)
        self._bytes = metrics.image_bytes.labels(*which)
        self._side = metrics.image_side.labels(*which)
        self._features: dict[str, tuple[Sequence[float], Slots]] = {}
        self._classes: tuple[dict[int, int], Slots] | None = None
        reference = manifest.reference
        if reference is None:
            return
        metrics.reference_images.labels(*which).set(reference.images)
        for feature in ("confidence", "entropy", "brightness", "contrast", "width", "height", "size_bytes"):
            histogram: Histogram | None = getattr(reference, feature)
            if histogram is not None and any(histogram.counts) and len(bins := list(_tenths(histogram))) > 1:
                edges = [low for low, _ in bins[1:]]
                names = [_span(low, high) for low, high in zip((-math.inf, *edges), (*edges, math.inf), strict=True)]
                self._features[feature] = edges, _slots(metrics, which, feature, names, [count for _, count in bins])
        own = _with_their_own_bin(reference.predicted)
        if own:
            rest = sum(reference.predicted) - sum(reference.predicted[index] for index in own)
            has_rest = len(own) < len(manifest.labels)
            names = [*(manifest.labels[index] for index in own), *([REST] if has_rest else [])]
            counts = [*(reference.predicted[index] for index in own), *([rest] if has_rest else [])]
            places = {index: place for place, index in enumerate(own)}
            self._classes = places, _slots(metrics, which, "class", names, counts)

    def take(self, now: float) -> bool:
        """Tell whether an image is wanted, by `time.monotonic()`; the next one then is not, for a while."""
        if now < self.due:
            return False
        self.due = now + PERIOD_S
        return True

    def look(self, pixels: NDArray[Any], probabilities: NDArray[Any], images: Sequence[bytes] | None) -> None:
        """Count one image of a request.

        Args:
            pixels: what the graph took, uint8 `[n, height, width, 3]`.
            probabilities: its answer, float32 `[n, classes]`.
            images: the encoded images; None: they came as pixels.
        """
        try:
            self._look(pixels, probabilities, images)
        except Exception:  # whoever calls has requests to answer, which this is no part of
            log.exception("an image could not be looked at")

    def _look(
        self, pixels: NDArray[np.uint8], probabilities: NDArray[np.float32], images: Sequence[bytes] | None
    ) -> None:
        row = self._turn % len(pixels)
        self._turn += 1
        self._look_at_answer(probabilities[row])
        luma = _luma(pixels[row])
        brightness = float(luma.mean())
        self._brightness.observe(brightness)
        self._count("brightness", brightness)
        self._count("contrast", float(luma.std()))
        if images is None:
            return
        self._bytes.observe(len(images[row]))
        self._count("size_bytes", len(images[row]))
        width, height = upright_size(images[row])
        self._side.observe(min(width, height))
        self._count("width", width)
        self._count("height", height)

    def _look_at_answer(self, answer: NDArray[Any]) -> None:
        likeliest = int(answer.argmax())
        confidence = float(answer[likeliest])
        there = answer[answer > 0].astype(np.float64)
        entropy = -float((there * np.log(there)).sum()) / math.log(len(answer))
        self._confidence.observe(confidence)
        self._entropy.observe(entropy)
        self._count("confidence", confidence)
        self._count("entropy", entropy)
        if self._classes is not None:
            places, slots = self._classes
            slots.inc(places.get(likeliest, len(places)))

    def _count(self, feature: str, value: float) -> None:
        if feature in self._features:
            edges, slots = self._features[feature]
            slots.inc(bisect_right(edges, value))


def _luma(image: NDArray[Any]) -> NDArray[np.float32]:
    """Return the luma of an image's pixels, or of a grid of them; without BLAS, which would wake up its threads."""
    rows, columns = -(-len(image) // SIDE), -(-image.shape[1] // SIDE)
    red, green, blue = image[::rows, ::columns].transpose(2, 0, 1) * LUMA
    luma: NDArray[np.float32] = red + green + blue
    return luma


def _tenths(histogram: Histogram) -> Iterator[tuple[float, int]]:
    """Join bins until each holds about a tenth of all; yields lower edge and count of each.

    Where the outer bins of the reference are empty they stay apart: what falls there is like nothing in it.
    """
    occupied = [place for place, count in enumerate(histogram.counts) if count]
    first, last = occupied[0], occupied[-1]
    left, remaining = BINS, sum(histogram.counts)
    if first > 0:
        yield histogram.edges[0], 0
    low, count = histogram.edges[first], 0
    for place in range(first, last + 1):
        count += histogram.counts[place]
        # What is left is shared out anew after each: one full bin must not make all others thin.
        if place == last or (left > 1 and count >= remaining / left):
            yield low, count
            left, remaining, low, count = left - 1, remaining - count, histogram.edges[place + 1], 0
    if last < len(histogram.counts) - 1:
        yield low, 0


def _with_their_own_bin(predicted: Sequence[int]) -> list[int]:
    """Return the classes that are counted apart, the most frequent first."""
    frequent = [index for index, count in enumerate(predicted) if count >= FEWEST_IMAGES]
    return sorted(frequent, key=lambda index: -predicted[index])[:MOST_CLASSES]


def _slots(metrics: Metrics, which: tuple[str, str], feature: str, names: list[str], counts: list[int]) -> Slots:
    """Show the reference's shares, of which none is 0, and return where images are counted."""
    assert len(names) <= MAX_BINS, f"{feature} has {len(names)} bins"
    labels = (*which, feature, json.dumps(names, ensure_ascii=True))
    total = sum(counts) + len(counts) / 2
    metrics.reference.replace(labels, [(count + 0.5) / total for count in counts])
    return metrics.features.labels(*labels)


def _span(low: float, high: float) -> str:
    """Return a bin's name, as in `16..32`; the outer ones are open."""
    return f"{low:g}..{high:g}".replace("-inf", "").replace("inf", "")
