"""Both published forms of CIFAR-10, made small: 6 images a batch instead of 10,000."""

import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.manifest import PixelRecipe
from training.data import cifar
from training.data.arrays import load_split, read_listing
from training.errors import DataError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
PER_BATCH = 6
PIXELS = PixelRecipe(height=32, width=32, resize_short_side=32)

Files = dict[str, bytes]


def rows(batch: int) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(batch)
    return random.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8), random.integers(0, 10, PER_BATCH).tolist()


def python_files() -> Files:
    files = {"batches.meta": pickle.dumps({"label_names": NAMES}, protocol=2)}
    for number, name in enumerate(BATCHES):
        data, labels = rows(number)
        files[name] = pickled_by_python2(data, labels)
    return files


def pickled_by_python2(data: np.ndarray, labels: list[int]) -> bytes:
    """Write what Python 2 wrote for `{"data": data, "labels": labels}`, opcode by opcode."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    byte_type = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(K" + bytes([len(data)]) + b"M\x00\x0ct"
    content = b"T" + data.nbytes.to_bytes(4, "little") + data.tobytes()
    state = b"(K\x01" + shape + byte_type + b"\x89" + content + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + state + b"U\x06labels" + numbers + b"u."


def binary_files() -> Files:
    files = {"batches.meta.txt": "\n".join([*NAMES, ""]).encode()}
    for number, name in enumerate(BATCHES):
        data, labels = rows(number)
        files[f"{name}.bin"] = b"".join(
            bytes([label]) + image.tobytes() for label, image in zip(labels, data, strict=True)
        )
    return files


def as_folder(files: Files, path: Path) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def as_archive(files: Files, path: Path) -> Path:
    path = path.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("pack", [as_folder, as_archive])
@pytest.mark.parametrize("make", [python_files, binary_files])
def test_every_published_form_gives_the_same_pictures(
    tmp_path: Path, make: Callable[[], Files], pack: Callable[[Files, Path], Path]
):
    listing = read_listing(pack(make(), tmp_path / "cifar"))
    assert listing.classes == tuple(NAMES)
    train, test = (load_split(listing.part(part), PIXELS, tmp_path) for part in ("train", "test"))
    assert (len(train.images), len(test.images)) == (5 * PER_BATCH, PER_BATCH)
    data, labels = rows(5)
    assert test.labels.tolist() == labels
    # Red plane first, row by row: pixel (row 2, column 3) of image 4.
    assert test.images[4, 2, 3].tolist() == [data[4, plane * 1024 + 2 * 32 + 3] for plane in range(3)]


def test_a_picture_of_an_archive_encodes_without_loss(tmp_path: Path):
    listing = read_listing(as_folder(python_files(), tmp_path / "cifar"))
    larger = PIXELS.model_copy(update={"height": 64, "width": 64, "resize_short_side": 64})
    split = load_split(listing.part("test"), larger, tmp_path / "cache")
    assert split.images.shape == (PER_BATCH, 64, 64, 3)
    assert split.pictures[0].encoded().startswith(b"\x89PNG")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_before_it_does(tmp_path: Path):
    files = python_files()
    files["data_batch_3"] = pickle.dumps({"data": Malicious(tmp_path / "harm"), "labels": []}, protocol=2)
    with pytest.raises(
        DataError, match=r"data_batch_3 in .* is damaged or not CIFAR-10: it asks for (posix|nt)\.mkdir"
    ):
        read_listing(as_archive(files, tmp_path / "cifar"))
    assert not (tmp_path / "harm").exists()


def without(name: str) -> Callable[[Files], None]:
    return lambda files: files.pop(name) and None


def put(name: str, data: bytes) -> Callable[[Files], None]:
    return lambda files: files.__setitem__(name, data)


def meta(names: list[str]) -> bytes:
    return pickle.dumps({"label_names": names}, protocol=2)


def batch(data: np.ndarray | None = None, labels: list[object] | None = None) -> bytes:
    given = {"data": rows(5)[0] if data is None else data, "labels": rows(5)[1] if labels is None else labels}
    return pickle.dumps(given, protocol=2)


def with_labels(opcodes: bytes) -> bytes:
    """A good batch, then other labels for it, written as a pickle's opcodes."""
    return pickled_by_python2(*rows(5))[:-2] + b"U\x06labels](" + opcodes + b"eu."


DEEP_LIST = b"]" * 100_000 + b"a" * 99_999


@pytest.mark.parametrize(
    ("make", "spoil", "sentence"),
    [
        (python_files, without("data_batch_2"), "lacks data_batch_2: download the archive again."),
        (binary_files, without("test_batch.bin"), "lacks test_batch.bin: download the archive again."),
        (python_files, put("test_batch", b"\x80\x02oops"), "test_batch in"),
        (python_files, put("test_batch", pickle.dumps([1], protocol=2)), "it holds no dictionary."),
        (python_files, put("test_batch", pickle.dumps({"data": 1}, protocol=2)), "has no 'data' of bytes"),
        (binary_files, put("data_batch_1.bin", b"\0" * 3072), "is cut off: its length is no multiple of 3073 bytes."),
        (binary_files, put("data_batch_1.bin", b"\x0a" + b"\0" * 3072), "has a label outside 0 to 9."),
        (binary_files, put("batches.meta.txt", b"cat dog"), "names 2 classes, but CIFAR-10 has 10."),
        (python_files, put("batches.meta", pickle.dumps({"names": []})), "has no list 'label_names'."),
        (python_files, put("batches.meta", meta(["cat"] * 10)), "names two classes 'cat'."),
        (python_files, put("batches.meta", meta([*NAMES[:9], "t" * 10**6])), "has no usable name for class 9"),
        (python_files, put("batches.meta", meta([*NAMES[:9], "a\nb"])), "has no usable name for class 9"),
        (binary_files, put("batches.meta.txt", b"cat " * 10), "names two classes 'cat'."),
        (python_files, put("test_batch", pickle.dumps({10**5000: 1}, protocol=2)), "has no 'data' of bytes"),
        (python_files, put("test_batch", batch(labels=[0] * 5 + [10**5000])), "has a label outside 0 to 9."),
        (python_files, put("test_batch", with_labels(b"K\x00" * 5 + DEEP_LIST)), "has a label of type list;"),
        (python_files, put("test_batch", batch(labels=[0] * 5 + ["x" * 10**6])), "has a label of type str;"),
        (python_files, put("test_batch", batch(labels=[0] * 5 + [True])), "has a label of type bool;"),
        (python_files, put("test_batch", pickled_by_python2(rows(5)[0][:0], [])), "has no 'data' of bytes"),
        (python_files, put("test_batch", batch(np.zeros((6, 3072), "u2"))), "has no 'data' of bytes"),
        (python_files, put("test_batch", batch(np.zeros((6, 3073), np.uint8))), "has no 'data' of bytes"),
        (python_files, put("test_batch", batch(np.zeros((6, 3072), np.uint8, "F"))), "has no 'data' of bytes"),
        (python_files, put("test_batch", b"\x80\x04\x8c\x05a\nb\x1bc\x8c\x01d\x93."), "it asks for a?b?c.d."),
    ],
)
def test_what_is_wrong_with_an_archive_is_named(
    tmp_path: Path, make: Callable[[], Files], spoil: Callable[[Files], None], sentence: str
):
    files = make()
    spoil(files)
    with pytest.raises(DataError) as caught:
        read_listing(as_folder(files, tmp_path / "cifar"))
    assert sentence in caught.value.message
    assert str(tmp_path / "cifar") in caught.value.message


def test_an_archive_of_something_else_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="is not a CIFAR-10 archive"):
        read_listing(as_archive({"README": b"hello"}, tmp_path / "other"))


def test_a_damaged_archive_is_refused(tmp_path: Path):
    path = as_archive(python_files(), tmp_path / "cifar")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="is damaged or no tar archive"):
        read_listing(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_batch_pickled_by_python3_is_read_too(tmp_path: Path, protocol: int):
    files = python_files()
    data, labels = rows(5)
    files["test_batch"] = pickle.dumps({"data": data, "labels": labels}, protocol=protocol)
    split = load_split(read_listing(as_folder(files, tmp_path / "cifar")).part("test"), PIXELS, tmp_path)
    assert split.images[4, 2, 3].tolist() == [data[4, plane * 1024 + 2 * 32 + 3] for plane in range(3)]


# A dtype 'V8' whose state claims an object field: NumPy would take the label's eight bytes for a pointer.
POINTER = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x01tcnumpy\ndtype\n(U\x02V8K\x00K\x01tR"
    b"(K\x03U\x01|N(U\x01xt}U\x01x(cnumpy\ndtype\n(U\x02O8K\x00K\x01tRK\x00tsK\x08K\x01K\x00tb\x89U\x08AAAAAAAAtb"
)
# () within () a million deep, as a key: to hash it takes more stack than there is.
DEEP_KEY = b"}()" + b"\x85" * 1_000_000 + b"K\x01u"


@pytest.mark.parametrize("label", [POINTER, DEEP_KEY], ids=["pointer", "deep key"])
def test_a_crafted_pickle_does_not_bring_the_process_down(tmp_path: Path, label: bytes):
    files = python_files()
    files["test_batch"] = with_labels(b"K\x00" * 5 + label)
    folder = as_folder(files, tmp_path / "cifar")
    code = "import sys; from training.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["train", f"--data={folder}", f"--runs-dir={tmp_path}", f"--cache-dir={tmp_path}"]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "test_batch in " in ended.stderr


@pytest.mark.parametrize("pack", [as_folder, as_archive])
def test_a_file_too_large_to_be_one_of_cifar_is_refused(
    tmp_path: Path, pack: Callable[[Files, Path], Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cifar, "FILE_LIMIT_BYTES", 1000)
    with pytest.raises(DataError, match=r"data_batch_1 in .* has 18,.* bytes, more than the 1,000 that"):
        read_listing(pack(python_files(), tmp_path / "cifar"))


def checksum_wrong(data: bytes) -> bytes:
    return data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]


def cut_before_the_checksum(data: bytes) -> bytes:
    return data[:-8]


def one_bit_flipped(data: bytes) -> bytes:
    """Flip a bit of stored, uncompressed pixels: nothing but the checksum can tell."""
    plain = gzip.decompress(data)
    stored = gzip.compress(plain, compresslevel=0)
    pixels = rows(1)[0].tobytes()[:50]
    at = stored.index(pixels)
    return stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :]


def scrambled(data: bytes) -> bytes:
    return data[:5000] + bytes(1000) + data[6000:]


@pytest.mark.parametrize("damage", [checksum_wrong, cut_before_the_checksum, one_bit_flipped, scrambled])
def test_damage_to_a_compressed_archive_is_noticed(tmp_path: Path, damage: Callable[[bytes], bytes]):
    path = as_archive(python_files(), tmp_path / "cifar")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="is damaged or no tar archive"):
        read_listing(path)


def test_an_xz_archive_with_a_damaged_end_is_refused(tmp_path: Path):
    path = tmp_path / "cifar.tar.gz"
    with tarfile.open(path, "w:xz") as archive:
        for name, data in python_files().items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    path.write_bytes(path.read_bytes()[:-12] + bytes(12))
    with pytest.raises(DataError, match="is damaged or no tar archive"):
        read_listing(path)
