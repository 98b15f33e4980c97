"""EfficientNet-Lite: EfficientNet (Tan & Le 2019) without squeeze-and-excitation and with ReLU6, for plain hardware.

It is MobileNetV2's network in other proportions, with TensorFlow's padding. Below 64 pixels the stem and the first
stage that would halve the image keep its resolution, as there; for this family the adaptation is ours.
"""

from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from training.nets.mobilenet_v2 import inverted_residual_network

BN_EPSILON = 1e-3
BN_MOMENTUM = 0.01

# Expansion, kernel, stride, output channels, repeats: table 1 of the paper.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's 'same' padding: at stride 2 on an even side, one pixel more at the far edges.

    The published weights were trained so. On 100 photographs of 100 classes: 89 % top-1 with it, 83 % with as much
    padding on every side.
    """

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[n, inputs, h, w]` → `[n, outputs, ceil(h / stride), ceil(w / stride)]`."""
        top, bottom = self._padding(x.shape[2])
        left, right = self._padding(x.shape[3])
        if (top, left) == (bottom, right):
            return conv2d(x, self.weight, None, self.stride, (top, left), 1, self.groups)
        return conv2d(pad(x, (left, right, top, bottom)), self.weight, None, self.stride, 0, 1, self.groups)

    def _padding(self, side: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        return total // 2, total - total // 2


class SameConvNorm(nn.Sequential):
    """`ConvNorm` with TensorFlow's padding, the published weights' normalisation, and ReLU6."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__(
            SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=BN_EPSILON, momentum=BN_MOMENTUM),
            activation(),
        )


def efficientnet_lite0(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """The smallest of the family: 4,652,008 parameters at 1000 classes; published for 224×224 images."""
    return inverted_residual_network(STAGES, STEM_CHANNELS, HEAD_CHANNELS, SameConvNorm, classes, size, dropout)


PUBLISHED = {
    "stem.0": "_conv_stem",
    "stem.1": "_bn0",
    "expand.0": "_expand_conv",
    "expand.1": "_bn0",
    "depthwise.0": "_depthwise_conv",
    "depthwise.1": "_bn1",
    "project.0": "_project_conv",
    "project.1": "_bn2",
    "head.0": "_conv_head",
    "head.1": "_bn1",
    "classifier": "_fc",
}


def published_name(ours: str) -> str:
    """Return what the published state dict calls the tensor that we call `ours`, as in `_blocks.0._bn1.bias`."""
    layer, _, tensor = ours.rpartition(".")
    if layer.startswith("blocks."):
        _, number, step = layer.split(".", 2)
        return f"_blocks.{number}.{PUBLISHED[step]}.{tensor}"
    return f"{PUBLISHED[layer]}.{tensor}"
