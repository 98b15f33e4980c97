"""The exported networks on a real server: who else is in a batch changes no answer, and batches there are."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from examples import keywords as of_sound
from examples import languages as of_text
from examples.keywords import KeywordNetwork, placed
from examples.languages import LANGUAGES, LanguageNetwork, as_batch
from examples.publish import Answered, publish
from tests.examples.conftest import SENTENCES, clips
from tests.servers import ConvoyProcess, convoy

TOLERANCE = 1e-5
"""Of a probability: ONNX Runtime against PyTorch, and a batch against a row. Measured here: 3e-7."""
CLIENTS = 8

TEXTS = [sentence[:length] for length in (3, 9, 17, 33) for sentence in SENTENCES.values()]
BATCHES = [TEXTS[at : at + size] for at, size in ((0, 1), (1, 3), (4, 2), (5, 1), (6, 6), (2, 4), (0, 12), (11, 1))]
"""Of different numbers of texts, of different lengths."""


@pytest.fixture(scope="module")
def serving(
    languages: LanguageNetwork,
    keywords: KeywordNetwork,
    tokens_graph: onnx.ModelProto,
    texts_graph: onnx.ModelProto,
    sound_graph: onnx.ModelProto,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ConvoyProcess]:
    """A server of one session, so that requests that come together wait together, with the three models."""
    root = tmp_path_factory.mktemp("examples")
    models = root / "models"
    expected = of_text.classify(languages, TEXTS[:2]).numpy()
    tokens = {name: tensor.numpy() for name, tensor in as_batch(TEXTS[:2]).items()}
    put(tokens_graph, Answered(tokens, expected), models / "languages" / "1", LANGUAGES)
    texts = {"text": np.array(TEXTS[:2], np.object_)}
    put(texts_graph, Answered(texts, expected), models / "languages-text" / "1", LANGUAGES)
    # This one as a plain file, of which nothing is known but what its graph says.
    (models / "keywords" / "1").mkdir(parents=True)
    onnx.save(sound_graph, models / "keywords" / "1" / "model.onnx")
    with convoy(models, root / "log", default_model="languages", sessions=1, linger_ms=200, max_batch=32) as process:
        yield process


def put(graph: onnx.ModelProto, golden: Answered, folder: Path, labels: Sequence[str]) -> None:
    story = {"description": "", "labels": labels, "evaluation": {}, "source": "a test", "licence": "none"}
    publish(graph, [golden], folder, story, "pytest")


def asked(server: ConvoyProcess, model: str, inputs: list[dict]) -> np.ndarray:
    answer = server.client.post(f"/v2/models/{model}/infer", json={"inputs": inputs})
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"]
    assert (output["name"], output["datatype"]) == ("probabilities", "FP32")
    return np.array(output["data"], np.float32).reshape(output["shape"])


def by_tokens(server: ConvoyProcess, texts: Sequence[str], length: int = 0) -> np.ndarray:
    """Ask with code points, padded to the longest, or to `length`, with what is no letter of the texts."""
    tokens, lengths = as_batch(texts).values()
    padded = np.full((len(texts), max(length, tokens.shape[1])), 0x1F682, np.int64)
    padded[:, : tokens.shape[1]] = np.where(tokens == 0, 0x1F682, tokens)
    return asked(
        server,
        "languages",
        [
            {"name": "tokens", "datatype": "INT64", "shape": padded.shape, "data": padded.ravel().tolist()},
            {"name": "lengths", "datatype": "INT64", "shape": [len(texts)], "data": lengths.tolist()},
        ],
    )


def by_strings(server: ConvoyProcess, texts: Sequence[str]) -> np.ndarray:
    given = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}
    return asked(server, "languages-text", [given])


def by_sound(server: ConvoyProcess, sounds: np.ndarray) -> np.ndarray:
    """Ask with samples, in binary, both ways."""
    tensor = {
        "name": "audio",
        "datatype": "FP32",
        "shape": sounds.shape,
        "parameters": {"binary_data_size": sounds.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    answer = server.client.post(
        "/v2/models/keywords/infer",
        content=head + sounds.tobytes(),
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content[int(answer.headers["Inference-Header-Content-Length"]) :], "<f4").reshape(
        len(sounds), -1
    )


def runs(server: ConvoyProcess, model: str) -> tuple[int, int]:
    """Return how many rows a model has answered, and in how many runs."""
    (statistics,) = server.client.get(f"/v2/models/{model}/stats").json()["model_stats"]
    return statistics["inference_count"], statistics["execution_count"]


def together(ask, parts: Sequence) -> list[np.ndarray]:
    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(ask, parts))


def test_what_the_models_take_and_give_is_told(serving):
    def described(model: str, side: str) -> dict[str, tuple[str, list[int]]]:
        metadata = serving.client.get(f"/v2/models/{model}").json()
        return {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in metadata[side]}

    assert described("languages", "inputs") == {"tokens": ("INT64", [-1, -1]), "lengths": ("INT64", [-1])}
    assert described("languages-text", "inputs") == {"text": ("BYTES", [-1])}
    assert described("keywords", "inputs") == {"audio": ("FP32", [-1, 16000])}
    assert described("languages", "outputs") == {"probabilities": ("FP32", [-1, len(LANGUAGES)])}


def test_batches_of_token_sequences_of_many_lengths_answer_as_pytorch(serving, languages):
    answers = together(lambda texts: by_tokens(serving, texts), BATCHES * 3)
    for texts, given in zip(BATCHES * 3, answers, strict=True):
        assert np.abs(given - of_text.classify(languages, texts).numpy()).max() < TOLERANCE


def test_token_sequences_padded_to_one_length_share_runs(serving, languages):
    """What docs advise: lengths rounded up, so that requests find each other."""
    rows, executions = runs(serving, "languages")
    answers = together(lambda texts: by_tokens(serving, texts, length=64), BATCHES)
    for texts, given in zip(BATCHES, answers, strict=True):
        assert np.abs(given - of_text.classify(languages, texts).numpy()).max() < TOLERANCE
    rows_after, executions_after = runs(serving, "languages")
    assert rows_after - rows == sum(map(len, BATCHES))
    assert executions_after - executions < len(BATCHES)


def test_strings_of_all_lengths_share_runs_and_answer_as_pytorch(serving, languages):
    rows, executions = runs(serving, "languages-text")
    batches = [*BATCHES, [""], ["🚂", "\0", TEXTS[-1] * 20]]
    answers = together(lambda texts: by_strings(serving, texts), batches)
    for texts, given in zip(batches, answers, strict=True):
        assert np.abs(given - of_text.classify(languages, texts).numpy()).max() < TOLERANCE
    rows_after, executions_after = runs(serving, "languages-text")
    assert rows_after - rows == sum(map(len, batches))
    assert executions_after - executions < len(batches)


def test_sounds_share_runs_and_answer_as_pytorch(serving, keywords):
    rows, executions = runs(serving, "keywords")
    sounds = placed(clips()[:24], 10, seed=7)
    parts = [sounds[at : at + size] for at, size in ((0, 1), (1, 5), (6, 2), (8, 8), (16, 1), (17, 3), (20, 4), (3, 1))]
    answers = together(lambda part: by_sound(serving, part.numpy()), parts)
    for part, given in zip(parts, answers, strict=True):
        assert np.abs(given - of_sound.classify(keywords, part).numpy()).max() < TOLERANCE
    rows_after, executions_after = runs(serving, "keywords")
    assert rows_after - rows == sum(map(len, parts))
    assert executions_after - executions < len(parts)
