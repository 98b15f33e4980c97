"""Whether the direct path of JPEGs gives Pillow's very pixels, over every JPEG below a folder, and what it saves.

python -m benchmarks.jpeg_identity --data FOLDER     # a table, and benchmarks/results/jpeg-identity.json

Every file is compared as it is; of every photo also 63 new encodings (subsamplings, qualities, gray, progressive,
restart intervals, odd sizes, orientations), and cut and flipped copies, whose errors must be the same ones.
"""

import argparse
import io
import json
import statistics
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, features

from app import jpeg
from app.cpus import machine
from app.errors import ConvoyError
from app.images import decode, decode_directly, decode_with_pillow
from app.manifest import PixelRecipe

ROOT = Path(__file__).parent.parent
SMALL = PixelRecipe(height=32, width=32, resize_short_side=32)
PHOTO = PixelRecipe(height=224, width=224, resize_short_side=256)
SUFFIXES = {".jpg", ".jpeg"}
PHOTO_SIDE = 100
SAMPLINGS = ("444", "422", "420", "440", "411")
DAMAGES = 12
SECONDS = 12.0

Decoder = Callable[[bytes, PixelRecipe], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with JPEG files, searched to its leaves")
    parser.add_argument("--photos", type=int, default=100, help="so many photos are encoded anew (default: 100)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"PIL\.")
    files = [path.read_bytes() for path in sorted(arguments.data.rglob("*")) if path.suffix.lower() in SUFFIXES]
    photos = [data for data in files if min(size_of(data)) >= PHOTO_SIDE]
    small = [data for data in files if size_of(data) == (32, 32)]
    chosen = photos[: arguments.photos]
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "pillow": f"{version('pillow')}, libjpeg-turbo {features.version('libjpeg_turbo')}",
        "simplejpeg": version("simplejpeg"),
        "files as they are": compared(iter(files)),
        "photos encoded anew": compared(variant for data in chosen for variant in encodings(data)),
        "cut and flipped": compared(broken for data in chosen + small[:200] for broken in damages(data)),
        "milliseconds an image": {
            "32×32, taken as it is": times(small[:500], SMALL, 1),
            "photos to 224×224, 1 thread": times(photos[:30], PHOTO, 1),
            "photos to 224×224, 2 threads": times(photos[:30], PHOTO, 2),
        },
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (ROOT / "benchmarks/results/jpeg-identity.json").write_text(text + "\n")
    print(text)


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def compared(files: Iterator[bytes]) -> dict[str, int]:
    """Count the files, those that took the direct path, and those of equal verdict; the largest difference of any."""
    count: Counter[str] = Counter()
    largest = 0
    for data in files:
        recipe = PHOTO if len(data) > 2000 else SMALL
        wanted, found = verdict(decode_with_pillow, data, recipe), verdict(decode, data, recipe)
        same = type(wanted) is type(found) and np.array_equal(wanted, found)
        count["files"] += 1
        count["direct"] += not isinstance(verdict(decode_directly, data, recipe), str | None)
        count["refused"] += isinstance(wanted, str)
        if isinstance(wanted, np.ndarray) and isinstance(found, np.ndarray):
            largest = max(largest, difference(wanted, found))
        # Every pixel of the file too, before any resize.
        if (header := jpeg.read_header(data)) and (pixels := jpeg.decode(data, header)) is not None:
            try:
                with Image.open(io.BytesIO(data)) as image:
                    whole = np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError):
                same = same and not isinstance(found, np.ndarray)
            else:
                same = same and np.array_equal(whole, pixels)
                largest = max(largest, difference(whole, pixels))
        count["identical"] += same
    return {name: count[name] for name in ("files", "direct", "refused", "identical")} | {"largest difference": largest}


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(np.int16) - other).max()) if one.shape == other.shape else 255


def verdict(decoder: Decoder, data: bytes, recipe: PixelRecipe) -> np.ndarray | str | None:
    try:
        return decoder(data, recipe)
    except ConvoyError as error:
        return f"{type(error).__name__}: {error}"


def encodings(data: bytes) -> Iterator[bytes]:
    with Image.open(io.BytesIO(data)) as opened:
        photo = opened.convert("RGB")
    pixels = np.asarray(photo)
    height, width = pixels.shape[:2]
    for sampling in SAMPLINGS:
        for quality in (20, 60, 80, 92, 100):
            yield simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", sampling)
        for right, bottom in ((1, 1), (7, 3), (17, 9), (width - 1, height - 3), (width // 2, 31)):
            yield simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[:bottom, :right]), 85, "RGB", sampling)
    for options in (
        {"optimize": True},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"restart_marker_blocks": 3},
    ):
        yield encoded(photo, **options)
    yield encoded(photo.convert("L"))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield encoded(photo, exif=exif.tobytes())


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, **options)
    return buffer.getvalue()


def damages(data: bytes) -> Iterator[bytes]:
    rng = np.random.default_rng(len(data))
    for number in range(DAMAGES):
        position = int(rng.integers(2, len(data)))
        if number % 3 == 0:
            yield data[:position]
        else:
            yield data[:position] + bytes([data[position] ^ int(rng.integers(1, 256))]) + data[position + 1 :]


def times(files: list[bytes], recipe: PixelRecipe, threads: int) -> dict[str, float]:
    """Median milliseconds an image of both paths, in turns, and the median of the turns' ratios."""
    direct, pillow = [], []
    stop = time.perf_counter() + SECONDS
    while time.perf_counter() < stop:
        direct.append(turn(decode, files, recipe, threads))
        pillow.append(turn(decode_with_pillow, files, recipe, threads))
    ratio = statistics.median(slow / fast for slow, fast in zip(pillow, direct, strict=True))
    return {
        "direct": round(statistics.median(direct), 4),
        "Pillow": round(statistics.median(pillow), 4),
        "Pillow : direct": round(ratio, 3),
    }


def turn(decoder: Decoder, files: list[bytes], recipe: PixelRecipe, threads: int) -> float:
    def work(number: int) -> None:
        for data in files[number::threads]:
            decoder(data, recipe)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return (time.perf_counter() - started) / len(files) * 1000


if __name__ == "__main__":
    main()
