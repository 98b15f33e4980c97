"""The exported examples that travel with the code: whole, small, and as good as the page says."""

from pathlib import Path

import numpy as np
import pytest

from app.golden import prove_tensors
from app.manifest import read_manifest, verify_tensor_files
from app.sessions import OnnxSession
from examples.languages import as_batch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MODELS = {path.parent.name: path for path in sorted(EXAMPLES.glob("models/*/1"))}

SAID = {
    "de": "Der nächste Zug nach Wien fährt um acht Uhr ab.",
    "fr": "Le prochain train pour Vienne part à huit heures.",
    "ru": "Следующий поезд в Вену отправляется в восемь часов.",
    "ja": "ウィーン行きの次の電車は八時に出発します。",
    "hu": "A következő vonat Bécsbe nyolckor indul.",
    "pl": "Następny pociąg do Wiednia odjeżdża o ósmej.",
    "el": "Το επόμενο τρένο για τη Βιέννη φεύγει στις οκτώ.",
    "tr": "Viyana'ya giden bir sonraki tren saat sekizde kalkıyor.",
}


def session(name: str) -> OnnxSession:
    return OnnxSession(MODELS[name] / "model.onnx", "cpu", 1)


def test_they_are_here():
    assert set(MODELS) == {"languages", "languages-text", "keywords"}


@pytest.mark.parametrize("name", MODELS)
def test_each_is_whole_and_proves_itself(name):
    manifest = read_manifest(MODELS[name])
    assert manifest.name == name
    verify_tensor_files(MODELS[name], manifest)
    assert prove_tensors(MODELS[name], manifest, session(name)) < 1e-5
    assert sum(file.stat().st_size for file in MODELS[name].rglob("*.*")) < 1_000_000


def test_languages_are_told_in_sentences_of_today():
    labels = read_manifest(MODELS["languages"]).labels
    (of_strings,) = session("languages-text").run(np.array(list(SAID.values()), np.object_))
    (of_tokens,) = session("languages").run(*(tensor.numpy() for tensor in as_batch(list(SAID.values())).values()))
    assert [labels[index] for index in of_strings.argmax(axis=1)] == list(SAID)
    np.testing.assert_allclose(of_strings, of_tokens, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_page_has_the_figures_of_the_manifest(name):
    page = (EXAMPLES / "README.md").read_text()
    evaluation = read_manifest(MODELS[name]).evaluation
    assert f"**{evaluation['accuracy']:.1%}**".replace("%", " %") in page
    assert f"{evaluation['parameters']:,} parameters" in page
    assert f"{evaluation['processor_seconds']} s of one core" in page
    megabytes = (MODELS[name] / "model.onnx").stat().st_size / 1e6
    assert f"{megabytes:.2f} MB" in page
