"""What a network sees in pictures: the numbers that the last linear layer of a run or a bundle takes.

Owns the streaming: pictures are decoded a batch at a time and only their features are kept. Knows nothing of labels.
"""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from app.cpus import usable_cpus
from app.golden import Run
from app.manifest import MANIFEST_FILE, PixelRecipe, read_bundle, verify_files
from training.classifiers import onnx_run, servable_of
from training.data.arrays import decode_picture
from training.data.listing import Picture
from training.errors import RunError
from training.export import write_graph
from training.graphs.cut import FEATURES_NAME, backbone, find_cut
from training.progress import counting
from training.runs import is_run, read_checkpoint

BATCH = 64


def features_of(pictures: Sequence[Picture], model: Path) -> NDArray[np.float32]:
    """Compute the features of pictures that decode, float32 `[n, width]`, in ONNX Runtime on the CPU.

    Raises:
        RunError, BundleError: the model is neither a run nor a bundle, or cannot be used.
        SurgeryError: it has no last linear layer to take features from.
        DataError: a picture has vanished or changed since it was looked at.
    """
    run, pixels = _open(model)
    rows = []
    with ThreadPoolExecutor(usable_cpus()) as pool, counting("Features", len(pictures)) as advance:
        for at in range(0, len(pictures), BATCH):
            batch = pictures[at : at + BATCH]
            images = list(pool.map(lambda picture: decode_picture(picture, pixels), batch))
            rows.append(run(np.stack(images)).reshape(len(batch), -1))
            advance(len(batch))
    return np.concatenate(rows)


def _open(model: Path) -> tuple[Run, PixelRecipe]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        if is_run(model):
            checkpoint = read_checkpoint(model)
            pixels = checkpoint.recipe.pixels
            write_graph(servable_of(checkpoint).to(torch.device("cpu")), pixels, path)
        elif (model / MANIFEST_FILE).is_file():
            bundle = read_bundle(model)
            verify_files(bundle)
            pixels, path = bundle.manifest.pixels, bundle.model_path
        else:
            raise RunError(f"{model} is neither a run (with checkpoint.pt) nor a bundle (with {MANIFEST_FILE}).")
        graph = onnx.load(path)
        below = Path(scratch) / "backbone.onnx"
        onnx.save(backbone(graph, find_cut(graph, str(model))), below)
        return onnx_run(below, given=FEATURES_NAME), pixels
