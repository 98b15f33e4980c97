import math

import numpy as np
import pytest
import torch

from training.data.augment import Moves, alternate, augment, blend, cover, draw_blends, draw_moves, mix, move, warp
from training.recipes import Recipe, make_recipe
from training.servable import Normalise

NOTHING = {"shear": 0, "zoom": 0, "flip": False}
MEAN = (0.5, 0.4, 0.3)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def pictures(count: int = 4, height: int = 12, width: int = 9) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dots(count: int, size: int = 9, row: int = 2, column: int = 3) -> torch.Tensor:
    """Draw black images uint8 [count, size, size, 3] with one white pixel."""
    images = torch.zeros(count, size, size, 3, dtype=torch.uint8)
    images[:, row, column] = 255
    return images


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
    moves = draw_moves(4000, make_recipe(shear=20, zoom=0.3), seeded())
    # shear · zoom has cos(angle) · zy below right, -sin(angle) · zy above it, and zx above left.
    assert moves.matrices is not None
    angles = torch.rad2deg(torch.atan2(-moves.matrices[:, 0, 1], moves.matrices[:, 1, 1]))
    rows, columns = moves.matrices[:, 0, 0], torch.hypot(moves.matrices[:, 0, 1], moves.matrices[:, 1, 1])
    assert 19.5 < angles.max() <= 20.001
    assert -20.001 <= angles.min() < -19.5
    for zoom in (rows, columns):
        assert 0.7 - 1e-4 <= zoom.min() < 0.71
        assert 1.29 < zoom.max() <= 1.3 + 1e-4
    assert abs(torch.corrcoef(torch.stack([rows, columns]))[0, 1]) < 0.05
    assert moves.mirrored is not None
    assert 0.47 < moves.mirrored.float().mean() < 0.53


def test_no_flip_mirrors_nothing():
    assert draw_moves(100, make_recipe(flip=False), seeded()).mirrored is None


def test_the_articles_run_is_what_it_was_before_the_other_operations():
    """Four numbers an image, in this order, and nothing else from the generator."""
    images, generator, reference = pictures(32), seeded(), seeded()
    result = augment(images, Recipe(), generator)
    uniform = torch.rand(32, 4, generator=reference)
    angle = (2 * uniform[:, 0] - 1) * math.radians(0.2)
    zoom = 1 + (2 * uniform[:, 1:3] - 1) * 0.2
    ones, zeros = torch.ones(32), torch.zeros(32)
    shear = torch.stack([ones, -angle.sin(), zeros, angle.cos()], dim=1).view(32, 2, 2)
    planes = images.permute(0, 3, 1, 2).float()
    assert torch.equal(result, warp(planes, shear @ torch.diag_embed(zoom), uniform[:, 3] < 0.5))
    assert torch.equal(generator.get_state(), reference.get_state())


def test_an_operation_more_leaves_the_draws_of_the_others():
    plain = draw_moves(8, make_recipe(), seeded())
    more = draw_moves(8, make_recipe(shift=2, cutout=4), seeded())
    assert torch.equal(plain.matrices, more.matrices)
    assert torch.equal(plain.mirrored, more.mirrored)


def test_shift_moves_the_marked_pixel_by_whole_pixels():
    moves = Moves(None, None, torch.tensor([[0, 0], [2, 0], [-3, 1], [1, -5]]), None)
    result = move(dots(4), moves, make_recipe())
    assert result.dtype == torch.float32
    for image, place in zip(result, [(2, 3), (0, 3), (5, 2), (1, 8)], strict=True):
        assert image[:, *place].tolist() == [255, 255, 255]


def test_shift_reflects_at_the_edge_as_padding_by_reflection_does():
    images = pictures(25)
    shifts = torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3))
    result = move(images, Moves(None, None, shifts, None), make_recipe())
    for image, planes, (row, column) in zip(images.numpy(), result, shifts.tolist(), strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), "reflect")
        expected = padded[2 + row : 2 + row + 12, 2 + column : 2 + column + 9]
        np.testing.assert_array_equal(planes.permute(1, 2, 0).numpy(), expected)


def test_a_shifted_image_is_mirrored_after_the_shift_however_it_is_computed():
    images, shifts, mirrored = pictures(4), torch.tensor([[1, 2]]).repeat(4, 1), torch.tensor([True, False] * 2)
    shifted = move(images, Moves(None, None, shifts, None), make_recipe())
    expected = torch.where(mirrored[:, None, None, None], shifted.flip(-1), shifted)
    assert torch.equal(move(images, Moves(None, mirrored, shifts, None), make_recipe()), expected)
    warped = move(images, Moves(torch.eye(2).repeat(4, 1, 1), mirrored, shifts, None), make_recipe())
    torch.testing.assert_close(warped, expected, atol=1e-3, rtol=0)


def test_shifts_are_uniform_and_rows_independent_of_columns():
    shifts = draw_moves(25_000, make_recipe(**NOTHING, shift=2), seeded()).shifts
    assert shifts is not None
    counts = torch.bincount((shifts[:, 0] + 2) * 5 + shifts[:, 1] + 2, minlength=25)
    assert len(counts) == 25
    assert 850 < counts.min() <= counts.max() < 1150


def test_rotation_turns_the_marked_pixel_around_the_centre():
    # Nine pixels a side: the centre is (4, 4), the mark two above and one to the left of it.
    quarter = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    result = move(dots(1), Moves(quarter, None, None, None), make_recipe())[0, 0]
    assert divmod(int(result.argmax()), 9) == (3, 6)
    matrices = draw_moves(4000, make_recipe(**NOTHING, rotate=30), seeded()).matrices
    assert matrices is not None
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(2).expand(4000, 2, 2))
    angles = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert -30.001 <= angles.min() < -29.8
    assert 29.8 < angles.max() <= 30.001


def test_rotation_is_composed_with_shear_and_zoom_as_keras_does():
    recipe = make_recipe(shear=10, zoom=0.2, rotate=30)
    both = draw_moves(6, recipe, seeded()).matrices
    inner = draw_moves(6, make_recipe(shear=10, zoom=0.2), seeded()).matrices
    rotation = both @ inner.inverse()
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(2).expand(6, 2, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_covers_a_square_with_what_the_network_sees_as_zero(side: int):
    recipe = make_recipe(**NOTHING, cutout=side, mean="0.5,0.4,0.3", std="0.2")
    planes = torch.full((3, 3, 9, 9), 200.0)
    covered = cover(planes.clone(), torch.tensor([[4, 5], [0, 0], [8, 4]]), recipe)
    expected = planes.clone()
    for image, (row, column) in zip(expected, [(4, 5), (0, 0), (8, 4)], strict=True):
        for channel, mean in zip(image, MEAN, strict=True):
            top, left = max(row - side // 2, 0), max(column - side // 2, 0)
            channel[top : row - side // 2 + side, left : column - side // 2 + side] = 255 * mean
    torch.testing.assert_close(covered, expected)
    seen = Normalise(recipe)(covered)
    assert seen[covered != 200].abs().max() < 1e-5
    assert (covered[0, 0] != 200).sum() == side * side


def test_cutout_leaves_the_images_it_is_given():
    images = pictures(4, 32, 32)
    before = images.clone()
    assert (augment(images, make_recipe(**NOTHING, cutout=8), seeded()) == 0).sum() > 4 * 3 * 16
    assert torch.equal(images, before)


def test_holes_are_uniform_over_the_image():
    holes = draw_moves(20_000, make_recipe(**NOTHING, cutout=4, size=10), seeded()).holes
    assert holes is not None
    counts = torch.bincount(holes[:, 0] * 10 + holes[:, 1], minlength=100)
    assert len(counts) == 100
    assert 140 < counts.min() <= counts.max() < 260


def test_alternating_flip_shows_each_image_both_ways_in_two_epochs():
    recipe = make_recipe(alternate_flip=True, seed=4)
    first, second, third = (alternate(4000, recipe, epoch) for epoch in (1, 2, 3))
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert 0.47 < first.float().mean() < 0.53
    assert not torch.equal(first, alternate(4000, make_recipe(alternate_flip=True, seed=5), 1))
    assert alternate(4, Recipe(), 1) is None
    assert alternate(4, make_recipe(flip=False, alternate_flip=True), 1) is None


def test_what_alternates_is_mirrored_and_nothing_else():
    images, mirrored = pictures(4), torch.tensor([True, False, False, True])
    planes = images.permute(0, 3, 1, 2).float()
    recipe = make_recipe(shear=0, zoom=0, alternate_flip=True)
    expected = torch.where(mirrored[:, None, None, None], planes.flip(-1), planes)
    assert torch.equal(augment(images, recipe, seeded(), mirrored), expected)


EVERYTHING = {"shear": 15, "rotate": 10, "shift": 2, "cutout": 4, "mixup": 0.5, "cutmix": 1}


def test_the_generator_alone_decides():
    images, recipe = pictures(), make_recipe(**EVERYTHING)
    once, again, other = (augment(images, recipe, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_a_part_of_a_batch_can_be_computed_alone():
    """As the processes do that share a batch."""
    images, recipe = pictures(6), make_recipe(**EVERYTHING)
    moves = draw_moves(6, recipe, seeded())
    parts = [move(images[part], moves.part(part), recipe) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), augment(images, recipe, seeded()))


# ---------------------------------------------------------------- mixup and cutmix


def plain_images(count: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw planes float32 [count, 3, size, size] of one grey each, which is the image's number, and labels mod 5."""
    grey = torch.arange(count, dtype=torch.float32)
    return grey.view(-1, 1, 1, 1).expand(count, 3, size, size).contiguous(), torch.arange(count) % 5


@pytest.mark.parametrize("knobs", [{"mixup": 0.4}, {"cutmix": 1}, {"mixup": 1, "cutmix": 0.5}], ids=str)
def test_targets_say_what_is_in_the_pixels(knobs: dict[str, float]):
    planes, labels = plain_images(200)
    recipe = make_recipe(**knobs)
    mixed, targets = mix(planes, labels, 5, recipe, seeded())
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(200))
    partners = draw_blends(200, 16, 16, recipe, seeded()).partners
    assert sorted(partners.tolist()) == list(range(200))
    # Each image is grey of its own number: the mean grey tells how much of which number is in it.
    for number, partner in enumerate(partners.tolist()):
        share = 1.0 if partner == number else (mixed[number].mean().item() - partner) / (number - partner)
        expected = torch.zeros(5)
        expected[labels[number]] += share
        expected[labels[partner]] += 1 - share
        torch.testing.assert_close(targets[number], expected, atol=1e-4, rtol=0)


def test_mixup_blends_all_pixels_alike():
    planes, labels = plain_images(50)
    mixed, targets = mix(planes, labels, 5, make_recipe(mixup=1), seeded())
    assert torch.equal(mixed, mixed[:, :1, :1, :1].expand_as(mixed))
    assert len(targets.max(dim=1).values.unique()) > 10


def test_cutmix_pastes_one_box_of_the_partner():
    planes, labels = plain_images(300)
    recipe = make_recipe(cutmix=1)
    mixed, _ = mix(planes, labels, 5, recipe, seeded())
    blends = draw_blends(300, 16, 16, recipe, seeded())
    for number, (partner, box) in enumerate(zip(blends.partners.tolist(), blends.boxes.tolist(), strict=True)):
        top, bottom, left, right = box
        expected = planes[number].clone()
        expected[:, top:bottom, left:right] = partner
        assert torch.equal(mixed[number], expected)


def test_shares_follow_the_papers_distributions():
    # Beta(a, a) has mean 1/2 and variance 1 / (8a + 4).
    kept = draw_blends(20_000, 32, 32, make_recipe(mixup=0.2), seeded()).kept
    assert abs(kept.mean() - 0.5) < 0.02
    assert abs(kept.var() - 1 / 5.6) < 0.01
    # Where the edge cuts nothing off, the box has the share of the area that Beta(1, 1), which is uniform, gives away.
    boxes = draw_blends(20_000, 1000, 1000, make_recipe(cutmix=1), seeded()).boxes
    top, bottom, left, right = boxes.unbind(dim=1)
    within = (top > 0) & (left > 0) & (bottom < 1000) & (right < 1000)
    torch.testing.assert_close((bottom - top)[within], (right - left)[within])
    assert (bottom - top).max() > 950
    # A box of side s, whose square is uniform, has room with probability (1 - s)²: the mean area of these is 1/5.
    share = ((bottom - top) * (right - left))[within].double() / 1e6
    assert abs(share.mean() - 0.2) < 0.005


def test_a_coin_decides_where_both_are_on():
    blends = draw_blends(4000, 32, 32, make_recipe(mixup=1, cutmix=1), seeded())
    boxed, blended = blends.boxes.any(dim=1), blends.kept < 1
    assert not (boxed & blended).any()
    assert 0.47 < blended.float().mean() < 0.53


def test_a_blend_of_parts_is_the_part_of_the_blend():
    planes, labels = plain_images(6)
    recipe = make_recipe(mixup=1, cutmix=1)
    mixed, targets = mix(planes, labels, 5, recipe, seeded())
    blends, part = draw_blends(6, 16, 16, recipe, seeded()), slice(2, 5)
    hot, partners = torch.nn.functional.one_hot(labels, 5).float(), blends.partners[part]
    some, some_targets = blend(planes[part], planes[partners], hot[part], hot[partners], blends.part(part))
    torch.testing.assert_close(some, mixed[part])
    torch.testing.assert_close(some_targets, targets[part])


@pytest.mark.parametrize("device", DEVICES)
def test_everything_together_is_the_same_on_every_device(device: str):
    images, labels, recipe = pictures(8, 32, 32), torch.arange(8) % 3, make_recipe(**EVERYTHING)
    here, there = (
        mix(augment(images.to(place), recipe, generator), labels.to(place), 3, recipe, generator)
        for place, generator in (("cpu", seeded()), (device, seeded()))
    )
    for mine, yours in zip(here, there, strict=True):
        assert yours.device.type == device
        torch.testing.assert_close(mine, yours.cpu(), atol=1e-2, rtol=1e-4)
    assert 0 <= here[0].min() <= here[0].max() <= 255
