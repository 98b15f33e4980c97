"""The proof that a loaded model is the one that was exported: its golden images must give their golden answers.

The images go through the service's real decoder and the real session, so a wrong Pillow, provider, precision, pixel
recipe or file shows here, before any traffic. Knows neither HTTP nor how a session runs.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from app.errors import BundleError, ConvoyError
from app.images import decode
from app.manifest import Bundle

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""uint8 `[n, height, width, 3]` → float32 probabilities `[n, classes]`."""


def prove(bundle: Bundle, run: Run) -> float:
    """Run the golden set and compare.

    Returns:
        The largest absolute difference of any probability.

    Raises:
        BundleError: an image cannot be decoded, the shapes differ, a difference is beyond the bundle's tolerance, or
            the winning label is not the one recorded.
    """
    golden = bundle.manifest.golden
    expected = bundle.golden_probabilities()
    found = run(_decode_all(bundle))
    if found.shape != expected.shape:
        raise BundleError(
            f"{bundle.model_path} gives probabilities of shape {list(found.shape)}, but the manifest has "
            f"{len(golden.images)} golden images and {len(bundle.manifest.labels)} labels."
        )
    differences = np.abs(found - expected).max(axis=1)
    worst = int(np.argmax(np.nan_to_num(differences, nan=np.inf)))
    difference = float(differences[worst])
    if not difference <= golden.tolerance:
        raise BundleError(
            f"{bundle.directory} does not reproduce its golden answers: {golden.images[worst].file} differs by "
            f"{difference:.2g}, allowed is {golden.tolerance:.2g}; the pixel recipe, the decoder or the provider is "
            "not the one it was exported with."
        )
    for image, row in zip(golden.images, found, strict=True):
        label = bundle.manifest.labels[int(row.argmax())]
        if label != image.label:
            raise BundleError(f"{bundle.directory}: {image.file} is now '{label}', but was '{image.label}' at export.")
    return difference


def _decode_all(bundle: Bundle) -> NDArray[np.uint8]:
    pixels = []
    for image, data in zip(bundle.manifest.golden.images, bundle.golden_bytes(), strict=True):
        try:
            pixels.append(decode(data, bundle.manifest.pixels))
        except ConvoyError as error:
            raise BundleError(f"{bundle.directory / image.file} cannot be decoded: {error.message}") from error
    return np.stack(pixels)
