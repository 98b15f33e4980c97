"""The training Job's command, as rendered, run here: two processes in place of two pods, on loopback.

    make training-job

Not part of the suite: four processes import PyTorch, which costs as much as all other tests of the deployment.
"""

import os
import subprocess
import sys
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


def test_two_nodes_train_together_with_the_jobs_command(tmp_path):
    [container] = pods(render(TRAINED))["Job/convoy-training"]["containers"]
    data, runs = draw_images(tmp_path / "data"), tmp_path / "runs"
    replaced = {
        "--rdzv-endpoint=convoy-training-0.convoy-training:29400": f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--data=/data": f"--data={data}",
        "--runs-dir=/runs": f"--runs-dir={runs}",
        "--cache-dir=/tmp/cache": f"--cache-dir={tmp_path / 'cache'}",
    }
    assert replaced.keys() <= set(container["args"])
    assert container["command"] == ["torchrun"]
    arguments = [replaced.get(argument, argument) for argument in container["args"]]
    small = ["--epochs=1", "--batch-size=8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *arguments, *small],
            cwd=ROOT,
            env=environment | {"JOB_COMPLETION_INDEX": f"{index}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [node.communicate(timeout=150) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum(output.count("epoch 1/1") for output, _ in said) == 1, "one speaks for both"
    assert sum(output.count("2 processes") for output, _ in said) == 1
    assert (runs / "pets").is_dir()
