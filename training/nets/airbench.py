"""Airbench (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU"): six convolutions behind a whitening one.

The layer order, the widths and the initial weights are the paper's. One thing is written otherwise: its outputs are
divided by 9 and its last layer is trained at a rate of its own; here the factor is such that all that is not a filter
can share one rate, which is the same training.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from training.errors import RecipeError

WIDTHS = (64, 256, 256)
PATCH = 2
WHITENED = 2 * 3 * PATCH * PATCH
WHITENED_IMAGES = 5000
WHITENING_EPSILON = 5e-4
BN_EPSILON = 1e-12
BN_MOMENTUM = 0.4
HEAD_SCALE = 0.4
"""The paper's 1/9 at a rate of 0.67 for the last layer, as the same steps at its rate of 0.053 for biases."""
HEAD_DEVIATION = 1 / (9 * HEAD_SCALE)


class Norm(nn.BatchNorm2d):
    """Batch normalisation whose scale stays 1: only its shift is learnt."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=BN_EPSILON, momentum=BN_MOMENTUM)
        self.weight.requires_grad_(False)


class Group(nn.Module):
    """Convolution, pooling, convolution: half the side, `outputs` channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = Norm(outputs)
        self.refine = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = Norm(outputs)
        self.activation = nn.GELU()
        for layer in (self.widen, self.refine):
            nn.init.dirac_(layer.weight[: layer.in_channels])  # the rest stays PyTorch's draw

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[n, inputs, h, w]` → `[n, outputs, h // 2, w // 2]`."""
        x = self.activation(self.norm1(max_pool2d(self.widen(x), 2)))
        refined: Tensor = self.activation(self.norm2(self.refine(x)))
        return refined


class Airbench(nn.Module):
    """Whitening, three groups, the largest value of each plane, one dense layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, WHITENED, PATCH)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        self.activation = nn.GELU()
        inputs = (WHITENED, *WIDTHS[:-1])
        self.groups = nn.Sequential(*(Group(*pair) for pair in zip(inputs, WIDTHS, strict=True)))
        self.head = nn.Linear(WIDTHS[-1], classes, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(HEAD_DEVIATION / self.head.weight.std())

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

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[n, 3, size, size]` → logits `[n, classes]`."""
        features = self.groups(self.activation(self.whiten(x))).amax(dim=(2, 3))
        logits: Tensor = self.head(features) * HEAD_SCALE
        return logits


def airbench94(*, classes: int, size: int, dropout: float) -> nn.Module:
    """1,972,792 parameters at 10 classes and 32×32 images; `dropout` is not used, as in the paper."""
    if size < 17:
        raise RecipeError(f"--size: airbench94 halves the image three times and needs 17 pixels, not {size}.")
    return Airbench(classes)
