"""Published state dicts, made up with their publishers' names and shapes, fit our networks key by key.

The names are written down here as the publishers' code has them, not derived from ours.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from training.errors import WeightsError
from training.nets import PUBLISHED, build
from training.nets.translation import is_published, translate
from training.published import read_network
from training.recipes import make_recipe

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def conv(name: str, inputs: int, outputs: int, kernel: int = 1, *, bias: bool = False) -> Shapes:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    if bias:
        yield f"{name}.bias", (outputs,)


def norm(name: str, channels: int) -> Shapes:
    yield from ((f"{name}.{tensor}", (channels,)) for tensor in ("weight", "bias", "running_mean", "running_var"))
    yield f"{name}.num_batches_tracked", ()


def dense(name: str, inputs: int, outputs: int) -> Shapes:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def alexnet() -> Shapes:
    rows = ((0, 3, 64, 11), (3, 64, 192, 5), (6, 192, 384, 3), (8, 384, 256, 3), (10, 256, 256, 3))
    for number, inputs, outputs, kernel in rows:
        yield from conv(f"features.{number}", inputs, outputs, kernel, bias=True)
    for number, inputs, outputs in ((1, 9216, 4096), (4, 4096, 4096), (6, 4096, 1000)):
        yield from dense(f"classifier.{number}", inputs, outputs)


def vgg16(numbers: tuple[int, ...], *, normalised: bool) -> Shapes:
    channels = (3, 64, 64, 128, 128, 256, 256, 256, *(512,) * 6)
    for number, inputs, outputs in zip(numbers, channels, channels[1:], strict=False):
        yield from conv(f"features.{number}", inputs, outputs, 3, bias=True)
        if normalised:
            yield from norm(f"features.{number + 1}", outputs)
    for number, inputs, outputs in ((0, 25088, 4096), (3, 4096, 4096), (6, 4096, 1000)):
        yield from dense(f"classifier.{number}", inputs, outputs)


def resnet(blocks: tuple[int, ...], expansion: int) -> Shapes:
    yield from conv("conv1", 3, 64, 7)
    yield from norm("bn1", 64)
    inputs = 64
    for stage, count in enumerate(blocks, 1):
        width = 32 * 2**stage
        for number in range(count):
            block, outputs = f"layer{stage}.{number}", width * expansion
            kernels = ((inputs, width, 1), (width, width, 3), (width, outputs, 1))
            if expansion == 1:
                kernels = ((inputs, width, 3), (width, width, 3))
            for step, (taken, given, kernel) in enumerate(kernels, 1):
                yield from conv(f"{block}.conv{step}", taken, given, kernel)
                yield from norm(f"{block}.bn{step}", given)
            if inputs != outputs:
                yield from conv(f"{block}.downsample.0", inputs, outputs)
                yield from norm(f"{block}.downsample.1", outputs)
            inputs = outputs
    yield from dense("fc", inputs, 1000)


def densenet121() -> Shapes:
    """As in the file: `norm.1`, where today's code says `norm1`."""
    yield from conv("features.conv0", 3, 64, 7)
    yield from norm("features.norm0", 64)
    channels = 64
    for block, count in enumerate((6, 12, 24, 16), 1):
        for number in range(1, count + 1):
            layer = f"features.denseblock{block}.denselayer{number}"
            yield from norm(f"{layer}.norm.1", channels)
            yield from conv(f"{layer}.conv.1", channels, 128)
            yield from norm(f"{layer}.norm.2", 128)
            yield from conv(f"{layer}.conv.2", 128, 32, 3)
            channels += 32
        if block < 4:
            yield from norm(f"features.transition{block}.norm", channels)
            yield from conv(f"features.transition{block}.conv", channels, channels // 2)
            channels //= 2
    yield from norm("features.norm5", channels)
    yield from dense("classifier", channels, 1000)


def mobilenet_v2() -> Shapes:
    yield from conv("features.0.0", 3, 32, 3)
    yield from norm("features.0.1", 32)
    inputs, number = 32, 0
    rows = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, outputs, repeats in rows:
        for _ in range(repeats):
            number += 1
            wide, step = inputs * expansion, 0
            if expansion > 1:
                yield from conv(f"features.{number}.conv.0.0", inputs, wide)
                yield from norm(f"features.{number}.conv.0.1", wide)
                step = 1
            yield from conv(f"features.{number}.conv.{step}.0", 1, wide, 3)
            yield from norm(f"features.{number}.conv.{step}.1", wide)
            yield from conv(f"features.{number}.conv.{step + 1}", wide, outputs)
            yield from norm(f"features.{number}.conv.{step + 2}", outputs)
            inputs = outputs
    yield from conv("features.18.0", 320, 1280)
    yield from norm("features.18.1", 1280)
    yield from dense("classifier.1", 1280, 1000)


def efficientnet_lite0() -> Shapes:
    yield from conv("_conv_stem", 3, 32, 3)
    yield from norm("_bn0", 32)
    inputs, number = 32, 0
    rows = ((1, 3, 16, 1), (6, 3, 24, 2), (6, 5, 40, 2), (6, 3, 80, 3), (6, 5, 112, 3), (6, 5, 192, 4), (6, 3, 320, 1))
    for expansion, kernel, outputs, repeats in rows:
        for _ in range(repeats):
            block, wide = f"_blocks.{number}", inputs * expansion
            if expansion > 1:
                yield from conv(f"{block}._expand_conv", inputs, wide)
                yield from norm(f"{block}._bn0", wide)
            yield from conv(f"{block}._depthwise_conv", 1, wide, kernel)
            yield from norm(f"{block}._bn1", wide)
            yield from conv(f"{block}._project_conv", wide, outputs)
            yield from norm(f"{block}._bn2", outputs)
            inputs, number = outputs, number + 1
    yield from conv("_conv_head", 320, 1280)
    yield from norm("_bn1", 1280)
    yield from dense("_fc", 1280, 1000)


FILES = {
    "alexnet": alexnet,
    "vgg16": lambda: vgg16((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), normalised=False),
    "vgg16_bn": lambda: vgg16((0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40), normalised=True),
    "resnet18": lambda: resnet((2, 2, 2, 2), 1),
    "resnet50": lambda: resnet((3, 4, 6, 3), 4),
    "densenet121": densenet121,
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_lite0": efficientnet_lite0,
}


def published(network: str) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in FILES[network]()}


def without_memory(network: str) -> nn.Sequential:
    with torch.device("meta"):
        return build(network, classes=1000, size=224, dropout=0.2)


@pytest.mark.parametrize("name", FILES)
def test_published_weights_fit_key_by_key(name: str):
    weights, network = published(name), without_memory(name)
    assert is_published(weights, network.state_dict(), PUBLISHED[name])
    translated = translate(weights, network.state_dict(), PUBLISHED[name], name)
    network.load_state_dict(translated, assign=True)
    last = "_fc" if name == "efficientnet_lite0" else next(key for key in reversed(weights)).rpartition(".")[0]
    assert translated[[*network.state_dict()][-2]] is weights[f"{last}.weight"]


@pytest.mark.parametrize("name", FILES)
def test_published_names_are_one_to_one_and_ours_are_known_as_ours(name: str):
    with torch.device("meta"):
        ours = build(name, classes=10, size=32, dropout=0).state_dict()
    assert len(set(map(PUBLISHED[name], ours))) == len(ours)
    assert not is_published(ours, ours, PUBLISHED[name])


def test_each_published_tensor_comes_to_its_place():
    """Shapes alone would not tell the normalisations of a block apart."""
    names = [name for name, _ in FILES["resnet18"]()]
    weights = {name: torch.full((), float(number)) for number, name in enumerate(names)}
    translated = translate(weights, without_memory("resnet18").state_dict(), PUBLISHED["resnet18"], "resnet18")
    places = {
        "stem.0.0.weight": "conv1.weight",
        "stages.0.1.branch.0.0.weight": "layer1.1.conv1.weight",
        "stages.0.1.branch.1.1.running_var": "layer1.1.bn2.running_var",
        "stages.3.0.shortcut.1.bias": "layer4.0.downsample.1.bias",
        "classifier.bias": "fc.bias",
    }
    assert {ours: translated[ours] for ours in places} == {ours: weights[theirs] for ours, theirs in places.items()}


def test_files_from_before_the_counter_fit_too(tmp_path: Path):
    path = tmp_path / "old.pt"
    weights = {name: torch.zeros(shape) for name, shape in FILES["mobilenet_v2"]() if "num_batches" not in name}
    torch.save(weights, path)
    network = read_network(path, make_recipe(network="mobilenet_v2", size=224), 1000)
    assert not any(parameter.any() for parameter in network.parameters())


def test_weights_for_other_sizes_are_refused_in_a_sentence(tmp_path: Path):
    path = tmp_path / "resnet18.pt"
    torch.save({name: torch.zeros(shape) for name, shape in FILES["resnet18"]()}, path)
    with pytest.raises(WeightsError, match=r"does not fit resnet18 with 10 classes: size mismatch for stem\.0\.0"):
        read_network(path, make_recipe(network="resnet18", size=32), 10)


def test_a_missing_published_tensor_is_named():
    weights, ours = published("efficientnet_lite0"), without_memory("efficientnet_lite0").state_dict()
    assert len(weights) == 296
    del weights["_blocks.3._expand_conv.weight"]
    with pytest.raises(WeightsError, match=r"lack '_blocks\.3\._expand_conv\.weight', which efficientnet_lite0 needs"):
        translate(weights, ours, PUBLISHED["efficientnet_lite0"], "efficientnet_lite0")


def test_a_published_tensor_without_a_place_is_named():
    weights, ours = published("efficientnet_lite0"), without_memory("efficientnet_lite0").state_dict()
    weights["_blocks.16._bn0.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError, match=r"hold '_blocks\.16\._bn0\.weight', which"):
        translate(weights, ours, PUBLISHED["efficientnet_lite0"], "efficientnet_lite0")
