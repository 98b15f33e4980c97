"""Augmentation: what Keras' `ImageDataGenerator` does, as one sampling grid per batch.

Owns the random geometry of training images and its one implementation; scaling to the network's range is
`training/servable.py`'s, so that serving cannot differ. Draws only from the generator it is given.
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample

from training.recipes import Recipe


def augment(images: Tensor, recipe: Recipe, generator: Generator) -> Tensor:
    """Shear, zoom and mirror each image by its own draw.

    Args:
        images: uint8 `[n, height, width, 3]`.
        recipe: `shear`, `zoom` and `flip` are read.
        generator: a CPU generator; the draws do not depend on the device of `images`.

    Returns:
        float32 `[n, 3, height, width]`, still in 0-255; without any operation, the very pixels.
    """
    planes = images.permute(0, 3, 1, 2).float()
    if not (recipe.shear or recipe.zoom or recipe.flip):
        return planes
    matrices, mirrored = draw(len(images), recipe, generator)
    return warp(planes, matrices.to(planes.device), mirrored.to(planes.device))


def draw(count: int, recipe: Recipe, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw the geometry of `count` images, with Keras' distributions.

    The shear angle is uniform in ±`shear` *degrees*: the article's 0.2 moves no pixel of a 32×32 image by more than
    0.06. Row and column zoom are independent, uniform in 1 ± `zoom`, and below 1 enlarge.

    Returns:
        float32 `[count, 2, 2]`, from (row, column) in the result to (row, column) in the source, both in pixels from
        the centre: shear · zoom, as `keras.preprocessing.image.apply_affine_transform` composes them; and bool
        `[count]`, whether the result is mirrored left to right.
    """
    uniform = torch.rand(count, 4, generator=generator)
    angle = (2 * uniform[:, 0] - 1) * math.radians(recipe.shear)
    zoom = 1 + (2 * uniform[:, 1:3] - 1) * recipe.zoom
    ones, zeros = torch.ones(count), torch.zeros(count)
    shear = torch.stack([ones, -angle.sin(), zeros, angle.cos()], dim=1).view(count, 2, 2)
    mirrored = (uniform[:, 3] < 0.5) & recipe.flip
    return shear @ torch.diag_embed(zoom), mirrored


def warp(planes: Tensor, matrices: Tensor, mirrored: Tensor) -> Tensor:
    """Resample by bilinear interpolation; outside the image, the nearest pixel of its edge.

    Args:
        planes: float32 `[n, channels, height, width]`.
        matrices: float32 `[n, 2, 2]`, as `draw` returns.
        mirrored: bool `[n]`.
    """
    height, width = planes.shape[-2:]
    # affine_grid counts (x, y), each axis from -1 to 1 between the centres of the outermost pixels.
    aspect = (height - 1) / (width - 1)
    theta = torch.zeros(len(planes), 2, 3, device=planes.device)
    theta[:, 0, 0] = matrices[:, 1, 1]
    theta[:, 0, 1] = matrices[:, 1, 0] * aspect
    theta[:, 1, 0] = matrices[:, 0, 1] / aspect
    theta[:, 1, 1] = matrices[:, 0, 0]
    theta[mirrored, :, 0] *= -1
    grid = affine_grid(theta, list(planes.shape), align_corners=True)
    return grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=True)
