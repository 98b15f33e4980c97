"""The bundle: what training and serving promise each other.

A bundle is a directory `<name>/<version>/` with `model.onnx`, `model.json` (the manifest, whose fields this module
defines) and `golden/` (encoded images and the probabilities they must give). This room reads, checks and writes
bundles; it never runs a model and never sees a request.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue, ValidationError, model_validator

from app.errors import BundleError
from app.tensors import Array
from app.trust import Calibration, Conformal, OutOfDistribution, Record, Reference

MANIFEST_FILE = "model.json"
MODEL_FILE = "model.onnx"
GOLDEN_DIRECTORY = "golden"
PROBABILITIES_FILE = "golden/probabilities.npy"
DATA_CARD_FILE = "data.json"
TENSORS_FILE = "golden/tensors.npz"

INPUT_NAME = "image"
"""Graph input: uint8 `[N, height, width, 3]`, RGB, 0–255."""
OUTPUT_NAME = "probabilities"
"""Graph output: float32 `[N, classes]`, each row sums to 1."""
ENERGY_NAME = "energy"
"""A second graph output, which a bundle may lack: float32 `[N]`, nats, high for images unlike all classes."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
VERSION_PATTERN = r"[1-9][0-9]{0,8}"
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
Version = Annotated[str, Field(pattern=f"^{VERSION_PATTERN}$")]
RelativeFile = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$")]


class PixelRecipe(Record):
    """How an encoded image becomes the uint8 `[height, width, 3]` array that the graph takes.

    The short side is resized to `resize_short_side`, then the centre `height` × `width` is cropped. Everything after
    that (scaling, mean and deviation, layout) is in the graph. `app/images.py` is the one implementation.
    """

    height: int = Field(ge=1, le=4096, description="Rows of the graph's input, pixels.")
    width: int = Field(ge=1, le=4096, description="Columns of the graph's input, pixels.")
    resize_short_side: int = Field(ge=1, le=8192, description="Short side after the resize, pixels.")
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    colour: Literal["RGB"] = "RGB"
    exif: Literal["apply", "ignore"] = Field(
        default="apply", description="Whether the camera's orientation tag turns the picture upright."
    )
    min_decode_ratio: float = Field(
        default=2.0,
        ge=0,
        description="A JPEG may be decoded at 1/2, 1/4 or 1/8 scale while its short side stays at least this many "
        "times resize_short_side; 0 always decodes in full.",
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.resize_short_side < max(self.height, self.width):
            raise ValueError(
                f"resize_short_side {self.resize_short_side} is smaller than the {self.height}×{self.width} crop"
            )
        return self


class ModelFile(Record):
    """The ONNX file and the digest that identifies it."""

    file: RelativeFile = MODEL_FILE
    sha256: Sha256
    size_bytes: int = Field(ge=1)
    opset: int = Field(ge=1)


class GoldenImage(Record):
    """One encoded image that the model must still classify as `label`."""

    file: RelativeFile
    sha256: Sha256
    label: str


class GoldenSet(Record):
    """Images and the probabilities that they must give, float32 `[images, classes]`, within `tolerance`."""

    images: tuple[GoldenImage, ...] = Field(min_length=1)
    probabilities: RelativeFile = PROBABILITIES_FILE
    probabilities_sha256: Sha256
    tolerance: float = Field(gt=0, le=0.1, description="Largest allowed absolute difference of a probability.")


class DataCardFile(Record):
    """The data card: what the model was trained on. Training writes and reads it; here it is a file with a digest."""

    file: RelativeFile = DATA_CARD_FILE
    sha256: Sha256


class Provenance(Record):
    """Where the weights come from and under which terms they may be used."""

    source: str
    licence: str
    command: str = Field(description="The command that wrote this bundle.")
    created: str = Field(description="UTC date, ISO 8601.")


class Parent(Record):
    """The model that this one was compressed from."""

    name: Name
    version: Version | None = Field(description="None: a run that was pruned, not a bundle.")
    sha256: Sha256 = Field(description="Of its ONNX file, or of the run's checkpoint.")
    method: Literal["int8", "fp16", "prune", "distil"]
    details: dict[str, JsonValue] = Field(default_factory=dict, description="What was done, for people.")


class Manifest(Record):
    """`model.json`: everything about a model that is not in its graph."""

    schema_version: Literal[1] = 1
    name: Name
    version: Version
    description: str
    pixels: PixelRecipe
    labels: tuple[str, ...] = Field(min_length=2)
    model: ModelFile
    golden: GoldenSet
    data_card: DataCardFile | None = None
    training: dict[str, JsonValue] = Field(default_factory=dict, description="Recipe and history, for people.")
    evaluation: dict[str, JsonValue] = Field(default_factory=dict, description="Figures, and on what measured.")
    calibration: Calibration | None = None
    conformal: Conformal | None = None
    ood: OutOfDistribution | None = None
    reference: Reference | None = None
    parent: Parent | None = None
    provenance: Provenance

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if any(not label.strip() for label in self.labels):
            raise ValueError("a label is empty")
        if len(set(self.labels)) != len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise ValueError(f"the label '{twice}' stands twice")
        return self

    @model_validator(mode="after")
    def _reference_knows_the_labels(self) -> Self:
        if self.reference is not None and len(self.reference.predicted) != len(self.labels):
            raise ValueError(
                f"the reference counts {len(self.reference.predicted)} predicted labels, but there are "
                f"{len(self.labels)}"
            )
        return self


class TensorGolden(Record):
    """Inputs and the outputs they must give: arrays of one NumPy archive, `in.<input>` and `out.<output>`."""

    file: RelativeFile = TENSORS_FILE
    sha256: Sha256
    tolerance: float = Field(gt=0, description="Largest allowed absolute difference of a number.")


class TensorManifest(Record):
    """`model.json` of a model that takes tensors, not images: any ONNX graph. The graph itself says its shapes."""

    schema_version: Literal[1] = 1
    kind: Literal["tensors"]
    name: Name
    version: Version
    description: str = ""
    model: ModelFile
    batching: Literal["auto", "never"] = Field(
        default="auto", description="never: requests always run alone; auto: they share runs where that is proved."
    )
    labels: tuple[str, ...] = Field(
        default=(), description="Names of the classes along the last dimension of an output, if it has any."
    )
    golden: TensorGolden | None = None
    evaluation: dict[str, JsonValue] = Field(default_factory=dict, description="Figures, and on what measured.")
    provenance: Provenance | None = None


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle directory whose manifest has been read; its files are checked by `verify_files`."""

    directory: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self.directory / self.manifest.model.file

    def golden_bytes(self) -> list[bytes]:
        """Return the golden images, encoded, in manifest order."""
        return [(self.directory / image.file).read_bytes() for image in self.manifest.golden.images]

    def data_card_bytes(self) -> bytes | None:
        """Return the data card's file; None where the bundle has none."""
        card = self.manifest.data_card
        return None if card is None else (self.directory / card.file).read_bytes()

    def golden_probabilities(self) -> NDArray[np.float32]:
        """Return the expected probabilities, float32 `[images, classes]`.

        Raises:
            BundleError: the array's shape or dtype does not fit the manifest.
        """
        path = self.directory / self.manifest.golden.probabilities
        try:
            expected: NDArray[np.float32] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BundleError(f"{path} is not a readable NumPy file: {error}.") from error
        shape = (len(self.manifest.golden.images), len(self.manifest.labels))
        if expected.shape != shape or expected.dtype != np.float32:
            raise BundleError(
                f"{path} holds {expected.dtype}{list(expected.shape)}, but the manifest's images and labels "
                f"need float32{list(shape)}."
            )
        return expected


def read_bundle(directory: Path) -> Bundle:
    """Read the manifest of an image classifier's bundle, without touching its other files.

    Raises:
        BundleError: the manifest is missing, not JSON, breaks a rule, or is of a model of tensors; the sentence names
            file and field.
    """
    manifest = read_manifest(directory)
    if isinstance(manifest, TensorManifest):
        raise BundleError(f"{directory / MANIFEST_FILE} is of a model of tensors, not of an image classifier.")
    return Bundle(directory, manifest)


def read_manifest(directory: Path) -> Manifest | TensorManifest:
    """Read what a version's directory says of itself.

    Raises:
        BundleError: the manifest is missing, not JSON, or breaks a rule; the sentence names file and field.
    """
    path = directory / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(f"{path} is missing, so {directory} is not a bundle.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}.") from error
    kind: type[Manifest] | type[TensorManifest] = TensorManifest if _says_tensors(text) else Manifest
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise BundleError(f"{path}: {_first_problem(error)}.") from error


def _says_tensors(text: str) -> bool:
    try:
        content = json.loads(text)
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("kind") == "tensors"


def verify_files(bundle: Bundle) -> None:
    """Check that every file which the manifest names is there, whole and unaltered.

    Raises:
        BundleError: a file is missing or its SHA-256 differs; the sentence names it.
    """
    manifest = bundle.manifest
    expected = {manifest.model.file: manifest.model.sha256}
    expected |= {image.file: image.sha256 for image in manifest.golden.images}
    expected[manifest.golden.probabilities] = manifest.golden.probabilities_sha256
    if manifest.data_card is not None:
        expected[manifest.data_card.file] = manifest.data_card.sha256
    _verify(bundle.directory, expected)
    unknown = {image.label for image in manifest.golden.images} - set(manifest.labels)
    if unknown:
        raise BundleError(
            f"{bundle.directory / MANIFEST_FILE}: the golden label '{min(unknown)}' is not among the labels."
        )


def verify_tensor_files(directory: Path, manifest: TensorManifest) -> None:
    """Check that the files of a model of tensors are there, whole and unaltered.

    Raises:
        BundleError: a file is missing or its SHA-256 differs; the sentence names it.
    """
    expected = {manifest.model.file: manifest.model.sha256}
    if manifest.golden is not None:
        expected[manifest.golden.file] = manifest.golden.sha256
    _verify(directory, expected)


def _verify(directory: Path, expected: Mapping[str, str]) -> None:
    for file, digest in expected.items():
        path = directory / file
        if not path.is_file():
            raise BundleError(f"{path} is missing.")
        found = sha256_of(path)
        if found != digest:
            raise BundleError(
                f"{path} is not the file that was exported: its SHA-256 starts {found[:12]}, "
                f"the manifest says {digest[:12]}."
            )


def write_tensor_manifest(
    directory: Path, fields: Mapping[str, Any], golden: Mapping[str, Array] | None = None
) -> None:
    """Write the manifest, and the golden tensors, beside a graph that lies in `directory` as `model.onnx`.

    Args:
        directory: `<name>/<version>/`.
        fields: the manifest's, except `kind`, `model` and `golden`, plus `opset` and, with a golden set, `tolerance`.
        golden: `in.<input>` and `out.<output>` → array: what goes in, and what must come out.

    Raises:
        BundleError: the fields do not make a valid manifest.
    """
    record = {**fields, "kind": "tensors"}
    record["model"] = {
        "sha256": sha256_of(directory / MODEL_FILE),
        "size_bytes": (directory / MODEL_FILE).stat().st_size,
        "opset": record.pop("opset"),
    }
    if golden is not None:
        (directory / GOLDEN_DIRECTORY).mkdir(exist_ok=True)
        arrays: dict[str, Any] = dict(golden)
        np.savez(directory / TENSORS_FILE, **arrays)
        record["golden"] = {"sha256": sha256_of(directory / TENSORS_FILE), "tolerance": record.pop("tolerance")}
    try:
        manifest = TensorManifest.model_validate(record)
    except ValidationError as error:
        raise BundleError(f"The model has no valid manifest: {_first_problem(error)}.") from error
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def write_bundle(
    target: Path,
    manifest: Mapping[str, Any],
    model: Path,
    golden: Mapping[str, bytes],
    probabilities: NDArray[np.float32],
    check: Callable[[Bundle], object] | None = None,
    data_card: bytes | None = None,
) -> Bundle:
    """Write a bundle in one step: it is complete and checked at `target`, or nothing there has changed.

    Args:
        target: the directory `<name>/<version>` to create; an earlier bundle there is replaced.
        manifest: the manifest's fields except `model` and `golden`, plus `opset`, `tolerance` and `golden_labels`
            (the expected label of each golden image, in order).
        model: the ONNX file, copied into the bundle.
        golden: file name → encoded image, in the order of `probabilities`.
        probabilities: float32 `[images, classes]`, what the golden images must give.
        check: called with the complete bundle before it takes its place; what it raises keeps the bundle out.
        data_card: what the model was trained on, the bytes of `data.json`.

    Raises:
        BundleError: the fields do not make a valid manifest, or name a file that is not given.
    """
    with _scratch_beside(target) as scratch:
        fields = dict(manifest)
        if data_card is not None:
            fields["data_card"] = _write_card(scratch, data_card)
        record = _fill(scratch, fields, model, golden, probabilities)
        verify_files(Bundle(scratch, record))
        if check is not None:
            check(Bundle(scratch, record))
        _replace_directory(scratch, target)
    return Bundle(target, record)


def add_data_card(bundle: Bundle, data_card: bytes) -> Bundle:
    """Give a bundle a data card, or another one, in one step; its other files stay byte for byte.

    Raises:
        BundleError: a file of the bundle is not the one that was exported.
    """
    verify_files(bundle)
    with _scratch_beside(bundle.directory) as scratch:
        shutil.copytree(bundle.directory, scratch, dirs_exist_ok=True)
        record = bundle.manifest.model_copy(update={"data_card": _write_card(scratch, data_card)})
        _write_manifest(scratch, record)
        _replace_directory(scratch, bundle.directory)
    return Bundle(bundle.directory, record)


def _write_card(directory: Path, data_card: bytes) -> DataCardFile:
    (directory / DATA_CARD_FILE).write_bytes(data_card)
    return DataCardFile(sha256=hashlib.sha256(data_card).hexdigest())


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """Make a hidden directory next to `target`, to be moved into its place; on failure nothing is left behind."""
    is_new_name = not target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_new_name and not target.exists():
            target.parent.rmdir()


def _fill(
    directory: Path,
    fields: dict[str, Any],
    model: Path,
    golden: Mapping[str, bytes],
    probabilities: NDArray[np.float32],
) -> Manifest:
    """Write a bundle's files into an empty directory, and last the manifest with their digests."""
    (directory / GOLDEN_DIRECTORY).mkdir()
    shutil.copyfile(model, directory / MODEL_FILE)
    np.save(directory / PROBABILITIES_FILE, probabilities.astype(np.float32, copy=False))
    images = []
    for (name, data), label in zip(golden.items(), fields.pop("golden_labels"), strict=True):
        file = f"{GOLDEN_DIRECTORY}/{name}"
        (directory / file).write_bytes(data)
        images.append({"file": file, "sha256": hashlib.sha256(data).hexdigest(), "label": label})
    fields["model"] = {
        "sha256": sha256_of(directory / MODEL_FILE),
        "size_bytes": (directory / MODEL_FILE).stat().st_size,
        "opset": fields.pop("opset"),
    }
    fields["golden"] = {
        "images": images,
        "probabilities_sha256": sha256_of(directory / PROBABILITIES_FILE),
        "tolerance": fields.pop("tolerance"),
    }
    try:
        record = Manifest.model_validate(fields)
    except ValidationError as error:
        raise BundleError(f"The bundle has no valid manifest: {_first_problem(error)}.") from error
    _write_manifest(directory, record)
    return record


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Return the file's SHA-256 as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace_directory(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.replace(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.replace(old / "bundle")
    scratch.replace(target)
    shutil.rmtree(old)


def _first_problem(error: ValidationError) -> str:
    """Say the first thing that pydantic found wrong: the field, then the reason, without its own prefixes."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {reason}" if field else reason
