"""Photos that tell more than their pixels, for tests of what is passed on."""

from io import BytesIO

import numpy as np
from PIL import Image

from training.data.metadata import EXIF_ORIENTATION

SECRET = b"Rue de Rivoli 99"


def photo(seed: int = 0) -> Image.Image:
    tiles = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(tiles).resize((120, 90), Image.Resampling.NEAREST)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    exif[0x010E] = SECRET.decode()  # the description
    exif.get_ifd(0x8825)[0x001D] = SECRET.decode()  # among GPS
    return exif


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def private_photo(seed: int, orientation: int, **options: object) -> bytes:
    """A JPEG that tells a secret in EXIF, in XMP, in a comment, in a segment of Photoshop's and after its end."""
    data = encoded(photo(seed), exif=exif_of(orientation), comment=SECRET, xmp=b"<x>" + SECRET, quality=90, **options)
    photoshop = b"\xff\xed" + (len(SECRET) + 2).to_bytes(2, "big") + SECRET
    return data[:2] + photoshop + data[2:] + b"\xff\xd8" + SECRET
