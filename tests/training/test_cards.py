"""Data cards: written by export, verified at load, and able to say whether some data is the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.errors import BundleError
from app.manifest import DATA_CARD_FILE, MANIFEST_FILE, PixelRecipe, add_data_card, read_bundle, verify_files
from tests.bundles import make_bundle
from training import cli
from training.data.arrays import read_listing
from training.data.cards import DataCard, compare, describe, read_card
from training.data.listing import Listing, Picture
from training.errors import DataError

PIXELS = PixelRecipe(height=32, width=32, resize_short_side=32)


@pytest.fixture
def data(draw_tree: Callable[..., Path], tmp_path: Path) -> Path:
    return draw_tree(tmp_path / "insects", parts=(("train", 4), ("test", 2)))


def card_of(data: Path, **options: object) -> DataCard:
    fields = {"name": data.name, "source": "drawn in a test", "licence": "Apache-2.0", "command": "test"}
    return describe(read_listing(data), PIXELS, **(fields | options))  # type: ignore[arg-type]


def test_a_card_says_what_is_in_the_data(data: Path):
    card = card_of(data)
    assert card.division.by == "data" and card.unknown == ()
    assert {name: part.images for name, part in card.parts.items()} == {"train": 12, "test": 6}
    train = card.parts["train"]
    assert {label: entry.images for label, entry in train.classes.items()} == {"ant": 4, "bee": 4, "cow": 4}
    assert (train.width.min, train.height.max, train.formats, train.modes) == (32, 32, {"JPEG": 12}, {"RGB": 12})
    assert "Pillow" in card.decoder


def test_the_same_files_elsewhere_are_the_data_of_the_card(data: Path, tmp_path: Path):
    card = card_of(data)
    shutil.copytree(data, tmp_path / "copy")
    found = compare(card, read_listing(tmp_path / "copy"), tmp_path / "copy")
    assert found.is_same and found.is_exact
    (tmp_path / "copy/train/bee/000.jpg").rename(tmp_path / "copy/train/bee/zzz.jpg")
    found = compare(card, read_listing(tmp_path / "copy"), tmp_path / "copy")
    assert found.is_same and not found.is_exact


def test_what_differs_is_named_by_part_and_class(data: Path):
    card = card_of(data)
    (data / "train/ant/000.jpg").unlink()
    shutil.copy(data / "test/bee/000.jpg", data / "test/bee/001.jpg")
    (data / "train/bee/000.jpg").rename(data / "train/cow/000b.jpg")
    found = compare(card, read_listing(data), data)
    assert not found.is_same
    assert found.sentences[1:] == (
        "train/ant: 3 images, in the card 4.",
        "train/bee: 3 images, in the card 4.",
        "train/cow: 5 images, in the card 4.",
        "test/bee: as many images as in the card, 2, but others.",
    )


def test_a_drawn_division_is_drawn_again(draw_tree: Callable[..., Path], tmp_path: Path):
    data = draw_tree(tmp_path / "whole", parts=(("", 10),))
    divided = read_listing(data).split(0.3, 5)
    card = describe(divided, PIXELS, name="whole", source="here", command="test", drawn=(0.3, 5))
    assert (card.division.by, card.parts["test"].images) == ("draw", 9)
    assert card.unknown == ("On which terms the data may be used is not stated.",)
    assert compare(card, read_listing(data), data).is_exact


def test_pixels_out_of_an_archive_have_digests_too():
    image = np.zeros((32, 32, 3), np.uint8)
    listing = Listing(("a", "b"), (Picture("0", 0, "", image), Picture("1", 1, "", image + 1)), test=None)
    card = describe(listing, PIXELS, name="x", source="y", command="z", is_trained_on=False)
    assert list(card.parts) == ["measured"]
    assert card.parts["measured"].classes["a"].sha256 != card.parts["measured"].classes["b"].sha256
    assert compare(card, listing, Path("archive")).is_exact


def test_a_file_that_is_no_card_is_told(tmp_path: Path):
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(DataError, match=r"data\.json is no data card: name: Field required"):
        read_card(tmp_path / "data.json")
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        read_card(tmp_path / "none.json")


# ---------------------------------------------------------------- in a bundle


def test_a_bundle_without_a_card_is_whole_and_one_with_a_card_must_have_it(tmp_path: Path):
    bundle = make_bundle(tmp_path / "models")
    verify_files(bundle)
    before = (bundle.directory / "model.onnx").stat()
    carded = add_data_card(bundle, b"{}")
    assert read_bundle(bundle.directory) == carded
    verify_files(carded)
    assert (bundle.directory / "model.onnx").stat().st_size == before.st_size
    (bundle.directory / DATA_CARD_FILE).write_text("[]")
    with pytest.raises(BundleError, match=r"data\.json is not the file that was exported"):
        verify_files(read_bundle(bundle.directory))
    (bundle.directory / DATA_CARD_FILE).unlink()
    with pytest.raises(BundleError, match=r"data\.json is missing"):
        verify_files(read_bundle(bundle.directory))


def test_a_manifest_from_before_there_were_cards_is_read(tmp_path: Path):
    bundle = make_bundle(tmp_path / "models")
    path = bundle.directory / MANIFEST_FILE
    record = json.loads(path.read_text())
    del record["data_card"]
    path.write_text(json.dumps(record))
    assert read_bundle(bundle.directory).manifest.data_card is None


def test_the_card_command_writes_what_was_only_measured_on(
    draw_tree: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bundle = make_bundle(tmp_path / "models")
    data = draw_tree(tmp_path / "photos", parts=(("", 2),))
    for old, new in (("ant", "red"), ("bee", "green"), ("cow", "blue")):
        (data / old).rename(data / new)
    words = ["--only-measured", "--data-licence", "free", "--unknown", "Who drew them."]
    assert cli.main(["card", str(bundle.directory), "--data", str(data), *words]) == 0
    card = bundle.directory / DATA_CARD_FILE
    assert read_card(card).unknown == ("Who drew them.", "Where the data comes from is not stated.")
    verify_files(read_bundle(bundle.directory))
    capsys.readouterr()

    assert cli.main(["check", "--card", str(card), "--data", str(data)]) == 0
    assert "is the data of the card: the same images and labels, and names" in capsys.readouterr().out
    (data / "red/000.jpg").unlink()
    assert cli.main(["check", "--card", str(card), "--data", str(data), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["sentences"][1] == "measured/red: 1 images, in the card 2."


def test_the_card_command_refuses_data_that_the_bundle_was_not_trained_on(
    draw_tree: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bundle = make_bundle(tmp_path / "models", training={"data_digest": "0" * 64})
    data = draw_tree(tmp_path / "photos")
    for part in ("train", "test"):
        for old, new in (("ant", "red"), ("bee", "green"), ("cow", "blue")):
            (data / part / old).rename(data / part / new)
    assert cli.main(["card", str(bundle.directory), "--data", str(data)]) == 2
    assert "does not have the names and labels" in capsys.readouterr().err
    assert not (bundle.directory / DATA_CARD_FILE).exists()
