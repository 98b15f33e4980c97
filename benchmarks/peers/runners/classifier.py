"""Encoded images in, the five best labels out: the same work in every peer, so that only the serving differs.

Runs in the peers' environment. It reads the bundle as anybody could, as JSON and ONNX; of Convoy it takes nothing but,
where the task says so, the function that decodes.
"""

import json
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image
from task import Task, read_task

TOP = 5
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDER = "PEER_PROVIDER"
"""Another provider of ONNX Runtime, for benchmarks/gpu/."""
Answer = dict[str, Any]
Decode = Callable[[bytes], np.ndarray]


class Classifier:
    """One session of one thread: with a process per processor, more threads only wait for each other."""

    def __init__(self, task: Task) -> None:
        manifest = json.loads((task.bundle / "model.json").read_text(encoding="utf-8"))
        self.labels: list[str] = manifest["labels"]
        self.decode = plain(manifest["pixels"]) if task.decoder == "plain" else convoy(manifest["pixels"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        wanted = os.environ.get(PROVIDER, CPU)
        if wanted == CUDA:
            ort.preload_dlls()
        self.session = ort.InferenceSession(str(task.bundle / manifest["model"]["file"]), options, providers=[wanted])
        # Where a provider is not there ONNX Runtime takes the processor, and says so only in its log.
        if (found := self.session.get_providers()[0]) != wanted:
            raise SystemExit(f"{PROVIDER} is {wanted}, but ONNX Runtime {ort.__version__} gave a session in {found}.")
        self.warm(task.batch, (manifest["pixels"]["height"], manifest["pixels"]["width"], 3))

    def warm(self, batch: int, shape: tuple[int, ...]) -> None:
        for rows in {1, batch}:
            self.infer(np.zeros((rows, *shape), np.uint8))

    def classify(self, encoded: Sequence[bytes]) -> list[Answer]:
        return [self.answer(row) for row in self.infer(np.stack([self.decode(data) for data in encoded]))]

    def infer(self, pixels: np.ndarray) -> np.ndarray:
        """Turn uint8 `[n, height, width, 3]` into float32 probabilities `[n, classes]`."""
        return self.session.run(["probabilities"], {"image": pixels})[0]

    def answer(self, row: np.ndarray) -> Answer:
        best = np.argsort(row)[: -TOP - 1 : -1].tolist()
        top = [
            {"label": self.labels[index], "index": index, "probability": round(float(row[index]), 6)} for index in best
        ]
        return {"results": [{"top": top}]}


def plain(pixels: dict[str, Any]) -> Decode:
    """Return what the peers' documentation shows: open, convert, resize the short side, crop the centre."""
    short, size = pixels["resize_short_side"], (pixels["width"], pixels["height"])
    resampling = Image.Resampling[pixels["interpolation"].upper()]

    def decode(data: bytes) -> np.ndarray:
        image = Image.open(BytesIO(data)).convert("RGB")
        scale = short / min(image.size)
        if scale != 1:
            image = image.resize((round(image.width * scale), round(image.height * scale)), resampling)
        if image.size != size:
            left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
            image = image.crop((left, top, left + size[0], top + size[1]))
        return np.asarray(image)

    return decode


def convoy(pixels: dict[str, Any]) -> Decode:
    """Return Convoy's own decoder; the driver puts the repository on PYTHONPATH."""
    from app import images
    from app.manifest import PixelRecipe

    recipe = PixelRecipe.model_validate(pixels)
    return lambda data: images.decode(data, recipe)


if __name__ == "__main__":
    # A trial: servers that start their workers anew for ever would not say what is missing.
    Classifier(read_task())
