"""Two networks go the whole way that `python -m tests.networks` takes all of them; what that measured holds its bounds.

These two have what the others are made of: convolutions and dense layers with dropout; residual blocks, squeeze and
excitation, batch normalisation.
"""

import json
from pathlib import Path

import pytest

from tests.networks import LARGEST_DIFFERENCE, RESULTS, SMALL, learn_export_and_serve
from training.nets import NETWORKS


@pytest.mark.parametrize("name", ["alexnet", "se_resnet18"])
def test_a_network_learns_is_exported_and_is_served(name: str, tree: Path, tmp_path: Path):
    outcome = learn_export_and_serve(name, tree, tmp_path, SMALL)
    assert outcome.onnx_against_pytorch <= LARGEST_DIFFERENCE
    assert outcome.served_against_pytorch <= LARGEST_DIFFERENCE


def test_every_network_was_taken_the_whole_way():
    kept = json.loads(RESULTS.read_text())["networks"]
    assert {key.partition("/")[0] for key in kept} == set(NETWORKS)
    for outcome in kept.values():
        assert outcome["onnx_against_pytorch"] <= LARGEST_DIFFERENCE
        assert outcome["served_against_pytorch"] <= LARGEST_DIFFERENCE
