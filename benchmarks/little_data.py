"""How far a few images per class go: augmentation, mixup, cutmix, and images made by two small generators.

    python -m benchmarks.little_data --data data/cifar10             # writes benchmarks/results/little-data.json

The article's network learns from 50 or 200 images per class of CIFAR-10 and is measured on all 10,000 test images. An
arm is a way to make much of them. All arms of a seed have the same images, the same initial weights and as many images
passed through the network. Synthetic images are made from the very images that the arm may train on, and nothing else:
as many as there are real ones, passed beside them for half the epochs. Runs that are in the results are not repeated.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from app.cpus import machine
from training.atomic import replacing
from training.data.arrays import Split, load_split, read_listing
from training.data.augment import augment, mix
from training.nets import build
from training.recipes import Recipe, make_recipe
from training.servable import Normalise

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/little-data.json"
CACHE = ROOT / "benchmarks/.cache/data"
PASSES = {50: 20_000, 200: 40_000}
"""Images per class → images that pass through the network in one training."""
SEEDS = (0, 1, 2)
BATCH = 32
LEARNING_RATE = 0.001
"""Adam's, as the article's; falls to 0 along a line, so that the last step is no accident."""
PIXELS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), "shear": 0, "zoom": 0, "flip": False}
MOVED = {"flip": True, "shift": 2}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to make much of few images."""

    knobs: dict[str, Any]
    generate: Callable[[Tensor, Tensor, int], Tensor] | None = None
    """(images uint8 `[n, h, w, 3]`, labels int64 `[n]`, seed) → one synthetic image for each of the labels."""


# ---------------------------------------------------------------- generators


def blend_a_class(images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Draw from the normal distribution that has each class's mean and covariance in pixels.

    mean + Σ zᵢ · (xᵢ - mean) / √n with normal zᵢ has exactly that covariance, without computing it: what principal
    components, all of them, would draw.
    """
    generator = torch.Generator().manual_seed(seed)
    made = torch.empty_like(images)
    for label in labels.unique().tolist():
        members = images[labels == label].flatten(1).float()
        mean, count = members.mean(dim=0), len(members)
        drawn = mean + torch.randn(count, count, generator=generator) @ (members - mean) / count**0.5
        made[labels == label] = drawn.round().clamp(0, 255).byte().view(-1, *images.shape[1:])
    return made


class Autoencoder(nn.Module):
    """A variational autoencoder that is told the class on both ways (Sohn et al. 2015)."""

    LATENT = 64
    WIDTH = 32
    DEVIATION = 0.1
    """Of a pixel around what is decoded, in 0-1: how much detail the code has to carry."""
    PASSES = 40_000

    def __init__(self, classes: int) -> None:
        super().__init__()
        width, self.classes = self.WIDTH, classes
        self.encode = nn.Sequential(
            nn.Conv2d(3 + classes, width, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(4 * width * 16, 2 * self.LATENT),
        )
        self.decode = nn.Sequential(
            nn.Linear(self.LATENT + classes, 4 * width * 16),
            nn.GELU(),
            nn.Unflatten(1, (4 * width, 4, 4)),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1),
            nn.GELU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.GELU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Sigmoid(),
        )

    def loss(self, planes: Tensor, labels: Tensor) -> Tensor:
        """Return the negative evidence lower bound per image, nats, but for a constant; planes in 0-1."""
        told = one_hot(labels, self.classes).float()
        spread = told[:, :, None, None].expand(-1, -1, *planes.shape[-2:])
        mean, log_variance = self.encode(torch.cat([planes, spread], dim=1)).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        decoded = self.decode(torch.cat([code, told], dim=1))
        fit = mse_loss(decoded, planes, reduction="sum") / (2 * self.DEVIATION**2)
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum() / 2
        return (fit + divergence) / len(planes)

    def sample(self, labels: Tensor) -> Tensor:
        """Decode a code from the prior for each label: float32 `[n, 3, 32, 32]` in 0-1."""
        told = one_hot(labels, self.classes).float()
        decoded: Tensor = self.decode(torch.cat([torch.randn(len(labels), self.LATENT), told], dim=1))
        return decoded


def decode_a_class(images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Train the autoencoder on the images, flipped and shifted, and decode an image for each label."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, recipe = Autoencoder(int(labels.max()) + 1), make_recipe(**PIXELS | MOVED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = model.PASSES // BATCH
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        model.loss(augment(images[chosen], recipe, generator) / 255, labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        return (255 * model.sample(labels)).round().byte().permute(0, 2, 3, 1).contiguous()


ARMS = {
    "as they are": Arm({}),
    "flip, shift": Arm(MOVED),
    "flip, shift, cutout": Arm(MOVED | {"cutout": 8}),
    "flip, shift, mixup": Arm(MOVED | {"mixup": 1}),
    "flip, shift, cutmix": Arm(MOVED | {"cutmix": 1}),
    "flip, shift, normal distribution": Arm(MOVED, blend_a_class),
    "flip, shift, autoencoder": Arm(MOVED, decode_a_class),
}


# ---------------------------------------------------------------- one training


def train(arm: Arm, images: Tensor, labels: Tensor, passes: int, seed: int) -> nn.Module:
    """Train the article's network on the arm's images until `passes` images went through it."""
    recipe = make_recipe(**PIXELS | arm.knobs)
    if arm.generate is not None:
        images, labels = torch.cat([images, arm.generate(images, labels, seed)]), labels.repeat(2)
    classes = int(labels.max()) + 1
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network, normalise = build(recipe.network, classes=classes, size=32, dropout=recipe.dropout), Normalise(recipe)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, passes // BATCH)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(-(-passes // len(images)))])
    for chosen in order[: passes // BATCH * BATCH].split(BATCH):
        planes, targets = augment(images[chosen], recipe, generator), labels[chosen]
        if recipe.mixup or recipe.cutmix:
            planes, targets = mix(planes, targets, classes, recipe, generator)
        optimizer.zero_grad()
        cross_entropy(network(normalise(planes)), targets).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def accuracy(network: nn.Module, recipe: Recipe, split: Split) -> float:
    normalise, labels = Normalise(recipe), torch.from_numpy(split.labels)
    images = torch.from_numpy(np.array(split.images))
    with torch.inference_mode():
        given = [network(normalise(part.permute(0, 3, 1, 2).float())).argmax(1) for part in images.split(500)]
    return (torch.cat(given) == labels).float().mean().item()


def few(split: Split, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose so many images of each class at random."""
    random = np.random.default_rng([seed, per_class])
    chosen = np.concatenate(
        [random.choice(np.flatnonzero(split.labels == label), per_class, False) for label in np.unique(split.labels)]
    )
    return torch.from_numpy(split.images[chosen]), torch.from_numpy(split.labels[chosen])


# ---------------------------------------------------------------- the study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10: train/ and test/ with a folder per class")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    listing, pixels = read_listing(options.data), make_recipe().pixels
    split, test = (load_split(listing.part(part), pixels, CACHE) for part in ("train", "test"))
    for seed in options.seeds:
        for per_class, passes in PASSES.items():
            for name in options.arms:
                key = {"images_per_class": per_class, "arm": name, "seed": seed}
                if any(key.items() <= run.items() for run in kept()):
                    continue
                begun = time.perf_counter()
                network = train(ARMS[name], *few(split, per_class, seed), passes, seed)
                share = accuracy(network, make_recipe(**PIXELS), test)
                run = key | {"accuracy": round(share, 4), "seconds": round(time.perf_counter() - begun, 1)}
                print(run, flush=True)
                keep([*kept(), run])


def kept() -> list[dict[str, Any]]:
    """Read the runs that are in the results, which processes with other seeds or arms write too."""
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []


def keep(runs: list[dict[str, Any]]) -> None:
    """Write every run, and the mean and the range of each arm over its seeds."""
    table = []
    for per_class in PASSES:
        for name in ARMS:
            found = [run["accuracy"] for run in runs if (run["images_per_class"], run["arm"]) == (per_class, name)]
            if found:
                figures = {"mean": round(statistics.mean(found), 4), "least": min(found), "most": max(found)}
                table.append({"images_per_class": per_class, "arm": name, "seeds": len(found), **figures})
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "torch": torch.__version__,
        "test_images": 10_000,
        "images_passed": {str(per_class): passes for per_class, passes in PASSES.items()},
        "arms": table,
        "runs": runs,
    }
    with replacing(RESULTS) as file:
        file.write((json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
