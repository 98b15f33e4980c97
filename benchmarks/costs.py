"""What the parts of a request cost here: the figures behind the decisions in ARCHITECTURE.md.

python -m benchmarks.costs              # a table, and benchmarks/results/costs.json
"""

import io
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from app.cpus import machine
from app.images import decode
from app.manifest import Bundle, PixelRecipe, read_bundle
from app.sessions import ClassifierSession
from benchmarks.others import Others

ROOT = Path(__file__).parent.parent
SECONDS = 2.0


def main() -> None:
    photo = Image.open(ROOT / "examples/photos/coffee.jpg")
    web, phone = jpeg(photo, (500, 375)), jpeg(photo, (4032, 3024))
    with Others() as others:
        figures = measured(web, phone)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "others_cpus": others.cpus,
        **figures,
    }
    (ROOT / "benchmarks/results/costs.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(report, indent=2, ensure_ascii=False))


def measured(web: bytes, phone: bytes) -> dict[str, object]:
    recipe = PixelRecipe(height=224, width=224, resize_short_side=256)
    full = recipe.model_copy(update={"min_decode_ratio": 0.0})
    tiny = (ROOT / "models/cifar10-article/1/golden/odd.jpg").read_bytes()
    small = PixelRecipe(height=32, width=32, resize_short_side=32)
    return {
        "milliseconds": {
            f"JPEG 500×375, {len(web) // 1000} kB: decode, resize, then crop": ms(lambda: resize_then_crop(web)),
            "the same: crop first": ms(lambda: decode(web, full)),
            f"JPEG 4032×3024, {len(phone) // 1000} kB: decode in full, crop first": ms(lambda: decode(phone, full)),
            "the same: decode at reduced scale, never below twice the resize": ms(lambda: decode(phone, recipe)),
            "JPEG 59×41: decode, crop": ms(lambda: decode(tiny, small)),
        },
        "images_per_s": {
            f"{name}, batches of {batch}": {
                "1 session of 1 thread": rate(bundle_of(name), 1, 1, batch),
                "1 session of 2 threads": rate(bundle_of(name), 1, 2, batch),
                "2 sessions of 1 thread": rate(bundle_of(name), 2, 1, batch),
            }
            for name, batch in (("cifar10-article", 8), ("cifar10-article", 32), ("imagenet", 1), ("imagenet", 8))
        },
    }


def jpeg(photo: Image.Image, size: tuple[int, int]) -> bytes:
    """Enlarge a photo, with the grain that a camera would have."""
    pixels = np.asarray(photo.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = pixels + np.random.default_rng(0).normal(0, 6, pixels.shape).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def resize_then_crop(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


def ms(work: Callable[[], object]) -> float:
    """Median milliseconds of one call."""
    work()
    times = []
    stop = time.perf_counter() + SECONDS
    while (started := time.perf_counter()) < stop:
        work()
        times.append(time.perf_counter() - started)
    return round(statistics.median(times) * 1000, 3)


def bundle_of(name: str) -> Bundle:
    return read_bundle(ROOT / "models" / name / "1")


def rate(bundle: Bundle, sessions: int, threads: int, batch: int) -> float:
    """Images per second of so many sessions of so many threads, each in a thread of its own."""
    pixels = bundle.manifest.pixels
    rows = np.random.default_rng(0).integers(0, 256, (batch, pixels.height, pixels.width, 3), np.uint8)
    opened = [ClassifierSession(bundle.model_path, "cpu", threads) for _ in range(sessions)]
    counts = [0] * sessions
    stop = time.monotonic() + SECONDS

    def loop(number: int) -> None:
        while time.monotonic() < stop:
            opened[number].run(rows)
            counts[number] += batch

    workers = [threading.Thread(target=loop, args=(number,)) for number in range(sessions)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return round(sum(counts) / SECONDS, 1)


if __name__ == "__main__":
    main()
