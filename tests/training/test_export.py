import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from app.errors import BundleError
from app.golden import prove
from app.images import decode
from app.manifest import DATA_CARD_FILE, Bundle, Manifest, PixelRecipe, read_bundle, verify_files
from app.trust import Calibration
from tests.training.photos import SECRET, private_photo
from training import cli, export
from training.classifiers import Classifier, onnx_run, open_classifier
from training.data import arrays as data
from training.data.arrays import Split, load_split, read_listing
from training.data.cards import read_card
from training.errors import ExportError
from training.export import spread
from training.graphs.ending import plain
from training.graphs.exporter import OPSET
from training.names import check_name, next_version
from training.runs import read_checkpoint, write_checkpoint
from training.trust.calibration import softmax


@pytest.fixture(scope="module")
def work(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run and the bundle made of it; read only."""
    work = tmp_path_factory.mktemp("export")
    common = [f"--cache-dir={work / 'cache'}"]
    train = ["train", f"--data={tree}", f"--runs-dir={work / 'runs'}", "--name=insects", "--epochs=3", "--seed=4"]
    assert cli.main([*train, *common]) == 0
    assert cli.main(["export", str(work / "runs" / "insects"), f"--models-dir={work / 'models'}", *common]) == 0
    return work


def test_a_device_that_rounds_may_be_given_more_tolerance(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, common = str(work / "runs" / "insects"), [f"--models-dir={tmp_path}", f"--cache-dir={work / 'cache'}"]
    assert cli.main(["export", run, *common, "--golden-tolerance=0.01"]) == 0
    assert read_bundle(tmp_path / "insects" / "1").manifest.golden.tolerance == 0.01
    assert cli.main(["export", run, *common, "--golden-tolerance=0.5"]) != 0
    assert "must be a number above 0, and at most 0.02" in capsys.readouterr().err


@pytest.fixture
def bundle(work: Path) -> Bundle:
    return read_bundle(work / "models" / "insects" / "1")


@pytest.fixture
def test_split(work: Path, tree: Path, bundle: Bundle) -> Split:
    return load_split(read_listing(tree).part("test"), bundle.manifest.pixels, work / "cache")


def as_torch(work: Path) -> Classifier:
    return open_classifier(work / "runs" / "insects", torch.device("cpu"))


def test_the_bundle_is_whole_and_proves_itself(bundle: Bundle):
    verify_files(bundle)
    assert prove(bundle, onnx_run(bundle.model_path)) <= 1e-6


def test_the_manifest_tells_the_models_story(work: Path, bundle: Bundle):
    manifest = bundle.manifest
    checkpoint = read_checkpoint(work / "runs" / "insects")
    assert manifest.labels == ("ant", "bee", "cow")
    assert manifest.pixels == checkpoint.recipe.pixels
    assert manifest.training["recipe"] == checkpoint.recipe.model_dump(mode="json")
    assert len(manifest.training["history"]) == 3
    assert manifest.training["command"].startswith("convoy-train train --data=")
    assert manifest.evaluation["accuracy"] == pytest.approx(checkpoint.history[-1].test_accuracy, abs=1e-6)
    assert manifest.evaluation["images"] == 30
    assert manifest.provenance.command.startswith("convoy-train export ")


def test_a_bundle_knows_which_images_were_kept_from_training(bundle: Bundle):
    classifier = open_classifier(bundle.directory, torch.device("cpu"))
    assert (classifier.origin.test_fraction, classifier.origin.seed) == (0.2, 4)


def test_a_bundle_that_was_altered_is_not_evaluated(bundle: Bundle, tmp_path: Path):
    altered = tmp_path / bundle.directory.name
    shutil.copytree(bundle.directory, altered)
    model = altered / bundle.model_path.name
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        open_classifier(altered, torch.device("cpu"))


def test_the_graph_is_self_contained_and_names_no_place(work: Path, bundle: Bundle):
    model = onnx.load(bundle.model_path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import] == [OPSET]
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)
    assert not model.metadata_props
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    content = bundle.model_path.read_bytes()
    assert str(Path(export.__file__).parent.parent).encode() not in content
    assert b".py" not in content
    image, (probabilities, energy) = model.graph.input[0], model.graph.output
    assert (image.name, probabilities.name, energy.name) == ("image", "probabilities", "energy")
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value or d.dim_param for d in image.type.tensor_type.shape.dim] == ["n", 32, 32, 3]


def calibration_of(bundle: Bundle) -> Calibration:
    assert bundle.manifest.calibration is not None
    return bundle.manifest.calibration


def test_every_batch_size_gives_what_pytorch_gives(work: Path, bundle: Bundle, test_split: Split):
    run, images = onnx_run(bundle.model_path), np.asarray(test_split.images)
    expected = softmax(np.log(as_torch(work).run(images)), calibration_of(bundle).temperature)
    np.testing.assert_allclose(expected.sum(axis=1), 1, atol=1e-5)
    for batch in (1, 3, len(images)):
        found = np.concatenate([run(images[at : at + batch]) for at in range(0, len(images), batch)])
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_golden_set_covers_what_can_arrive(bundle: Bundle):
    encoded = bundle.golden_bytes()
    images = [Image.open(io.BytesIO(data)) for data in encoded]
    assert len(images) == 8
    assert sum(map(len, encoded)) <= 300_000
    assert max(map(len, encoded)) <= 60_000
    assert {"JPEG", "PNG"} <= {image.format for image in images}
    assert "L" in {image.mode for image in images}
    assert 6 in {image.getexif().get(0x0112) for image in images}
    assert any(width % 2 and height % 2 and width != height for width, height in (image.size for image in images))
    large = max(images, key=lambda image: image.size)
    assert min(large.size) >= 4 * 2 * 32


CHANGES: list[dict[str, object]] = [
    {"resize_short_side": 36},
    {"resize_short_side": 40},
    {"interpolation": "bicubic"},
    {"interpolation": "lanczos"},
    {"exif": "ignore"},
    {"min_decode_ratio": 0.0},
    {"min_decode_ratio": 1.0},
    {"min_decode_ratio": 4.0},
    {"height": 30},
    {"width": 30},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_wrong_pixel_recipe_fails_the_proof(bundle: Bundle, change: dict[str, object]):
    pixels = PixelRecipe.model_validate(bundle.manifest.pixels.model_dump() | change)
    wrong = Bundle(bundle.directory, bundle.manifest.model_copy(update={"pixels": pixels}))
    with pytest.raises(BundleError, match=r"does not reproduce its golden answers|cannot take"):
        prove(wrong, onnx_run(wrong.model_path))


def test_every_field_of_the_pixel_recipe_is_tried(bundle: Bundle):
    assert {field for change in CHANGES for field in change} == set(PixelRecipe.model_fields) - {"colour"}


def test_a_graph_that_differs_is_refused_and_nothing_is_left(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def write_the_real_graph_with_one_weight_off(_: object, __: object, path: Path) -> None:
        model = plain(onnx.load(work / "models" / "insects" / "1" / "model.onnx"))
        bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [3])
        values = onnx.numpy_helper.to_array(bias) + np.array([0.1, 0, 0], np.float32)
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(model, path)

    monkeypatch.setattr(export, "write_graph", write_the_real_graph_with_one_weight_off)
    arguments = [f"--models-dir={tmp_path / 'models'}", f"--cache-dir={work / 'cache'}"]
    assert cli.main(["export", str(work / "runs" / "insects"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convoy-train: The graph differs from the network by 0.0")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_does_not_prove_itself_is_not_put_in_place(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(bundle: Bundle, run: object) -> float:
        raise BundleError(f"{bundle.directory.name} is not proven.")

    monkeypatch.setattr(export, "prove", refuse)
    graph = plain(onnx.load(work / "models" / "insects" / "1" / "model.onnx"))
    monkeypatch.setattr(export, "write_graph", lambda *arguments: onnx.save(graph, arguments[2]))
    arguments = [f"--models-dir={tmp_path / 'models'}", f"--cache-dir={work / 'cache'}"]
    assert cli.main(["export", str(work / "runs" / "insects"), *arguments]) == 2
    assert not list((tmp_path / "models").iterdir())


def test_golden_images_may_come_from_photos_of_ones_own(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (3, 6, 6, 3), np.uint8)
    for name, tiles in zip("abc", colours, strict=True):
        Image.fromarray(tiles).resize((120, 90), Image.Resampling.NEAREST).save(photos / f"{name}.jpg")
    (photos / "README.md").write_text("whose they are")
    models = tmp_path / "models"
    arguments = ["export", str(work / "runs" / "insects"), f"--models-dir={models}", f"--cache-dir={work / 'cache'}"]
    assert cli.main([*arguments, f"--golden-from={photos}"]) == 0
    bundle = read_bundle(models / "insects" / "1")
    own = {path.read_bytes() for path in photos.glob("*.jpg")}
    assert len(own & set(bundle.golden_bytes())) == 3
    prove(bundle, onnx_run(bundle.model_path))

    (tmp_path / "empty").mkdir()
    assert cli.main([*arguments, f"--golden-from={tmp_path / 'empty'}"]) == 2
    assert f"{tmp_path / 'empty'} holds no .jpg" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["../../x", "abc", "0", "", "1.0", "9" * 10])
def test_a_version_that_cannot_be_served_is_refused_before_anything_is_computed(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, version: str
):
    monkeypatch.setattr(data, "load_split", None)
    arguments = [f"--version={version}", f"--models-dir={tmp_path / 'models'}"]
    assert cli.main(["export", str(work / "runs" / "insects"), *arguments]) == 2
    assert f"'{version}' cannot be a version: give --version a whole number from 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_card_does_not_say_that_a_model_was_trained_on_what_it_is_measured_on(
    work: Path, draw_tree: Callable[..., Path], tmp_path: Path
):
    other = draw_tree(tmp_path / "other", parts=(("train", 3), ("test", 2)))
    arguments = [f"--models-dir={tmp_path / 'models'}", f"--cache-dir={tmp_path / 'cache'}", f"--data={other}"]
    assert cli.main(["export", str(work / "runs" / "insects"), *arguments]) == 0
    card = read_card(tmp_path / "models" / "insects" / "1" / DATA_CARD_FILE)
    assert list(card.parts) == ["measured"]
    assert "is not described" in card.unknown[0]


def test_nothing_is_computed_for_a_place_that_cannot_be_written(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "load_split", None)
    (tmp_path / "models").write_text("no folder")
    assert cli.main(["export", str(work / "runs" / "insects"), f"--models-dir={tmp_path / 'models'}"]) == 2
    assert "models/insects cannot be written: name another folder by --models-dir." in capsys.readouterr().err


def test_an_unfinished_run_says_so(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = tmp_path / "runs"
    shutil.copytree(work / "runs" / "insects", runs / "insects")
    checkpoint = read_checkpoint(runs / "insects")
    more = checkpoint.recipe.model_copy(update={"epochs": 2000})
    write_checkpoint(runs / "insects", replace(checkpoint, recipe=more))
    arguments = [f"--models-dir={tmp_path / 'models'}", f"--cache-dir={work / 'cache'}"]
    assert cli.main(["export", str(runs / "insects"), *arguments]) == 0
    assert "the run is not finished; the weights are those after epoch 3 of 2000." in capsys.readouterr().out
    manifest = read_bundle(tmp_path / "models" / "insects" / "1").manifest
    assert manifest.training["weights"] == "those after epoch 3 of 2000"


def test_grown_data_is_neither_exported_nor_evaluated_as_unseen(
    draw_tree: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root, run, cache = tmp_path / "data", tmp_path / "runs" / "data", f"--cache-dir={tmp_path / 'cache'}"
    draw_tree(root, parts=(("", 6),))
    assert cli.main(["train", f"--data={root}", f"--runs-dir={run.parent}", "--epochs=1", cache]) == 0
    shutil.copyfile(root / "bee" / "000.jpg", root / "bee" / "more.jpg")
    for command in (["export", str(run), f"--models-dir={tmp_path / 'models'}"], ["evaluate", str(run)]):
        capsys.readouterr()
        assert cli.main([*command, cache]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"convoy-train: {root} does not hold the very images that the model was trained on")
        assert error.count("\n") == 1
    assert not (tmp_path / "models").exists()


def test_a_broken_golden_photo_is_named(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    models = tmp_path / "models"
    arguments = [f"--models-dir={models}", f"--cache-dir={work / 'cache'}", f"--golden-from={photos}"]
    assert cli.main(["export", str(work / "runs" / "insects"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"convoy-train: {photos / 'broken.jpg'}: The ")
    assert error.count("\n") == 1


def test_golden_images_carry_no_metadata_of_a_photo(work: Path, tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, orientation in enumerate((1, 6, 3)):
        (photos / f"{number}.jpg").write_bytes(private_photo(number, orientation))
    arguments = [f"--models-dir={tmp_path / 'models'}", f"--cache-dir={work / 'cache'}", f"--golden-from={photos}"]
    assert cli.main(["export", str(work / "runs" / "insects"), *arguments]) == 0
    bundle = read_bundle(tmp_path / "models" / "insects" / "1")
    assert not any(SECRET in image for image in bundle.golden_bytes())
    decoded = {decode(image, bundle.manifest.pixels).tobytes() for image in bundle.golden_bytes()}
    for photo in photos.iterdir():
        assert decode(photo.read_bytes(), bundle.manifest.pixels).tobytes() in decoded


def test_a_version_is_not_replaced_unasked(work: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--version=1", f"--models-dir={work / 'models'}", f"--cache-dir={work / 'cache'}"]
    assert cli.main(["export", str(work / "runs" / "insects"), *arguments]) == 2
    assert "insects/1 exists: leave --version out for the next free one" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Insects", "my insects", "../insects", ""])
def test_a_name_that_cannot_be_served_is_refused(name: str):
    with pytest.raises(ExportError, match=f"'{name}' cannot name a model: give --name of lower-case letters"):
        check_name(name)


def test_the_default_version_is_the_next_free_one(tmp_path: Path):
    assert next_version(tmp_path, "m") == "1"
    for name in ("2", "10", "draft"):
        (tmp_path / "m" / name).mkdir(parents=True)
    assert next_version(tmp_path, "m") == "11"


def test_the_compared_images_are_spread_over_the_classes():
    images = np.arange(100)[:, None]
    assert spread(images, 5).ravel().tolist() == [0, 25, 50, 74, 99]
    assert len(spread(images, 500)) == 100


def test_published_weights_become_a_bundle(
    work: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_weights: Callable[[int], Path]
):
    (tmp_path / "labels.txt").write_text("ant\nbee\ncow\nzebra\n")
    arguments = ["import", f"--labels={tmp_path / 'labels.txt'}", f"--data={tree}", "--name=zoo"]
    arguments += ["--source=drawn by the test", "--licence=none", "--size=32", "--network=article_cnn"]
    arguments += [f"--models-dir={tmp_path / 'models'}", f"--cache-dir={tmp_path / 'cache'}"]
    assert cli.main([*arguments, f"--weights={small_weights(3)}"]) == 2
    assert "weights-3.pt does not fit article_cnn with 4 classes: size mismatch for" in capsys.readouterr().err
    assert cli.main([*arguments, f"--weights={tmp_path / 'none.pt'}"]) == 2
    assert "none.pt does not exist: give --weights a PyTorch state dict." in capsys.readouterr().err
    assert cli.main([*arguments, f"--weights={small_weights(4)}", "--rescale=1", "--mean=127", "--std=128"]) == 0
    manifest = Manifest.model_validate(json.loads((tmp_path / "models" / "zoo" / "1" / "model.json").read_text()))
    assert manifest.labels == ("ant", "bee", "cow", "zebra")
    assert manifest.evaluation["images"] == 90
    assert manifest.provenance.licence == "none"
    image = decode((tree / "test" / "bee" / "003.jpg").read_bytes(), manifest.pixels)
    network = build_small(4)
    network.load_state_dict(torch.load(small_weights(4), weights_only=True))
    logits = network.eval()((torch.tensor(image).permute(2, 0, 1)[None].float() - 127) / 128)
    found = onnx_run(tmp_path / "models" / "zoo" / "1" / "model.onnx")(image[None])
    assert manifest.calibration is not None
    expected = softmax(logits.detach().numpy(), manifest.calibration.temperature)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def build_small(classes: int) -> torch.nn.Module:
    from training.nets import build

    torch.manual_seed(3)
    return build("article_cnn", classes=classes, size=32, dropout=0.5)


@pytest.fixture
def small_weights(tmp_path: Path) -> Callable[[int], Path]:
    def save(classes: int) -> Path:
        path = tmp_path / f"weights-{classes}.pt"
        torch.save(build_small(classes).state_dict(), path)
        return path

    return save
