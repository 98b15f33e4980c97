import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from app import runtime
from app.golden import prove_tensors
from app.manifest import read_manifest, verify_tensor_files
from app.sessions import OnnxSession
from examples import languages as example
from examples.languages import (
    LANGUAGES,
    accuracy,
    as_batch,
    classify,
    clean,
    cut,
    messages,
    read_texts,
    train,
)
from examples.publish import Answered, publish
from tests.examples.conftest import SENTENCES, texts
from training.errors import DataError, ExportError

ODD = ["", "x", "\0\0", "ß→🚂", "ΑΒΓ αβγ", "İSTANBUL", "请输入" * 50, SENTENCES["ru"], SENTENCES["de"].upper()]


def catalogue(entries: dict[str, str], order: str = "<") -> bytes:
    """Return a gettext .mo file, as `msgfmt` lays it out."""
    columns = [[text.encode() for text in entries], [text.encode() for text in entries.values()]]
    tables, strings = b"", b""
    begin = 28 + 16 * len(entries)
    for column in columns:
        for text in column:
            tables += struct.pack(f"{order}2I", len(text), begin + len(strings))
            strings += text + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    return head + tables + strings


def wheel(folder: Path, name: str, catalogues: dict[str, dict[str, str]]) -> None:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for locale, entries in catalogues.items():
            archive.writestr(f"some/locale/{locale}/LC_MESSAGES/django.mo", catalogue(entries))


@pytest.mark.parametrize("order", ["<", ">"])
def test_messages_are_read_as_gettext_reads_them(order):
    entries = {"": "Content-Type: …", "menu\4Open it": "Öffnen", "%d day\0%d days": "%d Tag\0%d Tage"}
    assert list(messages(catalogue(entries, order))) == [("Open it", "Öffnen"), ("%d day", "%d Tag")]


def test_texts_come_from_the_translations_in_wheels(tmp_path):
    wheel(
        tmp_path,
        "Django-9.9-py3-none-any.whl",
        {
            "de": {
                "": "header",
                "Please wait a moment": "Bitte einen Moment warten",
                "Untranslated text": "Untranslated text",
            },
            "pt_BR": {"Please wait a moment": "Aguarde um <b>momento</b>, %(name)s"},
            "xx": {"Please wait a moment": "a language that is not taught"},
            "fr": {"No": "Non"},
        },
    )
    found = {(text.text, LANGUAGES[text.label]): text.held_out for text in read_texts(tmp_path, ["django"])}
    assert set(found) == {
        ("Please wait a moment", "en"),
        ("Untranslated text", "en"),
        ("Bitte einen Moment warten", "de"),
        ("Aguarde um momento ,", "pt"),
    }
    # All translations of a message are on one side, or what is held out would have been seen in another language.
    assert len({held for (text, _), held in found.items() if "Untranslated" not in text}) == 1


def test_a_missing_wheel_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="no wheel of wagtail: see examples/README"):
        read_texts(tmp_path, ["wagtail"])


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ("Hello %(user)s!", "Hello !"),
        ("<a href='x'>here</a>", "here"),
        ("100 %", "100 %"),
        ("a\n  b {0} &amp; c", "a b c"),
    ],
)
def test_only_what_a_person_reads_is_left(raw, read):
    assert clean(raw) == read


def test_pieces_are_of_the_text_and_no_longer_than_said():
    dice, sentence = random.Random(0), SENTENCES["de"]
    pieces = [cut(sentence, dice) for _ in range(200)]
    assert all(piece in sentence for piece in pieces)
    assert {len(piece) for piece in pieces} <= set(range(example.SHORTEST, example.LONGEST + 1))
    assert cut("short", dice) == "short"


def test_it_learns_and_the_same_seed_learns_the_same(languages):
    assert accuracy(languages, texts()) == 1
    assert accuracy(example.LanguageNetwork(languages.alphabet, len(LANGUAGES)).eval(), texts()) < 0.5
    again = train(texts(), epochs=12, seed=3)
    other = train(texts(), epochs=12, seed=4)
    for name, weights in languages.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name])
    assert not torch.equal(languages.output.weight, other.output.weight)


def test_an_answer_is_the_same_alone_and_beside_a_longer_text(languages):
    together = classify(languages, ODD)
    for row, text in enumerate(ODD):
        assert torch.allclose(classify(languages, [text])[0], together[row], rtol=0, atol=1e-6)
    assert torch.allclose(together.sum(dim=1), torch.ones(len(ODD)))


def test_what_stands_behind_a_text_does_not_matter(languages):
    inputs = as_batch(["kurz", SENTENCES["ru"]])
    clean_answer = languages(*inputs.values())
    inputs["tokens"][0, 4:] = torch.randint(-(2**62), 2**62, (len(SENTENCES["ru"]) - 4,))
    assert torch.equal(languages(*inputs.values()), clean_answer)


def test_lengths_that_lie_still_have_an_answer(languages):
    tokens, _ = as_batch(["kurz", "x"]).values()
    for lengths in ([-5, 0], [10**12, 5]):
        assert torch.allclose(languages(tokens, torch.tensor(lengths)).sum(dim=1), torch.ones(2))


def test_case_does_not_matter(languages):
    text = SENTENCES["de"].replace("ß", "ss")
    assert torch.equal(classify(languages, [text]), classify(languages, [text.upper()]))


def session_of(graph: onnx.ModelProto):
    return runtime.load().InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "batch", [ODD, ODD[:1], ODD[-1:], ["ab", "a"], ["", ""]], ids=lambda batch: f"{len(batch)} texts"
)
def test_both_graphs_answer_as_the_network_does(languages, tokens_graph, texts_graph, batch):
    expected = classify(languages, batch).numpy()
    tokens = {name: tensor.numpy() for name, tensor in as_batch(batch).items()}
    (given,) = session_of(tokens_graph).run(None, tokens)
    assert given.dtype == np.float32
    assert np.abs(given - expected).max() < 1e-6
    (given,) = session_of(texts_graph).run(None, {"text": np.array(batch, np.object_)})
    assert np.abs(given - expected).max() < 1e-6


def test_the_graph_holds_nothing_of_this_machine(texts_graph):
    assert str(Path(example.__file__).parent.parent).encode() not in texts_graph.SerializeToString()


def story() -> dict:
    return {
        "description": "Languages",
        "labels": LANGUAGES,
        "evaluation": {"accuracy": 1.0},
        "source": "s",
        "licence": "l",
    }


def test_what_is_published_proves_itself(languages, texts_graph, tmp_path):
    texts = ["Bitte", "введите"]
    answered = [Answered({"text": np.array(texts, np.object_)}, classify(languages, texts).numpy())]
    folder = tmp_path / "models" / "spoken" / "3"
    for _ in range(2):  # the second takes the first one's place
        assert publish(texts_graph, answered, folder, story(), "python -m …") < 1e-6
    manifest = read_manifest(folder)
    assert (manifest.name, manifest.version, manifest.labels) == ("spoken", "3", LANGUAGES)
    assert "runtime_difference" in manifest.evaluation
    verify_tensor_files(folder, manifest)
    assert prove_tensors(folder, manifest, OnnxSession(folder / "model.onnx", "cpu", 1)) < 1e-6
    assert [path.name for path in folder.parent.iterdir()] == ["3"]


@pytest.mark.parametrize("wrong", [1e-3, np.nan])
def test_a_graph_that_answers_differently_is_not_published(languages, texts_graph, tmp_path, wrong):
    texts = ["Bitte", "введите"]
    expected = classify(languages, texts).numpy()
    expected[1, 7] += wrong
    answered = [Answered({"text": np.array(texts, np.object_)}, expected)]
    with pytest.raises(ExportError, match="nothing was written"):
        publish(texts_graph, answered, tmp_path / "models" / "spoken" / "1", story(), "…")
    assert not (tmp_path / "models").exists()


def test_from_wheels_to_two_models(tmp_path, capsys):
    """The command itself, on wheels of a few messages."""
    for project in (*example.TRAINED_ON, *example.TESTED_ON):
        catalogues = {
            language: {f"{project} asks for {at}": f"{project} {sentence[at : 30 + 5 * at]}" for at in range(10)}
            for language, sentence in SENTENCES.items()
        }
        wheel(tmp_path, f"{project}-1-py3-none-any.whl", catalogues)
    example.main(["--wheels", str(tmp_path), "--models-dir", str(tmp_path / "models"), "--epochs", "1"])
    for name in ("languages", "languages-text"):
        manifest = read_manifest(tmp_path / "models" / name / "1")
        assert manifest.evaluation["texts_learnt_from"] > 20
        assert manifest.golden is not None
    assert capsys.readouterr().out.count("of PyTorch") == 2
