"""The repository: which models there are, which version of each is served, and in what state it is.

Reads `<root>/<name>/<version>/`, proves each bundle before it is served, and keeps one broken bundle from touching
the others. Knows nothing of requests.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from app.batcher import Batcher
from app.errors import BundleError, ConvoyError, SettingsError, UnavailableError, UnknownModelError
from app.golden import prove
from app.manifest import NAME_PATTERN, VERSION_PATTERN, Bundle, Manifest, read_bundle, verify_files
from app.metrics import Metrics, ModelMetrics
from app.sessions import OnnxSession, Session

log = logging.getLogger(__name__)

FIRST_CHOICE = "imagenet"
"""The default model where nothing else is said: the one that comes along."""


class State(StrEnum):
    """Where a model is between the disk and its first answer."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoadedModel:
    """A model that has proved itself and takes work."""

    bundle: Bundle
    provider: str
    batcher: Batcher
    metrics: ModelMetrics

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest


@dataclass(slots=True)
class Entry:
    """One model of the repository, as `GET /models` shows it."""

    name: str
    version: str
    directory: Path
    state: State = State.LOADING
    reason: str = ""
    load_s: float = 0.0
    model: LoadedModel | None = None
    shown: tuple[str, ...] = ()


Start = Callable[[Bundle, list[Session], ModelMetrics], Batcher]
Open = Callable[[Bundle], list[Session]]


class Repository:
    """The models under one directory: the highest version of each name."""

    def __init__(self, root: Path, metrics: Metrics, *, default: str, open_sessions: Open, start: Start) -> None:
        """Find the models; `load_all` loads them.

        Args:
            root: directory of bundles.
            metrics: where states and figures are shown.
            default: name of the default model; empty: imagenet, or the only one.
            open_sessions: makes a bundle's sessions.
            start: starts the batcher over sessions that have proved themselves.

        Raises:
            SettingsError: `root` does not exist or holds no model, or `default` is none of them.
        """
        self._metrics = metrics
        self._open_sessions = open_sessions
        self._start = start
        self.entries = {entry.name: entry for entry in find_models(root)}
        self.default = default_of(self.entries, default)
        self._stopping = threading.Event()
        for entry in self.entries.values():
            self._show(entry)

    def load_all(self) -> None:
        """Load every model in turn, the default one first; blocks. A failure is kept in its entry and logged.

        Raises:
            SettingsError: a setting makes every model impossible (a device that is not there).
        """
        for entry in sorted(self.entries.values(), key=lambda entry: entry.name != self.default):
            if self._stopping.is_set():
                return
            self._load(entry)

    def get(self, name: str | None = None) -> LoadedModel:
        """Return a model that takes work; None means the default one.

        Raises:
            UnknownModelError: there is no model of that name.
            UnavailableError: it is loading, or it failed to load.
        """
        name = name or self.default
        if not name:
            raise UnknownModelError(f"No model is the default one: ask for one by name, among {self._known()}.")
        entry = self.entries.get(name)
        if entry is None:
            raise UnknownModelError(f"There is no model '{name[:80]}' here; there are: {self._known()}.")
        if entry.model is not None:
            return entry.model
        if entry.state is State.LOADING:
            raise UnavailableError(f"Model '{entry.name}' is still loading; try again in a moment.", code="loading")
        raise UnavailableError(f"Model '{entry.name}' failed to load: {entry.reason}", code="model_failed")

    def why_not_ready(self, require_all: bool) -> str:
        """Return why the service should get no traffic yet, or an empty string."""
        loading = [entry.name for entry in self.entries.values() if entry.state is State.LOADING]
        if loading:
            return f"Loading: {', '.join(loading)}."
        failed = [entry.name for entry in self.entries.values() if entry.state is State.FAILED]
        if self.default in failed:
            return f"The default model '{self.default}' failed to load."
        if failed and (require_all or len(failed) == len(self.entries)):
            return f"Failed to load: {', '.join(failed)}."
        return ""

    def close(self) -> None:
        """Let every batcher finish what it holds, and stop; blocks."""
        self._stopping.set()
        for entry in self.entries.values():
            if entry.model is not None:
                entry.model.batcher.close()

    def _known(self) -> str:
        return ", ".join(sorted(self.entries))

    def _load(self, entry: Entry) -> None:
        started = time.monotonic()
        try:
            model, difference = self._prove_and_start(entry)
        except SettingsError:
            raise
        except ConvoyError as error:
            self._enter(entry, State.FAILED, reason=error.message)
            log.error("model failed", extra={"model": entry.name, "version": entry.version, "reason": error.message})
            return
        except Exception as error:
            reason = f"{entry.directory} could not be loaded: {type(error).__name__}: {error}"
            self._enter(entry, State.FAILED, reason=reason)
            log.exception("model failed", extra={"model": entry.name, "version": entry.version, "reason": reason})
            return
        entry.load_s = time.monotonic() - started
        self._enter(entry, State.READY, model=model)
        log.info(
            "model ready",
            extra={
                "model": entry.name,
                "version": entry.version,
                "provider": model.provider,
                "digest": model.manifest.model.sha256[:12],
                "golden_difference": difference,
                "seconds": round(entry.load_s, 3),
            },
        )

    def _prove_and_start(self, entry: Entry) -> tuple[LoadedModel, float]:
        if not entry.version:
            raise BundleError(
                f"{entry.directory} holds no version that can be read: a bundle lies in {entry.directory / '1'}."
            )
        bundle = read_bundle(entry.directory)
        manifest = bundle.manifest
        if (manifest.name, manifest.version) != (entry.name, entry.version):
            raise BundleError(f"{entry.directory} holds the manifest of {manifest.name} version {manifest.version}.")
        verify_files(bundle)
        sessions = self._open_sessions(bundle)
        difference = max(prove(bundle, session.run) for session in sessions)
        metrics = self._metrics.for_model(entry.name, entry.version)
        batcher = self._start(bundle, sessions, metrics)
        return LoadedModel(bundle, sessions[0].provider, batcher, metrics), difference

    def _enter(self, entry: Entry, state: State, *, reason: str = "", model: LoadedModel | None = None) -> None:
        # The model first: whoever sees READY finds it there.
        entry.model, entry.reason, entry.state = model, reason, state
        self._show(entry)

    def _show(self, entry: Entry) -> None:
        """Leave just one `convoy_model_info` series for the entry: that of its present state."""
        info = self._metrics.model_info
        if entry.shown:
            info.remove(*entry.shown)
        digest = entry.model.manifest.model.sha256 if entry.model else ""
        provider = entry.model.provider if entry.model else ""
        entry.shown = (entry.name, entry.version, digest, provider, entry.state.value)
        info.labels(*entry.shown).set(1)


def find_models(root: Path) -> list[Entry]:
    """Return one entry for each model under `root`, in its highest version; hidden names and files are passed over.

    A folder without a version in it is an entry too, with an empty version: it is somebody's mistake, to be told.

    Raises:
        SettingsError: `root` is no directory, or holds no folder.
    """
    if not root.is_dir():
        raise SettingsError(f"The models directory {root} does not exist: set --models or CONVOY_MODELS.")
    entries = []
    for directory in sorted(root.iterdir()):
        if not directory.is_dir() or directory.name.startswith("."):
            continue
        if re.fullmatch(NAME_PATTERN, directory.name):
            version = _highest_version(directory)
            entries.append(Entry(directory.name, version, directory / version))
        else:
            log.warning("folder passed over: not a model's name", extra={"folder": ascii(str(directory))})
    if not entries:
        raise SettingsError(f"The models directory {root} holds no bundle (<name>/<version>/model.json).")
    return entries


def _highest_version(directory: Path) -> str:
    """Return the highest version in a model's folder; empty where there is none, or it cannot be read."""
    try:
        versions = [path.name for path in directory.iterdir() if path.is_dir()]
    except OSError:
        return ""
    return max((name for name in versions if re.fullmatch(VERSION_PATTERN, name)), key=int, default="")


def default_of(names: Collection[str], wanted: str) -> str:
    """Return the default model's name: the wanted one; without a wish imagenet, or the only one, or none (empty).

    Raises:
        SettingsError: the wanted one is not there.
    """
    if wanted and wanted not in names:
        raise SettingsError(f"There is no model '{wanted}' to be the default; there are: {', '.join(sorted(names))}.")
    if wanted or len(names) == 1:
        return wanted or next(iter(names))
    return FIRST_CHOICE if FIRST_CHOICE in names else ""


def check_graph(bundle: Bundle, session: OnnxSession) -> None:
    """Check that a graph takes what the manifest's recipe gives and returns one number per label.

    Raises:
        BundleError: a fixed dimension differs.
    """
    pixels, labels = bundle.manifest.pixels, bundle.manifest.labels
    if len(session.input_shape) != 4 or session.input_shape[1:] != [pixels.height, pixels.width, 3]:
        raise BundleError(
            f"{bundle.model_path} takes images of shape {session.input_shape}, but the manifest's recipe makes "
            f"[N, {pixels.height}, {pixels.width}, 3]."
        )
    if len(session.output_shape) != 2 or session.output_shape[1] != len(labels):
        raise BundleError(
            f"{bundle.directory}: the manifest lists {len(labels)} labels, but the graph gives "
            f"{session.output_shape[-1]} classes."
        )


def warm_up(bundle: Bundle, session: Session, max_batch: int) -> None:
    """Run the batches that a session should have seen, so that no request pays for a first run.

    A GPU picks its kernels for each size: every power of two up to `max_batch`, and that. On CPU what counts is the
    memory of the largest: afterwards no size's first run costs more than its second (measured), and a replaced worker
    is back 0.2 s sooner with EfficientNet-Lite0.
    """
    pixels = bundle.manifest.pixels
    sizes = {max_batch}
    if session.provider != "cpu":
        sizes |= {1 << power for power in range(max_batch.bit_length())}
    for rows in sorted(sizes):
        session.run(np.zeros((rows, pixels.height, pixels.width, 3), np.uint8))
