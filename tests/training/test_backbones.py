"""Trainings that begin from weights: how they are found, proved, kept still and then let go."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from app.manifest import read_bundle
from training import cli, nets
from training.errors import RecipeError, WeightsError
from training.learning.freezing import prepare
from training.learning.optimizers import make_optimizer
from training.recipes import make_recipe
from training.runs import read_checkpoint
from training.transfer.backbones import Beginning, begun, read_beginning

ROOT = Path(__file__).parent.parent.parent


def small(*, classes: int, size: int, dropout: float) -> nn.Module:
    """A network with what can be hard about rebuilding: normalisation folded, one that cannot be, two dense layers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 7),
        nn.ReLU(),
        nn.Linear(7, classes),
    )


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nets.NETWORKS, "small", small)
        yield


@pytest.fixture(scope="module")
def work(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the small network and the bundle made of it; read only."""
    work = tmp_path_factory.mktemp("backbones")
    where = f"--cache-dir={work / 'cache'}"
    train = ["train", f"--data={tree}", f"--runs-dir={work / 'runs'}", "--network=small", "--epochs=2", "--size=24"]
    assert cli.main([*train, "--mean=0.4", "--std=0.25", "--resize-short-side=32", where]) == 0
    assert cli.main(["export", str(work / "runs" / "insects"), f"--models-dir={work / 'models'}", where]) == 0
    return work


@pytest.fixture(scope="module")
def bundle(work: Path) -> Path:
    return work / "models" / "insects" / "1"


def test_a_bundle_gives_the_network_back_though_normalisation_was_folded(work: Path, bundle: Path):
    folded = {tensor.name for tensor in onnx.load(bundle / "model.onnx").graph.initializer}
    assert "network.1.running_mean" not in folded, "nothing was folded: this test proves nothing"
    of_run, of_bundle = read_beginning(work / "runs" / "insects", {}), read_beginning(bundle, {})
    assert of_run.knobs == of_bundle.knobs
    assert of_run.knobs["network"] == "small"
    assert of_run.knobs["mean"] == (0.4, 0.4, 0.4)
    assert of_run.weights.keys() == of_bundle.weights.keys()
    assert "11.weight" not in of_run.weights
    images = torch.rand(4, 3, 24, 24)
    features = []
    for beginning in (of_run, of_bundle):
        network = small(classes=5, size=24, dropout=0).eval()
        network.load_state_dict(begun(beginning, make_recipe(**beginning.knobs), 5))
        features.append(network[:-1](images).detach().numpy())
    np.testing.assert_allclose(features[0], features[1], rtol=1e-4, atol=1e-5)
    assert of_run.told == f"run of small on {read_checkpoint(work / 'runs' / 'insects').data}, after epoch 2"
    assert of_bundle.told.startswith("bundle insects 1, model.onnx SHA-256 ")


@pytest.mark.parametrize("name", ["cifar10-article", "imagenet"])
def test_the_bundles_in_the_box_can_be_begun_from(name: str):
    directory = max((ROOT / "models" / name).iterdir(), key=lambda version: int(version.name))
    beginning = read_beginning(directory, {})
    assert beginning.knobs["network"] == read_bundle(directory).manifest.training["recipe"]["network"]


def test_a_state_dict_gives_all_but_its_last_layer(work: Path, tmp_path: Path):
    torch.save(read_checkpoint(work / "runs" / "insects").network, tmp_path / "weights.pt")
    given = {"network": "small", "size": "24"}
    beginning = read_beginning(tmp_path / "weights.pt", given)
    of_run = read_beginning(work / "runs" / "insects", {})
    assert all(torch.equal(of_run.weights[name], tensor) for name, tensor in beginning.weights.items())
    assert beginning.told == "weights of weights.pt"
    with pytest.raises(RecipeError, match="for a file of weights give its --network too"):
        read_beginning(tmp_path / "weights.pt", {})


def altered(bundle: Path, to: Path, change: Callable[[onnx.ModelProto, dict], None]) -> Path:
    """Copy a bundle with another graph or manifest, its digest set right."""
    shutil.copytree(bundle, to)
    model, manifest = onnx.load(to / "model.onnx"), json.loads((to / "model.json").read_text())
    change(model, manifest)
    onnx.save(model, to / "model.onnx")
    manifest["model"]["sha256"] = hashlib.sha256((to / "model.onnx").read_bytes()).hexdigest()
    (to / "model.json").write_text(json.dumps(manifest))
    return to


def test_what_cannot_be_rebuilt_is_refused_in_one_sentence(work: Path, bundle: Path, tmp_path: Path):
    def weights_off(model: onnx.ModelProto, _: dict) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "network.9.weight")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, tensor.name))

    def another_name(model: onnx.ModelProto, _: dict) -> None:
        for part in (*model.graph.initializer, *model.graph.node):
            if isinstance(part, onnx.NodeProto):
                part.input[:] = [name.replace("network.9.weight", "quantised") for name in part.input]
            elif part.name == "network.9.weight":
                part.name = "quantised"

    def no_recipe(_: onnx.ModelProto, manifest: dict) -> None:
        del manifest["training"]["recipe"]

    def another_size(_: onnx.ModelProto, manifest: dict) -> None:
        manifest["training"]["recipe"]["network"] = "article_cnn"

    for number, (change, sentence) in enumerate(
        (
            (weights_off, "small rebuilt from its graph differs from it by "),
            (another_name, "has no tensor 'network.9.weight' in its graph, which small has"),
            (no_recipe, "does not say which network its graph is of"),
            (another_size, "has no tensor 'network.0.bias' in its graph, which article_cnn has"),
        )
    ):
        with pytest.raises(WeightsError, match=sentence):
            read_beginning(altered(bundle, tmp_path / str(number), change), {})
    with pytest.raises(WeightsError, match="nowhere does not exist"):
        read_beginning(tmp_path / "nowhere", {})
    with pytest.raises(RecipeError, match=r"--network article_cnn: .* holds the weights of small; leave it out"):
        read_beginning(bundle, {"network": "article_cnn"})


def test_weights_of_another_size_are_refused():
    recipe = make_recipe(network="article_cnn", size=32)
    network = nets.build("article_cnn", classes=3, size=40, dropout=0)
    weights = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("10.")}
    with pytest.raises(WeightsError, match=r"holds '7.weight' as \[64, 4096\], and the network takes \[64, 2304\]"):
        begun(Beginning({}, weights, "thing"), recipe, 3)
    with pytest.raises(WeightsError, match=r"The thing lacks '7.weight': it is of another network"):
        begun(Beginning({}, {name: weights[name] for name in weights if name != "7.weight"}, "thing"), recipe, 3)


def test_the_backbone_rests_and_then_moves_slowly():
    network = small(classes=3, size=24, dropout=0)
    recipe = make_recipe(frozen_epochs=1, backbone_rate=0.1, optimizer="sgd", learning_rate=0.5, keep_statistics=True)
    network[6].weight.requires_grad_(False)  # never to learn, whatever the recipe
    optimizer = make_optimizer(network, recipe)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.05, 0.5]
    for number, learning in ((1, {"11.weight", "11.bias"}), (2, {name for name, _ in network.named_parameters()})):
        prepare(network, optimizer, recipe, number)
        found = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        assert found == learning - {"6.weight"}
        assert network.training
        assert not any(layer.training for layer in network if isinstance(layer, nn.BatchNorm2d))
    prepare(network, optimizer, recipe.model_copy(update={"keep_statistics": False}), 2)
    assert network[1].training
    with pytest.raises(RecipeError, match="--backbone-rate: muon has two step sizes"):
        make_recipe(optimizer="muon", backbone_rate=0.1)


def test_a_training_begins_from_a_bundle_and_resumes_as_if_it_had_not_stopped(
    bundle: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["train", f"--data={tree}", f"--cache-dir={tmp_path / 'cache'}", f"--runs-dir={tmp_path}"]
    fresh = [*command, "--from", str(bundle), "--frozen-epochs=1"]
    assert cli.main([*fresh, "--name=one", "--epochs=1"]) == 0
    assert "It began from the bundle insects 1, model.onnx SHA-256 " in capsys.readouterr().out
    after_one = read_checkpoint(tmp_path / "one")
    assert after_one.recipe.size == 24
    assert (after_one.recipe.backbone_rate, after_one.recipe.keep_statistics) == (0.1, True)
    begun_with = read_beginning(bundle, {}).weights
    assert all(torch.equal(after_one.network[name], tensor) for name, tensor in begun_with.items())

    assert cli.main([*fresh, "--name=one", "--epochs=2", "--resume"]) == 0
    assert cli.main([*fresh, "--name=two", "--epochs=2"]) == 0
    one, two = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "two")
    assert all(torch.equal(two.network[name], tensor) for name, tensor in one.network.items())
    assert one.begun_from == two.begun_from != ""
    assert not torch.equal(one.network["0.weight"], begun_with["0.weight"])
    assert torch.equal(one.network["1.running_mean"], begun_with["1.running_mean"])
    assert cli.main(["export", str(tmp_path / "one"), f"--models-dir={tmp_path}", f"--cache-dir={tmp_path}"]) == 0
    assert read_bundle(tmp_path / "one" / "1").manifest.training["begun_from"] == one.begun_from
