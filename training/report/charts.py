"""Charts as inline SVG: lines over epochs, a reliability diagram, a heat map. Colours are the page's, by class names.

Numbers in, elements out; a title inside an element is what a browser shows when the pointer rests on it.
"""

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.report.markup import Markup, element, joined
from training.trust.calibration import Bin

Format = Callable[[float], str]

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 96, 14, 34
MOST_MARKED_EPOCHS = 30
LABEL_HEIGHT = 15
MOST_NAMED = 25
"""Classes whose names and shares still find room beside and in a heat map."""


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a chart, a value for each epoch; `kind` is its class name in the page's style."""

    name: str
    kind: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where numbers lie: `x` and `y` give the place of a value in the drawing."""

    least: tuple[float, float]
    most: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT
    right: int = RIGHT

    def x(self, value: float) -> float:
        span = (self.most[0] - self.least[0]) or 1
        return LEFT + (value - self.least[0]) / span * (self.width - LEFT - self.right)

    def y(self, value: float) -> float:
        span = (self.most[1] - self.least[1]) or 1
        return self.height - BOTTOM - (value - self.least[1]) / span * (self.height - TOP - BOTTOM)


# ---------------------------------------------------------------- lines


def line_chart(title: str, epochs: Sequence[int], lines: Sequence[Line], tick: Format, shown: Format) -> Markup:
    """Draw series over epochs, each named at its end; values that are no numbers are left out.

    Args:
        title: what a reader who hears the page is told of it.
        epochs: ascending.
        lines: the series.
        tick: how a number beside the grid is written.
        shown: how a measured value is.
    """
    values = [value for line in lines for value in line.values if math.isfinite(value)]
    ticks = nice_ticks(min(values), max(values))
    frame = _Frame((epochs[0], ticks[0]), (epochs[-1], ticks[-1]))
    return element(
        "svg",
        _horizontals(frame, ticks, tick),
        _epoch_ticks(frame, epochs),
        joined(_path(frame, epochs, line) for line in lines),
        _ends(frame, lines, shown),
        joined(_column(frame, epochs, at, lines, shown) for at in range(len(epochs))),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        class_="chart",
        role="img",
        aria_label=title,
    )


def nice_ticks(least: float, most: float, about: int = 5) -> list[float]:
    """Return round numbers, evenly spaced, that reach from `least` or below to `most` or above."""
    span = (most - least) or abs(most) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= about)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _horizontals(frame: _Frame, ticks: Sequence[float], shown: Format) -> Markup:
    return joined(
        element(
            "g",
            element("line", x1=LEFT, x2=frame.width - frame.right, y1=frame.y(tick), y2=frame.y(tick), class_="grid"),
            element("text", shown(tick), x=LEFT - 8, y=frame.y(tick) + 4, class_="tick end"),
        )
        for tick in ticks
    )


def _epoch_ticks(frame: _Frame, epochs: Sequence[int]) -> Markup:
    step = max(1, math.ceil(len(epochs) / 10))
    step = next((nice for nice in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500) if nice >= step), step)
    marked = [epoch for epoch in epochs if epoch % step == 0] or [epochs[0]]
    bottom = frame.height - BOTTOM
    names = [element("text", f"{epoch:g}", x=frame.x(epoch), y=bottom + 18, class_="tick middle") for epoch in marked]
    return joined([*names, element("text", "epoch", x=frame.width - frame.right + 20, y=bottom + 18, class_="tick")])


def _path(frame: _Frame, epochs: Sequence[int], line: Line) -> Markup:
    points = [
        (frame.x(epoch), frame.y(value))
        for epoch, value in zip(epochs, line.values, strict=True)
        if math.isfinite(value)
    ]
    drawn = element("path", d=_polyline(points), class_=f"line {line.kind}")
    if len(points) > MOST_MARKED_EPOCHS:
        return drawn
    dots = [element("circle", cx=x, cy=y, r=2.5, class_=f"dot {line.kind}") for x, y in points]
    return joined([drawn, *dots])


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else "M0 0"


def _ends(frame: _Frame, lines: Sequence[Line], shown: Format) -> Markup:
    """Name each line at its last value; names that would lie on each other are moved apart."""
    at = [(frame.y(line.values[-1]), line) for line in lines if math.isfinite(line.values[-1])]
    names, lowest = [], -math.inf
    for y, line in sorted(at, key=lambda end: end[0]):
        lowest = max(y + 4, lowest + LABEL_HEIGHT)
        text = f"{line.name} {shown(line.values[-1])}"
        names.append(element("text", text, x=frame.width - frame.right + 8, y=lowest, class_=f"name {line.kind}"))
    return joined(names)


def _column(frame: _Frame, epochs: Sequence[int], at: int, lines: Sequence[Line], shown: Format) -> Markup:
    """The strip around an epoch: under the pointer it shows where it is, and what was measured there."""
    x, half = frame.x(epochs[at]), (frame.width - LEFT - frame.right) / max(1, len(epochs) - 1) / 2
    values = [(line, line.values[at]) for line in lines if math.isfinite(line.values[at])]
    told = f"epoch {epochs[at]}: " + ", ".join(f"{line.name} {shown(value)}" for line, value in values)
    return element(
        "g",
        element("rect", x=x - half, y=TOP, width=2 * half, height=frame.height - TOP - BOTTOM, class_="strip"),
        element("line", x1=x, x2=x, y1=TOP, y2=frame.height - BOTTOM, class_="cursor"),
        joined(element("circle", cx=x, cy=frame.y(v), r=4.5, class_=f"dot {line.kind} at") for line, v in values),
        element("title", told),
        class_="column",
    )


# ---------------------------------------------------------------- calibration


def reliability_diagram(bins: Sequence[Bin]) -> Markup:
    """Draw accuracy over confidence: a calibrated model's bars end on the diagonal; below, how many images."""
    side, counts = 380, 84
    frame = _Frame((0, 0), (1, 1), width=side + LEFT + 16, height=side + TOP + BOTTOM, right=16)
    tall = frame.height + counts
    most = max((entry.images for entry in bins), default=0) or 1
    shares = [number / 5 for number in range(6)]
    base = tall - BOTTOM
    across = joined(
        element("text", f"{share:.0%}", x=frame.x(share), y=base + 18, class_="tick middle") for share in shares
    )
    return element(
        "svg",
        _horizontals(frame, shares, "{:.0%}".format),
        across,
        joined(_reliability_bar(frame, entry) for entry in bins if entry.images),
        element("line", x1=frame.x(0), y1=frame.y(0), x2=frame.x(1), y2=frame.y(1), class_="ideal"),
        joined(_count_bar(frame, entry, base, (counts - 12) * entry.images / most) for entry in bins if entry.images),
        element("line", x1=LEFT, x2=frame.width - 16, y1=base, y2=base, class_="axis"),
        element("text", "accuracy", x=LEFT + 8, y=TOP + 14, class_="tick"),
        element("text", "images", x=LEFT + 8, y=frame.height - BOTTOM + 30, class_="tick"),
        element("text", "confidence", x=frame.x(0.5), y=tall - 1, class_="tick middle"),
        viewBox=f"0 0 {frame.width} {tall}",
        class_="chart square",
        role="img",
        aria_label="Reliability diagram",
    )


def _reliability_bar(frame: _Frame, entry: Bin) -> Markup:
    left, width = frame.x(entry.low) + 1, frame.x(entry.high) - frame.x(entry.low) - 2
    reached, claimed = frame.y(entry.accuracy), frame.y(entry.confidence)
    gap = "over" if entry.confidence > entry.accuracy else "under"
    told = (
        f"confidence {entry.low:.0%} to {entry.high:.0%}: {entry.images:,} images, "
        f"mean confidence {entry.confidence:.1%}, accuracy {entry.accuracy:.1%}"
    )
    top, height = min(reached, claimed), abs(reached - claimed)
    return element(
        "g",
        element("rect", x=left, y=reached, width=width, height=frame.y(0) - reached, class_="reached"),
        element("rect", x=left, y=top, width=width, height=height, class_=f"gap {gap}"),
        element("title", told),
        class_="bin",
    )


def _count_bar(frame: _Frame, entry: Bin, base: float, height: float) -> Markup:
    left, width = frame.x(entry.low) + 1, frame.x(entry.high) - frame.x(entry.low) - 2
    told = element("title", f"{entry.images:,} images")
    return element("rect", told, x=left, y=base - height, width=width, height=max(height, 0.8), class_="count")


# ---------------------------------------------------------------- confusions


def heat_map(shares: NDArray[np.float64], counts: NDArray[np.int64], labels: Sequence[str]) -> Markup:
    """Draw a confusion matrix, rows true, columns given, float `[classes, classes]` as shares of the row.

    Few classes are drawn with names and shares; many as a picture of one pixel a cell.
    """
    return _named_cells(shares, counts, labels) if len(labels) <= MOST_NAMED else _pixels(shares)


def _strengths(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how strongly each cell is coloured: right answers by share, mistakes beside the largest of them."""
    mistakes = shares * (1 - np.eye(len(shares)))
    largest = mistakes.max() or 1.0
    return np.where(np.eye(len(shares), dtype=bool), shares, 0.9 * (mistakes / largest) ** 0.75)


def _named_cells(shares: NDArray[np.float64], counts: NDArray[np.int64], labels: Sequence[str]) -> Markup:
    cell = max(24, min(46, 520 // len(labels)))
    margin = 20 + 7 * min(18, max(len(label) for label in labels))
    side = cell * len(labels)
    strengths, parts = _strengths(shares), []
    for at, label in enumerate(labels):
        middle, below = cell * (at + 0.5), side + 22.0
        parts.append(element("text", _cut(label), x=margin - 8, y=middle + 10, class_="tick end"))
        turn = f"rotate(-45 {margin + middle:.1f} {below:.0f})"
        parts.append(element("text", _cut(label), x=margin + middle, y=below, transform=turn, class_="tick end"))
    for (row, column), share in np.ndenumerate(shares):
        kind = "right" if row == column else "wrong"
        strength = strengths[row, column]
        words = f"{labels[row]}, given as {labels[column]}: {counts[row, column]:,} images, {share:.1%}"
        x, y = margin + cell * column, cell * row + 6
        inside: list[Markup] = [
            element(
                "rect",
                x=x + 0.5,
                y=y + 0.5,
                width=cell - 1,
                height=cell - 1,
                rx=2,
                fill_opacity=f"{strength:.2f}",
                class_=kind,
            )
        ]
        if share >= 0.005:
            tone = "on" if strength > 0.6 else "off"
            inside.append(
                element("text", f"{share * 100:.0f}", x=x + cell / 2, y=y + cell / 2 + 4, class_=f"share {tone}")
            )
        parts.append(element("g", *inside, element("title", words), class_="cell"))
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {margin + side + 4} {side + margin * 0.8 + 20:.0f}",
        class_="chart matrix",
        role="img",
        aria_label="Confusion matrix",
    )


def _cut(label: str) -> str:
    return label if len(label) <= 18 else f"{label[:17]}…"


RIGHT_COLOUR, WRONG_COLOUR = (37, 99, 235), (217, 72, 15)


def _pixels(shares: NDArray[np.float64]) -> Markup:
    """Draw a picture whose transparency is the share, so that it suits a light page and a dark one."""
    picture = np.empty((*shares.shape, 4), np.uint8)
    picture[..., :3] = WRONG_COLOUR
    picture[np.eye(len(shares), dtype=bool), :3] = RIGHT_COLOUR
    picture[..., 3] = (255 * _strengths(shares)).round().astype(np.uint8)
    return element(
        "img", src=data_uri(Image.fromarray(picture, "RGBA"), "PNG"), alt="Confusion matrix", class_="pixels"
    )


def data_uri(image: Image.Image, kind: str, **how: int) -> str:
    """Return a picture as a URI that holds it."""
    buffer = BytesIO()
    image.save(buffer, kind, optimize=True, **how)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
