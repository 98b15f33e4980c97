"""Networks that were trained for a moment, on data made here: what is tested is the way, not how well they know."""

import os
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch

from examples.keywords import SILENCE, Clip, KeywordNetwork, graph_of_sound
from examples.keywords import train as train_keywords
from examples.languages import LANGUAGES, LanguageNetwork, Text, graph_of_texts, graph_of_tokens
from examples.languages import train as train_languages

SENTENCES = {
    "de": "Bitte geben Sie einen gültigen Wert ein und wählen Sie ihn danach aus der Liste der möglichen Einträge.",
    "ru": "Пожалуйста, введите правильное значение, а затем выберите его из списка возможных вариантов.",
    "zh": "请输入一个有效的值，然后从可能的条目列表中选择它。如果没有找到，请与管理员联系。",
}


def texts() -> list[Text]:
    """Six pieces of each sentence, several times."""
    return [
        Text(text, LANGUAGES.index(language), False)
        for language, sentence in SENTENCES.items()
        for text in (sentence[at : at + 16 + at] for at in range(0, 12, 2))
        for _ in range(4)
    ]


def tone(low: float, high: float, seconds: float = 0.4) -> np.ndarray:
    """Return a sound that climbs, or falls, from one pitch to another."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    return np.sin(2 * np.pi * (low + (high - low) * time / seconds / 2) * time).astype(np.float32)


def clips() -> list[Clip]:
    """Three "words", and silence."""
    words = [Clip(tone(300, 500), 0), Clip(tone(1000, 1400), 1), Clip(tone(3000, 3500), 2)]
    return [*words, Clip(np.zeros(0, np.float32), SILENCE)] * 64


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread: parallel workers wait for each other otherwise, and only then do bits repeat."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def languages() -> LanguageNetwork:
    return train_languages(texts(), epochs=12, seed=3)


@pytest.fixture(scope="session")
def keywords() -> KeywordNetwork:
    return train_keywords(clips(), epochs=8, seed=3)


@pytest.fixture(scope="session")
def tokens_graph(languages: LanguageNetwork) -> onnx.ModelProto:
    return graph_of_tokens(languages)


@pytest.fixture(scope="session")
def texts_graph(languages: LanguageNetwork, tokens_graph: onnx.ModelProto) -> onnx.ModelProto:
    return graph_of_texts(languages, tokens_graph)


@pytest.fixture(scope="session")
def sound_graph(keywords: KeywordNetwork) -> onnx.ModelProto:
    return graph_of_sound(keywords)
