"""Several processes that train together: what one process would have learnt, and going on after one is lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.learning.ranks import ALONE, Ranks
from training.runs import read_checkpoint

ROOT = Path(__file__).parent.parent.parent


def torchrun(arguments: list[str], restarts: int = 0, processes: int = 2) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, f"--max-restarts={restarts}", "-m", "training.cli", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A host's name that resolves to nothing would keep gloo from finding itself.
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"},
    )


def arguments(data: Path, into: Path, name: str, **knobs: object) -> list[str]:
    given = {"data": data, "runs-dir": into / "runs", "cache-dir": into / "cache", "name": name, "epochs": 3}
    # A step of many images shows a wrong share of a gradient; augmentation, that both processes draw alike.
    given |= {"batch-size": 21, "optimizer": "sgd", "learning-rate": 0.05, "dropout": 0, "shift": 2} | knobs
    return ["train", *(f"--{knob}={value}" for knob, value in given.items())]


def alone(given: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "training.cli", *given], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(("count", "size"), [(10, 2), (7, 3), (2, 2), (5, 4)])
def test_parts_are_the_whole(count: int, size: int):
    places = [place for rank in range(size) for place in range(count)[Ranks(rank, size).part(count)]]
    assert places == list(range(count))
    lengths = {len(range(count)[Ranks(rank, size).part(count)]) for rank in range(size)}
    assert max(lengths) - min(lengths) <= 1


def test_alone_nothing_is_shared():
    values = torch.ones(2)
    assert ALONE.total(values) is values
    assert ALONE.share("here") == "here"
    network = torch.nn.Linear(1, 1)
    assert ALONE.wrap(network) is network


def test_two_processes_learn_what_one_does(tree: Path, tmp_path: Path):
    # 60 images in steps of 21: parts of 10 and 11, and a last step of 18. Mixup takes partners of the other's part.
    alone(arguments(tree, tmp_path, "one", mixup=0.4))
    together = torchrun(arguments(tree, tmp_path, "two", mixup=0.4))
    output, error = together.communicate(timeout=150)
    assert together.returncode == 0, error
    assert output.count("epoch 1/3") == 1  # one speaks for both
    one, two = (read_checkpoint(tmp_path / "runs" / name) for name in ("one", "two"))
    assert "2 processes" in two.hardware
    for mine, theirs in zip(one.history, two.history, strict=True):
        assert theirs.train_loss == pytest.approx(mine.train_loss, abs=1e-5)
        assert theirs.test_loss == pytest.approx(mine.test_loss, abs=1e-5)
    assert one.history[-1].train_loss < one.history[0].train_loss
    for name, value in one.network.items():
        torch.testing.assert_close(two.network[name], value, atol=1e-5, rtol=0)


def test_a_training_goes_on_after_one_of_its_processes_was_killed(tree: Path, tmp_path: Path):
    given = arguments(tree, tmp_path, "lost", epochs=60)
    together = torchrun(given, restarts=1)
    assert together.stdout is not None
    told = []
    for line in together.stdout:
        if line.startswith("epoch "):
            told.append(int(line.split()[1].partition("/")[0]))
            if told == [1, 2]:
                os.kill(max(children(together.pid)), signal.SIGKILL)
    _, error = together.communicate(timeout=60)
    assert together.returncode == 0, error
    assert "exitcode: -9" in error or "SIGKILL" in error, error
    # An epoch whose checkpoint was written but which was not told before the kill is not told again.
    assert told == sorted(set(told))
    assert told[-1] == 60
    alone(arguments(tree, tmp_path, "whole", epochs=60))
    lost, whole = (read_checkpoint(tmp_path / "runs" / name) for name in ("lost", "whole"))
    assert [epoch.epoch for epoch in lost.history] == list(range(1, 61))
    assert lost.history[-1].train_loss == pytest.approx(whole.history[-1].train_loss, abs=1e-4)


@pytest.mark.parametrize(("environment", "shut_down"), [({}, True), ({"TORCHELASTIC_RUN_ID": "1"}, False)])
def test_a_process_of_several_ends_without_shutting_python_down(environment: dict[str, str], shut_down: bool):
    # gloo's threads may still hold tensors then, and would abort it: what is set last in a module is freed in shutdown.
    code = (
        "import atexit, os, sys\n"
        "from training.cli import command\n"
        "class Held:\n    def __del__(self, write=os.write): write(1, b'shut down')\n"
        "held = Held()\n"
        "atexit.register(print, 'last words')\n"
        "print('unflushed', end=' ')\n"
        "command()\n"
    )
    wrong = [sys.executable, "-c", code, "train"]
    ended = subprocess.run(wrong, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "--data" in ended.stderr
    assert ended.stdout == "unflushed last words\n" + ("shut down" if shut_down else "")


def children(parent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
