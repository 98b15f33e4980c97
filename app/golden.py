"""The proof that a loaded model is the one that was exported: its golden images must give their golden answers.

The images go through the service's real decoder and the real session, so a wrong Pillow, provider, precision, pixel
recipe or file shows here, before any traffic. Knows neither HTTP nor how a session runs.
"""

from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from app.errors import BundleError, ConvoyError, DeviceLostError
from app.images import decode
from app.manifest import MANIFEST_FILE, Bundle, TensorManifest
from app.sessions import OnnxSession
from app.tensors import Array

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


def prove_tensors(directory: Path, manifest: TensorManifest, session: OnnxSession) -> float:
    """Run the golden tensors of a model and compare.

    Returns:
        The largest absolute difference of any number; strings must be equal.

    Raises:
        BundleError: an input or output is missing in the golden file, it does not run, the shapes differ, or a
            difference is beyond the tolerance.
    """
    assert manifest.golden is not None, "only a model with golden tensors proves itself by them"
    path = directory / manifest.golden.file
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        inputs = [_as_taken(arrays[f"in.{spec.name}"], spec.datatype) for spec in session.inputs]
        expected = [arrays[f"out.{spec.name}"] for spec in session.outputs]
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise BundleError(f"{path} is not a readable NumPy archive: {error}.") from error
    except KeyError as error:
        raise BundleError(f"{path} lacks {error}: it holds {', '.join(sorted(arrays))}.") from None
    try:
        found = session.run(*inputs)
    except DeviceLostError:
        raise
    except Exception as error:
        raise BundleError(f"{directory / MANIFEST_FILE}: the golden tensors do not run: {error}") from error
    worst = 0.0
    for spec, wanted, given in zip(session.outputs, expected, found, strict=True):
        if wanted.shape != given.shape:
            raise BundleError(
                f"{directory} gives '{spec.name}' in shape {list(given.shape)}, but its golden answer has "
                f"{list(wanted.shape)}."
            )
        difference = _difference(wanted, given)
        if not difference <= manifest.golden.tolerance:
            raise BundleError(
                f"{directory} does not reproduce its golden answers: '{spec.name}' differs by {difference:.2g}, "
                f"allowed is {manifest.golden.tolerance:.2g}."
            )
        worst = max(worst, difference)
    return worst


def _as_taken(array: Array, datatype: str) -> Array:
    """Return strings as the objects that a session takes; the archive holds them as fixed-width text."""
    return array.astype(np.object_) if datatype == "BYTES" else array


def _difference(wanted: Array, given: Array) -> float:
    if wanted.dtype.kind in "USO":
        return 0.0 if np.array_equal(wanted.astype(str), given.astype(str)) else float("inf")
    if not wanted.size:
        return 0.0
    differences = np.abs(wanted.astype(np.float64) - given.astype(np.float64))
    return float(np.nan_to_num(differences, nan=np.inf).max())
