"""The parts of a report, one function each: figures that others computed in, a section of the page out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.data.arrays import Split
from training.evaluate import Figures, worst_mistakes
from training.recipes import Recipe
from training.report.charts import MOST_NAMED, Line, data_uri, heat_map, line_chart, reliability_diagram
from training.report.markup import Markup, element, joined
from training.runs import Epoch
from training.trust.calibration import Bin

MISTAKES = 40
FREQUENT_CONFUSIONS = 12
THUMBNAIL = 112
"""Longest side of a mistake's picture, pixels: with 40 of them a report stays far below a megabyte."""
SMALL = 64
"""Pictures of this side or less are kept pixel for pixel."""
PARTS = ("train", "validation", "test")
"""Of the data, as the history names them; validation is there where some was held out."""
ROW_OF_NOTHING = "–"


def section(title: str, *parts: Markup | None, note: str | None = None) -> Markup:
    """Put parts under a heading, with a sentence on how to read them."""
    told = None if note is None else element("p", note, class_="note")
    return element("section", element("h2", title), told, *parts)


def tiles(facts: Mapping[str, str]) -> Markup:
    """Show the few figures that matter most, large."""
    return element(
        "div",
        joined(
            element("div", element("b", value), element("span", name), class_="tile") for name, value in facts.items()
        ),
        class_="tiles",
    )


# ---------------------------------------------------------------- curves


def curves(history: Sequence[Epoch]) -> Markup:
    """Draw loss and accuracy over the epochs."""
    epochs = [epoch.epoch for epoch in history]
    charts = []
    for what, shown in (("loss", "{:.3f}".format), ("accuracy", "{:.1%}".format)):
        values = {part: [getattr(epoch, f"{part}_{what}") for epoch in history] for part in PARTS}
        lines = [Line(part, part, series) for part, series in values.items() if None not in series]
        tick = "{:.0%}".format if what == "accuracy" else "{:.3g}".format
        chart = line_chart(f"{what.capitalize()} by epoch", epochs, lines, tick, shown)
        charts.append(element("figure", element("figcaption", what.capitalize()), chart))
    note = (
        "Train figures are means over each epoch, with augmentation and dropout on; test figures are of the weights "
        "at its end."
    )
    return section("Curves", element("div", *charts, class_="pair"), note=note)


# ---------------------------------------------------------------- calibration


def calibration(bins: Sequence[Bin], error: float) -> Markup:
    """Draw how far confidence can be taken at its word."""
    filled = [entry for entry in bins if entry.images]
    images = sum(entry.images for entry in filled)
    confidence = sum(entry.images * entry.confidence for entry in filled) / images
    accuracy = sum(entry.images * entry.accuracy for entry in filled) / images
    lean = "more sure than right" if confidence > accuracy else "more right than sure"
    told = element(
        "div",
        element("p", element("b", f"{error:.2%}"), " expected calibration error", class_="large"),
        element(
            "p",
            f"On average the model is {confidence:.1%} sure and {accuracy:.1%} right: {lean}. "
            f"The error is the mean distance between the two over {len(bins)} bins of confidence, weighed by their "
            "images.",
        ),
        element(
            "p",
            element("span", class_="key reached"),
            "accuracy ",
            element("span", class_="key over"),
            "too sure by ",
            element("span", class_="key under"),
            "too modest by",
            class_="legend",
        ),
        class_="aside",
    )
    return section("Calibration", element("div", reliability_diagram(bins), told, class_="beside"))


# ---------------------------------------------------------------- confusions


def confusions(figures: Figures) -> Markup:
    """Draw the confusion matrix, and list the pairs that are mistaken most often."""
    counts = figures.confusion
    rows = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares = counts / rows
    chart = heat_map(shares, counts, figures.labels)
    unit = "Cells are percent of the true class." if len(figures.labels) <= MOST_NAMED else "One pixel a cell."
    note = f"Rows are true classes, columns what was answered. {unit} Mistakes are coloured beside the largest of them."
    return section("Confusions", element("div", chart, _frequent(figures, shares), class_="beside"), note=note)


def _frequent(figures: Figures, shares: NDArray[np.float64]) -> Markup | None:
    counts = figures.confusion * (1 - np.eye(len(figures.labels), dtype=np.int64))
    order = np.argsort(-counts, axis=None, kind="stable")[:FREQUENT_CONFUSIONS]
    pairs = [divmod(int(place), len(figures.labels)) for place in order if counts.flat[place]]
    if not pairs:
        return None
    rows = [
        element(
            "tr",
            element("td", figures.labels[true]),
            element("td", figures.labels[given], class_="wrong"),
            element("td", f"{counts[true, given]:,}", class_="number"),
            element("td", f"{shares[true, given]:.1%}", class_="number"),
        )
        for true, given in pairs
    ]
    columns = (("true", None), ("given", None), ("images", "number"), ("of the class", "number"))
    head = element("tr", *(element("th", name, class_=kind) for name, kind in columns))
    table = element("table", element("thead", head), element("tbody", *rows))
    return element("div", element("h3", "Most often mistaken"), table, class_="aside")


# ---------------------------------------------------------------- mistakes


def mistakes(split: Split, probabilities: NDArray[np.float32], labels: Sequence[str]) -> Markup | None:
    """Show the wrong answers that were given with the most confidence, as the network saw them; None: no mistakes."""
    given = probabilities.argmax(axis=1)
    worst = worst_mistakes(probabilities, split.labels, MISTAKES).tolist()
    if not worst:
        return None
    figures = [
        element(
            "figure",
            element("img", src=_thumbnail(split.images[at]), alt="", title=split.pictures[at].name),
            element(
                "figcaption",
                element("b", labels[split.labels[at]]),
                element("span", f"{labels[given[at]]} {probabilities[at, given[at]]:.0%}", class_="wrong"),
            ),
        )
        for at in worst
    ]
    note = "The most confident wrong answers: what is there, and what was said. Resting on a picture tells its file."
    return section("Worst mistakes", element("div", *figures, class_="mistakes"), note=note)


def _thumbnail(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(np.asarray(pixels))
    if max(image.size) <= SMALL:
        return data_uri(image, "PNG")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(image, "JPEG", quality=82)


# ---------------------------------------------------------------- classes


def classes(figures: Figures) -> Markup:
    """List precision and recall of each class that has images or was answered, to be sorted by a click."""
    confusion, precisions, recalls = figures.confusion, figures.precision, figures.recall
    rows = []
    for at, label in enumerate(figures.labels):
        images, precision, recall = int(confusion[at].sum()), precisions[at], recalls[at]
        if not images and np.isnan(precision):
            continue
        others = confusion[at].copy()
        others[at] = 0
        rival = f"{figures.labels[others.argmax()]} ({others.max():,})" if others.any() else ROW_OF_NOTHING
        rows.append(
            element(
                "tr",
                element("td", label),
                _number(f"{images:,}", images),
                _share(precision),
                _share(recall),
                _share(_f1(precision, recall)),
                element("td", rival),
            )
        )
    columns = ("class", "images", "precision", "recall", "F1", "most often taken for")
    head = [
        element("th", element("button", name, type="button"), scope="col", class_="number" if 0 < at < 5 else None)
        for at, name in enumerate(columns)
    ]
    table = element("table", element("thead", element("tr", *head)), element("tbody", *rows), class_="sortable")
    note = (
        "Precision: of the images answered as this class, the share that is of it. Recall: of its images, the share "
        "that was answered so."
    )
    return section("Classes", element("div", table, class_="scroll"), note=note)


def _number(text: str, value: float) -> Markup:
    return element("td", text, class_="number", data_value=f"{value:g}")


def _share(share: float) -> Markup:
    if np.isnan(share):
        return _number(ROW_OF_NOTHING, -1)
    # A bar behind the number: the style draws it as wide as this share.
    return element("td", f"{share:.1%}", class_="number bar", style=f"--share:{share:.3f}", data_value=f"{share:.6f}")


def _f1(precision: float, recall: float) -> float:
    whole = precision + recall
    return 2 * precision * recall / whole if whole > 0 else float("nan") if np.isnan(whole) else 0.0


# ---------------------------------------------------------------- what it came from


def recipe(knobs: Mapping[str, Any]) -> Markup:
    """List a recipe: first what differs from the defaults, which are the article's, then all the rest."""
    defaults = Recipe().model_dump(mode="json")
    changed = {name: value for name, value in knobs.items() if name not in defaults or defaults[name] != value}
    same = {name: value for name, value in knobs.items() if name not in changed}
    rows = [_knob(name, value, _shown(defaults.get(name, ""))) for name, value in changed.items()]
    head = element("tr", *(element("th", name) for name in ("knob", "value", "default")))
    first = (
        element("table", element("thead", head), element("tbody", *rows))
        if rows
        else element("p", "Every knob is at its default.")
    )
    rest = element(
        "details",
        element("summary", f"{len(same)} knobs at their defaults"),
        element("table", element("tbody", *(_knob(name, value) for name, value in same.items()))),
    )
    return section("Recipe", first, rest)


def _knob(name: str, value: Any, default: str | None = None) -> Markup:
    before = None if default is None else element("td", default, class_="faint")
    return element("tr", element("td", element("code", name)), element("td", _shown(value)), before)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_shown(part) for part in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def origin(facts: Mapping[str, str]) -> Markup:
    """List what was measured on which machine from which data, and the commands, as they can be typed again."""
    pairs = [
        joined([element("dt", name), element("dd", element("code", value) if _is_code(name) else value)])
        for name, value in facts.items()
        if value
    ]
    return section("Where it comes from", element("dl", *pairs))


def _is_code(name: str) -> bool:
    return name.endswith(("command", "digest"))
