"""The repository: which models there are, their versions, and which of them answers.

One thread changes it (`operations.py` says when): it compares a model's folder with what is loaded, opens what is
missing beside the running service, switches in one step, and lets the old versions finish what they hold. A version
that fails changes nothing. Everybody else only looks things up. Knows nothing of requests, nor of other processes.
"""

import ctypes
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from app.board import NO_WISH, Board, Standing, Wish
from app.errors import BundleError, ConvoyError, SettingsError, UnavailableError, UnknownModelError
from app.gone import Gone
from app.loading import Load, LoadedModel
from app.metrics import Metrics
from app.runs import Runs
from app.versions import THE_LATEST, Folder, Selection, Shelf, Stamp, stamp_of

log = logging.getLogger(__name__)

RETIRING_STEP_S, GARBAGE_S = 0.02, 5.0


class State(StrEnum):
    """Where a version is between the disk and its last answer."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    UNLOADING = "unloading"
    UNLOADED = "unloaded"


@dataclass(slots=True)
class Version:
    """One version of a model.

    Attributes:
        name, version, directory: whose, which, and where it is.
        state: where it is; READY whenever it answers.
        reason: why it failed, or why what has changed in its directory is not served.
        load_s: how long its loading took, seconds.
        model: what answers; None: nothing does.
    """

    name: str
    version: str
    directory: Path
    state: State = State.UNLOADED
    reason: str = ""
    load_s: float = 0.0
    model: LoadedModel | None = None
    stamp: Stamp = ()
    shown: tuple[str, ...] = ()


@dataclass(slots=True)
class Entry:
    """One model; state, reason and model are those of its active version.

    Attributes:
        name, path: whose, and where its folder is.
        versions: all that are loaded or lie in the folder, by number, newest first. Replaced, never changed.
        active: the version for whoever names none; empty: there is none.
        aliases: names for versions, and which they mean now.
        fault: what is wrong with the folder as a whole, or with a version that should be served and is not.
        off: it was unloaded as a whole.
        changing: its versions are being opened.
    """

    name: str
    path: Path
    versions: Mapping[str, Version] = field(default_factory=dict)
    active: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    off: bool = False
    changing: bool = False

    @property
    def version(self) -> str:
        """The active version."""
        return self.active

    @property
    def state(self) -> State:
        """The active version's; without one UNLOADED where that was asked for, else FAILED.

        LOADING while nothing answers and something is being opened: where one version fails, the next is tried.
        """
        if self.changing and self.model is None:
            return State.LOADING
        if self.active in self.versions:
            return self.versions[self.active].state
        return State.UNLOADED if self.off else State.FAILED

    @property
    def reason(self) -> str:
        """Why it is in that state, or what else is wrong with it; empty: all is well."""
        own = self.versions[self.active].reason if self.active in self.versions else ""
        return own or self.fault

    @property
    def model(self) -> LoadedModel | None:
        """What answers whoever names no version."""
        return self.versions[self.active].model if self.active in self.versions else None


class _Change:
    """One comparison of a model's folder with what is loaded, on its way to the switch."""

    def __init__(self, entry: Entry, folder: Folder, wish: Wish, refused: Mapping[str, str], starting: bool) -> None:
        self.folder, self.wish, self.refused, self.starting = folder, wish, refused, starting
        self.pinned = [] if wish.off else [number for number in folder.policy.pinned if number not in wish.out]
        numbers = {*folder.versions, *self.pinned, *wish.on, *folder.policy.selection(Selection()).listed}
        numbers |= {number for number, version in entry.versions.items() if version.model is not None}
        self.versions = {
            number: entry.versions.get(number) or Version(entry.name, number, folder.directory_of(number))
            for number in sorted(numbers, key=int, reverse=True)
        }
        self.opened: dict[str, tuple[LoadedModel, Stamp, float]] = {}
        """What was loaded for the switch, when its directory looked how, in how many seconds."""
        self.faults: dict[str, str] = {}
        self.active = entry.active
        self.aliases = dict(entry.aliases)
        self.kept: set[str] = set()

    def can_serve(self, number: str | None) -> bool:
        """Tell whether a version will be able to answer after the switch."""
        version = self.versions.get(number or "")
        return version is not None and (number in self.opened or version.model is not None)

    def may_stay(self, number: str) -> bool:
        """Tell whether a version can answer after the switch, lies in the folder, and is not to be unloaded."""
        return self.can_serve(number) and number in self.folder.versions and number not in self.wish.out

    def decide(self, served: list[str]) -> None:
        """Decide which version is active, what the aliases mean, and which versions stay.

        Args:
            served: what the policy asks for and can answer, newest first.
        """
        policy, wish = self.folder.policy, self.wish
        extra = sorted((number for number in wish.on if self.may_stay(number)), key=int, reverse=True)
        wanted = None if wish.off or policy.active in wish.out else policy.active
        aliases = {} if wish.off else {alias: to for alias, to in policy.aliases.items() if to not in wish.out}
        for alias, target in aliases.items():
            before = self.aliases.get(alias, "")
            if not self.can_serve(target) and self.may_stay(before):
                aliases[alias] = before
        self.aliases = aliases
        if wanted is not None and (self.can_serve(wanted) or not self.may_stay(self.active)):
            self.active = wanted
        elif wanted is None:
            tried = [number for number in self.faults if number]
            self.active = next(iter([*served, *extra, *tried]), "")
        self.kept = {*served, *extra, *self.pinned, self.active, *aliases.values()}


@dataclass(slots=True)
class _Retirement:
    """A model that gets no new work, and ends with the last request that holds it."""

    name: str
    version: str
    batcher: Runs
    thread: threading.Thread


class Repository:
    """The models under one directory."""

    def __init__(
        self,
        shelf: Shelf,
        metrics: Metrics,
        *,
        folders: list[Folder],
        default: str,
        load: Load,
        selection: Selection = THE_LATEST,
        patience_s: float = 60.0,
        board: Board | None = None,
    ) -> None:
        """Enter the models; `refresh` loads them.

        Args:
            shelf: where they are.
            metrics: where states and figures are shown.
            folders: what is in it.
            default: name of the default model; empty: there is none.
            load: opens a version.
            selection: which versions are served where a model's folder does not say it.
            patience_s: how long a request may hold a version that has been replaced, seconds; then it is closed.
            board: of all workers; None: this one is alone.
        """
        self.shelf = shelf
        self.default = default
        self.entries: Mapping[str, Entry] = {}
        """Every model by its name. Replaced, never changed: whoever looks through it needs no lock."""
        self.started = False
        """Whether every model has been loaded once, or failed."""
        self._metrics = metrics
        self._open = load
        self._selection = selection
        self._patience_s = patience_s
        self._served: dict[tuple[str | None, str | None], LoadedModel] = {}
        self._retiring: list[_Retirement] = []
        self._gone = Gone(metrics, board)
        self._on_retired: Callable[[], None] = lambda: None
        for folder in folders:
            entry = Entry(folder.name, folder.path, active=folder.version)
            entry.versions = {
                version: Version(folder.name, version, folder.directory_of(version), State.LOADING)
                for version in [folder.version]
                if version
            }
            entry.versions = entry.versions or {"": Version(folder.name, "", folder.path, State.LOADING)}
            self.entries = {**self.entries, folder.name: entry}
            for version in entry.versions.values():
                self._show(version)

    def expect(self, standing: Mapping[str, Standing]) -> None:
        """Take over which versions the other workers serve where one that should be is broken; before `refresh`."""
        for name, what in standing.items():
            if name in self.entries:
                self.entries[name].active, self.entries[name].aliases = what.active, what.aliases

    def get(self, name: str | None = None, version: str | None = None) -> LoadedModel:
        """Return a model that takes work.

        Args:
            name: None: the default one.
            version: a number or an alias; None: the active one.

        Raises:
            UnknownModelError: there is no model of that name, or no such version.
            UnavailableError: it is loading, it failed to load, or it was unloaded.
        """
        model = self._served.get((name, version))
        return self._explain(name, version) if model is None else model

    def _explain(self, name: str | None, version: str | None) -> LoadedModel:
        """Return a model that is asked for in an unusual way, or say why there is none."""
        name = name or self.default
        if not name:
            raise UnknownModelError(f"No model is the default one: ask for one by name, among {self._known()}.")
        entry = self.entries.get(name)
        if entry is None:
            raise UnknownModelError(f"There is no model '{name[:80]}' here; there are: {self._known()}.")
        if model := self._served.get((name, version or None)):
            return model
        if version:
            found = entry.versions.get(entry.aliases.get(version, version))
            if found is None or found.state in (State.UNLOADED, State.UNLOADING):
                served = [number for number, other in entry.versions.items() if other.model is not None]
                raise UnknownModelError(
                    f"Model '{name}' has no version '{version[:40]}'; "
                    f"served {'is' if len(served) == 1 else 'are'} {', '.join([*served, *entry.aliases]) or 'none'}."
                )
            raise _unavailable(f"Version {found.version} of model '{name}'", found.state, found.reason)
        raise _unavailable(f"Model '{name}'", entry.state, entry.reason)

    def why_not_ready(self, require_all: bool) -> str:
        """Return why the service should get no traffic yet, or an empty string."""
        entries = self.entries
        loading = [entry.name for entry in entries.values() if entry.state is State.LOADING]
        if loading and not self.started:
            return f"Loading: {', '.join(loading)}."
        default = entries.get(self.default)
        if self.default and (default is None or default.model is None):
            state = State.UNLOADED if default is None else default.state
            what = {State.LOADING: "is loading", State.FAILED: "failed to load"}.get(state, "is unloaded")
            return f"The default model '{self.default}' {what}."
        # Asked for once: the loader may put another in its place at any moment.
        loaded = {entry.name: model for entry in entries.values() if (model := entry.model) is not None}
        down = [name for name, model in loaded.items() if not model.batcher.is_up]
        if self.default in down:
            return f"No engine has the default model '{self.default}' at the moment."
        failed = [entry.name for entry in entries.values() if entry.state is State.FAILED]
        if failed and (require_all or len(failed) == len(entries)):
            return f"Failed to load: {', '.join(failed)}."
        if down and (require_all or len(down) == len(loaded)):
            return f"No engine has these at the moment: {', '.join(down)}."
        return "" if loaded else "No model is loaded."

    @property
    def is_coming(self) -> bool:
        """Whether what is not ready may become so by itself: it is being opened, or waits for an engine."""
        return any(
            entry.state is State.LOADING or ((model := entry.model) is not None and not model.batcher.is_up)
            for entry in self.entries.values()
        )

    def refresh(
        self, name: str, wish: Wish = NO_WISH, refused: Mapping[str, str] | None = None, *, starting: bool = False
    ) -> dict[str, str]:
        """Serve of a model what its folder and the operators want, and nothing else; blocks.

        Args:
            name: the model's.
            wish: what was asked for beyond the folder.
            refused: versions that have failed elsewhere for the same wish, and why: they are not tried.
            starting: nothing is served yet, so a setting that makes it impossible is raised.

        Returns:
            Why, for each version that should be served and is not; under an empty name, what is wrong with the folder.

        Raises:
            SettingsError: `starting`, and a setting makes every model impossible (a device that is not there).
        """
        self._end_retirements(wait=True)  # so that memory never holds more than the old version and the new one
        folder = self.shelf.read(name)
        if name not in self.entries and not folder.path.is_dir():
            return {}
        faults = {"": "It was given up."}
        try:
            faults = self._refresh(folder, wish, refused or {}, starting)
        finally:
            self._metrics.reloaded(name, not faults)
        self._settle()
        return faults

    def _refresh(self, folder: Folder, wish: Wish, refused: Mapping[str, str], starting: bool) -> dict[str, str]:
        name = folder.name
        entry = self.entries.get(name)
        entry = entry or Entry(name, folder.path)
        self.entries = {**self.entries, name: entry}
        if folder.fault and any(version.model is not None for version in entry.versions.values()):
            entry.fault = folder.fault
            log.error("nothing is changed", extra={"model": name, "reason": folder.fault})
            return {"": folder.fault}
        change = _Change(entry, folder, wish, refused, starting)
        for number in entry.versions.keys() - change.versions.keys():
            self._hide(entry.versions[number])
        entry.versions = change.versions
        entry.changing = True
        try:
            self._prepare(change)
            self._switch(entry, change)
        finally:
            entry.changing = False
        return change.faults

    def providers(self) -> set[str]:
        """Return where models run now: `cpu`, `cuda`, `tensorrt`."""
        return {version.model.provider for version in self._versions() if version.model is not None}

    def show_queues(self) -> int:
        """Show each model's sessions and how long the first in its line has waited; returns how many run here."""
        # Those that end first: where a version replaced another of its number, both show the same series.
        batchers = [retirement.batcher for retirement in list(self._retiring)]
        batchers += [version.model.batcher for version in self._versions() if version.model is not None]
        return sum(batcher.show() for batcher in batchers)

    def close(self) -> None:
        """Let every batcher finish what it holds, and stop; blocks."""
        batchers = [version.model.batcher for version in self._versions() if version.model is not None]
        for batcher in [*batchers, *(retirement.batcher for retirement in self._retiring)]:
            batcher.close()

    @property
    def running_since(self) -> float:
        """When the longest run that any session is in began, on the monotonic clock; 0: none runs.

        Sessions of versions that were replaced are not asked: one that is stuck serves nobody any more.
        """
        models = {id(model): model for model in self._served.values()}.values()
        return min(filter(None, (model.batcher.running_since for model in models)), default=0.0)

    def sweep(self) -> None:
        """Forget versions whose last request has ended."""
        self._end_retirements(wait=False)

    def call_when_retired(self, told: Callable[[], None]) -> None:
        """Have `told` called, from another thread, whenever a version's last request has ended."""
        self._on_retired = told

    def _prepare(self, change: _Change) -> None:
        """Open whatever is wanted and is not loaded, and decide what is served then."""
        folder, wish = change.folder, change.wish
        served: list[str] = []
        if folder.fault:
            change.faults[""] = folder.fault
        elif not folder.versions and not wish.off and folder.path.is_dir():
            change.faults[""] = (
                f"{folder.path} holds no version that can be read: a bundle lies in {folder.path / '1'}."
            )
        if "" in change.faults:
            log.error("model failed", extra={"model": folder.name, "reason": change.faults[""]})
            change.decide([])
            return
        if not wish.off:
            selection = folder.policy.selection(self._selection)
            candidates = selection.candidates(folder.versions)
            for number in [number for number in candidates if number not in wish.out]:
                if selection.latest and len(served) == selection.latest:
                    break
                if self._bring(change, number):
                    served.append(number)
        for number in [*change.pinned, *sorted(wish.on.intersection(folder.versions), key=int)]:
            self._bring(change, number)
        if any(not change.can_serve(number) for number in change.pinned):
            for number in {change.active, *change.aliases.values()} & set(folder.versions) - wish.out:
                self._bring(change, number)
        change.decide(served)

    def _bring(self, change: _Change, number: str) -> bool:
        """Have a version ready for the switch; False: it cannot be served."""
        version = change.versions[number]
        if number in change.opened or number in change.faults:
            return change.can_serve(number)
        if version.model is not None and number not in change.folder.versions:
            change.faults[number] = f"{version.directory} is not there any more."
            return False
        stamp = stamp_of(version.directory)
        if version.model is not None and version.stamp == stamp:
            version.reason = ""
            return True
        if version.model is None:
            self._enter(version, State.LOADING)
        started = time.monotonic()
        try:
            if number in change.refused:
                raise BundleError(change.refused[number])
            model, difference = self._open_version(version)
        except Exception as error:
            if isinstance(error, SettingsError) and change.starting:
                raise
            change.faults[number] = self._fail(version, error)
            return change.can_serve(number)
        seconds = time.monotonic() - started
        change.opened[number] = model, stamp, seconds
        log.info(
            "model ready",
            extra={
                "model": version.name,
                "version": number,
                "provider": model.provider,
                "digest": model.digest[:12],
                "golden_difference": difference,
                "seconds": round(seconds, 3),
            },
        )
        return True

    def _open_version(self, version: Version) -> tuple[LoadedModel, float | None]:
        directory = version.directory
        if not directory.is_dir():
            raise BundleError(f"{directory} is not there.")
        if not directory.resolve().is_relative_to(self.shelf.root.resolve()):
            raise BundleError(f"{directory} is a link that leads out of {self.shelf.root}: models lie inside it.")
        return self._open(version.name, version.version, directory)

    def _fail(self, version: Version, error: Exception) -> str:
        """Note why a version could not be loaded; one of that number that is served goes on. Returns the reason."""
        fields = {"model": version.name, "version": version.version}
        if isinstance(error, ConvoyError):
            reason = error.message
            log.error("model failed", extra={**fields, "reason": reason})
        else:
            reason = f"{version.directory} could not be loaded: {type(error).__name__}: {error}"
            log.exception("model failed", extra={**fields, "reason": reason})
        self._enter(version, State.FAILED if version.model is None else version.state, reason)
        return reason

    def _switch(self, entry: Entry, change: _Change) -> None:
        """Have what was prepared answer from now on, all of it at once, and let go of what does not any more."""
        replaced: list[tuple[str, LoadedModel]] = []
        for number, version in change.versions.items():
            if version.model is not None and (number in change.opened or number not in change.kept):
                replaced.append((number, version.model))
                version.model = None
            if number in change.opened:
                version.model, version.stamp, version.load_s = change.opened.pop(number)
                self._metrics.load_seconds.labels(version.name, number).set(version.load_s)
                version.state, version.reason = State.READY, ""
            elif version.model is None and version.state is not State.FAILED:
                version.state = State.UNLOADING if version.state is State.READY else State.UNLOADED
            elif version.state is State.FAILED and number not in change.faults:
                version.state, version.reason = State.UNLOADED, ""
        entry.active, entry.aliases, entry.off = change.active, change.aliases, change.wish.off
        entry.fault = _told(change)
        if "" in change.faults:
            entry.versions = {
                "": Version(entry.name, "", entry.path, State.FAILED, change.faults[""]),
                **entry.versions,
            }
            entry.active = ""
        if not change.folder.path.is_dir():
            self.entries = {name: other for name, other in self.entries.items() if other is not entry}
        self._served = self._look_up_table()
        for version in entry.versions.values():
            self._show(version)
        while replaced:
            self._retire(entry.name, replaced)

    def _look_up_table(self) -> dict[tuple[str | None, str | None], LoadedModel]:
        table: dict[tuple[str | None, str | None], LoadedModel] = {}
        for name, entry in self.entries.items():
            models = {number: version.model for number, version in entry.versions.items() if version.model is not None}
            asked: dict[str | None, str] = {None: entry.active}
            asked.update(entry.aliases)
            asked.update({number: number for number in models})
            table |= {(name, version): models[number] for version, number in asked.items() if number in models}
        if model := table.get((self.default, None)):
            table[None, None] = model
        return table

    def _retire(self, name: str, replaced: list[tuple[str, LoadedModel]]) -> None:
        """Take the last model of a list, which nobody is given any more, and end it with the last who holds it."""
        number, model = replaced.pop()
        thread = threading.Thread(
            target=self._end, args=(weakref.ref(model), model.batcher), name=f"retire-{name}-{number}", daemon=True
        )
        self._retiring.append(_Retirement(name, number, model.batcher, thread))
        thread.start()

    def _end(self, model: weakref.ref[LoadedModel], batcher: Runs) -> None:
        """Wait until no request holds a model, and stop its sessions."""
        began, is_collected = time.monotonic(), False
        while model() is not None and time.monotonic() < began + self._patience_s:
            time.sleep(RETIRING_STEP_S)
            if not is_collected and time.monotonic() > began + GARBAGE_S:
                gc.collect()  # a fault and its traceback may hold each other, and the model
                is_collected = True
        batcher.close()
        _return_memory()
        self._on_retired()

    def _end_retirements(self, *, wait: bool) -> None:
        before = list(self._retiring)
        for retirement in before:
            if wait:
                retirement.thread.join()
            # It tells of its end just before it ends.
            retirement.thread.join(RETIRING_STEP_S)
            if not retirement.thread.is_alive():
                self._retiring.remove(retirement)
                self._forget(retirement.name, retirement.version)
        if len(self._retiring) < len(before):
            self._settle()

    def _forget(self, name: str, number: str) -> None:
        """Take a version that has ended off the lists."""
        log.info("model unloaded", extra={"model": name, "version": number})
        entry = self.entries.get(name)
        version = entry.versions.get(number) if entry else None
        if entry and version and version.state is State.UNLOADING:
            version.state = State.UNLOADED
            if not version.directory.is_dir():
                entry.versions = {key: other for key, other in entry.versions.items() if other is not version}

    def _settle(self) -> None:
        """Have shown what is there, and of what has gone the last few."""
        if not self.started:  # whoever wrote this page before may have left numbers of what is yet to be loaded
            return
        there = {
            name: {number for number, version in entry.versions.items() if version.shown}
            for name, entry in self.entries.items()
        }
        for retirement in self._retiring:
            there.setdefault(retirement.name, set()).add(retirement.version)
        self._gone.settle(there)

    def _enter(self, version: Version, state: State, reason: str = "") -> None:
        version.reason, version.state = reason, state
        self._show(version)

    def _show(self, version: Version) -> None:
        """Leave just one `convoy_model_info` series for a version: that of its present state; none when unloaded."""
        self._hide(version)
        if version.state in (State.UNLOADING, State.UNLOADED):
            return
        digest = version.model.digest if version.model else ""
        provider = version.model.provider if version.model else ""
        version.shown = (version.name, version.version, digest, provider, version.state.value)
        self._metrics.model_info.labels(*version.shown).set(1)

    def _hide(self, version: Version) -> None:
        if version.shown:
            self._metrics.model_info.remove(*version.shown)
            version.shown = ()

    def _versions(self) -> Iterator[Version]:
        for entry in self.entries.values():
            yield from entry.versions.values()

    def _known(self) -> str:
        return ", ".join(sorted(self.entries)) or "none"


def _return_memory() -> None:
    """Have the C library give freed memory back to the system, which it else keeps, in pieces (glibc only)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _unavailable(what: str, state: State, reason: str) -> UnavailableError:
    if state in (State.LOADING, State.READY):  # READY: it became so just now
        return UnavailableError(f"{what} is still loading; try again in a moment.", code="loading")
    if state is State.FAILED:
        return UnavailableError(f"{what} failed to load: {reason}", code="model_failed")
    return UnavailableError(f"{what} is unloaded, until somebody loads it again.", code="unloaded")


def _told(change: _Change) -> str:
    """Say what is wrong with a model beside its active version; empty: nothing."""
    faults = [f"Version {number} is not served: {reason}" for number, reason in change.faults.items() if number]
    return " ".join(([change.faults[""]] if "" in change.faults else []) + faults)
