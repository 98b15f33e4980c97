import io
import warnings

import numpy as np
import pytest
from PIL import Image

from app.errors import BadImageError, TooLargeError
from app.images import decode
from app.manifest import PixelRecipe
from tests.bundles import encode, noise_image

SQUARE = PixelRecipe(height=32, width=32, resize_short_side=40, min_decode_ratio=0)


def smooth_image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Natural-looking content: low-frequency noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (12, 12, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def resize_then_crop(image: Image.Image, recipe: PixelRecipe, method: Image.Resampling) -> np.ndarray:
    """The recipe in the plainest words: resize the whole picture, then cut out the centre."""
    scale = recipe.resize_short_side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    resized = image.resize((width, height), method)
    left, top = (width - recipe.width) // 2, (height - recipe.height) // 2
    return np.asarray(resized.crop((left, top, left + recipe.width, top + recipe.height)))


@pytest.mark.parametrize("size", [(40, 40), (100, 60), (61, 99), (41, 500), (333, 222), (20, 25), (640, 480)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_crop_first_is_resize_then_crop_within_one_level(size, interpolation):
    image = smooth_image(size)
    recipe = SQUARE.model_copy(update={"interpolation": interpolation})
    expected = resize_then_crop(image, recipe, Image.Resampling[interpolation.upper()])
    found = decode(file_of(image), recipe)
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_an_image_of_the_right_size_is_not_touched():
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    recipe = PixelRecipe(height=16, width=16, resize_short_side=16)
    assert np.array_equal(decode(encode(pixels), recipe), pixels)


# How a camera that was held so stores an upright scene: the inverse of what the tag asks a viewer to do.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_exif_orientation_turns_the_picture_upright(orientation, kind, options):
    upright = smooth_image((90, 60))
    stored = upright.transpose(STORED[orientation]) if orientation in STORED else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(stored, kind, exif=exif, **options)
    expected = decode(file_of(upright), SQUARE)
    assert np.array_equal(decode(data, SQUARE), expected)
    ignoring = SQUARE.model_copy(update={"exif": "ignore"})
    assert np.array_equal(decode(data, ignoring), expected) == (orientation == 1)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 2.0])
def test_large_jpegs_are_decoded_at_a_scale_that_the_recipe_allows(ratio, monkeypatch):
    recipe = SQUARE.model_copy(update={"min_decode_ratio": ratio})
    seen = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: seen.append(self.size) or resize(self, *a, **k))
    decode(file_of(smooth_image((1000, 700)), "JPEG"), recipe)
    # 700 / (ratio · 40) = 17.5 and 8.75: both allow libjpeg's largest reduction, 1/8; 0 forbids any.
    assert seen[-1] == ((1000, 700) if ratio == 0 else (125, 88))
    assert min(seen[-1]) >= ratio * recipe.resize_short_side


def test_reduced_decoding_stays_close_to_full_decoding():
    data = file_of(smooth_image((1600, 1200)), "JPEG", quality=92)
    full = decode(data, SQUARE).astype(int)
    reduced = decode(data, SQUARE.model_copy(update={"min_decode_ratio": 2.0})).astype(int)
    assert np.abs(full - reduced).mean() < 2


def gray16() -> bytes:
    return file_of(Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)))


def palette_with_transparency() -> bytes:
    image = smooth_image((64, 64)).quantize(16)
    return file_of(image, transparency=3)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(file_of(smooth_image((64, 64)).convert("L"), "JPEG"), id="gray-jpeg"),
        pytest.param(file_of(smooth_image((64, 64)).convert("CMYK"), "JPEG"), id="cmyk-jpeg"),
        pytest.param(file_of(smooth_image((64, 64)), "JPEG", progressive=True), id="progressive-jpeg"),
        pytest.param(file_of(smooth_image((64, 64)).convert("RGBA")), id="rgba-png"),
        pytest.param(file_of(smooth_image((64, 64)).convert("LA")), id="gray-alpha-png"),
        pytest.param(file_of(smooth_image((64, 64)).convert("1")), id="one-bit-png"),
        pytest.param(file_of(smooth_image((64, 64)).quantize(32)), id="palette-png"),
        pytest.param(palette_with_transparency(), id="palette-transparent-png"),
        pytest.param(gray16(), id="16-bit-png"),
        pytest.param(file_of(smooth_image((64, 64)), "WEBP"), id="webp"),
        pytest.param(file_of(smooth_image((64, 64)), "WEBP", save_all=True, append_images=[smooth_image((64, 64), 1)]),
                     id="animated-webp"),
        pytest.param(file_of(smooth_image((1, 500))), id="one-pixel-wide"),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(data):
    pixels = decode(data, SQUARE)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert pixels.std() > 1


def test_sixteen_bit_gray_keeps_its_high_byte():
    levels = np.full((40, 40), 0x8000, np.uint16)
    assert np.unique(decode(file_of(Image.fromarray(levels)), SQUARE)).tolist() == [0x80]


def test_cmyk_gives_the_colours_that_pillow_gives():
    image = smooth_image((40, 40)).convert("CMYK")
    data = file_of(image, "JPEG", quality=100, subsampling=0)
    recipe = SQUARE.model_copy(update={"height": 40, "width": 40})
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data, recipe), expected)


@pytest.mark.parametrize(
    ("data", "error", "sentence"),
    [
        pytest.param(b"", BadImageError, "The image is empty", id="empty"),
        pytest.param(b"hello", BadImageError, "not a JPEG, PNG or WebP", id="text"),
        pytest.param(file_of(smooth_image((50, 50)), "GIF"), BadImageError, "not a JPEG, PNG or WebP", id="gif"),
        pytest.param(file_of(smooth_image((50, 50)), "TIFF"), BadImageError, "not a JPEG, PNG or WebP", id="tiff"),
        pytest.param(noise_image(1, "JPEG", (64, 64))[:500], BadImageError, "damaged", id="half-jpeg"),
        pytest.param(file_of(smooth_image((64, 64)))[:2000], BadImageError, "damaged", id="half-png"),
        pytest.param(file_of(smooth_image((64, 64)), "WEBP")[:200], BadImageError, "header is damaged", id="half-webp"),
        pytest.param(b"\xff\xd8\xff\xe0" + b"\0" * 40, BadImageError, "JPEG|header", id="jpeg-of-zeros"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + b"\0" * 40, BadImageError, "PNG|header", id="png-of-zeros"),
    ],
)
def test_what_is_no_image_is_refused_with_a_sentence(data, error, sentence):
    with pytest.raises(error, match=sentence):
        decode(data, SQUARE)


def test_a_jpeg_of_countless_scans_is_refused_before_it_is_decoded():
    """A progressive JPEG repeats a scan of 12 bytes: each costs a pass over the whole picture."""
    data = file_of(smooth_image((64, 64)).convert("L"), "JPEG", progressive=True)
    assert decode(data, SQUARE).shape == (32, 32, 3)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x10"
    bomb = data[:-2] + scan * 9000 + b"\xff\xd9"
    with pytest.raises(BadImageError, match="scans; at most 200"):
        decode(bomb, SQUARE)


@pytest.mark.parametrize("size", [(9000, 9000), (40_000, 2)])
def test_too_many_pixels_are_refused_by_the_header_alone(size):
    bomb = file_of(Image.new("1", size))
    assert len(bomb) < 25_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(TooLargeError, match=f"{size[0]}×{size[1]} pixels"):
            decode(bomb, SQUARE)


def test_random_damage_never_raises_anything_else():
    rng = np.random.default_rng(3)
    originals = [noise_image(1, kind, (48, 48)) for kind in ("JPEG", "PNG", "WEBP")]
    for round_ in range(300):
        data = bytearray(originals[round_ % 3])
        for position in rng.integers(0, len(data), 8):
            data[position] = rng.integers(0, 256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pixels = decode(bytes(data), SQUARE)
            except (BadImageError, TooLargeError):
                continue
        assert pixels.shape == (32, 32, 3)
