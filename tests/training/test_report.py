"""The report of a run and of a bundle: one file, whole, safe, and right in what it draws."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from training.data.arrays import Split
from training.data.listing import Picture
from training.evaluate import worst_mistakes
from training.recipes import Recipe
from training.report import sections
from training.report.charts import Line, line_chart, nice_ticks
from training.report.markup import Markup, element
from training.report.page import Told, page, write_report
from training.report.sources import counted, told_of
from training.runs import Epoch
from training.trust.calibration import calibration_error

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "<script>alert('x')</script> & \"co\""


def history(epochs: int) -> list[Epoch]:
    return [Epoch(n, 2 / n, 1 - 1 / (n + 1), 2.1 / n, 0.9 - 1 / (n + 2), 1.5, 2000.0) for n in range(1, epochs + 1)]


def answers(classes: int, images: int, side: int = 32) -> tuple[Split, np.ndarray]:
    """A split of noise and answers to it, most of them right."""
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, images)
    scores = random.normal(0, 1, (images, classes)) + 3 * np.eye(classes)[labels]
    probabilities = (np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)).astype(np.float32)
    pixels = random.integers(0, 256, (images, side, side, 3)).astype(np.uint8)
    pictures = tuple(Picture(f"test/{n}.jpg", int(labels[n]), "", pixels[n]) for n in range(images))
    return Split(pixels, labels, pictures), probabilities


class Page(HTMLParser):
    """What a browser would make of it: balanced elements, addresses, text by element."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.addresses, self.found, self.text = [], [], [], {}
        self.feed(document)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "img":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.fixture(scope="module")
def document() -> str:
    split, probabilities = answers(4, 200)
    told = Told(
        title=HOSTILE,
        lede="A test.",
        history=history(12),
        recipe=Recipe(epochs=12).model_dump(mode="json"),
        origin={"training command": f"convoy-train train --data '{HOSTILE}'", "hardware": "", "data digest": "ab12"},
    )
    return page(told, split, probabilities, (HOSTILE, "bee", "cow", "dog"))


def test_a_report_is_one_file_that_loads_nothing(document):
    found = Page(document)
    assert found.open == ["html"] or found.open == []
    assert found.addresses and all(address.startswith("data:image/") for address in found.addresses)
    assert not re.search(r"https?://|@import|url\(", document)
    assert "default-src 'none'" in document


def test_text_is_escaped_wherever_it_stands(document):
    found = Page(document)
    assert found.found.count("script") == 1
    assert HOSTILE in found.text["h1"]
    assert HOSTILE in found.text["td"]
    assert any(HOSTILE in text for text in found.text["title"])


def test_only_its_own_script_may_run(document):
    import base64
    import hashlib

    script = re.search(r"<script>(.*)</script>\n</body>", document, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in document


def test_it_tells_figures_recipe_and_origin(document):
    found = Page(document)
    split, probabilities = answers(4, 200)
    accuracy = float((probabilities.argmax(axis=1) == split.labels).mean())
    assert f"{accuracy:.2%}" in found.text["b"]
    assert f"{calibration_error(probabilities, split.labels):.2%}" in found.text["b"]
    headings = ["Curves", "Confusions", "Calibration", "Worst mistakes", "Classes", "Recipe", "Where it comes from"]
    assert found.text["h2"] == headings
    assert "epochs" in found.text["code"] and "ab12" in found.text["code"]
    assert "hardware" not in found.text["dt"]
    assert found.found.count("img") == min(40, int((1 - accuracy) * 200 + 0.5))


def test_a_report_of_a_thousand_classes_and_photos_stays_below_a_megabyte(tmp_path):
    split, probabilities = answers(1000, 300, side=224)
    labels = tuple(f"class number {number}" for number in range(1000))
    told = Told(title="large", lede="", history=history(300))
    # No mistake of noise compresses: this is the worst that can come.
    written = write_report(tmp_path / "new", told, split, np.roll(probabilities, 1, axis=1), labels)
    assert written == tmp_path / "new/report.html"
    assert written.stat().st_size < 1_000_000


def test_a_model_that_is_always_right_has_a_report_too():
    split, _ = answers(3, 6)
    document = page(Told(title="perfect", lede=""), split, np.eye(3, dtype=np.float32)[split.labels], ("a", "b", "c"))
    assert Page(document).text["h2"] == ["Confusions", "Calibration", "Classes", "Where it comes from"]


def test_what_was_held_out_has_its_line_too():
    held_out = [replace(epoch, validation_loss=1.25, validation_accuracy=0.5) for epoch in history(3)]
    drawn = sections.curves(held_out)
    assert drawn.count('class="line validation"') == 2 and "validation 1.250<" in drawn
    assert "validation" not in sections.curves(history(3))


def test_a_bundle_tells_what_its_manifest_holds():
    told = told_of(ROOT / "models/cifar10-article/1", data=Path("data/cifar10"), measured="all", command="typed")
    assert told.title == "cifar10-article/1"
    assert len(told.history) == 10
    assert told.tiles["parameters"] == "168 k" and told.tiles["multiply-adds"] == "4.04 M"
    assert told.recipe["network"] == "article_cnn"
    assert told.origin["command"] == "typed"


def test_lines_end_where_their_values_are():
    lines = [Line("train", "train", [3.0, 2.0, 1.0]), Line("test", "test", [3.0, float("nan"), 2.0])]
    chart = line_chart("Loss", [1, 2, 3], lines, "{:g}".format, "{:.2f}".format)
    train, test = re.findall(r'd="(M[^"]*)"', chart)
    assert train == "M46.0 14.0L235.0 140.0L424.0 266.0"
    assert test == "M46.0 14.0L424.0 140.0"
    assert "epoch 2: train 2.00<" in chart
    assert ">train 1.00<" in chart and ">test 2.00<" in chart


def test_lines_may_end_in_the_same_value():
    lines = [Line("train", "train", [0.5, 1.0]), Line("test", "test", [0.25, 1.0])]
    chart = line_chart("Accuracy", [1, 2], lines, "{:g}".format, "{:.2f}".format)
    assert ">train 1.00<" in chart and ">test 1.00<" in chart


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [
        (0.31, 0.68, [0.3, 0.4, 0.5, 0.6, 0.7]),
        (1.0, 1.8, [1.0, 1.2, 1.4, 1.6, 1.8]),
        (0.0, 0.0, [0.0, 0.2]),
        (3e-4, 9e-4, [2e-4, 4e-4, 6e-4, 8e-4, 1e-3]),
        (40.0, 2300.0, [0.0, 500.0, 1000.0, 1500.0, 2000.0, 2500.0]),
    ],
)
def test_ticks_are_round_and_reach_both_ends(least, most, expected):
    assert nice_ticks(least, most) == pytest.approx(expected)


def test_the_worst_mistakes_are_the_surest():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.99, 0.01]], np.float32)
    assert worst_mistakes(probabilities, np.array([1, 0, 0, 0]), 2).tolist() == [0, 1]


def test_markup_escapes_text_and_attributes_and_nothing_else():
    inner = element("b", "<", class_='"')
    assert inner == '<b class="&quot;">&lt;</b>'
    assert element("p", inner, None, 1.25, hidden=True, id=None) == f"<p hidden>{inner}1.2</p>"
    assert isinstance(inner, Markup)


@pytest.mark.parametrize(
    ("number", "words"), [(7, "7"), (167_562, "168 k"), (4_631_000, "4.63 M"), (4_089e6, "4.09 G")]
)
def test_counts_are_short(number, words):
    assert counted(number) == words
