"""Test-time augmentation: one answer from several views of an image.

An option of evaluation only: a service that asked its model twice would be half as fast. Owns which views there are
and how their answers are joined.
"""

import numpy as np
from numpy.typing import NDArray

from app.golden import Run

TTA = ("none", "mirror", "shift")
"""`mirror`: the image and its mirror image; `shift`: also both, moved by one pixel along either diagonal, which count
together as much as those that are not moved (Jordan 2024)."""
SMALLEST = 1e-12


def several_views(run: Run, tta: str) -> Run:
    """Return the function that classifies by all views of an image.

    Args:
        run: uint8 `[n, height, width, 3]` → probabilities float32 `[n, classes]`.
        tta: one of `TTA`.

    Returns:
        The same kind of function. Answers are joined by the mean of their logarithms, which is the mean of logits.
    """
    if tta == "none":
        return run

    def by_views(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        joined = _with_mirror(run, images)
        if tta == "shift":
            padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
            moved = [_with_mirror(run, view) for view in (padded[:, :-2, :-2], padded[:, 2:, 2:])]
            joined = joined / 2 + (moved[0] + moved[1]) / 4
        shares = np.exp(joined - joined.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True), np.float32)

    return by_views


def _with_mirror(run: Run, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the mean logarithm of the answers to images and to their mirror images."""
    views = (np.ascontiguousarray(images), np.ascontiguousarray(images[:, :, ::-1]))
    first, second = (np.log(np.maximum(run(view), SMALLEST), dtype=np.float64) for view in views)
    mean: NDArray[np.float64] = (first + second) / 2
    return mean
