"""GoogLeNet (Szegedy et al. 2015, *Going deeper with convolutions*), also called Inception v1.

As in the paper's table 1, with batch normalisation after each convolution (Ioffe & Szegedy 2015) in place of biases,
local response normalisation and the two auxiliary classifiers: they carried gradients to the lower layers, which
normalisation does without them. The widest windows are 5×5 as in the paper; torchvision's published weights have 3×3
there and do not fit. Below 64 pixels one 3×3 convolution with stride 1 stands for the stem, as in K. Liu's
pytorch-cifar, so that the inception modules see 32, 16 and 8 pixels a side.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from training.nets.layers import ConvNorm, Mean, initialise, is_small

STEM_CHANNELS = 192
STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
"""Table 1 of the paper, columns `#1×1` to `pool proj`; between stages there is a pooling."""


class Inception(nn.Module):
    """Four ways through windows of different width, side by side; the reductions before 3×3 and 5×5 make them cheap."""

    def __init__(
        self, inputs: int, ones: int, reduced_3: int, threes: int, reduced_5: int, fives: int, pooled: int
    ) -> None:
        super().__init__()
        self.ways = nn.ModuleList(
            [
                ConvNorm(inputs, ones),
                nn.Sequential(ConvNorm(inputs, reduced_3), ConvNorm(reduced_3, threes, 3)),
                nn.Sequential(ConvNorm(inputs, reduced_5), ConvNorm(reduced_5, fives, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, padding=1), ConvNorm(inputs, pooled)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[n, inputs, h, w]` → `[n, ones + threes + fives + pooled, h, w]`."""
        return torch.cat([way(x) for way in self.ways], dim=1)


def googlenet(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """Nine inception modules: 7,005,832 parameters at 1000 classes for images from 64 pixels.

    With biases in place of normalisation, as in the paper, it would be 6,998,552.
    """
    features = STAGES[-1][-1]
    return initialise(
        nn.Sequential(
            OrderedDict(
                stem=ConvNorm(3, STEM_CHANNELS, 3) if is_small(size) else _stem(),
                inceptions=_inceptions(),
                pool=Mean(),
                dropout=nn.Dropout(dropout),
                classifier=nn.Linear(_width(features), classes),
            )
        )
    )


def _stem() -> nn.Sequential:
    return nn.Sequential(
        ConvNorm(3, 64, 7, stride=2),
        _halving(),
        ConvNorm(64, 64),
        ConvNorm(64, STEM_CHANNELS, 3),
        _halving(),
    )


def _inceptions() -> nn.Sequential:
    modules: list[nn.Module] = []
    inputs = STEM_CHANNELS
    for stage in STAGES:
        if modules:
            modules.append(_halving())
        for channels in stage:
            modules.append(Inception(inputs, *channels))
            inputs = _width(channels)
    return nn.Sequential(*modules)


def _width(channels: tuple[int, int, int, int, int, int]) -> int:
    ones, _, threes, _, fives, pooled = channels
    return ones + threes + fives + pooled


def _halving() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, padding=1)
