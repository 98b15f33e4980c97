"""Duplicates: the same file, the same pixels, nearly the same picture.

Owns what "nearly" means: the thumbnails agree in colour and layout (correlation of 8×8 colours, brightness and contrast
aside) *and* in detail (correlation of what a 3×3 blur takes from the 16×16 brightness), straight or mirrored. Either
alone is not enough: all ships on all seas share a layout. Knows nothing of splits or labels.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.checks.looks import THUMB, Survey, whole_pixels
from training.progress import counting

LAYOUT = 0.93
DETAIL = 0.8
"""Least correlations of near duplicates. Measured on CIFAR-10 (benchmarks/results/data-checks.json, docs/data.md)."""
AXES = 32
ROWS, COLUMNS = 512, 8192
"""Pairs compared at a time: 16 MB of correlations stay in a processor's cache."""
Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Near:
    """Pictures that are nearly alike, linked in pairs."""

    places: tuple[int, ...]
    least: float
    """Correlation of detail of the pair least alike among those linked."""
    most: float


def same_files(survey: Survey) -> list[tuple[int, ...]]:
    """Return the groups of two or more sound pictures with the same content, byte for byte."""
    return _groups((survey.looks[place].content, place) for place in survey.sound.tolist())


def same_pixels(survey: Survey) -> list[tuple[int, ...]]:
    """Return the groups of different files with the same pixels at full size: compressed anew without loss, tagged.

    Only pictures that agree in size and centre square are decoded at full size.
    """
    firsts: dict[bytes, int] = {}
    for place in survey.sound.tolist():
        firsts.setdefault(survey.looks[place].content, place)
    alike = _groups((survey.looks[place].seen, place) for place in firsts.values())
    return _groups((whole_pixels(survey.pictures[place]), place) for group in alike for place in group)


def near(survey: Survey, places: Sequence[int]) -> list[Near]:
    """Compare every pair of the given pictures and return those nearly alike, as groups of linked ones.

    Quadratic: 1.8 thousand million pairs for 60,000 pictures. So that a pair costs 33 multiplications, not 192, layouts
    are first compared on their 32 main axes, the rest counted at the most it could be: no pair is lost.
    """
    thumbs = survey.thumbs[np.asarray(places, np.int64)]
    links: dict[tuple[int, int], float] = {}
    layouts, details = _layouts(thumbs), _details(thumbs)
    axes = _main_axes(layouts)
    short = _shortened(layouts, axes)
    with counting("Comparing", 2 * math.ceil(len(thumbs) / ROWS)) as advance:
        for turned in (thumbs, thumbs[:, :, ::-1]):
            turned_layouts, turned_details = _layouts(turned), _details(turned)
            turned_short = _shortened(turned_layouts, axes)
            for top in range(0, len(thumbs), ROWS):
                first, second = _above(turned_short[top : top + ROWS], short, top)
                is_near = (turned_layouts[first] * layouts[second]).sum(axis=1) >= LAYOUT
                first, second = first[is_near], second[is_near]
                detail = (turned_details[first] * details[second]).sum(axis=1)
                is_near = detail >= DETAIL
                for one, other, likeness in zip(first[is_near], second[is_near], detail[is_near], strict=True):
                    pair = int(one), int(other)
                    links[pair] = max(links.get(pair, 0.0), float(likeness))
                advance(1)
    return [
        Near(
            tuple(places[place] for place in group),
            least=min(links[pair] for pair in pairs),
            most=max(links[pair] for pair in pairs),
        )
        for group, pairs in _linked(links)
    ]


def _groups(keyed: Iterable[tuple[Hashable, int]]) -> list[tuple[int, ...]]:
    found: dict[Hashable, list[int]] = defaultdict(list)
    for key, place in keyed:
        found[key].append(place)
    return [tuple(group) for group in found.values() if len(group) > 1]


def _linked(links: Iterable[tuple[int, int]]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return the connected groups, each with its links."""
    root: dict[int, int] = {}

    def find(place: int) -> int:
        while root.setdefault(place, place) != place:
            root[place] = root[root[place]]
            place = root[place]
        return place

    pairs = sorted(links)
    for one, other in pairs:
        root[find(other)] = find(one)
    groups: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
    for place in sorted(root):
        groups.setdefault(find(place), ([], []))[0].append(place)
    for pair in pairs:
        groups[find(pair[0])][1].append(pair)
    return list(groups.values())


# ---------------------------------------------------------------- arithmetic


def _layouts(thumbs: NDArray[np.uint8]) -> Vectors:
    """Reduce to 8×8 colours, float32 `[n, 192]`, mean 0 and length 1, so that a product is a correlation."""
    half = THUMB // 2
    return _standard(thumbs.reshape(-1, half, 2, half, 2, 3).mean((2, 4), dtype=np.float32))


def _details(thumbs: NDArray[np.uint8]) -> Vectors:
    """Take its 3×3 blur from the brightness, float32 `[n, 256]`, mean 0 and length 1."""
    gray = thumbs.mean(axis=3, dtype=np.float32)
    edged = np.pad(gray, ((0, 0), (1, 1), (1, 1)), mode="edge")
    blurred = sum(edged[:, row : row + THUMB, column : column + THUMB] for row in range(3) for column in range(3)) / 9
    return _standard(gray - blurred)


def _standard(values: Vectors) -> Vectors:
    """Flatten, centre, and bring to length 1; a picture of one colour becomes zeros, which are like nothing."""
    flat = values.reshape(len(values), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    standard: Vectors = np.where(lengths > 1e-3, flat / np.maximum(lengths, 1e-3), 0).astype(np.float32)
    return standard


def _main_axes(vectors: Vectors) -> Vectors:
    """Return the directions in which vectors differ most, float32 `[width, 32]`."""
    _, axes = np.linalg.eigh(vectors.T @ vectors)
    return np.ascontiguousarray(axes[:, -AXES:], np.float32)


def _shortened(vectors: Vectors, axes: Vectors) -> Vectors:
    """Project on the axes and append the length of what that leaves out, float32 `[n, 33]`.

    The product of two such is at least the product of the vectors: what is left out of both adds at most the product
    of its lengths (Cauchy and Schwarz).
    """
    kept = vectors @ axes
    left = np.sqrt(
        np.maximum(0, (vectors * vectors).sum(axis=1, keepdims=True) - (kept * kept).sum(axis=1, keepdims=True))
    )
    return np.hstack([kept, left])


def _above(rows: Vectors, vectors: Vectors, top: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs (first, second), first < second, whose product could be a near duplicate's."""
    firsts, seconds = [], []
    for left in range(top, len(vectors), COLUMNS):
        likeness = rows @ vectors[left : left + COLUMNS].T
        first, second = np.divmod(np.flatnonzero(likeness >= LAYOUT - 1e-4), likeness.shape[1])
        is_once = first + top < second + left
        firsts.append(first[is_once] + top)
        seconds.append(second[is_once] + left)
    return np.concatenate(firsts), np.concatenate(seconds)
