import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from training.classifiers import Classifier
from training.data.arrays import Split
from training.errors import DataError
from training.evaluate import measure_figures, predict, prediction_table
from training.pictures import draw_confusion, draw_mistakes
from training.recipes import Recipe

LABELS = tuple("abcdef")


def test_figures_of_a_known_confusion():
    truth = np.array([0, 0, 0, 1, 1, 2])
    given = np.array([0, 0, 1, 1, 2, 2])
    figures = measure_figures(np.eye(6, dtype=np.float32)[given], truth, LABELS)
    assert figures.accuracy == pytest.approx(4 / 6)
    np.testing.assert_allclose(figures.precision, [1, 1 / 2, 1 / 2, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(figures.recall, [2 / 3, 1 / 2, 1, np.nan, np.nan, np.nan])
    record = figures.record()
    assert record["classes"][1] == {"label": "b", "images": 2, "precision": 0.5, "recall": 0.5}
    assert record["classes"][5] == {"label": "f", "images": 0, "precision": None, "recall": None}
    assert json.loads(json.dumps(record))["confusion"][1][2] == 1


def test_top5_counts_the_five_likeliest():
    probabilities = np.array([[0.3, 0.25, 0.2, 0.1, 0.1, 0.05]] * 6, np.float32)
    assert measure_figures(probabilities, np.arange(6), LABELS).top5 == pytest.approx(5 / 6)
    assert measure_figures(probabilities[:5, :5], np.arange(5), LABELS[:5]).top5 is None


def test_a_file_that_cannot_be_predicted_is_named(tmp_path: Path):
    classifier = Classifier(LABELS, Recipe().pixels, lambda images: np.zeros((len(images), 6), np.float32))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt: The data is not a JPEG, PNG or WebP image\."):
        predict(classifier, [tmp_path / "notes.txt"])
    with pytest.raises(DataError, match=r"none\.jpg cannot be read: No such file or directory\."):
        predict(classifier, [tmp_path / "none.jpg"])


ODD = ("[b]cat", "[/b]", "$10_$20", "鸟", "نمر", "plain")


def shown(table: object) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def test_names_are_shown_as_they_are():
    figures = measure_figures(np.eye(6, dtype=np.float32), np.arange(6), ODD)
    assert all(label in shown(figures.table()) for label in ODD)
    predicted = shown(prediction_table([Path("[/b].jpg")], np.eye(6, dtype=np.float32)[:1], ODD, top=2))
    assert "[/b].jpg" in predicted
    assert "[b]cat" in predicted


def test_any_name_can_be_drawn(tmp_path: Path):
    # A warning about a letter that the font lacks would fail the test too.
    truth, probabilities = np.arange(6), np.eye(6, dtype=np.float32)[[1, 2, 3, 4, 5, 0]]
    draw_confusion(measure_figures(probabilities, truth, ODD), tmp_path)
    draw_mistakes(Split(np.zeros((6, 8, 8, 3), np.uint8), truth, ()), probabilities, ODD, tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["confusion.png", "mistakes.png"]
