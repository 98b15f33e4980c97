import math

import numpy as np
import pytest
import torch

from training.augment import augment, draw, warp
from training.recipes import make_recipe


def pictures(count: int = 4, height: int = 12, width: int = 9) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def warp_slowly(image: np.ndarray, matrix: np.ndarray, mirrored: bool) -> np.ndarray:
    """Do to one image, float [height, width, channels], pixel by pixel what Keras' apply_affine_transform does."""
    height, width = image.shape[:2]
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    result = np.empty_like(image)
    for row in range(height):
        for column in range(width):
            y, x = matrix @ (np.array([row, column]) - centre) + centre
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            top, left = min(int(y), height - 2), min(int(x), width - 2)
            dy, dx = y - top, x - left
            upper = image[top, left] * (1 - dx) + image[top, left + 1] * dx
            lower = image[top + 1, left] * (1 - dx) + image[top + 1, left + 1] * dx
            result[row, column] = upper * (1 - dy) + lower * dy
    return result[:, ::-1] if mirrored else result


def test_without_operations_the_pixels_are_untouched():
    images = pictures()
    result = augment(images, make_recipe(shear=0, zoom=0, flip=False), torch.Generator())
    assert torch.equal(result, images.permute(0, 3, 1, 2).float())


def test_flip_mirrors_left_to_right():
    planes = pictures().permute(0, 3, 1, 2).float()
    identity = torch.eye(2).repeat(4, 1, 1)
    result = warp(planes, identity, torch.tensor([True, False, True, False]))
    torch.testing.assert_close(result[0::2], planes[0::2].flip(-1), atol=1e-3, rtol=0)
    torch.testing.assert_close(result[1::2], planes[1::2], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("shear_degrees", "zoom"), [(0, (0.8, 1.2)), (25, (1, 1)), (-40, (1, 1)), (10, (1.15, 0.85)), (0.2, (0.9, 0.9))]
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_warp_agrees_with_the_slow_reference(shear_degrees: float, zoom: tuple[float, float], mirrored: bool):
    images = pictures()
    angle = math.radians(shear_degrees)
    matrix = np.array([[1, -math.sin(angle)], [0, math.cos(angle)]]) @ np.diag(zoom)
    planes = images.permute(0, 3, 1, 2).float()
    matrices = torch.tensor(matrix, dtype=torch.float32).repeat(len(images), 1, 1)
    result = warp(planes, matrices, torch.full((len(images),), mirrored)).permute(0, 2, 3, 1).numpy()
    expected = np.stack([warp_slowly(image, matrix, mirrored) for image in images.double().numpy()])
    np.testing.assert_allclose(result, expected, atol=2e-2)


def test_draws_cover_keras_ranges_and_no_more():
    recipe = make_recipe(shear=20, zoom=0.3)
    matrices, mirrored = draw(4000, recipe, torch.Generator().manual_seed(1))
    # shear · zoom has cos(angle) · zy below right, -sin(angle) · zy above it, and zx above left.
    angles = torch.rad2deg(torch.atan2(-matrices[:, 0, 1], matrices[:, 1, 1]))
    rows, columns = matrices[:, 0, 0], torch.hypot(matrices[:, 0, 1], matrices[:, 1, 1])
    assert 19.5 < angles.max() <= 20.001
    assert -20.001 <= angles.min() < -19.5
    for zoom in (rows, columns):
        assert 0.7 - 1e-4 <= zoom.min() < 0.71
        assert 1.29 < zoom.max() <= 1.3 + 1e-4
    assert abs(torch.corrcoef(torch.stack([rows, columns]))[0, 1]) < 0.05
    assert 0.47 < mirrored.float().mean() < 0.53


def test_no_flip_mirrors_nothing():
    assert not draw(100, make_recipe(flip=False), torch.Generator().manual_seed(1))[1].any()


def test_the_generator_alone_decides():
    images, recipe = pictures(), make_recipe(shear=15)
    once, again = (augment(images, recipe, torch.Generator().manual_seed(5)) for _ in range(2))
    other = augment(images, recipe, torch.Generator().manual_seed(6))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
