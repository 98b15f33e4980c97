"""What several families are made of: convolution with normalisation, dense layers, the mean, and the first weights.

Knows no family.
"""

from torch import Tensor, nn

SMALL = 64
"""Below this side, pixels, families keep the resolution in their first layers, as is usual for 32×32 images: with the
papers' strides of 32 in all, a 32×32 image would be a single pixel when the last stage gets it."""


def is_small(size: int) -> bool:
    """Tell whether a network for images of this side keeps their resolution in its first layers."""
    return size < SMALL


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch normalisation (Ioffe & Szegedy 2015), activation; `nn.Identity` for none.

    float32 `[n, inputs, h, w]` → `[n, outputs, ceil(h / stride), ceil(w / stride)]`, for odd kernels.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            activation(),
        )


class Mean(nn.Module):
    """The mean of each channel over the plane (Lin et al. 2014): float32 `[n, channels, h, w]` → `[n, channels]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Take the mean."""
        return x.mean(dim=(2, 3))


def dense_layers(inputs: int, width: int, dropout: float) -> nn.Sequential:
    """Two dense layers, each with dropout on its output: float32 `[n, channels, h, w]` → `[n, width]`."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(dropout),
    )


def initialise(network: nn.Sequential) -> nn.Sequential:
    """Draw the first weights of a network of ReLUs, and return it.

    Normal with variance 2 / inputs of a unit (He et al. 2015, eq. 10), biases 0; the last layer with deviation 0.01, so
    that no class is favoured at first (Goyal et al. 2017, section 5.1).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(network[-1].get_parameter("weight"), std=0.01)
    return network
