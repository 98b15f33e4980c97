"""A sheet of what each augmentation does to the free photos, for the documentation.

python -m benchmarks.augmentations      # writes docs/pictures/augmentations.jpg
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from app.images import decode
from training.data.augment import augment, mix
from training.recipes import make_recipe

ROOT = Path(__file__).parent.parent
PHOTOS = ("cat", "coffee", "rocket")
SIDE = 96
SEED = 8
STRENGTHS = {
    "as it is": {},
    "flip, shift 12": {"flip": True, "shift": 12},
    "shear 20, zoom 0.3": {"shear": 20, "zoom": 0.3},
    "rotate 30": {"rotate": 30},
    "cutout 40": {"cutout": 40},
    "mixup 1": {"mixup": 1},
    "cutmix 1": {"cutmix": 1},
}
"""Stronger than one would train with, so that it shows."""


def main() -> None:
    figure = Figure(figsize=(7.8, 3.5), layout="constrained")
    for row, panels in zip(
        figure.subplots(len(PHOTOS), len(STRENGTHS)), zip(*sheet().values(), strict=True), strict=True
    ):
        for axes, panel in zip(row, panels, strict=True):
            axes.imshow(panel)
            axes.set_axis_off()
    for axes, title in zip(figure.axes, STRENGTHS, strict=False):
        axes.set_title(title, fontsize=9)
    figure.savefig(ROOT / "docs/pictures/augmentations.jpg", dpi=100, pil_kwargs={"quality": 75})


def sheet() -> dict[str, np.ndarray]:
    """Change all photos by each recipe: uint8 `[photos, side, side, 3]`."""
    panels = {}
    for title, knobs in STRENGTHS.items():
        recipe = make_recipe(size=SIDE, mean=0.5, **{"shear": 0, "zoom": 0, "flip": False} | knobs)
        photos = [decode((ROOT / f"examples/photos/{name}.jpg").read_bytes(), recipe.pixels) for name in PHOTOS]
        generator = torch.Generator().manual_seed(SEED)
        planes = augment(torch.from_numpy(np.stack(photos)), recipe, generator)
        if recipe.mixup or recipe.cutmix:
            planes, _ = mix(planes, torch.arange(len(PHOTOS)), len(PHOTOS), recipe, generator)
        panels[title] = planes.round().byte().permute(0, 2, 3, 1).numpy()
    return panels


if __name__ == "__main__":
    main()
