"""CIFAR-10 as its author publishes it (Krizhevsky 2009): the python and the binary version, packed or unpacked.

Owns both formats, described at the data set's home. Files come from elsewhere, so sizes and values are checked, and
the pickles are read by an unpickler that can build arrays and nothing else.
"""

import hashlib
import pickle
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.errors import DataError
from training.listing import Listing, Picture

SIDE = 32
CLASSES = 10
PIXEL_BYTES = 3 * SIDE * SIDE
RECORD_BYTES = 1 + PIXEL_BYTES
PYTHON_FOLDER, BINARY_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"

Rows = tuple[NDArray[np.uint8], list[int]]
"""Pixels uint8 `[n, 3072]` (all red, all green, all blue, each row by row) and n labels."""


def is_cifar(path: Path) -> bool:
    """Say whether a path is one of the archives or one of the folders inside them."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("batches.meta", "batches.meta.txt"))
    return path.name.endswith((".tar.gz", ".tgz", ".tar"))


def read_cifar(path: Path) -> Listing:
    """List an archive or its unpacked folder.

    Raises:
        DataError: a file is missing, damaged, or not what the format says.
    """
    files = _folder_files(path) if path.is_dir() else _archive_files(path)
    if "batches.meta" in files:
        classes = tuple(_names(path, _unpickle(path, "batches.meta", files["batches.meta"])))
        read, suffix = _python_rows, ""
    elif "batches.meta.txt" in files:
        classes = tuple(files["batches.meta.txt"].decode("ascii", "replace").split())
        read, suffix = _binary_rows, ".bin"
    else:
        raise DataError(
            f"{path} is not a CIFAR-10 archive: it holds neither {PYTHON_FOLDER}/batches.meta "
            f"nor {BINARY_FOLDER}/batches.meta.txt."
        )
    if len(classes) != CLASSES:
        raise DataError(f"{path} names {len(classes)} classes, but CIFAR-10 has {CLASSES}.")
    for name in (*BATCHES, TEST_BATCH):
        if name + suffix not in files:
            raise DataError(f"{path} lacks {name}{suffix}: download the archive again.")
    return Listing(
        classes,
        tuple(picture for name in BATCHES for picture in _pictures(path, name, read(path, name, files))),
        test=tuple(_pictures(path, TEST_BATCH, read(path, TEST_BATCH, files))),
    )


def _folder_files(folder: Path) -> Mapping[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file() and _wanted(entry.name)}


def _archive_files(path: Path) -> Mapping[str, bytes]:
    """Read the members into memory: nothing is unpacked to disk, so no member's path can do harm."""
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                file = archive.extractfile(member) if member.isfile() and _wanted(name) else None
                if file is not None:
                    files[name] = file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{path} is damaged or no tar archive: {str(error).rstrip('.')}.") from error
    return files


def _wanted(name: str) -> bool:
    return name.startswith(("batches.meta", "data_batch_", TEST_BATCH))


class _ArraysOnly(pickle.Unpickler):
    """Builds NumPy arrays; whatever else a pickle asks to import is refused before it is imported."""

    _ALLOWED = frozenset(
        (module, name)
        for core in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
        for module, name in ((core, "_reconstruct"), (core, "_frombuffer"))
    ) | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(path: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        # The published files were pickled by Python 2, whose strings are read as Latin-1.
        found = _ArraysOnly(BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).rstrip(".")
        raise DataError(f"{name} in {path} is damaged or not CIFAR-10: {reason}.") from error
    if not isinstance(found, dict):
        raise DataError(f"{name} in {path} is not CIFAR-10: it holds no dictionary.")
    return {str(key, "latin1") if isinstance(key, bytes) else str(key): value for key, value in found.items()}


def _names(path: Path, meta: dict[str, Any]) -> list[str]:
    names = meta.get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"batches.meta in {path} has no list 'label_names'.")
    return names


def _python_rows(path: Path, name: str, files: Mapping[str, bytes]) -> Rows:
    batch = _unpickle(path, name, files[name])
    data, labels = batch.get("data"), batch.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (PIXEL_BYTES,):
        raise DataError(f"{name} in {path} has no 'data' of bytes, {PIXEL_BYTES} an image.")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise DataError(f"{name} in {path} has {len(data)} images but not as many 'labels'.")
    return data, labels


def _binary_rows(path: Path, name: str, files: Mapping[str, bytes]) -> Rows:
    data = files[f"{name}.bin"]
    if not data or len(data) % RECORD_BYTES:
        raise DataError(f"{name}.bin in {path} is cut off: its length is no multiple of {RECORD_BYTES} bytes.")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
    return records[:, 1:], records[:, 0].tolist()


def _pictures(path: Path, name: str, rows: Rows) -> list[Picture]:
    pixels, labels = rows
    for label in labels:
        if not isinstance(label, int) or not 0 <= label < CLASSES:
            raise DataError(f"{name} in {path} has the label {label!r}; labels are 0 to {CLASSES - 1}.")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return [
        Picture(f"{name}/{index:05d}", label, hashlib.sha256(image).hexdigest(), image)
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
