import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import __version__, cli
from app.settings import Settings, flag_of
from tests.bundles import COLOURS, make_bundle, plain_image
from tests.convoy.scripted import answer, fault, prediction, scripted
from tests.servers import convoy


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for colour in ("red", "green"):
        (folder / f"{colour}.png").write_bytes(plain_image(colour))
    (folder / "deep/blue.JPG").write_bytes(plain_image("blue", "JPEG"))
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)


def test_predict_shows_a_table(models, pictures):
    result = run("predict", pictures / "red.png", pictures / "green.png", "--models", models, "--model", "colours",
                 COLUMNS="200")  # fmt: skip
    assert result.returncode == 0, result.stderr
    header, red, green = result.stdout.splitlines()
    assert header.split() == ["file", "label", "probability", "then"]
    assert "red.png" in red and " red " in red and "99.9%" in red
    assert "green.png" in green and " green " in green


def test_predict_walks_folders_and_speaks_json(models, pictures):
    result = run("predict", pictures, "--models", models, "--model", "colours", "--json", "--top-k", 2)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["top"][0]["label"] for answer in answers] == ["blue", "green", "red"]
    assert all(len(answer["top"]) == 2 for answer in answers)


def test_predict_and_the_service_agree(models, server, pictures):
    result = run("predict", pictures, "--models", models, "--model", "colours", "--json", "--top-k", len(COLOURS))
    for line in result.stdout.splitlines():
        answer = json.loads(line)
        served = server.client.post("/predict?top_k=6", content=Path(answer["file"]).read_bytes()).json()
        assert answer["top"] == served["results"][0]["top"]


def test_a_reader_that_has_seen_enough_is_no_fault(models, pictures):
    command = [sys.executable, "-m", "app.cli", "predict", "--models", models, "--model", "colours", "--json"]
    with subprocess.Popen([*command, *[pictures] * 300], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_a_name_that_is_not_utf8_is_shown_all_the_same(models, pictures):
    odd = os.fsencode(pictures) + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(plain_image("red"))
    for style in ((), ("--json",)):
        command = [
            sys.executable,
            "-m",
            "app.cli",
            "predict",
            odd,
            "--models",
            str(models),
            "--model",
            "colours",
            *style,
        ]
        environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict", "COLUMNS": "200"}
        result = subprocess.run(command, capture_output=True, timeout=60, env=environment)
        assert result.returncode == 0, result.stderr
        assert "caf\N{REPLACEMENT CHARACTER}.png" in result.stdout.decode()


def test_a_bad_file_among_good_ones_is_named_and_the_status_says_so(models, pictures):
    bad = pictures / "notes.txt"
    result = run("predict", pictures / "red.png", bad, "--models", models, "--model", "colours", "--json")
    assert result.returncode == 1
    good, refused = [json.loads(line) for line in result.stdout.splitlines()]
    assert good["top"][0]["label"] == "red"
    assert refused == {"file": str(bad), "error": "The data is not a JPEG, PNG or WebP image."}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("predict", "{red}", "--top-k", "0"), "--top-k cannot be 0"),
        (("predict", "nothing.jpg"), "There is no file nothing.jpg."),
        (("predict", "{empty}"), "holds no JPEG, PNG or WebP image."),
        (("predict", "{red}", "--model", "nobody", "--models", "{models}"), "There is no model 'nobody'"),
        (("predict", "{red}", "--models", "nowhere"), "The models directory nowhere does not exist"),
        (("predict", "{red}", "--models", "{broken}"), "is not the file that was exported"),
        (("serve", "--port", "http"), "--port cannot be 'http'"),
        (("serve", "--device", "tpu"), "--device cannot be 'tpu'"),
    ],
)
def test_a_fault_is_one_sentence_and_status_2(models, pictures, tmp_path, arguments, sentence):
    (tmp_path / "empty").mkdir()
    broken = make_bundle(tmp_path / "broken").directory
    (broken / "model.onnx").write_bytes(b"")
    names = {"empty": tmp_path / "empty", "red": pictures / "red.png", "models": models, "broken": tmp_path / "broken"}
    result = run(*(str(argument).format(**names) for argument in arguments))
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.startswith("convoy: ") and result.stderr.count("\n") == 1


def test_predict_by_a_service_says_what_predict_without_one_says(models, server, pictures):
    arguments = ("predict", pictures, pictures / "notes.txt", "--json", "--top-k", 99, "--model")
    for name in ("colours", "other"):
        offline = run(*arguments, name, "--models", models)
        asked = run(*arguments, name, "--url", server.url)
        assert (asked.returncode, asked.stdout, asked.stderr) == (1, offline.stdout, "")
        assert offline.returncode == 1 and len(asked.stdout.splitlines()) == 4


def test_predict_by_a_service_uses_its_default_model_and_shows_a_table(server, pictures):
    result = run("predict", pictures / "red.png", "--url", server.url, COLUMNS="200")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].split() == ["file", "label", "probability", "then"]
    assert " red " in result.stdout and "99.9%" in result.stdout


def test_a_file_that_is_gone_or_too_large_is_one_line_among_others(server, pictures):
    (pictures / "large.png").write_bytes(b"x" * 2_100_000)
    result = run(
        "predict", pictures / "red.png", pictures / "large.png", pictures / "deep", "--url", server.url, "--json"
    )
    good, large, blue = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 1
    assert (good["top"][0]["label"], blue["top"][0]["label"]) == ("red", "blue")
    assert "2,000,000" in large["error"] and "top" not in large


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--url", "{url}", "--model", "nobody"), "There is no model 'nobody'"),
        (("--url", "{url}", "--models", "models"), "--models is for predictions without a server"),
        (("--url", "{url}", "--no-such-thing"), "unrecognized arguments"),
        (("--url", "localhost"), "url = 'localhost' is no address of a service"),
        (("--url", "http://127.0.0.1:1"), "http://127.0.0.1:1 does not answer: Connection refused."),
        (("--url", "{url}/docs"), "There is nothing at /docs/models"),
    ],
)
def test_a_fault_of_predict_by_a_service_is_one_sentence(server, pictures, arguments, sentence):
    result = run("predict", pictures, *(argument.format(url=server.url) for argument in arguments))
    assert result.returncode == 2
    assert sentence in result.stderr and "Traceback" not in result.stderr


def test_the_key_of_the_environment_goes_with_the_request(pictures):
    entry = {"name": "m", "version": "1", "state": "ready", "classes": 2}
    models, found = answer(200, {"default": "m", "models": [entry]}), answer(200, prediction("cat"))
    with scripted(models, found) as fake:
        result = run("predict", pictures / "red.png", "--url", fake.url, "--json", CONVOY_API_KEY="secret-key")
        assert result.returncode == 0, result.stderr
        assert [headers["authorization"] for _, headers, _ in fake.requests] == ["Bearer secret-key"] * 2
        assert [line for line, _, _ in fake.requests] == ["GET /models", "POST /models/m/predict?top_k=2"]


def test_a_service_that_goes_away_ends_the_command(pictures):
    entry = {"name": "m", "version": "1", "state": "ready", "classes": 2}
    with scripted(answer(200, {"default": "m", "models": [entry]}), fault(401, sentence="No key.")) as fake:
        result = run("predict", pictures / "red.png", "--url", fake.url)
    assert (result.returncode, result.stderr) == (2, "convoy: No key.\n")


def test_the_variables_of_the_client_are_not_the_services(models, pictures):
    environment = {"CONVOY_API_KEY": "secret-key", "CONVOY_URL": "http://127.0.0.1:1"}
    result = run("predict", pictures / "red.png", "--models", models, "--model", "colours", "--json", **environment)
    assert result.returncode == 0, result.stderr


def test_a_service_with_a_clients_key_says_that_it_protects_nothing(models, tmp_path):
    with convoy(models, tmp_path / "log", loaded=False, api_key="secret-key") as server:
        (warning,) = [line for line in server.lines() if line["level"] == "warning"]
        assert "CONVOY_API_KEY" in warning["message"] and "secret-key" not in str(server.lines())


def test_an_unknown_variable_stops_the_start(models):
    result = run("serve", "--models", models, CONVOY_PROT="9000")
    assert result.returncode == 2 and "did you mean CONVOY_PORT" in result.stderr


def test_the_environment_sets_what_no_flag_does(models, pictures):
    environment = {"CONVOY_MODELS": str(models), "CONVOY_DEFAULT_MODEL": "other"}
    result = run("predict", pictures / "red.png", "--json", **environment)
    assert json.loads(result.stdout)["top"][0]["label"] == "rot"


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert [name for name in Settings.model_fields if flag_of(name) not in shown] == []


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"convoy {__version__}\n"
