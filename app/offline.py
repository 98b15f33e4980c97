"""Answers on the command line, without a server: the same bundle checks, decoder and session as the service."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from app.cpus import usable_cpus
from app.errors import BadRequestError, ConvoyError, UnknownModelError
from app.golden import prove
from app.images import decode, forbid_pillow_guesses
from app.loading import check_graph
from app.manifest import Bundle, read_bundle, verify_files
from app.scores import Score, top_k
from app.sessions import ClassifierSession, place
from app.settings import Settings
from app.tensorrt import Engines
from app.versions import Shelf, default_of, find_models

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says of one file: its best classes, or one sentence why it could not be read."""

    path: Path
    top: Sequence[Score]
    error: str = ""


class Classifier:
    """One bundle, proved and ready to classify files."""

    def __init__(self, settings: Settings, name: str | None) -> None:
        """Load the model `name` (None: the default one) from the settings' models directory.

        Raises:
            SettingsError: the models directory is missing or empty.
            UnknownModelError: there is no such model.
            BundleError: the bundle is damaged or does not reproduce its golden answers.
        """
        forbid_pillow_guesses()
        self.bundle = find_bundle(settings, name)
        verify_files(self.bundle)
        self._threads = settings.sessions or usable_cpus()
        rows = max(settings.max_batch, len(self.bundle.manifest.golden.images))
        engines = Engines(rows, settings.tensorrt_cache, settings.tensorrt_fp16)
        device = place(settings.device, settings.plugin, settings.plugin_hardware, settings.plugin_options)
        self._session = ClassifierSession(self.bundle.model_path, device, settings.threads_per_session, engines)
        check_graph(self.bundle, self._session)
        prove(self.bundle, self._session.classify)
        self._max_pixels = settings.max_image_pixels

    def classify(self, paths: Iterable[Path], k: int) -> Iterator[Answer]:
        """Yield the answer for each file, in order, computed on all usable processors."""
        with ThreadPoolExecutor(self._threads) as pool:
            yield from pool.map(lambda path: self._classify_one(path, k), paths)

    def _classify_one(self, path: Path, k: int) -> Answer:
        manifest = self.bundle.manifest
        try:
            pixels = decode(path.read_bytes(), manifest.pixels, self._max_pixels)
        except ConvoyError as error:
            return Answer(path, (), error.message)
        except OSError as error:
            return Answer(path, (), f"The file cannot be read: {error.strerror}.")
        return Answer(path, top_k(self._session.classify(pixels[None])[0], manifest.labels, k))


def find_bundle(settings: Settings, name: str | None) -> Bundle:
    """Return the bundle of model `name` (None or empty: the default one) in the settings' models directory.

    Raises:
        SettingsError: the models directory is missing or empty.
        UnknownModelError: there is no such model.
        BundleError: its manifest cannot be read.
    """
    entries = {entry.name: entry for entry in find_models(Shelf(settings.models, settings.model_name))}
    name = name or default_of(entries, settings.default_model)
    if not name:
        raise UnknownModelError(f"No model is the default one: give --model, one of {', '.join(entries)}.")
    if name not in entries:
        raise UnknownModelError(f"There is no model '{name}' in {settings.models}; there are: {', '.join(entries)}.")
    return read_bundle(entries[name].directory)


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files among `paths`, and the images in its folders, sorted within each folder.

    Raises:
        BadRequestError: a path does not exist, or a folder holds no image.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not found:
                raise BadRequestError(f"The folder {path} holds no JPEG, PNG or WebP image.")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise BadRequestError(f"There is no file {path}.")
    return files
