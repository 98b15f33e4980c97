"""Augmentation: random changes to a batch of training images, on the device that the batch is on.

Two steps, because they need different things. `augment` moves and covers each image alone, and keeps its label: flip,
shift, shear, zoom, rotate, cutout. `mix` blends each image with another of its batch, and their labels with them:
mixup, cutmix. Both first draw for the whole batch from the CPU generator that they are given, and nowhere else, then
compute; the halves can be called alone, by a process that computes a part of a batch which others share.

Owns this randomness and its one implementation. Scaling to the network's range is `training/servable.py`'s, so that
serving cannot differ. An operation whose knob is 0 draws nothing: the draws of the others stay what they were.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample, one_hot

from training.recipes import Recipe

# ---------------------------------------------------------------- each image alone


@dataclass(frozen=True, slots=True)
class Moves:
    """What is done to each image of a batch; None where the recipe does nothing of the kind."""

    matrices: Tensor | None
    """float32 `[n, 2, 2]`, from (row, column) in the result to (row, column) in the source, in pixels from the centre:
    rotation · shear · zoom, as `keras.preprocessing.image.apply_affine_transform` composes them."""
    mirrored: Tensor | None
    """bool `[n]`, whether the result is mirrored left to right."""
    shifts: Tensor | None
    """int64 `[n, 2]`: the row and the column of the source that come to lie at (0, 0)."""
    holes: Tensor | None
    """int64 `[n, 2]`: row and column of the middle of the square that is covered."""

    def part(self, chosen: slice | Tensor) -> "Moves":
        """Return what is done to some images of the batch: a slice, or int64 places."""
        every = (self.matrices, self.mirrored, self.shifts, self.holes)
        return Moves(*(None if draws is None else draws[chosen] for draws in every))

    def to(self, device: torch.device) -> "Moves":
        """Return the same on another device."""
        every = (self.matrices, self.mirrored, self.shifts, self.holes)
        return Moves(*(None if draws is None else draws.to(device, non_blocking=True) for draws in every))


def augment(images: Tensor, recipe: Recipe, generator: Generator, mirrored: Tensor | None = None) -> Tensor:
    """Change each image by its own draw.

    Args:
        images: uint8 `[n, size, size, 3]`.
        recipe: `flip`, `shift`, `shear`, `zoom`, `rotate` and `cutout` are read.
        generator: a CPU generator; the draws do not depend on the device of `images`.
        mirrored: bool `[n]`, where `alternate` has decided it for these images.

    Returns:
        float32 `[n, 3, size, size]`, still in 0-255; without any operation, the very pixels.
    """
    return move(images, draw_moves(len(images), recipe, generator, mirrored), recipe)


def alternate(count: int, recipe: Recipe, epoch: int) -> Tensor | None:
    """Say which of all training images an epoch mirrors, if they take turns: airbench's alternating flip.

    A random half of the images is mirrored in odd epochs, the other half in even ones, so that two epochs in a row
    show each image both ways, where independent draws show the same side twice half of the time (Jordan 2024).

    Returns:
        bool `[count]`, by the seed, in the order of the data set; None where every draw is independent.
    """
    if not (recipe.flip and recipe.alternate_flip):
        return None
    # Epochs are numbered from 1: (seed, 0) is nobody else's.
    seed = np.random.SeedSequence([recipe.seed, 0]).generate_state(1).item()
    first = torch.rand(count, generator=Generator().manual_seed(seed)) < 0.5
    return first if epoch % 2 else ~first


def draw_moves(count: int, recipe: Recipe, generator: Generator, mirrored: Tensor | None = None) -> Moves:
    """Draw what is done to `count` images; shear, zoom and rotation with Keras' distributions.

    The shear angle is uniform in ±`shear` *degrees*: the article's 0.2 moves no pixel of a 32×32 image by more than
    0.06. Row and column zoom are independent, uniform in 1 ± `zoom`, and below 1 enlarge. Shifts are uniform over all
    whole pixels in ±`shift`, rows and columns apart; holes over all pixels of the image.
    """
    matrices = shifts = holes = None
    if recipe.shear or recipe.zoom or recipe.flip:
        uniform = torch.rand(count, 4, generator=generator)
        if mirrored is None and recipe.flip:
            mirrored = uniform[:, 3] < 0.5
        if recipe.shear or recipe.zoom:
            angle = (2 * uniform[:, 0] - 1) * math.radians(recipe.shear)
            zoom = 1 + (2 * uniform[:, 1:3] - 1) * recipe.zoom
            matrices = _matrices(torch.ones(count), -angle.sin(), torch.zeros(count), angle.cos())
            matrices = matrices @ torch.diag_embed(zoom)
    if recipe.shift:
        shifts = torch.randint(-recipe.shift, recipe.shift + 1, (count, 2), generator=generator)
    if recipe.rotate:
        angle = (2 * torch.rand(count, generator=generator) - 1) * math.radians(recipe.rotate)
        rotations = _matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
        matrices = rotations if matrices is None else rotations @ matrices
    if recipe.cutout:
        holes = torch.randint(recipe.size, (count, 2), generator=generator)
    return Moves(matrices, mirrored, shifts, holes)


def _matrices(*entries: Tensor) -> Tensor:
    """Four times float32 `[n]`, row by row → float32 `[n, 2, 2]`."""
    return torch.stack(entries, dim=1).view(-1, 2, 2)


def move(images: Tensor, moves: Moves, recipe: Recipe) -> Tensor:
    """Do what was drawn: shift, then rotate, shear and zoom, then mirror, then cover.

    Whole pixels are moved as they are, without interpolation.
    """
    moves = moves.to(images.device)
    warped = moves.matrices is not None
    if moves.shifts is not None or (moves.mirrored is not None and not warped):
        images = crop(images, moves.shifts, None if warped else moves.mirrored)
    planes = images.permute(0, 3, 1, 2).float()
    if moves.matrices is not None:
        planes = warp(planes, moves.matrices, moves.mirrored)
    return planes if moves.holes is None else cover(planes, moves.holes, recipe)


def crop(images: Tensor, shifts: Tensor | None, mirrored: Tensor | None) -> Tensor:
    """Shift by whole pixels, what comes in reflected at the edge (not repeating the outermost pixel), and mirror.

    One gather of whole pixels: 150,000 images of 32×32 a second on one core, where `warp` does 30,000.

    Args:
        images: uint8 `[n, height, width, 3]`.
        shifts: int64 `[n, 2]`, smaller than height and width; None: no shift.
        mirrored: bool `[n]`; None: not mirrored.
    """
    count, height, width, channels = images.shape
    rows, columns = (torch.arange(side, device=images.device).expand(count, side) for side in (height, width))
    if mirrored is not None:
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    if shifts is not None:
        rows, columns = _reflect(rows + shifts[:, :1], height), _reflect(columns + shifts[:, 1:], width)
    rows = rows + torch.arange(0, count * height, height, device=images.device)[:, None]
    pixels = rows[:, :, None] * width + columns[:, None, :]
    return images.reshape(-1, channels).index_select(0, pixels.view(-1)).view(images.shape)


def _reflect(places: Tensor, side: int) -> Tensor:
    """Bring places that are less than a side outside of 0 … side - 1 back in, mirrored at the outermost pixel."""
    return side - 1 - (side - 1 - places.abs()).abs()


def warp(planes: Tensor, matrices: Tensor, mirrored: Tensor | None) -> Tensor:
    """Resample by bilinear interpolation; outside the image, the nearest pixel of its edge.

    Args:
        planes: float32 `[n, channels, height, width]`.
        matrices: float32 `[n, 2, 2]`, as in `Moves`.
        mirrored: bool `[n]`; None: not mirrored.
    """
    height, width = planes.shape[-2:]
    # affine_grid counts (x, y), each axis from -1 to 1 between the centres of the outermost pixels.
    aspect = (height - 1) / (width - 1)
    theta = torch.zeros(len(planes), 2, 3, device=planes.device)
    theta[:, 0, 0] = matrices[:, 1, 1]
    theta[:, 0, 1] = matrices[:, 1, 0] * aspect
    theta[:, 1, 0] = matrices[:, 0, 1] / aspect
    theta[:, 1, 1] = matrices[:, 0, 0]
    if mirrored is not None:
        theta[:, :, 0] *= torch.where(mirrored, -1.0, 1.0)[:, None]
    grid = affine_grid(theta, list(planes.shape), align_corners=True)
    return grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=True)


def cover(planes: Tensor, holes: Tensor, recipe: Recipe) -> Tensor:
    """Cover, in place, `cutout` × `cutout` pixels around each hole, less at the edge (DeVries & Taylor 2017).

    The colour is the recipe's `mean`, which the network sees as 0: the mean colour of the data where the recipe knows
    it, and otherwise black, as the article's.
    """
    # Written pixel by pixel, a cut-off one more than once: three times as fast as a mask over all pixels on a CPU.
    square = torch.arange(recipe.cutout, device=planes.device) - recipe.cutout // 2
    rows = (holes[:, :1] + square).clamp(0, planes.shape[-2] - 1)
    columns = (holes[:, 1:] + square).clamp(0, planes.shape[-1] - 1)
    number = torch.arange(len(planes), device=planes.device)
    colour = torch.tensor([mean / recipe.rescale for mean in recipe.mean], device=planes.device)
    planes[number[:, None, None], :, rows[:, :, None], columns[:, None, :]] = colour
    return planes


# ---------------------------------------------------------------- images with each other


@dataclass(frozen=True, slots=True)
class Blends:
    """With whom, where and how much each image of a batch is blended."""

    partners: Tensor
    """int64 `[n]`: the image of the batch that is mixed in."""
    kept: Tensor
    """float32 `[n]`: mixup's share of the image itself, outside of the box."""
    boxes: Tensor
    """int64 `[n, 4]`: top, bottom, left and right of cutmix's box, ends not included; in it the partner alone is."""

    def part(self, chosen: slice) -> "Blends":
        """Return the blends of a part of the batch; partners are still places in the whole."""
        return Blends(self.partners[chosen], self.kept[chosen], self.boxes[chosen])


def mix(planes: Tensor, labels: Tensor, classes: int, recipe: Recipe, generator: Generator) -> tuple[Tensor, Tensor]:
    """Blend each image with another of the batch, and their labels in the same proportion.

    Args:
        planes: float32 `[n, 3, height, width]`, in any linear scale: blending and normalising may be exchanged.
        labels: int64 `[n]`.
        classes: how many classes there are.
        recipe: `mixup` and `cutmix` are read; where both are on, a coin decides for each image.
        generator: a CPU generator; the draws do not depend on the device of `planes`.

    Returns:
        The blended planes, and the targets, float32 `[n, classes]`, whose rows sum to one: what
        `torch.nn.functional.cross_entropy` takes for labels.
    """
    blends = draw_blends(len(planes), planes.shape[-2], planes.shape[-1], recipe, generator)
    targets = one_hot(labels, classes).float()
    partners = blends.partners.to(planes.device, non_blocking=True)
    return blend(planes, planes[partners], targets, targets[partners], blends)


def draw_blends(count: int, height: int, width: int, recipe: Recipe, generator: Generator) -> Blends:
    """Draw with whom and how much each of `count` images is blended.

    Mixup's share is drawn from Beta(`mixup`, `mixup`) (Zhang et al. 2017), the share of the area that cutmix keeps
    from Beta(`cutmix`, `cutmix`) (Yun et al. 2019), its box around any pixel and cut off at the edge. The papers draw
    once per batch, here each image has its own: all strengths are in every batch.
    """
    # PyTorch draws no beta distribution from a generator.
    random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    partners = random.permutation(count)
    kept, boxes = np.ones(count), np.zeros((count, 4), np.int64)
    boxed = random.random(count) < 0.5 if recipe.mixup and recipe.cutmix else np.full(count, bool(recipe.cutmix))
    if recipe.mixup:
        kept = np.where(boxed, 1.0, random.beta(recipe.mixup, recipe.mixup, count))
    if recipe.cutmix:
        side = np.sqrt(1 - random.beta(recipe.cutmix, recipe.cutmix, count))
        for axis, pixels in enumerate((height, width)):
            length = (side * pixels).astype(np.int64)
            begin = random.integers(pixels, size=count) - length // 2
            ends = np.stack([begin, begin + length], axis=1).clip(0, pixels)
            boxes[:, 2 * axis : 2 * axis + 2] = np.where(boxed[:, None], ends, 0)
    return Blends(torch.from_numpy(partners), torch.from_numpy(kept).float(), torch.from_numpy(boxes))


def blend(
    planes: Tensor, partners: Tensor, targets: Tensor, partner_targets: Tensor, blends: Blends
) -> tuple[Tensor, Tensor]:
    """Do what was drawn: planes with partners' planes, targets with partners' by the share of each in the pixels."""
    kept, boxes = (draws.to(planes.device, non_blocking=True) for draws in (blends.kept, blends.boxes))
    height, width = planes.shape[-2:]
    top, bottom, left, right = boxes.unbind(dim=1)
    boxed = _inside(top, bottom, height)[:, :, None] & _inside(left, right, width)[:, None]
    weights = kept[:, None, None] * ~boxed
    shares = weights.mean(dim=(1, 2))[:, None]
    return torch.lerp(partners, planes, weights[:, None]), torch.lerp(partner_targets, targets, shares)


def _inside(begin: Tensor, end: Tensor, side: int) -> Tensor:
    """Say for each place of a side whether it is in begin … end - 1: int64 `[n]`, twice → bool `[n, side]`."""
    places = torch.arange(side, device=begin.device)
    return (places >= begin[:, None]) & (places < end[:, None])
