"""A bundle of a standard ResNet-50, for speed only: its weights are random, and what it answers means nothing.

    python -m benchmarks.networks           # writes benchmarks/.cache/models/resnet50/1, once

The network is that of `training/nets/resnet.py`. The bundle is a real one: exported, compared with PyTorch, with a
golden set that it proves itself by, so `convoy serve --models benchmarks/.cache/models` takes it as any other.
"""

import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from app.errors import BundleError
from app.golden import prove
from app.images import decode
from app.manifest import Bundle, read_bundle, verify_files, write_bundle
from training.classifiers import onnx_run, torch_run
from training.data.arrays import Split
from training.data.listing import Picture
from training.export import compare, write_graph
from training.golden import GoldenAnswers, choose_golden
from training.graphs.exporter import OPSET
from training.nets import build
from training.published import read_labels
from training.recipes import Recipe, make_recipe
from training.servable import Normalise, Servable

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "benchmarks/.cache/models"
CLASSES = 1000
LOGIT_DEVIATION = 4.0
"""Of the logits over pictures: one class stands out, as in a trained network, and golden labels are not in doubt."""
VIEWS = 64
TOLERANCE = 0.1
"""The most that a manifest allows. Fifty layers of random weights carry the rounding of half precision further than
trained ones do, to 0.06 where a probability is near a half; these bundles are for speed."""
SURE = 0.95
"""Least distance of a golden image's likeliest label from the next. A difference beyond the tolerance then takes logits
that are 1.5 off; at a half 0.4 would do, and any label could change. Rounding what goes into every layer and comes out
of it to half precision makes a difference of 0.003, and what goes into it to TF32 as much (emulated in PyTorch)."""


def main() -> None:
    print(resnet50().directory)


def resnet50() -> Bundle:
    """Return the bundle, written first where it is not there, not whole or of an earlier tolerance."""
    target = CACHE / "resnet50/1"
    return kept(target) or write_resnet50(target)


def kept(target: Path) -> Bundle | None:
    """Return the bundle that an earlier run left there, if it can be taken as it is."""
    try:
        bundle = read_bundle(target)
        verify_files(bundle)
    except BundleError:
        return None
    return bundle if bundle.manifest.golden.tolerance == TOLERANCE else None


def surest(golden: GoldenAnswers) -> GoldenAnswers:
    """Leave the images whose answers are hardly in doubt, at least the surest one."""
    ordered = np.sort(golden.probabilities, axis=1)
    margins = ordered[:, -1] - ordered[:, -2]
    names = list(golden.images)
    left = np.flatnonzero(margins >= min(SURE, margins.max())).tolist()
    return GoldenAnswers(
        {names[index]: golden.images[names[index]] for index in left}, golden.probabilities[left], golden.detects
    )


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
        golden = surest(choose_golden(pictures, recipe.pixels, run))
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
            "tolerance": TOLERANCE,
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


def random_network(images: np.ndarray, recipe: Recipe) -> nn.Sequential:
    """Draw weights, and let the statistics of batch normalisation be those of real pictures, as after a training."""
    torch.manual_seed(0)
    network = build("resnet50", classes=CLASSES, size=recipe.size, dropout=0)
    features, classifier = network[:-1], network[-1]
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # One batch, taken whole: what it measures is what it keeps. Every branch counts, as after a training.
            module.momentum = 1.0
            nn.init.ones_(module.weight)
    planes = Normalise(recipe)(views(images))
    with torch.no_grad():
        features.train()(planes)
        found = features.eval()(planes)
        nn.init.normal_(classifier.weight, std=1.0)
        logits = (found - found.mean(dim=0)) @ classifier.weight.T
        classifier.weight.mul_(LOGIT_DEVIATION / logits.std())
        classifier.bias.copy_(-classifier.weight @ found.mean(dim=0))
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
