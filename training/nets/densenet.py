"""DenseNet (Huang et al. 2017): every layer gets the outputs of all layers before it in its block.

The variant BC: bottlenecks of four growth rates, transitions that halve the channels. Below 64 pixels the stem is one
3×3 convolution with stride 1 and there is no pooling, as in K. Liu's pytorch-cifar; the paper's own networks for
CIFAR-10 have three blocks and other depths. No dropout, as in the paper wherever there is augmentation.
"""

import re
from collections import OrderedDict

import torch
from torch import Tensor, nn

from training.nets.layers import ConvNorm, Mean, initialise, is_small

GROWTH = 32
BOTTLENECK = 4 * GROWTH
STEM_CHANNELS = 2 * GROWTH


class NormConv(nn.Sequential):
    """Batch normalisation, ReLU, convolution: the order of He et al. 2016 (*Identity mappings*)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        )


class DenseLayer(nn.Module):
    """Compute a few channels from all there are, and put them behind those."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.grow = nn.Sequential(NormConv(inputs, BOTTLENECK), NormConv(BOTTLENECK, GROWTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[n, inputs, h, w]` → `[n, inputs + 32, h, w]`."""
        return torch.cat([x, self.grow(x)], dim=1)


def densenet121(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """7,978,856 parameters at 1000 classes for images from 64 pixels."""
    return _densenet((6, 12, 24, 16), classes, size)


def densenet169(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """14,149,480 parameters at 1000 classes for images from 64 pixels."""
    return _densenet((6, 12, 32, 32), classes, size)


def densenet201(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """20,013,928 parameters at 1000 classes for images from 64 pixels."""
    return _densenet((6, 12, 48, 32), classes, size)


def _densenet(layers: tuple[int, ...], classes: int, size: int) -> nn.Sequential:
    """Stem, dense blocks with transitions between them, mean and classifier: table 1 of the paper."""
    body: list[nn.Module] = []
    channels = STEM_CHANNELS
    for count in layers:
        if body:
            body.append(nn.Sequential(NormConv(channels, channels // 2), nn.AvgPool2d(2)))
            channels //= 2
        body.append(nn.Sequential(*(DenseLayer(channels + GROWTH * number) for number in range(count))))
        channels += GROWTH * count
    return initialise(
        nn.Sequential(
            OrderedDict(
                stem=nn.Sequential(*_stem(size)),
                body=nn.Sequential(*body),
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(),
                pool=Mean(),
                classifier=nn.Linear(channels, classes),
            )
        )
    )


def _stem(size: int) -> list[nn.Module]:
    if is_small(size):
        return [nn.Conv2d(3, STEM_CHANNELS, 3, padding=1, bias=False)]
    return [ConvNorm(3, STEM_CHANNELS, 7, stride=2), nn.MaxPool2d(3, 2, padding=1)]


PUBLISHED = {"stem.0.0": "features.conv0", "stem.0.1": "features.norm0", "norm": "features.norm5"}
PARTS = {"0": "norm", "2": "conv"}


def published_name(ours: str) -> str:
    """Return what torchvision calls the tensor that we call `ours`."""
    layer, _, tensor = ours.rpartition(".")
    if dense := re.fullmatch(r"body\.(\d)\.(\d+)\.grow\.([01])\.([02])", layer):
        block, number, step, part = dense.groups()
        place = f"features.denseblock{int(block) // 2 + 1}.denselayer{int(number) + 1}"
        return f"{place}.{PARTS[part]}{int(step) + 1}.{tensor}"
    if transition := re.fullmatch(r"body\.(\d)\.0\.([02])", layer):
        between, part = transition.groups()
        return f"features.transition{int(between) // 2 + 1}.{PARTS[part]}.{tensor}"
    return f"{PUBLISHED.get(layer, layer)}.{tensor}"
