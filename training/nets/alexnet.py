"""AlexNet (Krizhevsky et al. 2012) in one tower (Krizhevsky 2014, *One weird trick*), as it is commonly published.

Without the first paper's local response normalisation. Below 64 pixels the adaptation is ours: the first convolution
is 3×3 with stride 1 instead of 11×11 with stride 4, and the dense layers have 512 units instead of 4096.
"""

from collections import OrderedDict

from torch import nn

from training.errors import RecipeError
from training.nets.layers import dense_layers, initialise, is_small

SMALLEST, LARGEST = 15, 256
DENSE_WIDTH, SMALL_DENSE_WIDTH = 4096, 512
LAST_CHANNELS = 256


def alexnet(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """Five convolutions and three dense layers: 61,100,840 parameters for 224×224 images and 1000 classes."""
    if not SMALLEST <= size <= LARGEST:
        raise RecipeError(
            f"--size: alexnet takes {SMALLEST} to {LARGEST} pixels a side (three poolings, and dense layers that grow "
            f"with the image), not {size}."
        )
    first = nn.Conv2d(3, 64, 3, padding=1) if is_small(size) else nn.Conv2d(3, 64, 11, stride=4, padding=2)
    side = size if is_small(size) else (size + 2 * 2 - 11) // 4 + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    width = SMALL_DENSE_WIDTH if is_small(size) else DENSE_WIDTH
    return initialise(
        nn.Sequential(
            OrderedDict(
                features=nn.Sequential(
                    first,
                    nn.ReLU(),
                    nn.MaxPool2d(3, 2),
                    nn.Conv2d(64, 192, 5, padding=2),
                    nn.ReLU(),
                    nn.MaxPool2d(3, 2),
                    nn.Conv2d(192, 384, 3, padding=1),
                    nn.ReLU(),
                    nn.Conv2d(384, 256, 3, padding=1),
                    nn.ReLU(),
                    nn.Conv2d(256, LAST_CHANNELS, 3, padding=1),
                    nn.ReLU(),
                    nn.MaxPool2d(3, 2),
                ),
                dense=dense_layers(LAST_CHANNELS * side * side, width, dropout),
                classifier=nn.Linear(width, classes),
            )
        )
    )


PUBLISHED = {"dense.1": "classifier.1", "dense.4": "classifier.4", "classifier": "classifier.6"}


def published_name(ours: str) -> str:
    """Return what torchvision calls the tensor that we call `ours`."""
    layer, _, tensor = ours.rpartition(".")
    return f"{PUBLISHED.get(layer, layer)}.{tensor}"
