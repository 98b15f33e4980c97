"""The whole page: what is told of a model, in order, in one file that loads nothing and runs no script but its own."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app import __version__
from training.atomic import replacing
from training.data.arrays import Split
from training.evaluate import measure_figures
from training.report import sections
from training.report.markup import Markup, element
from training.runs import REPORT_FILE, Epoch
from training.trust.calibration import calibration_error, reliability


@dataclass(frozen=True, slots=True)
class Told:
    """What a report says beside what it measures."""

    title: str
    lede: str
    """One sentence: what it is and what it was measured on."""
    history: Sequence[Epoch] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    tiles: Mapping[str, str] = field(default_factory=dict)
    """Figures to stand beside accuracy: name → value."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Hardware, commands, data, digests: name → value; what is empty is left out."""


def write_report(
    directory: Path, told: Told, split: Split, probabilities: NDArray[np.float32], labels: tuple[str, ...]
) -> Path:
    """Write `report.html` into a directory.

    Args:
        directory: made if need be.
        told: what is not in the probabilities.
        split: the images that were classified.
        probabilities: float32 `[n, classes]`, of the split's images.
        labels: names of the classes.
    """
    path = directory / REPORT_FILE
    with replacing(path) as file:
        file.write(page(told, split, probabilities, labels).encode())
    return path


def page(told: Told, split: Split, probabilities: NDArray[np.float32], labels: tuple[str, ...]) -> str:
    """Return the document; arguments as of `write_report`."""
    figures = measure_figures(probabilities, split.labels, labels)
    bins, error = reliability(probabilities, split.labels), calibration_error(probabilities, split.labels)
    measured = {
        "accuracy": f"{figures.accuracy:.2%}",
        "top-5 accuracy": "" if figures.top5 is None else f"{figures.top5:.2%}",
        "calibration error": f"{error:.2%}",
        "test images": f"{figures.images:,}",
    }
    tiles = {name: value for name, value in {**measured, **told.tiles}.items() if value}
    header = element(
        "header",
        element("p", f"Convoy {__version__}", class_="kicker"),
        element("h1", told.title),
        element("p", told.lede, class_="lede"),
        sections.tiles(tiles),
    )
    main = element(
        "main",
        sections.curves(told.history) if told.history else None,
        sections.confusions(figures),
        sections.calibration(bins, error),
        sections.mistakes(split, probabilities, labels),
        sections.classes(figures),
        sections.recipe(told.recipe) if told.recipe else None,
        sections.origin(told.origin),
    )
    return _document(told.title, header, main)


def _document(title: str, header: Markup, main: Markup) -> str:
    style, script = _asset("report.css"), _asset("report.js")
    # The browser itself holds the page to its word: nothing is loaded, and no script but this one runs.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            element("title", f"{title} · Convoy"),
            f"<style>\n{style}</style>",
            f"<body>{header}{main}",
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        )
    )


def _asset(name: str) -> Markup:
    return Markup(files("training.report").joinpath(name).read_text(encoding="utf-8"))
