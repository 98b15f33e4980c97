from pathlib import Path

import pytest

from app.errors import SettingsError
from app.settings import Settings


def test_flags_beat_the_environment_which_beats_the_default():
    environment = {"CONVOY_PORT": "9000", "CONVOY_HOST": "0.0.0.0", "HOME": "/nowhere"}
    settings = Settings.from_sources(environment, {"port": "9001"})
    assert (settings.port, settings.host, settings.models) == (9001, "0.0.0.0", Path("models"))


def test_a_file_beats_the_default_and_nothing_else(tmp_path):
    file = tmp_path / "convoy.toml"
    file.write_text('port = 9000\nhost = "0.0.0.0"\nmax_batch = 8\naccess_log = false\nlinger_ms = 1.5\n')
    environment = {"CONVOY_HOST": "127.0.0.2", "CONVOY_SETTINGS": str(file)}
    settings = Settings.from_sources(environment, {"max_batch": "4"})
    assert (settings.port, settings.host, settings.max_batch) == (9000, "127.0.0.2", 4)
    assert (settings.access_log, settings.linger_ms) == (False, 1.5)
    other = tmp_path / "other.toml"
    other.write_text("port = 9001\n")
    assert Settings.from_sources(environment, {"settings": str(other)}).port == 9001


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("max_bach = 8", "convoy.toml: max_bach is no setting of a file: did you mean max_batch?"),
        ("CONVOY_PORT = 1", "convoy.toml: CONVOY_PORT is no setting of a file"),
        ('settings = "other.toml"', "convoy.toml: settings is no setting of a file"),
        ("[port]\nnumber = 1", "convoy.toml: port is a table or a list"),
        ("max_batch = 0", "convoy.toml: max_batch cannot be 0: "),
        ('host = ""', "convoy.toml: host is empty"),
        ("max_batch: 8", "convoy.toml is not TOML: "),
        (b"\xff", "convoy.toml is not TOML: "),
        (None, "convoy.toml cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_its_name(tmp_path, content, sentence):
    file = tmp_path / "convoy.toml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError) as caught:
        Settings.from_sources({"CONVOY_SETTINGS": str(file)})
    assert sentence in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"CONVOY_PROT": "1"}, "CONVOY_PROT is no setting: did you mean CONVOY_PORT"),
        ({"CONVOY_XYZZY": "1"}, "CONVOY_XYZZY is no setting"),
        ({"CONVOY_SERVICE_HOST": "10.0.0.1"}, "enableServiceLinks: false"),
        ({"CONVOY_PORT_8000_TCP": "tcp://10.0.0.1:8000"}, "enableServiceLinks: false"),
        ({"CONVOY_PORT": "tcp://10.0.0.1:8000"}, "CONVOY_PORT cannot be .* enableServiceLinks: false"),
        ({"CONVOY_PORT": "70000"}, "CONVOY_PORT cannot be '70000'"),
        ({"CONVOY_MAX_BATCH": "0"}, "CONVOY_MAX_BATCH cannot be '0'"),
        ({"CONVOY_HOST": ""}, "CONVOY_HOST is empty: give it a value, or leave it out"),
        ({"CONVOY_REQUEST_TIMEOUT_MS": "9" * 400}, "CONVOY_REQUEST_TIMEOUT_MS cannot be"),
        ({"CONVOY_DEVICE": "tpu"}, "CONVOY_DEVICE cannot be 'tpu'"),
    ],
)
def test_a_wrong_variable_is_one_sentence_with_its_name(environment, sentence):
    with pytest.raises(SettingsError, match=sentence):
        Settings.from_sources(environment)


def test_a_wrong_flag_is_named_as_a_flag():
    with pytest.raises(SettingsError, match="--max-batch cannot be 'many'"):
        Settings.from_sources({}, {"max_batch": "many"})


def test_every_setting_says_what_it_is_for():
    for name, field in Settings.model_fields.items():
        assert field.description and field.description.endswith("."), name


def test_limits_of_models():
    settings = Settings(model_limits="imagenet=64, pets=2")
    assert settings.limits_of_models(["imagenet", "pets", "other"]) == {"imagenet": 64, "pets": 2}
    assert Settings().limits_of_models([]) == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cats=3", "names 'cats', which is no model here; there are: imagenet, pets"),
        ("pets", "has 'pets': write name=number"),
        ("pets=0", "has 'pets=0'"),
        ("pets=-1", "has 'pets=-1'"),
    ],
)
def test_impossible_limits_of_models(text, sentence):
    with pytest.raises(SettingsError, match=sentence):
        Settings(model_limits=text).limits_of_models({"pets", "imagenet"})
