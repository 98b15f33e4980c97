import json
from pathlib import Path

import numpy as np
import pytest

from app.errors import BundleError
from app.manifest import PixelRecipe, read_bundle, verify_files
from tests.bundles import make_bundle


def edit(directory: Path, **fields: object) -> None:
    path = directory / "model.json"
    manifest = json.loads(path.read_text())
    for dotted, value in fields.items():
        *parents, last = dotted.split("__")
        place = manifest
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(manifest))


def test_a_bundle_survives_the_round_trip(tmp_path):
    written = make_bundle(tmp_path / "models")
    found = read_bundle(written.directory)
    verify_files(found)
    assert found == written
    assert len(found.golden_bytes()) == 4
    assert found.golden_probabilities().shape == (4, 6)


def test_writing_again_replaces_the_whole_bundle(tmp_path):
    make_bundle(tmp_path / "models", description="first")
    make_bundle(tmp_path / "models", description="second")
    assert read_bundle(tmp_path / "models/colours/1").manifest.description == "second"
    assert [path.name for path in (tmp_path / "models/colours").iterdir()] == ["1"]


def test_an_invalid_manifest_leaves_nothing_behind(tmp_path):
    with pytest.raises(BundleError, match="labels"):
        make_bundle(tmp_path / "models", labels=("only one",))
    assert not (tmp_path / "models/colours").exists()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pixels__interpolation": "nearest"}, "pixels.interpolation"),
        ({"pixels__resize_short_side": 8}, "smaller than the 16×16 crop"),
        ({"pixels__typo": 1}, "pixels.typo"),
        ({"labels": ["a", "b", "a", "c", "d", "e"]}, "'a' stands twice"),
        ({"labels": ["a", " ", "b", "c", "d", "e"]}, "a label is empty"),
        ({"schema_version": 2}, "schema_version"),
        ({"name": "../evil"}, "name"),
        ({"model__file": "../../etc/passwd"}, "model.file"),
        ({"model__file": "/etc/passwd"}, "model.file"),
        ({"model__sha256": "no"}, "model.sha256"),
        ({"golden__tolerance": 5}, "golden.tolerance"),
    ],
)
def test_a_broken_manifest_is_refused_with_the_field_s_name(tmp_path, fields, sentence):
    directory = make_bundle(tmp_path / "models").directory
    edit(directory, **fields)
    with pytest.raises(BundleError, match=sentence):
        read_bundle(directory)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"name": "x"}'])
def test_a_manifest_that_is_no_manifest(tmp_path, content):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.json"):
        read_bundle(tmp_path)


def test_a_directory_without_manifest(tmp_path):
    with pytest.raises(BundleError, match="is missing"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("file", ["model.onnx", "golden/red.png", "golden/probabilities.npy"])
@pytest.mark.parametrize("damage", ["missing", "altered", "truncated"])
def test_damaged_files_are_named(tmp_path, file, damage):
    bundle = make_bundle(tmp_path / "models")
    path = bundle.directory / file
    data = bytearray(path.read_bytes())
    match damage:
        case "missing":
            path.unlink()
        case "altered":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "truncated":
            path.write_bytes(data[:-10])
    with pytest.raises(BundleError, match=file):
        verify_files(bundle)


def test_a_golden_label_must_be_a_label(tmp_path):
    directory = make_bundle(tmp_path / "models").directory
    edit(directory, labels=["rot", "green", "blue", "white", "black", "gray"])
    with pytest.raises(BundleError, match="'red' is not among the labels"):
        verify_files(read_bundle(directory))


def test_golden_probabilities_of_another_shape_are_refused(tmp_path):
    bundle = make_bundle(tmp_path / "models")
    np.save(bundle.directory / "golden/probabilities.npy", np.zeros((4, 5), np.float32))
    with pytest.raises(BundleError, match=r"float32\[4, 6\]"):
        bundle.golden_probabilities()


def test_the_recipe_s_defaults_are_the_documented_ones():
    recipe = PixelRecipe(height=224, width=224, resize_short_side=256)
    assert (recipe.interpolation, recipe.exif, recipe.min_decode_ratio) == ("bilinear", "apply", 2.0)
