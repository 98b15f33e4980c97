"""Tiny data sets, drawn in the test: each class is a tint and a direction of stripes, which a network can learn."""

import os
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

CLASSES = ("ant", "bee", "cow")
COLOURS = ((150, 110, 100), (100, 140, 110), (100, 110, 150))


def stripes(label: int, number: int, side: int = 32) -> np.ndarray:
    """Draw picture `number` of a class: uint8 [side, side, 3], the same at every call."""
    random = np.random.default_rng([label, number])
    rows, columns = np.mgrid[:side, :side]
    angle = label * np.pi / 3
    wave = np.sin((rows * np.cos(angle) + columns * np.sin(angle)) * 0.9 + random.uniform(0, 6))
    image = np.array(COLOURS[label]) + 50 * wave[..., None] + random.normal(0, 40, (side, side, 3))
    return image.clip(0, 255).astype(np.uint8)


def jpeg(image: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread, here and in the processes that a test starts.

    Parallel workers on few cores wait for each other otherwise, and only the same number of threads repeats bits.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def draw_images(root: Path, *, parts: tuple[tuple[str, int], ...] = (("train", 20), ("test", 10))) -> Path:
    """Write `<root>/{train,test}/<class>/N.jpg`, or `<root>/<class>/N.jpg` where a part has no name."""
    for offset, (part, count) in enumerate(parts):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number:03d}.jpg").write_bytes(jpeg(stripes(label, 1000 * offset + number)))
    return root


@pytest.fixture(scope="session")
def draw_tree() -> Callable[..., Path]:
    """The function that draws a tree of images."""
    return draw_images


@pytest.fixture(scope="session")
def tree(draw_tree: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of three classes with a train and a test part; read only."""
    return draw_tree(tmp_path_factory.mktemp("data") / "insects")
