"""Pictures of a run: its curves, its confusions, its worst mistakes. Draws figures that others have computed."""

import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from training.atomic import replacing
from training.data.arrays import Split
from training.evaluate import Figures, worst_mistakes
from training.runs import CONFUSION_FILE, CURVES_FILE, MISTAKES_FILE, Epoch
from training.trust.calibration import Bin

DOTS_PER_INCH = 110
RATES_FILE = "rates.png"
MISTAKES = 24
COLUMNS = 8
MOST_NAMED_CLASSES = 25


def draw_curves(history: Sequence[Epoch], directory: Path) -> None:
    """Draw loss and accuracy of each epoch."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [epoch.epoch for epoch in history]
    for axes, what, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("nats", "share"), strict=True):
        for part, colour in (("train", "tab:orange"), ("test", "tab:blue")):
            values = [getattr(epoch, f"{part}_{what}") for epoch in history]
            axes.plot(epochs, values, color=colour, marker="o", markersize=3, label=part)
        axes.set(xlabel="epoch", ylabel=f"{what} ({unit})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, directory / CURVES_FILE)


def draw_rates(tries: Sequence[tuple[float, float]], chosen: float, directory: Path) -> Path:
    """Draw the smoothed loss over the learning rate, and the rate that was chosen; return the picture's path."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([rate for rate, _ in tries], [loss for _, loss in tries], color="tab:orange")
    axes.axvline(chosen, color="tab:blue", label=f"{chosen:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / RATES_FILE
    _save(figure, path)
    return path


def draw_confusion(figures: Figures, directory: Path) -> None:
    """Draw the confusion matrix, each row as shares of its true class."""
    counts = figures.confusion
    shares = np.nan_to_num(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    figure = Figure(figsize=(6.4, 5.8), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true", title=figures.headline())
    if len(figures.labels) <= MOST_NAMED_CLASSES:
        places = range(len(figures.labels))
        axes.set_xticks(places, figures.labels, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(places, figures.labels, parse_math=False)
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
    _save(figure, directory / CONFUSION_FILE)


def draw_mistakes(split: Split, probabilities: NDArray[np.float32], labels: tuple[str, ...], directory: Path) -> None:
    """Draw the wrong answers that were given with the most confidence: true label over given label."""
    given = probabilities.argmax(axis=1)
    worst = worst_mistakes(probabilities, split.labels, MISTAKES)
    rows = max(1, -(-len(worst) // COLUMNS))
    figure = Figure(figsize=(1.25 * COLUMNS, 1.65 * rows), layout="constrained")
    for axes in (grid := figure.subplots(rows, COLUMNS, squeeze=False)).flat:
        axes.axis("off")
    for axes, index in zip(grid.flat, worst.tolist(), strict=False):
        axes.imshow(split.images[index])
        sure = probabilities[index, given[index]]
        title = f"{labels[split.labels[index]]}\nnot {labels[given[index]]} ({sure:.0%})"
        axes.set_title(title, fontsize=7, parse_math=False)
    _save(figure, directory / MISTAKES_FILE)


def draw_reliability(before: Sequence[Bin], after: Sequence[Bin], path: Path) -> None:
    """Draw how often answers were right by how sure they were, before and after calibration, and how many there are."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, bins, title in zip(figure.subplots(1, 2), (before, after), ("before", "after"), strict=True):
        full = [entry for entry in bins if entry.images]
        total = max(1, sum(entry.images for entry in full))
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
        axes.bar(
            [entry.low for entry in bins],
            [entry.images / total for entry in bins],
            [entry.high - entry.low for entry in bins],
            align="edge",
            color="tab:gray",
            alpha=0.4,
            label="share of images",
        )
        axes.plot(
            [entry.confidence for entry in full],
            [entry.accuracy for entry in full],
            "o-",
            color="tab:blue",
            label="right",
        )
        axes.set(xlabel="probability of the likeliest label", ylabel="share", xlim=(0, 1), ylim=(0, 1), title=title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG of at most 256 colours: a third of the bytes, and no difference to the eye."""
    drawn = BytesIO()
    with warnings.catch_warnings():
        # A class may be named in a script that the font lacks: boxes stand for it, and there is nothing to mend.
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    with replacing(path) as file:
        Image.open(drawn).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
