from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.images import decode
from app.manifest import PixelRecipe
from tests.training.photos import SECRET, encoded, exif_of, photo, private_photo
from training.data.metadata import EXIF_ORIENTATION, without_metadata

ROOT = Path(__file__).parent.parent.parent
SHIPPED = sorted((ROOT / "models").glob("*/*/golden/verbatim-*")) + sorted((ROOT / "examples" / "photos").glob("*.jpg"))
PIXELS = PixelRecipe(height=64, width=64, resize_short_side=64)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_jpeg_keeps_its_pixels_and_its_orientation_alone(orientation: int, options: dict[str, object]):
    data = private_photo(1, orientation, **options)
    assert data.count(SECRET) >= 5
    clean = without_metadata(data)
    assert clean is not None
    assert SECRET not in clean
    assert dict(Image.open(BytesIO(clean)).getexif()) == ({} if orientation == 1 else {EXIF_ORIENTATION: orientation})
    np.testing.assert_array_equal(decode(clean, PIXELS), decode(data, PIXELS))
    assert without_metadata(without_metadata(clean) or b"") is not None


def test_the_colours_stay_as_they_are():
    cmyk = encoded(photo().convert("CMYK"), comment=SECRET, icc_profile=b"a profile")
    clean = without_metadata(cmyk)
    assert clean is not None
    assert SECRET not in clean
    assert b"a profile" in clean
    np.testing.assert_array_equal(decode(clean, PIXELS), decode(cmyk, PIXELS))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "-".join(path.parts[-4:]))
def test_what_is_shipped_carries_no_more_than_an_encoders_signature(path: Path):
    data = path.read_bytes()
    signature = Image.open(BytesIO(data)).info.get("comment", b"")
    assert len(signature) < 40
    segment = b"\xff\xfe" + (len(signature) + 2).to_bytes(2, "big") + signature
    assert without_metadata(data) == (data.replace(segment, b"") if signature else data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_without_metadata_stays_as_it_is(kind: str):
    data = encoded(photo(), kind)
    assert without_metadata(data) == data


def text_of_png() -> PngInfo:
    text = PngInfo()
    text.add(b"tEXt", b"Comment\0" + SECRET, after_idat=True)
    return text


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {"exif": exif_of(1)}),
        ("PNG", {"pnginfo": text_of_png()}),
        ("WEBP", {"exif": exif_of(6)}),
        ("WEBP", {"xmp": SECRET}),
    ],
)
def test_other_formats_with_metadata_are_not_passed_on(kind: str, options: dict[str, object]):
    data = encoded(photo(), kind, **options)
    assert SECRET in data
    assert without_metadata(data) is None


@pytest.mark.parametrize("length", [2, 3, 10, 300, 2000])
def test_a_jpeg_that_ends_early_is_not_passed_on(length: int):
    assert without_metadata(private_photo(1, 6)[:length]) is None
