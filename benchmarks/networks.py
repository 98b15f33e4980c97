"""A bundle of a standard ResNet-50, for speed only: its weights are random, and what it answers means nothing.

    python -m benchmarks.networks           # writes benchmarks/.cache/models/resnet50/1, once

The network is that of the papers (He et al. 2015, with the stride in the 3×3 convolution, "v1.5"), 25,557,032
parameters. The bundle is a real one: exported, compared with PyTorch, with a golden set that it proves itself by, so
`convoy serve --models benchmarks/.cache/models` takes it as any other.
"""

import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from app.errors import BundleError
from app.golden import prove
from app.images import decode
from app.manifest import Bundle, read_bundle, verify_files, write_bundle
from training.classifiers import onnx_run, torch_run
from training.data import Split
from training.export import GOLDEN_TOLERANCE, compare, write_graph
from training.golden import choose_golden
from training.graphs import OPSET
from training.listing import Picture
from training.published import read_labels
from training.recipes import Recipe, make_recipe
from training.servable import Normalise, Servable

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "benchmarks/.cache/models"
PARAMETERS = 25_557_032
CLASSES = 1000
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""Channels of the 3×3 convolution, blocks, stride of the first: table 1 of the paper."""
EXPANSION = 4
LOGIT_DEVIATION = 4.0
"""Of the logits over pictures: one class stands out, as in a trained network, and golden labels are not in doubt."""
VIEWS = 64


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * EXPANSION
        self.narrow, self.narrow_norm = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.middle = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.middle_norm = nn.BatchNorm2d(width)
        self.widen, self.widen_norm = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.narrow_norm(self.narrow(x)))
        y = relu(self.middle_norm(self.middle(y)))
        return relu(self.widen_norm(self.widen(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    """float32 `[n, 3, size, size]` → logits `[n, 1000]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)
        )
        blocks: list[nn.Module] = []
        inputs = 64
        for width, count, stride in STAGES:
            for number in range(count):
                blocks.append(Bottleneck(inputs, width, stride if number == 0 else 1))
                inputs = width * EXPANSION
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        planes: Tensor = self.blocks(self.stem(x))
        return planes.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


def main() -> None:
    print(resnet50().directory)


def resnet50() -> Bundle:
    """Return the bundle, written first where it is not there or not whole."""
    target = CACHE / "resnet50/1"
    try:
        bundle = read_bundle(target)
        verify_files(bundle)
    except BundleError:
        return write_resnet50(target)
    return bundle


def write_resnet50(target: Path) -> Bundle:
    recipe = make_recipe(size=224, resize_short_side=256, mean="0.485,0.456,0.406", std="0.229,0.224,0.225")
    photos = sorted((ROOT / "examples/photos").glob("*.jpg"))
    pictures = tuple(Picture(path.name, 0, path.name, path) for path in photos)
    images = np.stack([decode(path.read_bytes(), recipe.pixels) for path in photos])
    servable = Servable(random_network(images, recipe), recipe).eval()
    labels = read_labels(ROOT / "training/labels/imagenet.txt")
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model.onnx"
        write_graph(servable, recipe.pixels, model)
        run = onnx_run(model)
        split = Split(images, np.zeros(len(images), np.int64), pictures)
        difference = compare(torch_run(servable, torch.device("cpu")), run, split)
        golden = choose_golden(pictures, recipe.pixels, run)
        manifest = {
            "name": "resnet50",
            "version": "1",
            "description": "ResNet-50 with random weights, to measure speed; its answers mean nothing.",
            "pixels": recipe.pixels,
            "labels": labels,
            "evaluation": {"runtime_difference": float(f"{difference:.2g}")},
            "provenance": {
                "source": "random weights, seed 0",
                "licence": "Apache-2.0",
                "command": "python -m benchmarks.networks",
                "created": datetime.now(UTC).date().isoformat(),
            },
            "opset": OPSET,
            "tolerance": GOLDEN_TOLERANCE,
            "golden_labels": [labels[index] for index in golden.probabilities.argmax(axis=1).tolist()],
        }
        return write_bundle(
            target,
            manifest,
            model,
            golden.images,
            golden.probabilities,
            check=lambda written: prove(written, onnx_run(written.model_path)),
        )


def random_network(images: np.ndarray, recipe: Recipe) -> ResNet50:
    """Draw weights, and let the statistics of batch normalisation be those of real pictures, as after a training."""
    torch.manual_seed(0)
    network = ResNet50()
    count = sum(parameter.numel() for parameter in network.parameters())
    if count != PARAMETERS:
        raise SystemExit(f"This ResNet-50 has {count:,} parameters instead of {PARAMETERS:,}.")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            # One batch, taken whole: what it measures is what it keeps.
            module.momentum = 1.0
    planes = Normalise(recipe)(views(images))
    with torch.no_grad():
        features = network.train().features(planes)
        features = network.eval().features(planes)
        nn.init.normal_(network.classifier.weight, std=1.0)
        logits = (features - features.mean(dim=0)) @ network.classifier.weight.T
        network.classifier.weight.mul_(LOGIT_DEVIATION / logits.std())
        network.classifier.bias.copy_(-network.classifier.weight @ features.mean(dim=0))
    return network


def views(images: np.ndarray) -> Tensor:
    """Cut uint8 `[n, 224, 224, 3]` into views of several places and sizes: float32 `[VIEWS, 3, 224, 224]`, 0-255."""
    generator = torch.Generator().manual_seed(0)
    planes = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float()
    cut = []
    for number in range(VIEWS):
        side = int(torch.randint(64, 225, (1,), generator=generator))
        top, left = torch.randint(0, 225 - side, (2,), generator=generator).tolist()
        view = planes[number % len(planes), :, top : top + side, left : left + side]
        cut.append(nn.functional.interpolate(view[None], size=(224, 224), mode="bilinear", antialias=True))
    return torch.cat(cut)


if __name__ == "__main__":
    main()
