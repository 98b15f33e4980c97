"""The repository: which models there are, which version of each is served, and in what state it is.

Reads `<root>/<name>/<version>/`, proves each bundle before it is served, and keeps one broken bundle from touching
the others. Knows nothing of requests.
"""

import logging
import re
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from app.errors import BundleError, ConvoyError, SettingsError, UnavailableError, UnknownModelError
from app.loading import Load, LoadedModel
from app.manifest import NAME_PATTERN, VERSION_PATTERN
from app.metrics import Metrics

log = logging.getLogger(__name__)

FIRST_CHOICE = "imagenet"
"""The default model where nothing else is said: the one that comes along."""


class State(StrEnum):
    """Where a model is between the disk and its first answer."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


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


class Repository:
    """The models under one directory: the highest version of each name."""

    def __init__(self, root: Path, metrics: Metrics, *, default: str, load: Load) -> None:
        """Find the models; `load_all` loads them.

        Args:
            root: directory of bundles.
            metrics: where states and figures are shown.
            default: name of the default model; empty: imagenet, or the only one.
            load: opens a version.

        Raises:
            SettingsError: `root` does not exist or holds no model, or `default` is none of them.
        """
        self._metrics = metrics
        self._open = load
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

    def get(self, name: str | None = None, version: str | None = None) -> LoadedModel:
        """Return a model that takes work; None means the default one, and the version that is served.

        Raises:
            UnknownModelError: there is no model of that name, or no such version.
            UnavailableError: it is loading, or it failed to load.
        """
        name = name or self.default
        if not name:
            raise UnknownModelError(f"No model is the default one: ask for one by name, among {self._known()}.")
        entry = self.entries.get(name)
        if entry is None:
            raise UnknownModelError(f"There is no model '{name[:80]}' here; there are: {self._known()}.")
        if version is not None and version != entry.version:
            raise UnknownModelError(f"Model '{entry.name}' has no version '{version[:20]}'; served is {entry.version}.")
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
            model, difference = self._open_version(entry)
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
                "digest": model.digest[:12],
                "golden_difference": difference,
                "seconds": round(entry.load_s, 3),
            },
        )

    def _open_version(self, entry: Entry) -> tuple[LoadedModel, float | None]:
        if not entry.version:
            raise BundleError(
                f"{entry.directory} holds no version that can be read: a bundle lies in {entry.directory / '1'}."
            )
        return self._open(entry.name, entry.version, entry.directory)

    def _enter(self, entry: Entry, state: State, *, reason: str = "", model: LoadedModel | None = None) -> None:
        # The model first: whoever sees READY finds it there.
        entry.model, entry.reason, entry.state = model, reason, state
        self._show(entry)

    def _show(self, entry: Entry) -> None:
        """Leave just one `convoy_model_info` series for the entry: that of its present state."""
        info = self._metrics.model_info
        if entry.shown:
            info.remove(*entry.shown)
        digest = entry.model.digest if entry.model else ""
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
