"""Operations: when the repository changes, and that it changes in every worker.

Whatever asks for a change (an operator over any protocol, SIGHUP, the watched directory) writes it on the board; each
worker's loader thread does it in its turn, one worker at a time, beside serving. What one worker has found to be broken
no other tries. Owns that thread; knows nothing of HTTP.
"""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from app.board import NO_WISH, Board, Notes, Standing, Wish
from app.cpus import step_back
from app.errors import BadRequestError, LoadFailedError, UnavailableError, UnknownModelError
from app.manifest import NAME_PATTERN, VERSION_PATTERN
from app.pages import Page, WriterState
from app.repository import Entry, Repository
from app.versions import ALIAS_PATTERN, Watcher

log = logging.getLogger(__name__)

TIMEOUT_S = 300.0
"""How long whoever asks is kept waiting for all workers."""
POLL_S = 0.02
REASON_LENGTH = 500


class Operations:
    """Loading, unloading and looking again, for one worker and for all."""

    def __init__(
        self, repository: Repository, board: Board, page: Page, pages: Sequence[Page], *, watch_s: float = 0.0
    ) -> None:
        """Prepare; `run` does the work.

        Args:
            repository: this worker's.
            board: the service's.
            page: this worker's.
            pages: of all workers.
            watch_s: how often to look whether the models directory has changed, seconds; 0: never.
        """
        self._repository = repository
        self._board = board
        self._page = page
        self._pages = pages
        self._watch_s = watch_s
        self._applied = 0
        self._faults: dict[str, tuple[int, str]] = {}
        self._watcher: Watcher | None = None
        self._watched_at = 0.0
        self._seen: dict[str, int] = {}
        """Changes that nobody may have asked for yet: by model, the generation in which this worker saw them."""
        self._wake = threading.Event()
        self._stopping = threading.Event()
        repository.call_when_retired(self._wake.set)

    @property
    def note(self) -> dict[str, Any]:
        """What the other workers should know: how far this one is, and what failed; empty before it has loaded."""
        return {"applied": self._applied, "faults": self._faults} if self._applied else {}

    async def load(self, name: str, version: str | None = None) -> Entry:
        """Serve of a model what its folder asks for, or one version more, in every worker.

        Args:
            name: the model's.
            version: None: look at its folder again, whatever was unloaded before; a number or an alias: serve that too.

        Returns:
            The model, when every worker serves so.

        Raises:
            BadRequestError: that is no model's name, or no version's.
            UnknownModelError: there is nothing of that name.
            LoadFailedError: a version could not be loaded; what was served before still is.
            UnavailableError: not every worker has done it in time.
        """
        name, number = self._checked(name, version)
        folder = self._repository.shelf.path_of(name)
        if not await asyncio.to_thread((folder if number is None else folder / number).is_dir):
            what = f"model '{name}'" if number is None else f"version {number} of model '{name}'"
            raise UnknownModelError(f"There is no {what} in the models directory.")
        if number is None:
            return await self._ask(name, lambda wish: NO_WISH)
        return await self._ask(name, lambda wish: Wish(wish.off, wish.on | {number}, wish.out - {number}))

    async def unload(self, name: str, version: str | None = None) -> Entry:
        """Take a model, or one version, from every worker; requests that are inside are answered.

        Args:
            name: the model's.
            version: None: all of them; a number or an alias: that one, and the next newest takes its place.

        Returns:
            The model as it is then.

        Raises:
            BadRequestError: that is no model's name, or no version's.
            UnknownModelError: there is no such model, or version.
            LoadFailedError: another version should be served instead, and could not be loaded.
            UnavailableError: not every worker has done it in time.
        """
        name, number = self._checked(name, version)
        entry = self._repository.entries.get(name)
        if entry is None or (number is not None and number not in entry.versions):
            what = f"model '{name}'" if number is None else f"version {number} of model '{name}'"
            raise UnknownModelError(f"There is no {what}.")
        if number is None:
            return await self._ask(name, lambda wish: Wish(off=True))
        return await self._ask(name, lambda wish: Wish(wish.off, wish.on - {number}, wish.out | {number}))

    async def rescan(self) -> None:
        """Look at every model's folder again, in every worker.

        Raises:
            LoadFailedError: a version could not be loaded; what was served before still is.
            UnavailableError: the models directory cannot be read, or not every worker has done it in time.
        """
        names = await asyncio.to_thread(self._all_names)
        generation = self._board.ask(names)
        await self._all_have(generation)
        self._raise_faults(names, generation)

    def look(self) -> None:
        """See whether something was asked for; call it now and then, on the event loop."""
        if self._board.read().generation > self._applied:
            self._wake.set()

    def start(self, notes: Notes) -> None:
        """Load every model, the default one first; blocks. A version that fails is noted, and logged.

        Args:
            notes: the board, as it was when this worker began.

        Raises:
            SettingsError: a setting makes every model impossible (a device that is not there).
        """
        repository = self._repository
        self._watcher = Watcher(repository.shelf) if self._watch_s else None
        repository.expect(notes.standing)
        for name in sorted(repository.entries, key=lambda name: name != repository.default):
            if self._stopping.is_set():
                return
            repository.refresh(name, notes.wish(name), starting=True)
        repository.started = True
        self._applied = notes.generation

    def run(self) -> None:
        """Do whatever is asked for until `close`; blocks."""
        step_back()
        while not self._stopping.is_set():
            self._wake.wait(self._watch_s or None)
            self._wake.clear()
            self._watch()
            self._catch_up()
            self._repository.sweep()

    def close(self) -> None:
        """Do nothing more."""
        self._stopping.set()
        self._wake.set()

    def _checked(self, name: str, version: str | None) -> tuple[str, str | None]:
        """Return a model's name and a version's number, which an alias may stand for.

        Raises:
            BadRequestError: that is no model's name, or no version's.
            UnknownModelError: there is no such alias.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise BadRequestError(f"{name[:80]!r} is no model's name: small letters, digits, dots and dashes make one.")
        if version is None or re.fullmatch(VERSION_PATTERN, version):
            return name, version
        if not re.fullmatch(ALIAS_PATTERN, version):
            raise BadRequestError(f"{version[:40]!r} is no version: a number from 1 is one, or an alias.")
        entry = self._repository.entries.get(name)
        if entry is None or version not in entry.aliases:
            raise UnknownModelError(f"Model '{name}' has no alias '{version}'.")
        return name, entry.aliases[version]

    def _all_names(self) -> list[str]:
        try:
            return sorted({*self._repository.shelf.names(), *self._repository.entries})
        except OSError as error:
            raise UnavailableError(f"{self._repository.shelf.root} cannot be read: {error.strerror}.") from error

    async def _ask(self, name: str, change: Callable[[Wish], Wish]) -> Entry:
        generation = self._board.ask([name], change)
        await self._all_have(generation)
        self._raise_faults([name], generation)
        entry = self._repository.entries.get(name)
        if entry is None:
            raise UnknownModelError(f"Model '{name}' has gone from the models directory.")
        return entry

    async def _all_have(self, generation: int) -> None:
        """Wait until every worker has done what was asked for in a generation."""
        self._wake.set()
        until = time.monotonic() + TIMEOUT_S
        while behind := self._behind(generation):
            if time.monotonic() > until:
                raise UnavailableError(
                    f"Not done after {TIMEOUT_S:.0f} s by worker {', '.join(map(str, behind))}, which may do it yet.",
                    code="busy",
                )
            await asyncio.sleep(POLL_S)

    def _behind(self, generation: int) -> list[int]:
        """Return the numbers of workers that have not come so far; those that start read the board by themselves."""
        behind = [] if self._applied >= generation else [self._page.number]
        for page in self._pages:
            absent = not page.pid or page.state in (WriterState.STARTING, WriterState.DRAINING)
            if page is not self._page and not absent and page.note.get("applied", 0) < generation:
                behind.append(page.number)
        return behind

    def _raise_faults(self, names: Collection[str], generation: int) -> None:
        """Raise LoadFailedError if something went wrong with one of some models, here or in another worker."""
        told: dict[str, None] = {}
        for page in self._pages:
            faults = self._faults if page is self._page else page.note.get("faults", {})
            for name in names:
                since, sentence = faults.get(name, (0, ""))
                if since >= generation:
                    told[f"Model '{name}': {sentence}"] = None
        if told:
            raise LoadFailedError(" ".join(told))

    def _watch(self) -> None:
        """Ask for whatever has changed in the models directory, if this is the worker that watches, and it is time."""
        if self._watcher is None or time.monotonic() < self._watched_at + self._watch_s:
            return
        self._watched_at = time.monotonic()
        try:
            changed = self._watcher.changed(self._repository.entries)
        except OSError as error:
            log.error("models directory cannot be read", extra={"reason": str(error)})
            return
        notes = self._board.read()
        self._seen |= dict.fromkeys(changed, notes.generation)
        # What another worker has asked for since is done with; the rest is this one's, if the one before it dies.
        asked, forgotten = notes.asked, notes.forgotten
        self._seen = {name: since for name, since in self._seen.items() if asked.get(name, forgotten) <= since}
        others = [page.number for page in self._pages if page.pid and page.state is WriterState.READY]
        if self._seen and self._page.number <= min(others, default=self._page.number):
            log.info("models directory has changed", extra={"models": [*self._seen]})
            try:
                self._board.ask([*self._seen])
            except UnavailableError as error:  # the thread must go on, and tries again
                log.error("the change is not taken up yet", extra={"reason": error.message})
                return
            self._seen = {}

    def _catch_up(self) -> None:
        """Do what the board asks for, if it is more than was done."""
        if self._board.read().generation <= self._applied:
            return
        with self._board.turn(self._stopping) as mine:
            if not mine:
                return
            notes = self._board.read()  # again: what another worker has found out meanwhile counts
            asked = self._everything(notes.forgotten) if self._applied < notes.forgotten else {}
            for name, generation in sorted((asked | notes.asked).items(), key=lambda item: item[1]):
                if generation > self._applied:
                    self._apply(name, generation, notes)
            self._applied = max(self._applied, notes.generation)

    def _everything(self, generation: int) -> dict[str, int]:
        """Return all models there are, as asked for in a generation: for who is so far behind that it is forgotten."""
        try:
            return dict.fromkeys(self._all_names(), generation)
        except UnavailableError as error:
            log.error("models directory cannot be read", extra={"reason": error.message})
            return dict.fromkeys(self._repository.entries, generation)

    def _apply(self, name: str, generation: int, notes: Notes) -> None:
        refused = {
            version: reason for version, (since, reason) in notes.refused.get(name, {}).items() if since == generation
        }
        try:
            faults = self._repository.refresh(name, notes.wish(name), refused)
        except Exception as error:  # the thread must go on: others will be asked for
            log.exception("operation failed", extra={"model": name})
            faults = {"": f"{type(error).__name__}: {error}"}
        if not faults:
            self._faults.pop(name, None)
            return
        reasons = {version: reason[:REASON_LENGTH] for version, reason in faults.items()}
        self._faults = self._faults | {name: (generation, " ".join(reasons.values()))}
        entry = self._repository.entries.get(name)
        standing = Standing(entry.active, entry.aliases) if entry else Standing()
        reasons.pop("", None)
        try:
            self._board.refuse(name, {version: (generation, reason) for version, reason in reasons.items()}, standing)
        except UnavailableError as error:  # then each worker finds it out by itself
            log.error("the other workers are not told", extra={"model": name, "reason": error.message})
