"""The training Job's command, as rendered, run here: two processes in place of two pods, on loopback.

    make training-job

Not part of the suite: four processes import PyTorch, which costs as much as all other tests of the deployment.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.app.watching import free_port
from tests.deploy.kustomize import ON_CPU, ROOT, pods, render

TRAINED = (*ON_CPU, "training")


def draw_images(root: Path) -> Path:
    """Write a folder of two classes, a few plain images each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label, level in (("dark", 40), ("light", 210)):
            directory = root / split / label
            directory.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(level - 30, level + 30, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(directory / f"{number}.png")
    return root


class Nodes:
    """The Job's pods, as processes on loopback; each can be lost, and replaced by another with the same command."""

    def __init__(self, directory: Path, *small: str) -> None:
        [container] = pods(render(TRAINED))["Job/convoy-training"]["containers"]
        data, self.runs = draw_images(directory / "data"), directory / "runs"
        replaced = {
            "--rdzv-endpoint=convoy-training-0.convoy-training:29400": f"--rdzv-endpoint=127.0.0.1:{free_port()}",
            "--data=/data": f"--data={data}",
            "--runs-dir=/runs": f"--runs-dir={self.runs}",
            "--cache-dir=/tmp/cache": f"--cache-dir={directory / 'cache'}",
        }
        assert replaced.keys() <= set(container["args"])
        assert container["command"] == ["torchrun"]
        self.arguments = [*(replaced.get(argument, argument) for argument in container["args"]), *small]
        given = {variable["name"]: variable["value"] for variable in container["env"]}
        self.environment = os.environ | given | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.environment["PYTHONUNBUFFERED"] = "1"

    def start(self, index: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *self.arguments],
            cwd=ROOT,
            env=self.environment | {"JOB_COMPLETION_INDEX": f"{index}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def lose(node: subprocess.Popen[str]) -> None:
    """End a pod as a machine that is switched off does: torchrun and what it started, without a word."""
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    for pid in (node.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    node.communicate()


def test_two_nodes_train_together_with_the_jobs_command(tmp_path):
    job = Nodes(tmp_path, "--epochs=1", "--batch-size=8")
    nodes = [job.start(index) for index in range(2)]
    said = [node.communicate(timeout=150) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum(output.count("epoch 1/1") for output, _ in said) == 1, "one speaks for both"
    assert sum(output.count("2 processes") for output, _ in said) == 1
    assert (job.runs / "pets").is_dir()


def test_a_node_that_is_lost_is_replaced_and_the_training_goes_on(tmp_path):
    job = Nodes(tmp_path, "--epochs=40", "--batch-size=8")
    nodes = [job.start(0)]
    time.sleep(5)  # so that the others meet at this one, which stays
    nodes.append(job.start(1))
    while not (job.runs / "pets/checkpoint.pt").exists():
        assert [node.poll() for node in nodes] == [None, None]
        time.sleep(0.05)
    lose(nodes[1])
    nodes[1] = job.start(1)
    said = [node.communicate(timeout=150) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    told = [line for output, _ in said for line in output.splitlines() if line.startswith("epoch ")]
    assert sum(line.startswith("epoch 1/") for line in told) <= 1, "it did not begin anew"
    assert sum(line.startswith("epoch 40/40") for line in told) == 1
