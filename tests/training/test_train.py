import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training import cli, commands, runs, train
from training.data import arrays as data
from training.errors import RecipeError
from training.recipes import make_recipe
from training.runs import read_checkpoint

ROOT = Path(__file__).parent.parent.parent
EPOCHS = 5


def convoy_train(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "training.cli", *map(str, arguments)]


def flags(data: Path, into: Path, epochs: int = EPOCHS, **knobs: object) -> list[str]:
    """Arguments of `convoy-train train` for one run under `into`."""
    given = {"data": data, "runs-dir": into / "runs", "cache-dir": into / "cache", "name": "insects", "epochs": epochs}
    return ["train", *(f"--{name}={value}" for name, value in (given | knobs).items())]


def weights(into: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(into / "runs" / "insects").network


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def finished(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; read only."""
    into = tmp_path_factory.mktemp("finished")
    assert cli.main(flags(tree, into)) == 0
    return into


@pytest.fixture
def one_epoch(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert cli.main(flags(tree, tmp_path, epochs=1)) == 0
    capsys.readouterr()
    return tmp_path


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_a_run_directory_holds_recipe_history_checkpoint_and_pictures(finished: Path):
    run = finished / "runs" / "insects"
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert sorted(entry.name for entry in run.iterdir() if "tfevents" not in entry.name) == [
        "checkpoint.pt",
        "confusion.png",
        "curves.png",
        "history.csv",
        "mistakes.png",
        "recipe.json",
        "report.html",
    ]
    assert json.loads((run / "recipe.json").read_text())["epochs"] == EPOCHS
    with (run / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [row["epoch"] for row in history] == ["1", "2", "3", "4", "5"]
    assert float(history[-1]["test_accuracy"]) > 0.6
    assert float(history[-1]["train_loss"]) < float(history[0]["train_loss"])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(finished: Path, tree: Path, tmp_path: Path):
    cli.main(flags(tree, tmp_path / "again"))
    cli.main(flags(tree, tmp_path / "other", seed=1))
    assert same(weights(tmp_path / "again"), weights(finished))
    assert not same(weights(tmp_path / "other"), weights(finished))


def test_a_run_killed_within_an_epoch_resumes_to_the_same_weights(finished: Path, tree: Path, tmp_path: Path):
    # A hundred times the images an epoch has here would be needed to meet it in the middle: slow the steps instead.
    slow = "import time, training.train as t; take = t.take; t.take = lambda *a: (time.sleep(0.2), take(*a))[1]; "
    run = f"{slow}from training.cli import main; main({flags(tree, tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", run], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            time.sleep(0.3)
            break
    os.kill(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()
    assert len(read_checkpoint(tmp_path / "runs" / "insects").history) == 2
    resumed = subprocess.run(convoy_train(*flags(tree, tmp_path), "--resume"), cwd=ROOT, capture_output=True, text=True)
    assert "epoch 3/5" in resumed.stdout
    assert "epoch 2/5" not in resumed.stdout
    assert same(weights(tmp_path), weights(finished))


def test_ctrl_c_says_where_the_checkpoint_is_and_how_to_go_on(tree: Path, tmp_path: Path):
    # A shell without job control lets what it starts in the background ignore the signal, and all below that.
    heard = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = f"{heard}from training.cli import main; sys.exit(main({flags(tree, tmp_path, epochs=100_000)!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert f"{tmp_path}/runs/insects/checkpoint.pt holds epoch " in error
    assert "--resume`" in error


def test_epochs_may_be_added(one_epoch: Path, tree: Path, tmp_path: Path):
    assert cli.main([*flags(tree, one_epoch, epochs=2), "--resume"]) == 0
    assert cli.main(flags(tree, tmp_path / "straight", epochs=2)) == 0
    assert same(weights(one_epoch), weights(tmp_path / "straight"))


def test_a_run_is_not_overwritten_unasked(one_epoch: Path, tree: Path, capsys: pytest.CaptureFixture[str]):
    before = weights(one_epoch)
    assert cli.main(flags(tree, one_epoch, epochs=1, seed=9)) == 2
    assert "already holds a run: continue it with --resume, discard it with --force" in sentence(capsys)
    assert same(weights(one_epoch), before)
    assert cli.main([*flags(tree, one_epoch, epochs=1, seed=9), "--force"]) == 0
    assert not same(weights(one_epoch), before)


def test_a_job_that_is_started_again_goes_on_with_what_there_is(tree: Path, tmp_path: Path, finished: Path):
    asked = [*flags(tree, tmp_path), "--resume-or-begin"]
    assert cli.main([*asked, "--epochs=2"]) == 0
    assert cli.main(asked) == 0
    assert len(read_checkpoint(tmp_path / "runs" / "insects").history) == EPOCHS
    assert same(weights(tmp_path), weights(finished))
    assert cli.main(asked) == 0, "also when all is done"


def test_there_must_be_a_run_to_resume(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*flags(tree, tmp_path), "--resume"]) == 2
    assert "checkpoint.pt does not exist: no epoch of this run was finished." in sentence(capsys)


@pytest.mark.parametrize("damage", [lambda data: data[:-500], lambda data: b"", lambda data: b"."])
def test_a_damaged_checkpoint_is_named(
    one_epoch: Path, tree: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
):
    checkpoint = one_epoch / "runs" / "insects" / "checkpoint.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    assert cli.main([*flags(tree, one_epoch), "--resume"]) == 2
    assert f"{checkpoint} is damaged and cannot be read: restore it, or train anew with --force." in sentence(capsys)


def test_a_checkpoint_that_would_run_code_is_refused(one_epoch: Path, tree: Path, capsys: pytest.CaptureFixture[str]):
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(one_epoch / "harm"),)

    torch.save({"format": runs.FORMAT, "network": Malicious()}, one_epoch / "runs" / "insects" / "checkpoint.pt")
    assert cli.main([*flags(tree, one_epoch), "--resume"]) == 2
    assert "is damaged and cannot be read" in sentence(capsys)
    assert not (one_epoch / "harm").exists()


def test_a_resume_with_another_recipe_is_refused(one_epoch: Path, tree: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*flags(tree, one_epoch, zoom=0.5), "--resume"]) == 2
    assert "was begun with --zoom 0.2, not 0.5: leave --zoom out to resume it." in sentence(capsys)


def test_a_resume_with_other_data_is_refused(
    one_epoch: Path, draw_tree: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    other = draw_tree(one_epoch / "other", parts=(("train", 3), ("test", 2)))
    assert cli.main([*flags(other, one_epoch), "--resume"]) == 2
    assert "was begun with other images" in sentence(capsys)
    for part in ("train", "test"):
        (other / part / "cow").rename(other / part / "dog")
    assert cli.main([*flags(other, one_epoch), "--resume"]) == 2
    assert "was begun with other classes ('cow' differs)" in sentence(capsys)


def test_divergence_leaves_the_last_good_checkpoint(
    one_epoch: Path, tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    before = weights(one_epoch)
    monkeypatch.setattr(train, "cross_entropy", lambda logits, labels, **_: logits.sum() * float("nan"))
    assert cli.main([*flags(tree, one_epoch), "--resume"]) == 2
    assert "The loss is not a number any more in epoch 2: lower --learning-rate" in sentence(capsys)
    assert same(weights(one_epoch), before)


def test_sgd_trains_too(tree: Path, tmp_path: Path):
    assert cli.main(flags(tree, tmp_path, epochs=1, optimizer="sgd")) == 0


def test_cuda_is_not_silently_replaced(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert cli.main(flags(tree, tmp_path, device="cuda")) == 2
    assert "PyTorch finds no CUDA device here" in sentence(capsys)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"network": "lenet"}, "--network: there is no 'lenet'"),
        ({"size": 9}, "--size: article_cnn needs at least 10 pixels a side, not 9."),
        ({"seed": 2**63}, "--seed: input should be less than"),
        ({"network": "efficientnet_lite0", "batch-size": 1}, "--batch-size 1: efficientnet_lite0 normalises over each"),
    ],
)
def test_force_costs_nothing_where_the_new_run_cannot_start(
    one_epoch: Path,
    tree: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    wrong: dict[str, object],
    sentence: str,
):
    run = one_epoch / "runs" / "insects"
    before = {entry.name: entry.read_bytes() for entry in run.iterdir()}
    monkeypatch.setattr(data, "load_split", None)  # nothing is decoded either
    assert cli.main([*flags(tree, one_epoch, **wrong), "--force"]) == 2
    assert sentence_starts(capsys, sentence)
    assert {entry.name: entry.read_bytes() for entry in run.iterdir()} == before


def sentence_starts(capsys: pytest.CaptureFixture[str], start: str) -> bool:
    return sentence(capsys).startswith(f"convoy-train: {start}")


def test_force_interrupted_in_its_first_epoch_keeps_the_run_before(
    one_epoch: Path, tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    before = weights(one_epoch)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "measure", interrupt)
    assert cli.main([*flags(tree, one_epoch, seed=9), "--force"]) == 130
    assert "still holds the run before." in sentence(capsys)
    assert same(weights(one_epoch), before)


def test_force_leaves_no_picture_of_the_run_before(one_epoch: Path, tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(commands.train, "_draw_run", lambda *_: None)
    assert cli.main([*flags(tree, one_epoch, epochs=1, seed=9), "--force"]) == 0
    assert not list((one_epoch / "runs" / "insects").glob("*.png"))


def test_a_single_image_left_over_joins_the_batch_before():
    assert [len(batch) for batch in train.batches(torch.arange(9), 4)] == [4, 5]
    assert [len(batch) for batch in train.batches(torch.arange(10), 4)] == [4, 4, 2]
    assert [len(batch) for batch in train.batches(torch.arange(3), 1)] == [1, 1, 1]
    assert [len(batch) for batch in train.batches(torch.arange(3), 10**30)] == [3]
    assert torch.equal(torch.cat(train.batches(torch.arange(9), 4)), torch.arange(9))


def test_batch_normalisation_trains_where_one_image_is_left_over(tree: Path, tmp_path: Path):
    small = {"network": "efficientnet_lite0", "batch-size": 59, "size": 32}  # of 60 images
    assert cli.main(flags(tree, tmp_path, epochs=1, **small)) == 0


def test_only_batch_normalisation_needs_two_images_a_batch():
    train.check_network(make_recipe(batch_size=1), classes=3)
    with pytest.raises(RecipeError):
        train.check_network(make_recipe(batch_size=1, network="efficientnet_lite0"), classes=3)


def test_weights_that_are_no_numbers_are_not_kept(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # The only step's loss is fine; what it leaves behind is not.
    wild = {"optimizer": "sgd", "learning-rate": 1e38, "batch-size": 60}
    assert cli.main(flags(tree, tmp_path, epochs=1, **wild)) == 2
    assert "The loss is not a number any more in epoch 1" in sentence(capsys)
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_outside_an_epoch_is_told_too(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "read_listing", interrupt)
    assert cli.main(flags(tree, tmp_path)) == 130
    assert sentence(capsys) == "convoy-train: interrupted.\n"


def test_two_trainings_do_not_share_a_run_directory(one_epoch: Path, tree: Path, capsys: pytest.CaptureFixture[str]):
    run = one_epoch / "runs" / "insects"
    with runs.locked(run):
        assert cli.main([*flags(tree, one_epoch), "--force"]) == 2
        assert f"{run} is being trained into by another process" in sentence(capsys)
    (run / runs.LOCK_FILE).touch()  # as a killed process leaves it
    assert cli.main([*flags(tree, one_epoch, epochs=1), "--force"]) == 0
    assert not (run / runs.LOCK_FILE).exists()


@pytest.mark.parametrize("folder", ["runs-dir", "cache-dir"])
def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: str
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(data, "_decode_all", None)
    assert cli.main(flags(tree, tmp_path, **{folder: tmp_path / "file" / "below"})) == 2
    assert f"cannot be written (Not a directory): name another folder by --{folder}." in sentence(capsys)


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(one_epoch: Path, tree: Path):
    # No file may grow beyond 300 kB: writing the checkpoint of 2 MB fails half way, as on a full disk.
    run = one_epoch / "runs" / "insects"
    before = {entry.name: entry.read_bytes() for entry in run.iterdir()}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
    code = (
        f"{limit}import sys; from training.cli import main; sys.exit(main({[*flags(tree, one_epoch), '--resume']!r}))"
    )
    stopped = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode == 2
    assert stopped.stderr.count("\n") == 1, stopped.stderr
    assert "cannot be" in stopped.stderr and "File too large" in stopped.stderr
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not [entry for entry in run.iterdir() if entry.name not in before]


@pytest.mark.parametrize("name", ["../escaped", "Pets", "", "a/b"])
def test_a_run_is_named_as_a_model_may_be(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    assert cli.main(flags(tree, tmp_path, name=name)) == 2
    assert f"'{name}' cannot name a model: give --name of lower-case letters" in sentence(capsys)
    assert not list(tmp_path.iterdir())
