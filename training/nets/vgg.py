"""VGG (Simonyan & Zisserman 2015): 3×3 convolutions between five poolings, and dense layers that hold most weights.

Configurations A, B, D and E of the paper's table 1, and D with batch normalisation, which the paper has not: it comes
from Ioffe & Szegedy 2015, and lets the network be trained without care. Below 64 pixels the dense layers have 512 units
instead of 4096, as in C.-Y. Fu's pytorch-vgg-cifar10; the convolutions are the same.
"""

from collections import OrderedDict
from collections.abc import Iterator

from torch import nn

from training.errors import RecipeError
from training.nets.layers import dense_layers, initialise, is_small

SMALLEST, LARGEST = 32, 256
DENSE_WIDTH, SMALL_DENSE_WIDTH = 4096, 512
STAGE_CHANNELS = (64, 128, 256, 512, 512)


def vgg11(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """Configuration A: 132,863,336 parameters for 224×224 images and 1000 classes."""
    return _vgg("vgg11", (1, 1, 2, 2, 2), False, classes, size, dropout)


def vgg13(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """Configuration B: 133,047,848 parameters for 224×224 images and 1000 classes."""
    return _vgg("vgg13", (2, 2, 2, 2, 2), False, classes, size, dropout)


def vgg16(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """Configuration D: 138,357,544 parameters for 224×224 images and 1000 classes."""
    return _vgg("vgg16", (2, 2, 3, 3, 3), False, classes, size, dropout)


def vgg16_bn(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """Configuration D with batch normalisation: 138,365,992 parameters for 224×224 images and 1000 classes."""
    return _vgg("vgg16_bn", (2, 2, 3, 3, 3), True, classes, size, dropout)


def vgg19(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """Configuration E: 143,667,240 parameters for 224×224 images and 1000 classes."""
    return _vgg("vgg19", (2, 2, 4, 4, 4), False, classes, size, dropout)


def _vgg(
    name: str, convolutions: tuple[int, ...], normalises: bool, classes: int, size: int, dropout: float
) -> nn.Sequential:
    if not SMALLEST <= size <= LARGEST:
        raise RecipeError(
            f"--size: {name} takes {SMALLEST} to {LARGEST} pixels a side (five halvings, and dense layers that grow "
            f"with the image), not {size}."
        )
    side = size // 2 ** len(convolutions)
    width = SMALL_DENSE_WIDTH if is_small(size) else DENSE_WIDTH
    return initialise(
        nn.Sequential(
            OrderedDict(
                features=nn.Sequential(*_features(convolutions, normalises)),
                dense=dense_layers(STAGE_CHANNELS[-1] * side * side, width, dropout),
                classifier=nn.Linear(width, classes),
            )
        )
    )


def _features(convolutions: tuple[int, ...], normalises: bool) -> Iterator[nn.Module]:
    inputs = 3
    for count, channels in zip(convolutions, STAGE_CHANNELS, strict=True):
        for _ in range(count):
            yield nn.Conv2d(inputs, channels, 3, padding=1)
            if normalises:
                yield nn.BatchNorm2d(channels)
            yield nn.ReLU()
            inputs = channels
        yield nn.MaxPool2d(2)


PUBLISHED = {"dense.1": "classifier.0", "dense.4": "classifier.3", "classifier": "classifier.6"}


def published_name(ours: str) -> str:
    """Return what torchvision calls the tensor that we call `ours`."""
    layer, _, tensor = ours.rpartition(".")
    return f"{PUBLISHED.get(layer, layer)}.{tensor}"
