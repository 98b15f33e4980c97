from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from app.trust import Histogram
from training.data.listing import Picture
from training.trust.reference import SHARES, describe, entropy_of, histogram, luma_of


def test_a_histogram_loses_nothing():
    counted = histogram(np.array([-5.0, 0, 0.5, 1, 1.5, 2, 99]), np.array([0.0, 1.0, 2.0]))
    assert counted == Histogram(edges=(0, 1, 2), counts=(3, 4))


@pytest.mark.parametrize(
    ("edges", "counts", "sentence"),
    [((0, 1), (1, 2), "need 3 edges"), ((0, 2, 1), (1, 2), "edges must rise"), ((0, 1, 2), (1, -2), "negative")],
)
def test_a_histogram_that_is_none_is_refused(edges: tuple[float, ...], counts: tuple[int, ...], sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        Histogram(edges=edges, counts=counts)


def test_entropy_is_a_share_of_the_largest():
    found = entropy_of(np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]]))
    np.testing.assert_allclose(found, [1, 0, 0.5], atol=1e-12)


def test_brightness_and_contrast_are_those_of_the_luma():
    images = np.zeros((3, 4, 6, 3), np.uint8)
    images[1] = (255, 0, 0)
    images[2, :2] = 200
    brightness, contrast = luma_of(images)
    np.testing.assert_allclose(brightness, [0, 0.299 * 255, 100], atol=1e-9)
    np.testing.assert_allclose(contrast, [0, 0, 100], atol=1e-9)


def test_everything_is_counted_over_all_images(tmp_path: Path):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 40)).save(path, exif=exif.tobytes())
    pixels = np.full((30, 20, 3), 9, np.uint8)
    pictures = (Picture("a", 0, "", path), Picture("b", 1, "", pixels))
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7]])
    record = describe(probabilities, np.zeros((2, 8, 8, 3), np.uint8), pictures, 2, "two")
    assert (record.images, record.predicted) == (2, (1, 1))
    assert sum(record.confidence.counts) == sum(record.entropy.counts) == sum(record.brightness.counts) == 2
    assert record.confidence.counts[18] == 1
    assert record.confidence.counts[14] == 1 or record.confidence.counts[13] == 1
    assert len(record.confidence.counts) == len(SHARES) - 1
    assert record.width and record.height and record.size_bytes
    # Upright, the photo is 40 wide and 100 high.
    widths = [low for low, count in zip(record.width.edges, record.width.counts, strict=False) if count]
    heights = [low for low, count in zip(record.height.edges, record.height.counts, strict=False) if count]
    assert widths == [16, 32] and heights == [22.6, 90.5]
    assert sum(record.size_bytes.counts) == 1
    assert describe(probabilities[1:], np.zeros((1, 8, 8, 3), np.uint8), pictures[1:], 2, "").size_bytes is None
