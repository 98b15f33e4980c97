"""Evaluation: probabilities and true labels in, figures out. Opens no model and draws nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from app.errors import ConvoyError
from app.images import decode
from training.classifiers import Classifier
from training.errors import DataError

TOP = 5


@dataclass(frozen=True, slots=True)
class Figures:
    """How a classifier did on a data set."""

    labels: tuple[str, ...]
    confusion: NDArray[np.int64]
    """`[true, predicted]`, counts."""
    top5: float | None
    """Share of images whose label is among the five likeliest; None for five classes or fewer."""

    @property
    def images(self) -> int:
        """How many images were classified."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of images whose likeliest label is the true one."""
        return float(self.confusion.trace() / self.images)

    @property
    def precision(self) -> NDArray[np.float64]:
        """Per class: of the images given its label, the share that has it; NaN where none was."""
        return _share(self.confusion.diagonal(), self.confusion.sum(axis=0))

    @property
    def recall(self) -> NDArray[np.float64]:
        """Per class: of the images that have its label, the share given it; NaN where there is none."""
        return _share(self.confusion.diagonal(), self.confusion.sum(axis=1))

    def summary(self) -> dict[str, Any]:
        """Return the figures of the whole, for a manifest."""
        top5 = {} if self.top5 is None else {"top5_accuracy": round(self.top5, 6)}
        return {"images": self.images, "accuracy": round(self.accuracy, 6)} | top5

    def record(self) -> dict[str, Any]:
        """Return every figure as JSON values; a share of nothing is null."""
        classes = [
            {"label": label, "images": int(count), "precision": _number(precision), "recall": _number(recall)}
            for label, count, precision, recall in self._rows()
        ]
        return self.summary() | {"classes": classes, "confusion": self.confusion.tolist()}

    def table(self) -> Table:
        """Return precision and recall of each class that has images or was predicted."""
        table = Table("class")
        for column in ("images", "precision", "recall"):
            table.add_column(column, justify="right")
        for label, count, precision, recall in self._rows():
            if count or not np.isnan(precision):
                table.add_row(Text(label), f"{count:,}", _percent(precision), _percent(recall))
        return table

    def headline(self) -> str:
        """Say accuracy, and top-5 where it means something, in one line."""
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2%}"
        return f"accuracy {self.accuracy:.2%}{top5} on {self.images:,} images"

    def _rows(self) -> Sequence[tuple[str, int, float, float]]:
        counts = self.confusion.sum(axis=1).tolist()
        return list(zip(self.labels, counts, self.precision.tolist(), self.recall.tolist(), strict=True))


def measure_figures(probabilities: NDArray[np.float32], truth: NDArray[np.int64], labels: tuple[str, ...]) -> Figures:
    """Compare probabilities float32 `[n, classes]` with true labels int64 `[n]`."""
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(confusion, (truth, probabilities.argmax(axis=1)), 1)
    if len(labels) <= TOP:
        return Figures(labels, confusion, top5=None)
    likeliest = np.argpartition(probabilities, -TOP, axis=1)[:, -TOP:]
    return Figures(labels, confusion, top5=float((likeliest == truth[:, None]).any(axis=1).mean()))


def worst_mistakes(probabilities: NDArray[np.float32], truth: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return the places of the wrong answers given with the most confidence, int64 `[<= most]`, the surest first."""
    given = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(given != truth)
    return wrong[np.argsort(-probabilities[wrong, given[wrong]], kind="stable")][:most]


def predict(classifier: Classifier, files: Sequence[Path]) -> NDArray[np.float32]:
    """Classify image files one by one: float32 `[files, classes]`.

    Raises:
        DataError: a file cannot be read or decoded; the sentence names it.
    """
    rows = []
    for file in files:
        try:
            image = decode(file.read_bytes(), classifier.pixels)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}.") from error
        except ConvoyError as error:
            raise DataError(f"{file}: {error.message}") from error
        rows.append(classifier.run(image[None])[0])
    return np.stack(rows)


def prediction_table(
    files: Sequence[Path], probabilities: NDArray[np.float32], labels: tuple[str, ...], top: int
) -> Table:
    """Return the likeliest labels of each file."""
    table = Table("file", "label")
    table.add_column("probability", justify="right")
    for file, row in zip(files, probabilities, strict=True):
        for place, index in enumerate(np.argsort(-row)[:top].tolist()):
            table.add_row(Text(str(file) if place == 0 else ""), Text(labels[index]), f"{row[index]:.2%}")
    return table


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = np.full(len(part), np.nan)
    np.divide(part, whole, out=shares, where=whole > 0)
    return shares


def _number(share: float) -> float | None:
    return None if np.isnan(share) else round(share, 6)


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{share:.1%}"
