"""Airbench (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU"): six convolutions behind a whitening one.

Layers, widths and first weights are the paper's. One thing is written otherwise: there the last layer's outputs are
divided by 256 and it is trained at a rate of its own, by the sum of a batch's losses. Here the factor is such that
all that is not a filter shares one rate, by the mean: the same steps.
"""

import torch
from torch import Tensor, nn

from training.errors import RecipeError

WIDTHS = (64, 256, 256)
PATCH = 2
WHITENED = 2 * 3 * PATCH * PATCH
WHITENING_EPSILON = 5e-4
BN_EPSILON = 1e-12
BN_MOMENTUM = 0.4
FEATURE_SCALE = 1 / 72
"""(0.67 / 0.053) ** 0.5 / 256: the paper's rates for the last layer and for biases, and its factor."""
CLASSIFIER_DEVIATION = 1 / (256 * FEATURE_SCALE)


class Norm(nn.BatchNorm2d):
    """Batch normalisation whose scale stays 1: only its shift is learnt."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=BN_EPSILON, momentum=BN_MOMENTUM)
        self.weight.requires_grad_(False)


class Group(nn.Sequential):
    """Convolution, pooling, convolution: float32 `[n, inputs, h, w]` → `[n, outputs, h // 2, w // 2]`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        widen = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        refine = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        for layer in (widen, refine):
            nn.init.dirac_(layer.weight[: layer.in_channels])  # the other filters stay PyTorch's draw
        super().__init__(widen, nn.MaxPool2d(2), Norm(outputs), nn.GELU(), refine, Norm(outputs), nn.GELU())


class PlaneMaximum(nn.Module):
    """The largest value of each plane, scaled: float32 `[n, channels, h, w]` → `[n, channels]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Take the maxima of a batch."""
        return x.amax(dim=(2, 3)) * FEATURE_SCALE


class Airbench(nn.Sequential):
    """Whitening, three groups, maxima, one dense layer: float32 `[n, 3, size, size]` → logits `[n, classes]`."""

    whiten: nn.Conv2d

    def __init__(self, classes: int) -> None:
        whiten, classifier = nn.Conv2d(3, WHITENED, PATCH), nn.Linear(WIDTHS[-1], classes, bias=False)
        whiten.weight.requires_grad_(False)
        with torch.no_grad():
            whiten.bias.zero_()  # type: ignore[union-attr]
            classifier.weight.mul_(CLASSIFIER_DEVIATION / classifier.weight.std())
        super().__init__()
        self.add_module("whiten", whiten)
        self.add_module("activation", nn.GELU())
        inputs = WHITENED
        for number, outputs in enumerate(WIDTHS, start=1):
            self.add_module(f"group{number}", Group(inputs, outputs))
            inputs = outputs
        self.add_module("maximum", PlaneMaximum())
        self.add_module("classifier", classifier)

    @torch.no_grad()
    def initialise(self, images: Tensor) -> None:
        """Set the first layer from the data: its filters turn 2×2 patches into uncorrelated values of equal spread.

        Args:
            images: float32 `[n, 3, size, size]`, normalised training images, thousands of them.
        """
        patches = images.unfold(2, PATCH, 1).unfold(3, PATCH, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, WHITENED // 2)
        spread, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (spread + WHITENING_EPSILON).sqrt()).T.flip(0).view(-1, 3, PATCH, PATCH)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def airbench94(*, classes: int, size: int, dropout: float) -> nn.Module:
    """1,972,792 parameters at 10 classes; published for 32×32 images. `dropout` is not used, as in the paper."""
    if size < 17:
        raise RecipeError(f"--size: airbench94 halves the image three times and needs 17 pixels, not {size}.")
    return Airbench(classes)
