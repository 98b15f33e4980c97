"""CIFAR-10 as its author publishes it (Krizhevsky 2009): the python and the binary version, packed or unpacked.

Owns both formats, described at the data set's home. Files come from elsewhere: sizes and values are checked, none of
their values is printed, and pickles are read by an unpickler that builds plain values and records, nothing else.
"""

import hashlib
import lzma
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.listing import Listing, Picture
from training.errors import DataError

SIDE = 32
CLASSES = 10
PIXEL_BYTES = 3 * SIDE * SIDE
RECORD_BYTES = 1 + PIXEL_BYTES
PYTHON_FOLDER, BINARY_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
FILE_LIMIT_BYTES = 64 << 20
"""Of a file in memory; the published ones have 31 MB."""
NAME_LIMIT = 100
MOST_TUPLES = 1000
"""In one pickle; a published one has a handful. Nested tuples are hashed recursively in C: a million deep, a crash."""

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
    _check_names(path, classes)
    for name in (*BATCHES, TEST_BATCH):
        if name + suffix not in files:
            raise DataError(f"{path} lacks {name}{suffix}: download the archive again.")
    return Listing(
        classes,
        tuple(picture for name in BATCHES for picture in _pictures(path, name, read(path, name, files))),
        test=tuple(_pictures(path, TEST_BATCH, read(path, TEST_BATCH, files))),
    )


def _folder_files(folder: Path) -> Mapping[str, bytes]:
    files = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and _wanted(entry.name):
            _check_size(folder, entry.name, entry.stat().st_size)
            files[entry.name] = entry.read_bytes()
    return files


def _archive_files(path: Path) -> Mapping[str, bytes]:
    """Read the members into memory: nothing is unpacked to disk, so no member's path can do harm."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                file = archive.extractfile(member) if member.isfile() and _wanted(name) else None
                if file is not None:
                    _check_size(path, name, member.size)
                    files[name] = file.read()
            _drain(archive)
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged or no tar archive: {_reason(error)}.") from error
    return files


def _drain(archive: tarfile.TarFile) -> None:
    """Read on to the end of the compressed stream, where its checksum is compared: tar stops before it."""
    if archive.fileobj is not None:
        while archive.fileobj.read(1 << 20):
            pass


def _check_size(path: Path, name: str, size: int) -> None:
    if size > FILE_LIMIT_BYTES:
        raise DataError(
            f"{_brief(name)} in {path} has {size:,} bytes, more than the {FILE_LIMIT_BYTES:,} that a file of CIFAR-10 "
            "may have: download the archive again."
        )


def _wanted(name: str) -> bool:
    return name.startswith(("batches.meta", "data_batch_", TEST_BATCH))


class _Record:
    """What a pickle asks to build: remembered, not built."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Record):
    """An array: `_reconstruct(…)` with state (version, shape, dtype, by columns, bytes)."""


class _ArrayOfBuffer(_Record):
    """An array as newer pickles have it: `_frombuffer(bytes, dtype, shape, order)`."""


class _Dtype(_Record):
    """An array's type: `dtype("u1", …)`."""


class _Encoded(_Record):
    """Bytes as Python 3 writes them for Python 2: `_codecs.encode(text, "latin1")`."""


_STANDS_FOR: dict[tuple[str, str], type[_Record]] = {
    ("numpy", "ndarray"): _Record,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encoded,
}
for _core in ("numpy.core", "numpy._core"):
    _STANDS_FOR[f"{_core}.multiarray", "_reconstruct"] = _Array
    _STANDS_FOR[f"{_core}.numeric", "_frombuffer"] = _ArrayOfBuffer


class _RecordsOnly(pickle.Unpickler):
    """Builds plain values and records of arrays; whatever else a pickle asks to import is refused.

    NumPy's own unpickling trusts what it reads: a crafted dtype makes it follow any pointer.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STANDS_FOR:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STANDS_FOR[module, name]


def _unpickle(path: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        tuples = sum(opcode.name.startswith("TUPLE") for opcode, _, _ in pickletools.genops(data))
        if tuples > MOST_TUPLES:
            raise pickle.UnpicklingError(f"it holds {tuples:,} tuples")
        # The published files were pickled by Python 2, whose strings are read as Latin-1.
        found = _RecordsOnly(BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{name} in {path} is damaged or not CIFAR-10: {_reason(error)}.") from error
    if not isinstance(found, dict):
        raise DataError(f"{name} in {path} is not CIFAR-10: it holds no dictionary.")
    return {_text(key): value for key, value in found.items() if isinstance(key, str | bytes)}


def _text(key: str | bytes) -> str:
    return str(key, "latin1") if isinstance(key, bytes) else key


def _reason(error: BaseException) -> str:
    return _brief(str(error).rstrip(".")) or type(error).__name__


def _brief(text: str) -> str:
    """Make text out of a foreign file fit for a sentence: short, and nothing in it that a terminal obeys."""
    return "".join(character if character.isprintable() else "?" for character in text[:NAME_LIMIT])


def _names(path: Path, meta: dict[str, Any]) -> list[str]:
    names = meta.get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"batches.meta in {path} has no list 'label_names'.")
    return names


def _check_names(path: Path, names: Sequence[str]) -> None:
    if len(names) != CLASSES:
        raise DataError(f"{path} names {len(names)} classes, but CIFAR-10 has {CLASSES}.")
    for place, name in enumerate(names):
        if not name.strip() or len(name) > NAME_LIMIT or not name.isprintable():
            raise DataError(f"{path} has no usable name for class {place}: one to {NAME_LIMIT} printable letters.")
        if name in names[:place]:
            raise DataError(f"{path} names two classes '{name}'.")


def _python_rows(path: Path, name: str, files: Mapping[str, bytes]) -> Rows:
    batch = _unpickle(path, name, files[name])
    data, labels = _pixels(batch.get("data")), batch.get("labels")
    if data is None:
        raise DataError(f"{name} in {path} has no 'data' of bytes, {PIXEL_BYTES} an image.")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise DataError(f"{name} in {path} has {len(data)} images but not as many 'labels'.")
    return data, labels


def _pixels(record: Any) -> NDArray[np.uint8] | None:
    """Build the array uint8 `[n, 3072]` that a record describes, or None where it describes something else."""
    match record:
        case _Array(state=(_, (int(rows), int(columns)), _Dtype(arguments=("u1", *_)), False, content)):
            pass
        case _ArrayOfBuffer(arguments=(content, _Dtype(arguments=("u1", *_)), (int(rows), int(columns)), "C")):
            pass
        case _:
            return None
    match content:
        case _Encoded(arguments=(str(text), "latin1")) | str(text):
            content = text.encode("latin1", "replace")
    if not isinstance(content, bytes | bytearray) or rows < 1 or columns != PIXEL_BYTES:
        return None
    if len(content) != rows * PIXEL_BYTES:
        return None
    return np.frombuffer(content, np.uint8).reshape(rows, PIXEL_BYTES)


def _binary_rows(path: Path, name: str, files: Mapping[str, bytes]) -> Rows:
    data = files[f"{name}.bin"]
    if not data or len(data) % RECORD_BYTES:
        raise DataError(f"{name}.bin in {path} is cut off: its length is no multiple of {RECORD_BYTES} bytes.")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
    return records[:, 1:], records[:, 0].tolist()


def _pictures(path: Path, name: str, rows: Rows) -> list[Picture]:
    pixels, labels = rows
    for label in labels:
        if type(label) is not int:
            raise DataError(f"{name} in {path} has a label of type {type(label).__name__}; labels are whole numbers.")
        if not 0 <= label < CLASSES:
            raise DataError(f"{name} in {path} has a label outside 0 to {CLASSES - 1}.")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return [
        Picture(f"{name}/{index:05d}", label, hashlib.sha256(image).hexdigest(), image)
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
