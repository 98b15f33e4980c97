"""Each network: the published number of parameters, a logit per class at every size, what is refused, first weights."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from training.errors import RecipeError
from training.nets import NETWORKS, build
from training.nets.efficientnet_lite import SameConv2d
from training.nets.resnet import Residual

DOCS = (Path(__file__).parent.parent.parent / "docs/networks.md").read_text()
PARAMETERS = {
    "article_cnn": 12_028_392,
    "airbench94": 2_226_232,
    "alexnet": 61_100_840,
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "googlenet": 7_005_832,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "se_resnet18": 11_778_592,
    "se_resnet34": 21_958_868,
    "se_resnet50": 28_088_024,
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "mobilenet_v2": 3_504_872,
    "efficientnet_lite0": 4_652_008,
}
"""At 224×224 and 1000 classes, as commonly published; of `googlenet` and `article_cnn` see their tests."""


SIBLINGS = {"vgg11", "vgg13", "vgg16_bn", "vgg19", "resnet34", "resnet101", "se_resnet18", "se_resnet34"}
SIBLINGS |= {"densenet169", "densenet201"}
"""Deeper or shallower than another of the family by a number in a table: they are built, not run, for time's sake."""
NO_SEQUENCES = {"airbench94"}
"""It multiplies its logits after the last layer."""
WITHOUT_DROPOUT = ("airbench", "resnet", "se_resnet", "densenet")
LEADERS = sorted(NETWORKS.keys() - SIBLINGS)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def without_memory(name: str, *, classes: int, size: int) -> nn.Sequential:
    """Build a network on the meta device, which computes shapes and nothing else."""
    with torch.device("meta"):
        return build(name, classes=classes, size=size, dropout=0.3).eval()


def row(name: str) -> list[str]:
    """The network's row in docs/networks.md."""
    found = re.search(rf"^\| `{name}` \|(.*)\|$", DOCS, re.MULTILINE)
    assert found is not None, f"docs/networks.md has no row for {name}"
    return [cell.strip() for cell in found[1].split("|")]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_published_number_of_parameters(name: str):
    network, small = without_memory(name, classes=1000, size=224), without_memory(name, classes=10, size=32)
    assert parameters(network) == PARAMETERS[name]
    dropped = {layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)}
    assert dropped == (set() if name.startswith(WITHOUT_DROPOUT) else {0.3})
    documented = [f"{PARAMETERS[name]:,}", f"{parameters(small):,}", "yes" if dropped else "–"]
    assert row(name)[0:5:2] == documented


def test_googlenet_has_the_layers_of_the_papers_table_1():
    """With a bias for each channel, as in the paper, in place of normalisation: 6,998,552, the count of Caffe's."""
    network = without_memory("googlenet", classes=1000, size=224)
    normalised = sum(layer.num_features for layer in network.modules() if isinstance(layer, nn.BatchNorm2d))
    assert parameters(network) - normalised == 6_998_552


@pytest.mark.parametrize("name", LEADERS)
@pytest.mark.parametrize(("size", "classes", "column"), [(224, 1000, 1), (32, 10, 3)])
def test_a_network_gives_features_and_a_logit_per_class(name: str, size: int, classes: int, column: int):
    network = without_memory(name, classes=classes, size=size)
    features = []
    if name not in NO_SEQUENCES:
        network[-1].register_forward_pre_hook(lambda _, given: features.append(given[0].shape))
    with FlopCounterMode(display=False) as counter:
        assert network(torch.zeros(1, 3, size, size, device="meta")).shape == (1, classes)
    assert features == ([] if name in NO_SEQUENCES else [(1, network[-1].in_features)])
    assert row(name)[column] == f"{counter.get_total_flops() / 2e6:,.0f}"


@pytest.mark.parametrize(("name", "last"), [("vgg11", 2), ("resnet18", 4), ("mobilenet_v2", 4), ("googlenet", 8)])
def test_a_small_image_keeps_its_resolution_in_the_first_layers(name: str, last: int):
    """Otherwise the last convolutions of most would see a single pixel of a 32×32 image, and their borders."""
    sides = []
    network = without_memory(name, classes=10, size=32)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, planes: sides.append(planes.shape[2]))
    network(torch.zeros(1, 3, 32, 32, device="meta"))
    assert (sides[0], sides[-1]) == (32, last)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("article_cnn", 10),
        ("alexnet", 15),
        ("alexnet", 65),
        ("vgg11", 63),
        ("googlenet", 8),
        ("resnet18", 8),
        ("resnet18", 65),
        ("densenet121", 8),
        ("mobilenet_v2", 8),
        ("efficientnet_lite0", 65),
    ],
)
def test_other_sizes_are_taken(name: str, size: int):
    network = without_memory(name, classes=3, size=size)
    assert network(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 3)


def test_an_unknown_network_is_named_with_those_that_exist():
    with pytest.raises(RecipeError, match="no 'article_cmm'; there are airbench94, alexnet, article_cnn, densenet121"):
        build("article_cmm", classes=2, size=32, dropout=0)


@pytest.mark.parametrize(
    ("name", "size"),
    [("article_cnn", 9), ("alexnet", 14), ("alexnet", 257), ("vgg11", 31), ("vgg16_bn", 31), ("vgg19", 257)],
)
def test_an_image_of_the_wrong_size_for_the_network_is_refused(name: str, size: int):
    with pytest.raises(RecipeError, match=f"--size: {name} .* not {size}"):
        build(name, classes=2, size=size, dropout=0)


def test_article_cnn_has_the_parameters_that_keras_counts():
    network = build("article_cnn", classes=10, size=32, dropout=0.5)
    assert [parameters(layer) for layer in network if list(layer.parameters())] == [896, 18_496, 147_520, 650]
    assert parameters(network) == 167_562


def test_article_cnn_starts_as_keras_does():
    torch.manual_seed(0)
    first = build("article_cnn", classes=10, size=32, dropout=0.5)[0]
    limit = (6 / (3 * 9 + 32 * 9)) ** 0.5
    assert not first.bias.any()
    assert 0.95 * limit < first.weight.abs().max() <= limit


@pytest.mark.parametrize("name", ["vgg11", "mobilenet_v2"])
def test_first_weights_keep_the_variance_and_favour_no_class(name: str):
    torch.manual_seed(0)
    network = build(name, classes=10, size=32, dropout=0.5)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        variance = 2 / layer.weight[0].numel()
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.3)
        assert layer.bias is None or not layer.bias.any()
    assert network[-1].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not network[-1].bias.any()


@pytest.mark.parametrize("name", ["resnet18", "se_resnet18"])
def test_residual_branches_add_nothing_at_first(name: str):
    blocks = [layer for layer in build(name, classes=2, size=32, dropout=0).modules() if isinstance(layer, Residual)]
    assert len(blocks) == 8
    planes = torch.rand(2, 64, 8, 8)
    assert torch.equal(blocks[0].train()(planes), planes)


@pytest.mark.parametrize(("side", "kernel"), [(8, 3), (8, 5), (7, 3), (7, 5)])
def test_same_padding_is_tensorflows(side: int, kernel: int):
    """On an even side TensorFlow's first window starts one pixel later than symmetric padding would have it."""
    convolution = SameConv2d(1, 1, kernel, stride=2, bias=False)
    torch.nn.init.ones_(convolution.weight)
    image = torch.arange(side * side, dtype=torch.float32).view(1, 1, side, side)
    before = (kernel - 2) // 2 if side % 2 == 0 else kernel // 2
    starts = range(-before, -before + 2 * -(-side // 2), 2)
    expected = [
        [image[0, 0, max(r, 0) : r + kernel, max(c, 0) : c + kernel].sum().item() for c in starts] for r in starts
    ]
    assert convolution(image)[0, 0].tolist() == expected
