"""The direct path of JPEGs: either the very pixels and verdicts that Pillow alone gives, or nothing."""

import io
import struct
import warnings

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app import jpeg
from app.errors import BadImageError, ConvoyError, TooLargeError
from app.images import decode, decode_directly, decode_with_pillow
from app.manifest import PixelRecipe

TINY = PixelRecipe(height=32, width=32, resize_short_side=32)
CROPPED = PixelRecipe(height=24, width=28, resize_short_side=36, min_decode_ratio=0)
SAMPLINGS = ("444", "422", "420", "440", "411")


def picture(width: int = 32, height: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth content with grain, so that every frequency and both chroma planes are busy."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return (smooth + rng.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)


def saved(pixels: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turbo(pixels: np.ndarray, sampling: str, quality: int = 85) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", sampling)


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """Put an application segment behind the JFIF header."""
    end = 4 + int.from_bytes(data[4:6], "big")
    return data[:end] + struct.pack(">HH", marker, len(body) + 2) + body + data[end:]


def without_segment(data: bytes, marker: int) -> bytes:
    kept, position = [data[:2]], 2
    while True:
        found, length = struct.unpack_from(">HH", data, position)
        if found == 0xFFDA:
            return b"".join(kept) + data[position:]
        if found != marker:
            kept.append(data[position : position + 2 + length])
        position += 2 + length


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def verdict(decoder, data: bytes, recipe: PixelRecipe, **limits: int) -> object:
    """Shape and pixels, or the error with its sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = decoder(data, recipe, **limits)
        except ConvoyError as error:
            return type(error), str(error)
    return pixels.shape, pixels.dtype, pixels.tobytes()


def assert_as_pillow(data: bytes, recipe: PixelRecipe, **limits: int) -> None:
    assert verdict(decode, data, recipe, **limits) == verdict(decode_with_pillow, data, recipe, **limits)


RGB, GRAY = picture(), picture()[..., 1]
ORDINARY = {
    **{f"{sampling}-quality-{quality}": turbo(RGB, sampling, quality)
       for sampling in SAMPLINGS for quality in (1, 30, 75, 95, 100)},
    **{f"pillow-{sampling}": saved(RGB, subsampling=sampling) for sampling in ("4:4:4", "4:2:2", "4:2:0")},
    "gray": saved(GRAY),
    "optimized": saved(RGB, optimize=True),
    "restarts-by-block": saved(RGB, restart_marker_blocks=1),
    "restarts-by-row": saved(RGB, restart_marker_rows=1),
    "comment": saved(RGB, comment=b"taken on a Monday"),
    "icc": saved(RGB, icc_profile=b"a profile" * 20),
    "adobe": with_segment(saved(RGB), 0xFFEE, b"Adobe\0\x64\0\0\0\0\x01"),
    "adobe-without-jfif": without_segment(with_segment(saved(RGB), 0xFFEE, b"Adobe\0\x64\0\0\0\0\x01"), 0xFFE0),
    "neither-jfif-nor-adobe": without_segment(saved(RGB), 0xFFE0),
    "camera's-own-segment": with_segment(saved(RGB), 0xFFE5, b"anything at all"),
    "bytes-behind-the-end": saved(RGB) + b"a trailer",
    "exif": saved(RGB, exif=exif_of(1)),
    "photoshop": with_segment(saved(RGB), 0xFFED, b"Photoshop 3.0\0008BIM\x03\xed\0\0\0\0\0\x10" + b"\0\1" * 8),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("recipe", [TINY, CROPPED], ids=["as-it-is", "resized"])
def test_ordinary_jpegs_take_the_direct_path_to_the_same_pixels(name, recipe):
    data = ORDINARY[name]
    direct = decode_directly(data, recipe)
    assert direct is not None, "Pillow was asked"
    assert np.array_equal(direct, decode_with_pillow(data, recipe))


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    sampling=st.sampled_from(SAMPLINGS),
    quality=st.integers(1, 100),
    seed=st.integers(0, 5),
)
def test_every_size_and_subsampling_has_the_same_pixels(width, height, sampling, quality, seed):
    data = turbo(picture(width, height, seed), sampling, quality)
    header = jpeg.read_header(data)
    assert header == (width, height, True)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(jpeg.decode(data, header), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("mode", ["apply", "ignore"])
@pytest.mark.parametrize("kind", ["exif", "xmp"])
def test_orientation_is_pillows(orientation, mode, kind):
    xmp = f'<x tiff:Orientation="{orientation}"/>'.encode()
    data = saved(picture(50, 40), **({"exif": exif_of(orientation)} if kind == "exif" else {"xmp": xmp}))
    recipe = CROPPED.model_copy(update={"exif": mode})
    direct = decode_directly(data, recipe)
    assert np.array_equal(direct, decode_with_pillow(data, recipe))
    turned = not np.array_equal(direct, decode(saved(picture(50, 40)), recipe))
    assert turned == (mode == "apply" and 2 <= orientation <= 8)


def multi_picture() -> bytes:
    return saved(Image.fromarray(RGB), "MPO", save_all=True, append_images=[Image.fromarray(picture(seed=1))])


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def renumbered(data: bytes) -> bytes:
    """Components 0, 1 and 2 instead of 1, 2 and 3, in the frame and in the scan."""
    changed, frame, scan = bytearray(data), data.index(FRAME), data.index(b"\xff\xda\x00\x0c\x03")
    for place in (frame + 10, frame + 13, frame + 16, scan + 5, scan + 7, scan + 9):
        changed[place] -= 1
    return bytes(changed)


FRAME = b"\xff\xc0\x00\x11\x08"
UNUSUAL = {
    "progressive": saved(RGB, progressive=True),
    "cmyk": saved(Image.fromarray(RGB).convert("CMYK")),
    "rgb-coded": saved(RGB, keep_rgb=True),
    "rgb-by-adobe": with_segment(saved(RGB), 0xFFEE, b"Adobe\0\x64\0\0\0\0\0"),
    "other-identifiers": renumbered(saved(RGB)),
    "several-pictures": multi_picture(),
    "two-starts": b"\xff\xd8" + saved(RGB),
    "fill-bytes": saved(RGB).replace(b"\xff\xdb", b"\xff\xff\xdb", 1),
    "twelve-bits": patched(saved(RGB), FRAME, b"\xff\xc0\x00\x11\x0c"),
    "lossless": patched(saved(RGB), FRAME, b"\xff\xc3\x00\x11\x08"),
    "arithmetic": patched(saved(RGB), FRAME, b"\xff\xc9\x00\x11\x08"),
    "two-frames": patched(saved(RGB), FRAME, FRAME + saved(RGB)[saved(RGB).index(FRAME) + 5:][:14] + FRAME),
    "no-height": patched(saved(RGB), FRAME + b"\0\x20", FRAME + b"\0\0"),
    "odd-sampling": patched(turbo(RGB, "444"), b"\x03\x01\x11\x00", b"\x03\x01\x14\x00"),
    "no-huffman-tables": without_segment(saved(RGB), 0xFFC4),
    "no-quantization-tables": without_segment(saved(RGB), 0xFFDB),
    "no-frame": without_segment(saved(RGB), 0xFFC0),
    "short-jfif": without_segment(with_segment(saved(RGB), 0xFFE0, b"JFIF\0"), 0xFFED),
    "short-icc": with_segment(saved(RGB), 0xFFE2, b"ICC_PROFILE\0"),
    "damaged-photoshop": with_segment(saved(RGB), 0xFFED, b"Photoshop 3.0\0" + b"8BIM\x03\xed"),
    "segment-of-length-0": patched(saved(RGB), b"\xff\xe0\x00\x10", b"\xff\xe0\x00\x00"),
    "no-end": saved(RGB)[:-2],
    "half": saved(RGB)[:400],
    "no-jpeg": saved(RGB, "PNG"),
    "nothing": b"",
    "start-alone": b"\xff\xd8",
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("recipe", [TINY, CROPPED], ids=["as-it-is", "resized"])
def test_whatever_is_unusual_is_pillows_to_judge(name, recipe):
    try:
        assert decode_directly(UNUSUAL[name], recipe) is None
    except BadImageError:
        assert name in ("damaged-photoshop",), "only a header that Pillow reads may be refused here"
    assert_as_pillow(UNUSUAL[name], recipe)


@pytest.mark.parametrize(
    "body", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0garbage" * 3]
)
def test_damaged_exif_is_judged_as_pillow_judges_it(body):
    for data in (with_segment(saved(RGB), 0xFFE1, body), with_segment(saved(RGB, dpi=(72, 72)), 0xFFE1, body)):
        for recipe in (TINY, CROPPED, CROPPED.model_copy(update={"exif": "ignore"})):
            assert_as_pillow(data, recipe)


@pytest.mark.parametrize("name", ["420-quality-75", "gray", "exif", "restarts-by-row"])
def test_a_file_cut_anywhere_is_refused_in_pillows_words(name):
    data = ORDINARY[name]
    for length in range(len(data)):
        assert decode_directly_or_none(data[:length]) is None, length
        assert_as_pillow(data[:length], TINY)


def decode_directly_or_none(data: bytes) -> np.ndarray | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged Exif
        try:
            return decode_directly(data, TINY)
        except (BadImageError, TooLargeError):
            return None


@pytest.mark.parametrize(
    "name", ["444-quality-95", "420-quality-75", "411-quality-30", "gray", "restarts-by-row", "exif"]
)
def test_flipped_bytes_have_pillows_verdict_and_pixels(name):
    rng = np.random.default_rng(7)
    taken = 0
    for _ in range(250):
        data = bytearray(ORDINARY[name])
        for position in rng.integers(2, len(data), rng.integers(1, 4)):
            data[position] ^= rng.integers(1, 256)
        taken += decode_directly_or_none(bytes(data)) is not None
        assert_as_pillow(bytes(data), TINY)
        assert_as_pillow(bytes(data), CROPPED)
    assert 0 < taken < 250, "the damage must reach both paths"


@pytest.mark.parametrize("length", [10_000, 66_000, 140_000])
def test_a_large_photo_that_was_cut_or_flipped_has_pillows_verdict(length):
    """Pillow feeds libjpeg 64 KiB at a time, this path all at once."""
    whole = turbo(picture(500, 400), "420", 97)
    assert len(whole) > 140_000
    flipped = bytearray(whole)
    flipped[length] ^= 0x5A
    for data in (whole, whole[:length], bytes(flipped)):
        assert_as_pillow(data, CROPPED)


def test_limits_hold_before_anything_is_decoded():
    data = turbo(picture(40, 30), "420")
    assert decode_directly(data, CROPPED, 1199) is None
    with pytest.raises(TooLargeError, match="40×30 pixels; at most 1,199"):
        decode(data, CROPPED, 1199)
    assert decode_directly(data, CROPPED, 1200) is not None
    thin = patched(data, FRAME + b"\0\x1e\0\x28", FRAME + struct.pack(">HH", 1, 40_000))
    with pytest.raises(TooLargeError, match="40000×1 pixels"):
        decode(thin, CROPPED)
    assert jpeg.read_header(patched(data, FRAME + b"\0\x1e\0\x28", FRAME + struct.pack(">HH", 2000, 1001))) is None


STARTS = {
    "colour": turbo(picture(), "420"),
    "gray": saved(picture()[:, :, 0]),
    "scan-in-a-comment": with_segment(turbo(picture(), "420"), 0xFFFE, b"\xff\xda" + bytes(40) + b"\xff\xda"),
    "profile": saved(picture(), icc_profile=bytes(3000)),
    "exif": with_segment(turbo(picture(), "420"), 0xFFE1, b"Exif\0\0" + bytes(20)),
    "progressive": saved(picture(), progressive=True),
}


@pytest.mark.parametrize("data", STARTS.values(), ids=STARTS)
def test_a_start_that_came_before_says_what_the_whole_file_says(data):
    for _ in range(2):
        for end in (*range(len(data)), len(data)):
            assert jpeg.read_header(data[:end]) == jpeg._walk(data[:end]), end


def test_further_scans_are_counted_by_pillows_side():
    data = saved(GRAY)
    scan = data[data.index(b"\xff\xda") : -2]
    bomb = data[:-2] + scan * 300 + b"\xff\xd9"
    with pytest.raises(BadImageError, match="301 scans; at most 200"):
        decode(bomb, TINY)


def test_reduced_decoding_is_left_to_pillow_exactly_where_pillow_reduces(monkeypatch):
    drafted = []
    load = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: drafted.append(self.size) or load(self, *a, **k))
    for width, height in [(71, 72), (72, 72), (143, 144), (144, 143), (144, 144), (145, 300), (300, 144), (600, 145)]:
        data = turbo(picture(width, height), "420")
        recipe = CROPPED.model_copy(update={"min_decode_ratio": 2.0})
        decode_with_pillow(data, recipe)
        reduced = drafted[-1] != (width, height)
        assert (decode_directly(data, recipe) is None) == reduced == (min(width, height) >= 144)
        assert_as_pillow(data, recipe)


def test_an_answer_is_not_written_over_by_the_next_one():
    for recipe in (TINY, CROPPED):
        first = decode(turbo(RGB, "444"), recipe)
        kept = first.copy()
        decode(turbo(255 - RGB, "444"), recipe)
        assert np.array_equal(first, kept)
