"""Few-shot transfer: a bundle's graph as a backbone, a few images of new classes, and a bundle of these out of both.

Owns the order: cut the graph, compute the features of the chosen images once by ONNX Runtime, fit a head, graft it on.
The backbone stays as it is, tensor for tensor, so seconds on a CPU do.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from app.golden import Run
from app.manifest import Bundle, read_bundle, verify_files
from training.classifiers import onnx_run
from training.data.arrays import Split
from training.data.listing import TRAIN, Listing, Picture
from training.errors import DataError, SurgeryError
from training.graphs.cut import FEATURES_NAME, Cut, backbone, find_cut, graft
from training.progress import counting
from training.runs import is_run
from training.transfer.heads import Features, Head

BATCH = 32
"""Images whose features are computed at a time."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A bundle's graph below its last linear layer, ready to run."""

    bundle: Bundle
    graph: onnx.ModelProto
    """The bundle's, whole."""
    cut: Cut
    run: Callable[[NDArray[np.uint8]], Features]
    """uint8 `[n, height, width, 3]` → float32 `[n, width]`."""

    def features(self, split: Split) -> Features:
        """Compute the features of a split, float32 `[n, width]`.

        Raises:
            SurgeryError: what the last linear layer takes is not one row of numbers an image.
            BundleError: the graph fails.
        """
        parts = []
        with counting("Features", len(split.images)) as advance:
            for at in range(0, len(split.images), BATCH):
                images = np.asarray(split.images[at : at + BATCH])
                parts.append(self.run(images))
                if parts[-1].ndim != 2 or len(parts[-1]) != len(images):
                    raise SurgeryError(
                        f"{self.bundle.model_path}: its last linear layer '{self.cut.linear}' takes "
                        f"{list(parts[-1].shape)} for {len(images)} images, not one row each: choose another bundle."
                    )
                advance(len(images))
        return np.concatenate(parts)

    def answers(self, head: Head) -> Run:
        """Return what a grafted graph has to answer, computed apart from it: these features, that head in NumPy."""
        return lambda images: head.probabilities(self.run(images))

    def graft(self, head: Head, classes: int) -> onnx.ModelProto:
        """Return the graph with the head in place of its own."""
        return graft(self.graph, self.cut, head.steps, head.weights, classes)


def open_backbone(path: Path) -> Backbone:
    """Open a bundle for its features.

    Raises:
        BundleError: it cannot be read, or a file of it is not the one that was exported.
        SurgeryError: its graph has no last linear layer to cut before, or it is no bundle but a run.
    """
    if is_run(path):
        raise SurgeryError(f"{path} is a run, not a bundle: make one of it with `convoy-train export {path}`.")
    bundle = read_bundle(path)
    verify_files(bundle)
    graph = onnx.load(bundle.model_path)
    cut = find_cut(graph, str(bundle.model_path))
    with tempfile.TemporaryDirectory() as scratch:
        below = Path(scratch) / "backbone.onnx"
        onnx.save(backbone(graph, cut), below)
        run = onnx_run(below, given=FEATURES_NAME)
    return Backbone(bundle, graph, cut, run)


def draw_shots(listing: Listing, shots: int | None, seed: int) -> tuple[Picture, ...]:
    """Draw as many training pictures of every class, or take all of them where no number is given.

    Raises:
        DataError: a class has fewer.
    """
    pictures = listing.part(TRAIN)
    labels = np.array([picture.label for picture in pictures])
    chosen: list[Picture] = []
    for label, name in enumerate(listing.classes):
        members = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        if shots is not None and len(members) < shots:
            raise DataError(
                f"The class '{name}' has {len(members)} images to train on, fewer than --shots {shots}: add some, "
                "or ask for fewer."
            )
        chosen += [pictures[index] for index in members[:shots].tolist()]
    return tuple(chosen)
