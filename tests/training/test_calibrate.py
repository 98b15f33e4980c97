"""A bundle recalibrated: the colour bundle of the tests, on images whose labels it half knows."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from app.errors import BundleError
from app.golden import prove
from app.loading import check_graph
from app.manifest import Bundle, add_data_card, read_bundle, verify_files
from app.sessions import ClassifierSession
from tests.bundles import COLOURS, encode, make_bundle, noise_image
from training import cli
from training.classifiers import onnx_run
from training.graphs.ending import LOGITS_NAME, logits_of, plain, temperature_of
from training.trust import calibrate
from training.trust.calibration import softmax
from training.trust.energy import energy_of

EACH = 12
CARD = b'{"name": "colours"}'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The colour bundle, and what `calibrate` makes of it as version 2; read only."""
    root = tmp_path_factory.mktemp("calibrate")
    make_bundle(root / "models")
    add_data_card(version(root / "models", 1), CARD)
    random = np.random.default_rng(0)
    for label, colour in enumerate(COLOURS.values()):
        folder = root / "data" / list(COLOURS)[label]
        folder.mkdir(parents=True)
        for number in range(EACH):
            # Every third picture has another class's colour: the model is surer than it should be.
            shown = colour if number % 3 else list(COLOURS.values())[(label + number + 1) % len(COLOURS)]
            pixels = np.array(shown) + random.normal(0, 30, (16, 16, 3))
            (folder / f"{number}.png").write_bytes(encode(pixels.clip(0, 255).astype(np.uint8)))
    (root / "strange" / "deep").mkdir(parents=True)
    for seed in range(5):
        (root / "strange" / "deep" / f"{seed}.png").write_bytes(noise_image(seed))
    assert run(root, "--unfamiliar", str(root / "strange")) == 0
    return root / "models"


def run(root: Path, *arguments: str, model: str = "colours/1") -> int:
    common = ["--data", str(root / "data"), "--cache-dir", str(root / "cache")]
    return cli.main(["calibrate", str(root / "models" / model), *common, *arguments])


def version(models: Path, number: int) -> Bundle:
    return read_bundle(models / "colours" / str(number))


def test_the_new_version_is_whole_and_its_golden_images_are_the_old_ones(models: Path):
    old, new = version(models, 1), version(models, 2)
    verify_files(new)
    assert prove(new, onnx_run(new.model_path)) <= 1e-6
    assert new.golden_bytes() == old.golden_bytes()
    assert new.data_card_bytes() == old.data_card_bytes() == CARD
    assert [image.label for image in new.manifest.golden.images] == [i.label for i in old.manifest.golden.images]
    assert plain(onnx.load(new.model_path)) == onnx.load(old.model_path)
    assert new.manifest.provenance.command.startswith("make_bundle\nconvoy-train calibrate ")
    assert new.manifest.description == old.manifest.description


def test_the_graph_answers_by_the_temperature_of_the_manifest(models: Path, tmp_path: Path):
    new = version(models, 2)
    graph = onnx.load(new.model_path)
    calibration = new.manifest.calibration
    assert calibration is not None
    assert calibration.temperature != 1
    assert calibration.after.negative_log_likelihood < calibration.before.negative_log_likelihood
    assert temperature_of(graph) == pytest.approx(calibration.temperature, rel=1e-6)
    onnx.save(logits_of(graph), tmp_path / "logits.onnx")
    images = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8)
    logits = onnx_run(tmp_path / "logits.onnx", given=LOGITS_NAME)(images)
    expected = softmax(logits, calibration.temperature)
    np.testing.assert_allclose(onnx_run(new.model_path)(images), expected, atol=1e-6)
    energies = energy_of(logits, calibration.temperature)
    np.testing.assert_allclose(onnx_run(new.model_path, given="energy")(images), energies, rtol=1e-5)


def test_the_service_sees_probabilities_alone(models: Path):
    """A graph with an energy and one without are the same to it."""
    old, new = version(models, 1), version(models, 2)
    session = ClassifierSession(new.model_path, "cpu", 1)
    check_graph(new, session)
    assert session.outputs == ClassifierSession(old.model_path, "cpu", 1).outputs
    assert [array.shape for array in session.run(np.zeros((3, 16, 16, 3), np.uint8))] == [(3, 6)]


def test_the_sections_survive_the_round_trip_and_a_misspelt_field_does_not(models: Path, tmp_path: Path):
    new = version(models, 2)
    manifest = new.manifest
    assert manifest.calibration and manifest.conformal and manifest.ood and manifest.reference
    assert manifest.reference.images == manifest.calibration.fitted_images == EACH * len(COLOURS)
    assert sum(manifest.reference.predicted) == manifest.reference.images
    (stranger,) = manifest.ood.unfamiliar
    assert (stranger.images, len(stranger.noticed)) == (5, len(manifest.ood.thresholds))
    text = json.loads((new.directory / "model.json").read_text())
    for section, field, wrong, sentence in (
        ("calibration", "temprature", 2, "calibration.temprature"),
        ("calibration", "temperature", 0, "calibration.temperature"),
        ("conformal", "sets", [], "conformal.sets"),
        ("ood", "score", "entropy", "ood.score"),
        ("reference", "predicted", [1, 2], "counts 2 predicted labels, but there are 6"),
    ):
        changed = text | {section: text[section] | {field: wrong}}
        (tmp_path / "model.json").write_text(json.dumps(changed))
        with pytest.raises(BundleError, match=sentence):
            read_bundle(tmp_path)


def test_a_second_calibration_replaces_the_first(models: Path):
    root = models.parent
    assert run(root, "--version", "7", model="colours/2") == 0
    assert onnx.load(version(models, 7).model_path) == onnx.load(version(models, 2).model_path)
    assert version(models, 7).manifest.calibration == version(models, 2).manifest.calibration


def test_no_calibrate_takes_the_temperature_out(models: Path, capsys: pytest.CaptureFixture[str]):
    assert run(models.parent, "--no-calibrate", "--version", "8", model="colours/2") == 0
    assert "Not wanted (--no-calibrate)." in capsys.readouterr().out
    bundle = version(models, 8)
    assert temperature_of(onnx.load(bundle.model_path)) == 1
    np.testing.assert_allclose(bundle.golden_probabilities(), version(models, 1).golden_probabilities(), atol=1e-6)
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration.after == bundle.manifest.calibration.before


def test_what_cannot_be_calibrated_is_told_in_a_sentence_and_nothing_is_written(
    models: Path, capsys: pytest.CaptureFixture[str]
):
    root = models.parent
    assert run(root, "--version", "2") == 2
    assert "colours/2 exists: leave --version out" in capsys.readouterr().err
    assert run(root, "--version", "9", "--unfamiliar", str(root / "strange" / "none")) == 2
    assert "none cannot be read as a folder of images" in capsys.readouterr().err
    assert not (models / "colours" / "9").exists()


def test_a_bundle_that_lies_elsewhere_is_not_calibrated_into_an_unnamed_place(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(models / "colours" / "1", tmp_path / "mine")
    assert cli.main(["calibrate", str(tmp_path / "mine"), "--data", str(models.parent / "data")]) == 2
    assert "mine is not in a folder colours/" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_a_graph_that_does_not_follow_the_arithmetic_is_refused(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(calibrate, "with_temperature", lambda graph, _: onnx.load(version(models, 7).model_path))
    monkeypatch.setattr(calibrate, "softmax", lambda logits, temperature: softmax(logits, temperature * 1.1))
    assert run(models.parent, "--version", "9") == 2
    error = capsys.readouterr().err
    assert error.startswith("convoy-train: The calibrated graph differs by 0.0")
    assert not (models / "colours" / "9").exists()
