"""`convoy-train` as a user types it: real processes, in a folder of their own."""

import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from app.golden import prove
from app.manifest import DATA_CARD_FILE, read_bundle
from training import classifiers, cli
from training.classifiers import onnx_run
from training.commands.flags import recipe_of
from training.data.arrays import read_listing
from training.data.cards import compare, read_card
from training.errors import RecipeError
from training.names import check_name, name_of
from training.recipes import Recipe, flag

ROOT = Path(__file__).parent.parent.parent


def convoy_train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from training.cli import main; sys.exit(main())"
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_three_commands_lead_from_a_folder_of_images_to_a_bundle(
    draw_tree: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    draw_tree(tmp_path / "data" / "insects", parts=(("", 20),))

    trained = convoy_train(tmp_path, "train", "--data", "data/insects", "--epochs", "8")
    assert trained.returncode == 0, trained.stderr
    assert "epoch 8/8" in trained.stdout

    evaluated = convoy_train(tmp_path, "evaluate", "runs/insects", "--json", "--out", "pictures")
    assert evaluated.returncode == 0, evaluated.stderr
    figures = json.loads(evaluated.stdout)
    assert figures["images"] == 12
    assert figures["accuracy"] > 0.6
    written = sorted(entry.name for entry in (tmp_path / "pictures").iterdir())
    assert written == ["confusion.png", "mistakes.png", "report.html"]
    assert f"{figures['accuracy']:.2%}" in (tmp_path / "runs/insects/report.html").read_text()

    exported = convoy_train(tmp_path, "export", "runs/insects")
    assert exported.returncode == 0, exported.stderr
    assert exported.stderr == ""
    bundle = read_bundle(tmp_path / "models" / "insects" / "1")
    prove(bundle, onnx_run(bundle.model_path))
    assert bundle.manifest.provenance.command == "convoy-train export runs/insects"
    card = read_card(bundle.directory / DATA_CARD_FILE)
    assert (card.division.by, card.parts["train"].images, card.parts["test"].images) == ("draw", 48, 12)
    assert compare(card, read_listing(tmp_path / "data/insects"), tmp_path).is_exact

    # The bundle answers as the run did; in this process, to spare the start of two more.
    monkeypatch.chdir(tmp_path)
    for model in ("runs/insects", "models/insects/1"):
        assert cli.main(["predict", model, "data/insects/ant/000.jpg", "--top-k", "1"]) == 0
    of_run, of_bundle = re.findall(r"data/insects/ant/000.jpg\W+(\w+)\W+([\d.]+%)", capsys.readouterr().out)
    assert of_run == of_bundle
    assert cli.main(["evaluate", "models/insects/1", "--data", "data/insects", "--cache-dir", "cache/convoy"]) == 0
    expected = f"accuracy {figures['accuracy']:.2%} on 12 images (a held-out 20%: 12 of 60 images)"
    assert expected in capsys.readouterr().out


def test_help_answers_at_once_and_without_pytorch():
    code = "import sys, training.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    begun = time.perf_counter()
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "False"
    assert time.perf_counter() - begun < 5
    for command in ("fetch", "train", "evaluate", "predict", "export", "import"):
        assert f"  {command}" in shown.stdout


def test_every_knob_is_a_flag_of_train(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for knob in Recipe.model_fields:
        assert flag(knob) in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--data", "nowhere"], "nowhere does not exist: give --data a folder of class folders"),
        (["train", "--data", "nowhere", "--epochs", "none"], "--epochs: input should be a valid integer"),
        (["train", "--data", "{tree}", "--network", "lenet"], "--network: there is no 'lenet'; there are"),
        (["evaluate", "nowhere", "--data", "{tree}"], "nowhere is neither a run (with checkpoint.pt) nor a bundle"),
        (["predict", "nowhere", "a.jpg"], "nowhere is neither a run (with checkpoint.pt) nor a bundle"),
        (["export", "nowhere"], "nowhere/checkpoint.pt does not exist: no epoch of this run was finished."),
        ([], "the following arguments are required: COMMAND."),
        (["trian"], "COMMAND: invalid choice: 'trian' (choose from"),
        (["train"], "the following arguments are required: --data."),
        (["train", "--data", "{tree}", "--device", "gpu"], "--device: invalid choice: 'gpu' (choose from"),
        (["train", "--data", "{tree}", "--optimizer", "lion"], "--optimizer: invalid choice: 'lion' (choose from"),
        (["train", "--data", "{tree}", "--fast"], "unrecognized arguments: --fast."),
        (["train", "--data", "{tree}", "--name", "../escaped"], "'../escaped' cannot name a model: give --name"),
        (["train", "--data", "caf\udce9"], "The argument 'caf\\udce9' is not UTF-8"),
        (["predict", "nowhere", "a.jpg", "--top-k", "0"], "--top-k: '0' is no whole number of at least 1."),
        (["predict", "nowhere", "a.jpg", "--top-k=-1"], "--top-k: '-1' is no whole number of at least 1."),
    ],
)
def test_a_fault_is_one_sentence_and_exit_code_2(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cli.main([argument.format(tree=tree) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"convoy-train: {sentence}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("data", "name"), [("data/My Pets!", "my-pets"), ("a/cifar-10-python.tar.gz", "cifar-10-python")]
)
def test_a_run_is_named_after_its_data(data: str, name: str):
    assert name_of(Path(data)) == name
    check_name(name)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["predict", "model", "photo.jpg"]) == 2
    assert capsys.readouterr().err == (
        "convoy-train: rich is not installed here: `make training` sets up all it needs.\n"
    )


def test_too_little_memory_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def too_large(*_: object) -> None:
        raise MemoryError("Unable to allocate 7.01 GiB")

    monkeypatch.setattr(classifiers, "open_classifier", too_large)
    assert cli.main(["predict", "model", "photo.jpg", "--device=cpu"]) == 2
    assert "Memory is too small for this (Unable to allocate 7.01 GiB)" in capsys.readouterr().err


def test_a_warmup_that_would_not_happen_is_refused():
    assert recipe_of(Namespace(warmup="0.1", schedule="cosine"), None).warmup == 0.1
    with pytest.raises(RecipeError, match="--warmup: a constant --schedule does not rise"):
        recipe_of(Namespace(warmup="0.1"), None)
