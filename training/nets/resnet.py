"""ResNet (He et al. 2016): each block adds what it computes to what it was given.

The stride of a bottleneck is in its 3×3 convolution, as in all published weights ("v1.5"; the paper has it in the first
1×1). Below 64 pixels the stem is one 3×3 convolution with stride 1 and there is no pooling, as in Chen et al. 2020
(SimCLR, appendix B.9); the paper's own networks for CIFAR-10 are others, thinner. No dropout, as in the paper.
"""

import re
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import relu

from training.nets.layers import ConvNorm, Mean, initialise, is_small

STEM_CHANNELS = 64
STAGE_WIDTHS = (64, 128, 256, 512)

Branch = Callable[[int, int, int], nn.Sequential]
"""Inputs, width, stride → what a block adds to its input, as a sequence of `ConvNorm`s."""


def basic(inputs: int, width: int, stride: int) -> nn.Sequential:
    """Two 3×3 convolutions: figure 5 of the paper, left."""
    return nn.Sequential(ConvNorm(inputs, width, 3, stride), ConvNorm(width, width, 3, activation=nn.Identity))


def bottleneck(inputs: int, width: int, stride: int) -> nn.Sequential:
    """Narrow, filter, widen to four times `width`: figure 5 of the paper, right."""
    return nn.Sequential(
        ConvNorm(inputs, width),
        ConvNorm(width, width, 3, stride),
        ConvNorm(width, 4 * width, activation=nn.Identity),
    )


class Residual(nn.Module):
    """`relu(shortcut(x) + recalibrate(branch(x)))`; the shortcut is a projection only where shapes differ."""

    def __init__(self, branch: nn.Sequential, inputs: int, outputs: int, stride: int, recalibrate: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.recalibrate = recalibrate
        changes = stride != 1 or inputs != outputs
        self.shortcut = ConvNorm(inputs, outputs, 1, stride, activation=nn.Identity) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[n, inputs, h, w]` → `[n, outputs, h / stride, w / stride]`."""
        return relu(self.shortcut(x) + self.recalibrate(self.branch(x)))


def resnet18(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """11,689,512 parameters at 1000 classes for images from 64 pixels."""
    return residual_network(basic, 1, (2, 2, 2, 2), classes, size)


def resnet34(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """21,797,672 parameters at 1000 classes for images from 64 pixels."""
    return residual_network(basic, 1, (3, 4, 6, 3), classes, size)


def resnet50(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """25,557,032 parameters at 1000 classes for images from 64 pixels."""
    return residual_network(bottleneck, 4, (3, 4, 6, 3), classes, size)


def resnet101(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """44,549,160 parameters at 1000 classes for images from 64 pixels."""
    return residual_network(bottleneck, 4, (3, 4, 23, 3), classes, size)


def residual_network(
    branch: Branch,
    expansion: int,
    blocks: tuple[int, ...],
    classes: int,
    size: int,
    recalibrate: Callable[[int], nn.Module] = nn.Identity,
) -> nn.Sequential:
    """Build stem, four stages of residual blocks, mean and classifier: table 1 of the paper.

    Args:
        branch: what a block adds to its input.
        expansion: the branch's outputs, in widths of its stage.
        blocks: how many there are in each stage.
        classes: number of logits.
        size: side of the images, pixels.
        recalibrate: from the number of channels, what weighs the branch's output before it is added.
    """
    stages: list[nn.Sequential] = []
    inputs = STEM_CHANNELS
    for number, (width, count) in enumerate(zip(STAGE_WIDTHS, blocks, strict=True)):
        outputs = width * expansion
        stage = nn.Sequential()
        for repeat in range(count):
            stride = 2 if number > 0 and repeat == 0 else 1
            stage.append(Residual(branch(inputs, width, stride), inputs, outputs, stride, recalibrate(outputs)))
            inputs = outputs
        stages.append(stage)
    network = nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(*_stem(size)),
            stages=nn.Sequential(*stages),
            pool=Mean(),
            classifier=nn.Linear(inputs, classes),
        )
    )
    return _begin_as_shortcuts(initialise(network))


def _stem(size: int) -> list[nn.Module]:
    if is_small(size):
        return [ConvNorm(3, STEM_CHANNELS, 3)]
    return [ConvNorm(3, STEM_CHANNELS, 7, stride=2), nn.MaxPool2d(3, 2, padding=1)]


def _begin_as_shortcuts(network: nn.Sequential) -> nn.Sequential:
    """Let every branch add nothing at first: its last normalisation scales by 0 (Goyal et al. 2017, section 5.1)."""
    for module in network.modules():
        if isinstance(module, Residual):
            nn.init.zeros_(module.branch[-1].get_parameter("1.weight"))
    return network


PUBLISHED = {"stem.0.0": "conv1", "stem.0.1": "bn1", "classifier": "fc"}


def published_name(ours: str) -> str:
    """Return what torchvision calls the tensor that we call `ours`."""
    block = re.fullmatch(r"stages\.(\d)\.(\d+)\.(?:branch\.(\d)|(shortcut))\.([01])\.(\w+)", ours)
    if block is None:
        layer, _, tensor = ours.rpartition(".")
        return f"{PUBLISHED[layer]}.{tensor}"
    stage, number, step, shortcut, part, tensor = block.groups()
    layer = f"downsample.{part}" if shortcut else f"{('conv', 'bn')[int(part)]}{int(step) + 1}"
    return f"layer{int(stage) + 1}.{number}.{layer}.{tensor}"
