"""The networks, by name: one family per file, and the function's name is the network's name.

A network takes float32 `[n, 3, size, size]`, already normalised, and gives logits float32 `[n, classes]`. Those of the
literature are sequences whose last layer is the dense one that gives the logits: `network[:-1]` gives the features,
float32 `[n, network[-1].in_features]`.
"""

from typing import Protocol

from torch import nn

from training.errors import RecipeError
from training.nets import (
    airbench,
    alexnet,
    article,
    densenet,
    efficientnet_lite,
    googlenet,
    mobilenet_v2,
    resnet,
    se_resnet,
    vgg,
)
from training.nets.translation import PublishedName


class Builder(Protocol):
    """A network's function."""

    __name__: str

    def __call__(self, *, classes: int, size: int, dropout: float) -> nn.Module:
        """Return the network with fresh weights, drawn from PyTorch's global generator.

        Args:
            classes: number of logits.
            size: side of the images, pixels.
            dropout: share of features dropped before the last layer, in those networks whose paper has dropout.

        Raises:
            RecipeError: the network does not take images of this size.
        """


BUILDERS: tuple[Builder, ...] = (
    article.article_cnn,
    airbench.airbench94,
    alexnet.alexnet,
    vgg.vgg11,
    vgg.vgg13,
    vgg.vgg16,
    vgg.vgg16_bn,
    vgg.vgg19,
    googlenet.googlenet,
    resnet.resnet18,
    resnet.resnet34,
    resnet.resnet50,
    resnet.resnet101,
    se_resnet.se_resnet18,
    se_resnet.se_resnet34,
    se_resnet.se_resnet50,
    densenet.densenet121,
    densenet.densenet169,
    densenet.densenet201,
    mobilenet_v2.mobilenet_v2,
    efficientnet_lite.efficientnet_lite0,
)
NETWORKS: dict[str, Builder] = {builder.__name__: builder for builder in BUILDERS}

PUBLISHED: dict[str, PublishedName] = {
    "alexnet": alexnet.published_name,
    **dict.fromkeys(("vgg11", "vgg13", "vgg16", "vgg16_bn", "vgg19"), vgg.published_name),
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101"), resnet.published_name),
    **dict.fromkeys(("densenet121", "densenet169", "densenet201"), densenet.published_name),
    "mobilenet_v2": mobilenet_v2.published_name,
    "efficientnet_lite0": efficientnet_lite.published_name,
}
"""Networks whose weights others published under other names: our name of a tensor → theirs."""


def build(name: str, *, classes: int, size: int, dropout: float) -> nn.Module:
    """Build a network by name.

    Raises:
        RecipeError: no network has that name, or it does not take images of this size.
    """
    if name not in NETWORKS:
        raise RecipeError(f"--network: there is no '{name}'; there are {', '.join(sorted(NETWORKS))}.")
    return NETWORKS[name](classes=classes, size=size, dropout=dropout)
