"""A trained run or a bundle, opened: both take uint8 pixels and give probabilities.

Owns the difference between the two for evaluation, prediction and export's comparison, so that nothing else asks
which it is.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from app import runtime
from app.errors import BundleError
from app.golden import Run
from app.manifest import INPUT_NAME, MANIFEST_FILE, OUTPUT_NAME, Bundle, PixelRecipe, read_bundle, verify_files
from training.data.arrays import Split
from training.data.listing import Origin
from training.errors import RunError
from training.nets import build
from training.recipes import Recipe, make_recipe
from training.runs import Checkpoint, is_run, read_checkpoint
from training.servable import Servable

BATCH = 250


@dataclass(frozen=True, slots=True)
class Classifier:
    """What answers, and what it must be asked with."""

    labels: tuple[str, ...]
    pixels: PixelRecipe
    run: Run
    origin: Origin = field(default_factory=Origin)

    def probabilities(self, split: Split, batch: int = BATCH) -> NDArray[np.float32]:
        """Classify a split: float32 `[n, classes]`."""
        return in_batches(self.run, split.images, batch)


def in_batches(run: Run, images: NDArray[np.uint8], batch: int) -> NDArray[np.float32]:
    """Classify uint8 `[n, height, width, 3]` a batch at a time: float32 `[n, classes]`."""
    return np.concatenate([run(np.asarray(images[at : at + batch])) for at in range(0, len(images), batch)])


def open_classifier(path: Path, device: torch.device) -> Classifier:
    """Open a run directory in PyTorch, or a bundle directory in ONNX Runtime.

    Raises:
        RunError: the path is neither.
        BundleError: the bundle cannot be used.
    """
    if is_run(path):
        checkpoint = read_checkpoint(path)
        recipe, run = checkpoint.recipe, torch_run(servable_of(checkpoint), device)
        return Classifier(checkpoint.classes, recipe.pixels, run, origin_of(checkpoint))
    if (path / MANIFEST_FILE).is_file():
        bundle = read_bundle(path)
        verify_files(bundle)
        run = onnx_run(bundle.model_path)
        return Classifier(bundle.manifest.labels, bundle.manifest.pixels, run, origin_told(bundle))
    raise RunError(f"{path} is neither a run (with checkpoint.pt) nor a bundle (with {MANIFEST_FILE}).")


def origin_of(checkpoint: Checkpoint) -> Origin:
    """Return what a run was trained on."""
    recipe = checkpoint.recipe
    return Origin(
        checkpoint.data, checkpoint.data_digest, recipe.test_fraction, recipe.seed, recipe.validation_fraction
    )


def origin_told(bundle: Bundle) -> Origin:
    """Return what a bundle's manifest tells of its training, with the defaults where it was not trained here."""
    told = bundle.manifest.training
    knobs = told.get("recipe")
    recipe = make_recipe(**knobs) if isinstance(knobs, dict) else Recipe()
    return Origin(
        str(told.get("data", "")),
        str(told.get("data_digest", "")),
        recipe.test_fraction,
        recipe.seed,
        recipe.validation_fraction,
    )


def servable_of(checkpoint: Checkpoint) -> Servable:
    """Rebuild a run's network with its weights, ready to serve.

    Raises:
        RunError: the weights do not fit the recipe's network.
    """
    recipe = checkpoint.recipe
    network = build(recipe.network, classes=len(checkpoint.classes), size=recipe.size, dropout=recipe.dropout)
    try:
        network.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise RunError(f"The checkpoint's weights are not of the network '{recipe.network}' that it names.") from error
    return Servable(network, recipe).eval()


def torch_run(servable: Servable, device: torch.device) -> Run:
    """Return the function that classifies in PyTorch."""
    servable.to(device)

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = servable(torch.tensor(images, device=device)).cpu().numpy()
        return found

    return run


def onnx_run(model: Path, taken: str = INPUT_NAME, given: str = OUTPUT_NAME) -> Run:
    """Return the function that classifies in ONNX Runtime on the CPU, or gives another output of the graph.

    Args:
        model: the ONNX file.
        taken: the name of its input, where it is a part of a classifier.
        given: the name of its output, likewise.

    Raises:
        BundleError: the file is missing, damaged or not a graph that this runtime takes.
    """
    ort = runtime.load()
    options = ort.SessionOptions()
    # Threads that spin between two runs would take the processors from PyTorch, where the graph is a teacher.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions have no common class
        raise BundleError(f"{model} cannot be loaded by ONNX Runtime: {str(error).splitlines()[0]}") from error

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            found: NDArray[np.float32] = session.run([given], {taken: images})[0]
        except Exception as error:
            raise BundleError(f"{model} cannot take {list(images.shape)}: {str(error).splitlines()[0]}") from error
        return found

    return run
