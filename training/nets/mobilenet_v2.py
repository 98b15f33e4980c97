"""MobileNetV2 (Sandler et al. 2018): inverted residuals, of which EfficientNet is made too.

Below 64 pixels the stem and the first stage that would halve the image keep its resolution, as in K. Liu's
pytorch-cifar.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from training.nets.layers import ConvNorm, Mean, initialise, is_small

# Expansion, kernel, stride, output channels, repeats: table 2 of the paper.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 3, 2, 32, 3),
    (6, 3, 2, 64, 4),
    (6, 3, 1, 96, 3),
    (6, 3, 2, 160, 3),
    (6, 3, 1, 320, 1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280

Layer = Callable[..., nn.Module]
"""What has the arguments of `ConvNorm`."""


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int, layer: Layer) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = layer(inputs, wide) if expansion > 1 else nn.Identity()
        self.depthwise = layer(wide, wide, kernel, stride, groups=wide)
        self.project = layer(wide, outputs, activation=nn.Identity)
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[n, inputs, h, w]` → `[n, outputs, h / stride, w / stride]`."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds_input else y


def mobilenet_v2(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """3,504,872 parameters at 1000 classes."""
    return inverted_residual_network(
        STAGES, STEM_CHANNELS, HEAD_CHANNELS, partial(ConvNorm, activation=nn.ReLU6), classes, size, dropout
    )


def inverted_residual_network(
    stages: Sequence[tuple[int, int, int, int, int]],
    stem_channels: int,
    head_channels: int,
    layer: Layer,
    classes: int,
    size: int,
    dropout: float,
) -> nn.Sequential:
    """Build stem, inverted residuals, head, mean and classifier.

    Args:
        stages: expansion, kernel, stride, output channels and repeats of each.
        stem_channels: outputs of the first convolution.
        head_channels: outputs of the last.
        layer: what all of it is made of.
        classes: number of logits.
        size: side of the images, pixels.
        dropout: share of the features dropped before the classifier.
    """
    blocks: list[nn.Module] = []
    inputs = stem_channels
    keeps = is_small(size)
    for expansion, kernel, stride, outputs, repeats in stages:
        if keeps and stride == 2:
            keeps, stride = False, 1
        for repeat in range(repeats):
            blocks.append(InvertedResidual(inputs, outputs, expansion, kernel, stride if repeat == 0 else 1, layer))
            inputs = outputs
    return initialise(
        nn.Sequential(
            OrderedDict(
                stem=layer(3, stem_channels, kernel=3, stride=1 if is_small(size) else 2),
                blocks=nn.Sequential(*blocks),
                head=layer(inputs, head_channels),
                pool=Mean(),
                dropout=nn.Dropout(dropout),
                classifier=nn.Linear(head_channels, classes),
            )
        )
    )


PUBLISHED = {"stem": "features.0", "head": "features.18", "classifier": "classifier.1"}


def published_name(ours: str) -> str:
    """Return what torchvision calls the tensor that we call `ours`."""
    kind, _, rest = ours.partition(".")
    if kind != "blocks":
        return f"{PUBLISHED[kind]}.{rest}"
    number, layer, part, tensor = rest.split(".")
    # The first block has nothing to expand. Convolution and normalisation are a pair, but in a projection.
    steps = ("depthwise", "project") if number == "0" else ("expand", "depthwise", "project")
    step = steps.index(layer)
    place = str(step + int(part)) if layer == "project" else f"{step}.{part}"
    return f"features.{int(number) + 1}.conv.{place}.{tensor}"
