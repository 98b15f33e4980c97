"""Whatever a caller has becomes an encoded image with the same pixels; lists of them become parts."""

import io
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from PIL import Image

import convoy
from convoy.images import encoded, split
from tests.bundles import noise_image, plain_image

ORIENTATION = 0x0112


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_encoded_images_go_as_they_are(tmp_path):
    data = noise_image(1, "JPEG")
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with path.open("rb") as file:
        kinds = [path, str(path), data, bytearray(data), memoryview(data), file, io.BytesIO(data)]
        assert [encoded(kind) for kind in kinds] == [data] * len(kinds)


side = st.integers(1, 20)
shapes = st.one_of(st.tuples(side, side), st.tuples(side, side, st.just(3)))


@given(numpy_strategies.arrays(np.uint8, shapes))
def test_an_array_loses_nothing(pixels):
    data = encoded(pixels)
    assert data.startswith(b"\x89PNG")
    assert np.array_equal(pixels_of(data), pixels)


def test_an_array_that_is_a_view_counts_as_what_it_shows():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    assert np.array_equal(pixels_of(encoded(pixels[::-1, ::2])), pixels[::-1, ::2])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F", "I", "I;16"])
def test_every_mode_of_pillow_is_taken(mode):
    image = Image.new("L", (8, 6), 1).convert(mode) if mode not in ("I;16",) else Image.new(mode, (8, 6), 700)
    sent = Image.open(io.BytesIO(encoded(image)))
    assert sent.size == (8, 6) and sent.format == "PNG"
    if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        assert np.array_equal(np.asarray(sent.convert("RGBA")), np.asarray(image.convert("RGBA")))


def test_a_turned_photo_stays_turned_and_the_callers_own_is_left_alone():
    image = Image.new("RGB", (8, 6))
    exif = image.getexif()
    exif[ORIENTATION], exif[0x010F] = 6, "a maker"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    photo = Image.open(buffer)
    sent = Image.open(io.BytesIO(encoded(photo)))
    assert dict(sent.getexif()) == {ORIENTATION: 6}
    assert dict(photo.getexif()) == {ORIENTATION: 6, 0x010F: "a maker"}


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("nowhere/cat.jpg", "The file nowhere/cat.jpg cannot be read: No such file or directory."),
        (".", "The file . cannot be read: Is a directory."),
        (b"", "The image is empty."),
        (io.BytesIO(), "The image is empty."),
        (np.zeros((4, 4, 3), np.float32), "An array of float32 [4, 4, 3] is no image"),
        (np.zeros((3, 4, 4), np.uint8), "An array of uint8 [3, 4, 4] is no image"),
        (np.zeros((0, 4, 3), np.uint8), "An array of uint8 [0, 4, 3] is no image"),
        (np.zeros(4, np.uint8), "An array of uint8 [4] is no image"),
    ],
)
def test_what_is_no_image_here_is_an_error_without_a_status(image, sentence):
    with pytest.raises(convoy.BadImageError) as caught:
        encoded(image)
    assert caught.value.sentence.startswith(sentence)
    assert caught.value.status is None


def test_a_picture_that_is_cut_off_is_an_error():
    photo = Image.open(io.BytesIO(plain_image("red", "PNG", (64, 64))[:-30]))
    with pytest.raises(convoy.BadImageError, match="The Pillow image cannot be encoded"):
        encoded(photo)


@pytest.mark.parametrize("thing", [3, None, ["cat.jpg"], io.StringIO("text")])
def test_what_can_be_no_image_is_a_mistake_in_the_program(thing):
    with pytest.raises(TypeError):
        encoded(thing)


sizes = st.lists(st.integers(1, 100), max_size=60)


@given(sizes, st.integers(1, 10), st.integers(1, 300), st.integers(0, 20))
def test_parts_hold_everything_in_order_within_the_limits(sizes, max_images, max_bytes, overhead):
    images = [bytes([index]) * size for index, size in enumerate(sizes)]
    parts = list(split(images, max_images, max_bytes, overhead, keep_faults=False))
    assert [pair for part in parts for pair in part.images] == list(enumerate(images))

    def weight(part):
        return sum(len(data) + overhead for _, data in part.images)

    for part in parts:
        assert 1 <= len(part.images) <= max_images
        assert weight(part) <= max_bytes or len(part.images) == 1
    for part, after in itertools.pairwise(parts):  # no part ends before it has to
        assert len(part.images) == max_images or weight(part) + len(after.images[0][1]) + overhead > max_bytes


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 10))
def test_images_that_cannot_be_read_keep_their_places(readable, max_images):
    images = [b"image" if good else "nowhere.jpg" for good in readable]
    parts = list(split(images, max_images, 10**6, 0, keep_faults=True))
    good = {index for part in parts for index, _ in part.images}
    bad = {index: fault for part in parts for index, fault in part.faults.items()}
    assert good == {index for index, is_good in enumerate(readable) if is_good}
    assert set(bad) == set(range(len(readable))) - good
    assert all(fault.index == index and f"images[{index}]: " in fault.sentence for index, fault in bad.items())
    assert all(len(part) <= max_images for part in parts)


def test_an_image_is_read_when_its_part_is_due():
    read = []

    def images():
        for index in range(10):
            read.append(index)
            yield b"image"

    parts = split(images(), 3, 10**6, 0, keep_faults=False)
    assert not read
    next(parts)
    assert read == [0, 1, 2]
