"""Versions: what a models directory holds, and which of it is wanted.

    models/<name>/versions.toml     which versions are served, which one to whoever names none, and aliases; optional
    models/<name>/<version>/        a version: a whole number from 1, without leading zeros

Or it is itself one model's folder, with versions in it, or one version, where whoever mounts it says the model's name.
Reads names, sizes, dates, digests and `versions.toml`; opens no model, and knows nothing of what is loaded.
"""

import logging
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.errors import BundleError, SettingsError
from app.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    NAME_PATTERN,
    VERSION_PATTERN,
    Bundle,
    TensorManifest,
    Version,
    read_manifest,
    verify_files,
    verify_tensor_files,
)

log = logging.getLogger(__name__)

POLICY_FILE = "versions.toml"
ALIAS_PATTERN = r"[a-z][a-z0-9_-]{0,31}"
FIRST_CHOICE = "imagenet"
"""The default model where nothing else is said: the one that comes along."""

Stamp = tuple[tuple[str, int, int, int], ...]
"""Path, size, time and inode of each file of a directory: another one when a file is written, replaced or gone."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which versions of a model are served: the newest few that load, or those listed; neither: all.

    Attributes:
        latest: how many of the newest; 0: not chosen so.
        listed: these.
    """

    latest: int = 0
    listed: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `latest`, `latest:3` or `all`.

        Raises:
            ValueError: it is none of them.
        """
        kind, colon, count = text.partition(":")
        if kind == "all" and not colon:
            return cls()
        if kind == "latest" and (not colon or re.fullmatch(VERSION_PATTERN, count)):
            return cls(latest=int(count or 1))
        raise ValueError(f"{text!r} is not latest, latest:N or all")

    def candidates(self, versions: Iterable[str]) -> list[str]:
        """Return the versions to be tried, newest first; of `latest` all, since one that fails makes room for the next.

        A version that is listed and not there is among them: it is somebody's mistake, to be told.
        """
        chosen = self.listed or versions
        return sorted(chosen, key=int, reverse=True)


THE_LATEST = Selection(latest=1)


class Policy(BaseModel):
    """`versions.toml`: what a model's owner wants of its versions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    serve: str | tuple[Version, ...] = Field(
        default="", description='"latest", "latest:N", "all", or a list of versions; empty: as the service is set.'
    )
    active: Version | None = Field(
        default=None, description="The version for whoever names none; without it the newest that is served."
    )
    aliases: dict[Annotated[str, Field(pattern=f"^{ALIAS_PATTERN}$")], Version] = Field(
        default_factory=dict, description="Names for versions, as in stable = 3."
    )

    @model_validator(mode="after")
    def _can_be_meant(self) -> Self:
        if self.serve == ():
            raise ValueError("serve lists no version")
        if isinstance(self.serve, str) and self.serve:
            Selection.parse(self.serve)
        return self

    def selection(self, otherwise: Selection) -> Selection:
        """Return which versions are served; `otherwise`: where nothing is said."""
        if isinstance(self.serve, tuple):
            return Selection(listed=self.serve)
        return Selection.parse(self.serve) if self.serve else otherwise

    @property
    def pinned(self) -> list[str]:
        """Versions that are named, and so are served whatever `serve` says."""
        return [version for version in (self.active, *self.aliases.values()) if version is not None]


@dataclass(frozen=True, slots=True)
class Folder:
    """A model's folder.

    Attributes:
        name: the model's.
        path: where it is.
        versions: those in it, oldest first.
        policy: what its owner wants of them.
        fault: why the policy cannot be read, in one sentence; else empty.
        is_version: the folder is itself its only version, and not one that versions lie in.
    """

    name: str
    path: Path
    versions: tuple[str, ...]
    policy: Policy
    fault: str = ""
    is_version: bool = False

    @property
    def version(self) -> str:
        """The version for whoever names none, if it loads; empty: there is none."""
        return self.policy.active or (self.versions[-1] if self.versions else "")

    @property
    def directory(self) -> Path:
        """Where that version is."""
        return self.directory_of(self.version)

    def directory_of(self, version: str) -> Path:
        """Return where a version is, or would be."""
        return self.path if self.is_version else self.path / version


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where models are looked for.

    Attributes:
        root: the models directory.
        only: the name of the one model that the directory itself is; empty: it holds a folder for each model.
    """

    root: Path
    only: str = ""
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Names of the folders that it was said of that they are no models': it is looked at again and again."""

    def names(self) -> list[str]:
        """Return the names of all models; of each folder that cannot be one, that is said once.

        Raises:
            OSError: the directory cannot be read.
        """
        if self.only:
            return [self.only]
        found = sorted(path.name for path in self.root.iterdir() if not path.name.startswith(".") and path.is_dir())
        names = [name for name in found if re.fullmatch(NAME_PATTERN, name)]
        others = set(found).difference(names)
        for name in sorted(others - self._told):
            log.warning("folder passed over: not a model's name", extra={"folder": ascii(str(self.root / name))})
        self._told.intersection_update(others)  # one that has gone, and comes back, is news
        self._told.update(others)
        return names

    def path_of(self, name: str) -> Path:
        """Return where a model's folder is, or would be."""
        return self.root if self.only == name else self.root / name

    def read(self, name: str) -> Folder:
        """Read a model's folder; what cannot be read is its fault."""
        return read_folder(self.path_of(name), self.only)

    def folders(self) -> list[Folder]:
        """Return all folders, as many as there are.

        Raises:
            OSError: the directory cannot be read.
        """
        return [self.read(name) for name in self.names()]


def find_models(shelf: Shelf) -> list[Folder]:
    """Return the models' folders, of which there must be one; hidden names and files are passed over.

    A folder without a version in it is one too: it is somebody's mistake, to be told.

    Raises:
        SettingsError: the models directory is none, or holds no folder.
    """
    if not shelf.root.is_dir():
        raise SettingsError(f"The models directory {shelf.root} does not exist: set --models or CONVOY_MODELS.")
    folders = shelf.folders()
    if not folders:
        raise SettingsError(f"The models directory {shelf.root} holds no bundle (<name>/<version>/model.json).")
    return folders


def read_folder(path: Path, named: str = "") -> Folder:
    """Read a model's folder; what cannot be read is its fault.

    Args:
        path: where it is.
        named: the model's name where the folder does not bear it, and may be a version itself; empty: its own.
    """
    versions = _versions_in(path)
    if named and not versions and _is_version(path):
        return Folder(named, path, (_number_of(path),), Policy(), is_version=True)
    try:
        return Folder(named or path.name, path, versions, _read_policy(path / POLICY_FILE))
    except BundleError as error:
        return Folder(named or path.name, path, versions, Policy(), error.message)


def _is_version(path: Path) -> bool:
    return any((path / file).exists() for file in (MANIFEST_FILE, MODEL_FILE))


def _number_of(path: Path) -> str:
    """Return the version that a manifest says it is; 1 where there is none, or none that can be read."""
    try:
        return read_manifest(path).version
    except BundleError:
        return "1"


def _versions_in(path: Path) -> tuple[str, ...]:
    """Return the versions in a model's folder, oldest first; none where it cannot be read."""
    try:
        names = [found.name for found in path.iterdir() if found.is_dir()]
    except OSError:
        return ()
    return tuple(sorted((name for name in names if re.fullmatch(VERSION_PATTERN, name)), key=int))


def _read_policy(path: Path) -> Policy:
    try:
        return Policy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Policy()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"] if part not in ("str", "tuple[constrained-str, ...]"))
        reason = problem["msg"].removeprefix("Value error, ")
        raise BundleError(f"{path}: {f'{field}: ' if field else ''}{reason[:1].lower()}{reason[1:]}.") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise BundleError(f"{path} is not TOML: {error}.") from error


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


def stamp_of(directory: Path) -> Stamp:
    """Return the stamp of a version's directory; hidden files are passed over."""
    found = []
    for path, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            file = Path(path, name)
            where = str(file.relative_to(directory))
            try:
                status = file.stat()
            except OSError:  # gone again, or a link to nowhere: a state of its own
                found.append((where, -1, 0, 0))
                continue
            found.append((where, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(sorted(found))


def is_whole(directory: Path) -> bool:
    """Tell whether a version's manifest is there, and every file that it names with the digest that it says."""
    try:
        manifest = read_manifest(directory)
        if isinstance(manifest, TensorManifest):
            verify_tensor_files(directory, manifest)
        else:
            verify_files(Bundle(directory, manifest))
    except (BundleError, OSError):
        return False
    return True


class Watcher:
    """Tells which models' folders have changed, and rest.

    A new version whose digests match is told at once: it was moved there whole, or its last file has come. All else,
    plain graphs too, is told once it has looked the same twice in a row.
    """

    def __init__(self, shelf: Shelf) -> None:
        """Take what is there now for known."""
        self._shelf = shelf
        self._known = self._before = self._look()

    def changed(self, served: Collection[str] = ()) -> list[str]:
        """Return the names of models that have changed, each change once.

        Args:
            served: models that are there; one whose folder came and went between two looks is told, too.

        Raises:
            OSError: the models directory cannot be read; what is known stays.
        """
        now, before = self._look(), self._before
        self._before = now
        told = [
            name
            for name in now | self._known
            if now.get(name) != self._known.get(name)
            and (now.get(name) == before.get(name) or self._is_done(name, now.get(name, {})))
        ]
        for name in told:
            if name in now:
                self._known[name] = now[name]
            else:
                del self._known[name]
        return [*told, *(name for name in served if name not in now and name not in self._known and name not in told)]

    def _look(self) -> dict[str, dict[str, Stamp]]:
        """Return the stamp of each version by its model and number; that of `versions.toml` is under its own name."""
        return {name: self._look_into(self._shelf.read(name)) for name in self._shelf.names()}

    def _look_into(self, folder: Folder) -> dict[str, Stamp]:
        stamps = {version: stamp_of(folder.directory_of(version)) for version in folder.versions}
        try:
            status = (folder.path / POLICY_FILE).stat()
        except OSError:
            return stamps
        return stamps | {POLICY_FILE: ((POLICY_FILE, status.st_size, status.st_mtime_ns, status.st_ino),)}

    def _is_done(self, name: str, now: Mapping[str, Stamp]) -> bool:
        """Tell whether all that is new is whole; what has gone may be going still."""
        known = self._known.get(name, {})
        if known.keys() - now.keys():
            return False
        changed = [version for version, stamp in now.items() if stamp != known.get(version)]
        folder = self._shelf.read(name)
        return POLICY_FILE not in changed and all(is_whole(folder.directory_of(version)) for version in changed)
