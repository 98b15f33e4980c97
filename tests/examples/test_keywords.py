import shutil

import numpy as np
import pytest
import torch

from app import runtime
from examples import keywords as example
from examples.keywords import (
    KEYWORDS,
    LABELS,
    OTHER,
    OTHERS,
    OTHERS_IN_TEST,
    RATE,
    SILENCE,
    STEP,
    VOICES,
    VOICES_IN_TEST,
    WINDOW,
    Clip,
    KeywordNetwork,
    LogMel,
    Utterance,
    accuracy,
    classify,
    mel_bands,
    place,
    placed,
    resample,
    say,
    train,
)
from tests.examples.conftest import clips, tone
from training.errors import DataError


def test_the_features_are_the_textbooks(keywords):
    """The convolution with fixed kernels against NumPy's Fourier transform."""
    sound = placed([clips()[0]], 10, seed=5)
    frames = np.lib.stride_tricks.sliding_window_view(sound[0].numpy().astype(np.float64), WINDOW)[::STEP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW + 1)[:-1])) ** 2
    expected = np.log(power @ mel_bands().T + 1e-4).T
    assert LogMel()(sound)[0].shape == expected.shape == (40, 99)
    np.testing.assert_allclose(LogMel()(sound)[0], expected, atol=1e-3)


def test_every_frequency_in_the_middle_is_heard():
    bands = mel_bands()
    assert (bands.sum(axis=1) > 0).all()
    assert (bands[:, 2:147].sum(axis=0) > 0.5).all()


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
def test_resampling_keeps_pitch_and_loudness(rate):
    original = np.sin(2 * np.pi * 1000 * np.arange(rate // 2) / rate)
    expected = np.sin(2 * np.pi * 1000 * np.arange(RATE // 2) / RATE)
    found = resample(original, rate)
    assert len(found) == RATE // 2
    assert np.abs(found - expected)[200:-200].max() < 0.01


def test_what_is_above_half_the_rate_does_not_fold_back():
    shrill = np.sin(2 * np.pi * 10_000 * np.arange(22_050) / 22_050)
    assert np.abs(resample(shrill, 22_050)).max() < 0.01


@pytest.mark.parametrize("noise", [40, 0])
def test_a_clip_is_laid_somewhere_into_noise_of_the_level_asked_for(noise):
    dice = np.random.default_rng(0)
    word = Clip(tone(500, 500, 0.2), 0)
    loudest = []
    for _ in range(20):
        sound = place(word, 0.1, noise, dice)
        assert sound.shape == (RATE,)
        assert sound.dtype == np.float32
        assert np.abs(sound).max() <= 1
        energy = np.convolve(sound**2, np.ones(3200), "valid")
        begin = int(energy.argmax())
        loudest.append(begin)
        rest = np.delete(sound, np.arange(max(0, begin - 200), min(RATE, begin + 3400)))
        assert 20 * np.log10(0.1 / np.sqrt(2) / np.sqrt(np.mean(rest**2))) == pytest.approx(noise, abs=3)
    assert len(set(loudest)) > 10


def test_it_learns_and_the_same_seed_learns_the_same(keywords):
    assert accuracy(keywords, clips(), 30) > 0.95
    assert accuracy(KeywordNetwork().eval(), clips(), 30) < 0.6
    again = train(clips(), epochs=8, seed=3)
    for name, weights in keywords.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name])


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_the_graph_answers_as_the_network_does(keywords, sound_graph, rows):
    sounds = placed(clips()[:rows], 10, seed=rows)
    session = runtime.load().InferenceSession(sound_graph.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["n", RATE]
    (given,) = session.run(None, {"audio": sounds.numpy()})
    assert given.shape == (rows, len(LABELS))
    assert np.abs(given - classify(keywords, sounds).numpy()).max() < 1e-5


def test_total_silence_has_an_answer(keywords):
    assert torch.isfinite(classify(keywords, torch.zeros(2, RATE))).all()


def test_nothing_of_the_test_is_learnt():
    assert not set(VOICES) & set(VOICES_IN_TEST)
    assert not set(OTHERS) & set(OTHERS_IN_TEST)
    assert not set(KEYWORDS) & {*OTHERS, *OTHERS_IN_TEST}
    assert not set(example.ACCENTS) & set(example.ACCENTS_IN_TEST)


def test_without_the_program_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="apt-get install espeak-ng"):
        say([Utterance("yes", "en-us+m1", 160, 50)])


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_words_are_said_trimmed_and_told_apart():
    said = [Utterance(word, f"en-us+{voice}", 160, 50) for word in ("yes", "banana") for voice in ("m1", "f4", "m1")]
    first, *_ = heard = say(said)
    assert [clip.label for clip in heard] == [0, 0, 0, OTHER, OTHER, OTHER]
    assert SILENCE not in [clip.label for clip in heard]
    for clip in heard:
        assert clip.sound.dtype == np.float32
        assert 0.15 * RATE < len(clip.sound) <= RATE
        assert np.abs(clip.sound[0]) > 0.01 * np.abs(clip.sound).max()
    np.testing.assert_array_equal(first.sound, heard[2].sound)
    assert len(first.sound) != len(heard[1].sound) or not np.array_equal(first.sound, heard[1].sound)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_every_voice_is_there():
    """An unknown variant is no error to espeak-ng: it speaks with its own voice, and tests would hear learnt ones."""
    accents = (*example.ACCENTS, *example.ACCENTS_IN_TEST)
    voices = [f"en-us+{voice}" for voice in (*VOICES, *VOICES_IN_TEST)] + [f"{accent}+m1" for accent in accents]
    plain = say([Utterance("station", "en-us+nobody", 160, 50)])[0].sound
    sounds = say([Utterance("station", voice, 160, 50) for voice in voices])
    alike = [voice for voice, clip in zip(voices, sounds, strict=True) if np.array_equal(clip.sound, plain)]
    assert alike == []
