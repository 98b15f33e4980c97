"""SE-ResNet: ResNet whose blocks weigh their channels by squeeze and excitation (Hu et al. 2018).

Everything but that is ResNet's, the stem for images below 64 pixels included.
"""

from torch import Tensor, nn

from training.nets.layers import Mean
from training.nets.resnet import basic, bottleneck, residual_network

REDUCTION = 16


class SqueezeExcitation(nn.Module):
    """Weigh each channel by what all channels' means say: two dense layers with a narrow waist, then a sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        waist = channels // REDUCTION
        self.weights = nn.Sequential(
            Mean(), nn.Linear(channels, waist), nn.ReLU(), nn.Linear(waist, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[n, channels, h, w]` → the same shape."""
        weights: Tensor = self.weights(x)
        return x * weights[:, :, None, None]


def se_resnet18(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """11,778,592 parameters at 1000 classes for images from 64 pixels."""
    return residual_network(basic, 1, (2, 2, 2, 2), classes, size, SqueezeExcitation)


def se_resnet34(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """21,958,868 parameters at 1000 classes for images from 64 pixels."""
    return residual_network(basic, 1, (3, 4, 6, 3), classes, size, SqueezeExcitation)


def se_resnet50(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """28,088,024 parameters at 1000 classes for images from 64 pixels."""
    return residual_network(bottleneck, 4, (3, 4, 6, 3), classes, size, SqueezeExcitation)
