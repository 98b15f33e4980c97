"""The board: what operators have asked for, in memory that all workers of a service have.

Whoever is asked writes it down; every worker reads it, does it in its turn, and says in its page how far it is. A
worker that starts later reads the same. Knows nothing of models: a wish is under a name.
"""

import fcntl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from app.errors import UnavailableError
from app.pages import Page, private_page

_WRITING, _TURN = range(2)
"""What the first two bytes of the pages' memory are locks of; no process ever has to be told of a dead holder."""
TURN_STEP_S = 0.02
Name = tuple[str, ...]
"""A model, or a version of one: its name, and its number."""
READS = 50
"""How often the board is read again that is being written: a note takes less than a few reads to write."""
MOST_HIDDEN = 200
"""Names that are hidden: until the last worker has forgotten them, which it does with the next change at the latest."""
MOST_ASKED = 1_000
"""Models of which it is kept when they were last asked for; a worker that is further behind looks at all there are."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What operators have asked for of one model, beyond what its folder says.

    Attributes:
        off: none of the versions that the folder asks for.
        on: these, whatever else.
        out: none of these.
    """

    off: bool = False
    on: frozenset[str] = frozenset()
    out: frozenset[str] = frozenset()


NO_WISH = Wish()


@dataclass(frozen=True, slots=True)
class Standing:
    """Which version of a model is active and what its aliases mean, where a version that should be is broken."""

    active: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Notes:
    """What is on the board.

    Attributes:
        generation: of the last change; grows with each.
        default: the default model's name, as the first worker found it; None: none has looked yet.
        asked: by model, the generation in which it was last asked for.
        forgotten: generation up to which it may not be known any more what was asked for.
        hidden: what has gone and is not shown any more, whichever worker still has numbers of it.
        wishes: by model.
        refused: by model and version, the generation in which it failed somewhere, and why.
        standing: what goes on instead, by model: for workers that start later.
    """

    generation: int = 0
    default: str | None = None
    asked: dict[str, int] = field(default_factory=dict)
    forgotten: int = 0
    hidden: list[Name] = field(default_factory=list)
    wishes: dict[str, Wish] = field(default_factory=dict)
    refused: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    standing: dict[str, Standing] = field(default_factory=dict)

    def wish(self, name: str) -> Wish:
        """Return what was asked for of a model."""
        return self.wishes.get(name, NO_WISH)


class Board:
    """The notes, in a page of their own."""

    def __init__(self, page: Page | None = None, descriptor: int = -1) -> None:
        """Use the board of a service.

        Args:
            page: where it is written; None: nobody else has to see it.
            descriptor: of the memory that the page is in, for locks between processes; it must never be closed.
        """
        self._page = page or private_page()
        self._descriptor = descriptor
        self._writing, self._turn = threading.Lock(), threading.Lock()

    def read(self) -> Notes:
        """Return what is on the board; empty notes while it is being written: look again in a moment."""
        return _notes_of(self._page.note)

    def join(self, default: str) -> Notes:
        """Return what is on the board, as a worker that starts wants it.

        Args:
            default: the default model's name, if nobody has settled it yet.
        """
        with self._changing() as notes:
            notes.generation = notes.generation or _next(0)
            if notes.default is None:
                notes.default = default
            return notes

    def ask(self, names: Iterable[str], change: Callable[[Wish], Wish] = lambda wish: wish) -> int:
        """Write down that models are to be looked at, and what changes in what is wanted; returns the generation."""
        with self._changing() as notes:
            notes.generation = _next(notes.generation)
            for name in names:
                notes.asked[name] = notes.generation
                notes.wishes[name] = change(notes.wish(name))
                if notes.wishes[name] == NO_WISH:
                    del notes.wishes[name]
                notes.refused.pop(name, None)
                notes.standing.pop(name, None)
            for name in sorted(notes.asked, key=notes.asked.__getitem__)[:-MOST_ASKED]:
                notes.forgotten = notes.asked.pop(name)
            return notes.generation

    def refuse(self, name: str, faults: Mapping[str, tuple[int, str]], standing: Standing) -> None:
        """Write down which versions have failed here, so that nobody else tries them, and what goes on instead."""
        with self._changing() as notes:
            notes.refused[name] = dict(faults)
            notes.standing[name] = standing

    def hidden(self) -> list[Name]:
        """Return what is hidden, also while the board is being written."""
        for _ in range(READS):
            notes = self.read()
            if notes.generation:
                return notes.hidden
        return []

    def hide(self, gone: Collection[Name], there: Mapping[str, Collection[str]]) -> list[Name]:
        """Write down what is not to be shown any more, but for what is there again; returns all that is hidden."""
        hidden = self.hidden()
        if not gone and not any(_is_there(name, there) for name in hidden):
            return hidden
        with self._changing() as notes:
            known = dict.fromkeys([*notes.hidden, *gone])
            notes.hidden = [name for name in known if not _is_there(name, there)][-MOST_HIDDEN:]
            return notes.hidden

    @contextmanager
    def turn(self, stopping: threading.Event) -> Iterator[bool]:
        """Be the only worker that changes its models, for a `with` block; False: it stops before its turn."""
        while not self._take_turn():
            if stopping.wait(TURN_STEP_S):
                yield False
                return
        try:
            yield True
        finally:
            self._unlock(_TURN)
            self._turn.release()

    def _take_turn(self) -> bool:
        if not self._turn.acquire(blocking=False):
            return False
        if self._descriptor >= 0:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _TURN)
            except OSError:
                self._turn.release()
                return False
        return True

    @contextmanager
    def _changing(self) -> Iterator[Notes]:
        with self._writing:
            if self._descriptor >= 0:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, _WRITING)
            try:
                notes = _notes_of(self._page.note)
                yield notes
                if not self._page.write_note(_as_json(notes)):
                    raise UnavailableError("More models have been asked for than the workers can be told of.")
            finally:
                self._unlock(_WRITING)

    def _unlock(self, which: int) -> None:
        if self._descriptor >= 0:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, which)


def _is_there(name: Name, there: Mapping[str, Collection[str]]) -> bool:
    return name[0] in there and (len(name) == 1 or name[1] in there[name[0]])


def _next(generation: int) -> int:
    """Return the next generation: by the clock too, so that it grows where a killed writer has spoilt the notes."""
    return max(generation + 1, time.monotonic_ns() // 1000)


def _notes_of(content: Mapping[str, Any]) -> Notes:
    if not content:
        return Notes()
    wishes = {name: Wish(off, frozenset(on), frozenset(out)) for name, (off, on, out) in content["wishes"].items()}
    refused = {
        name: {version: (generation, reason) for version, (generation, reason) in versions.items()}
        for name, versions in content["refused"].items()
    }
    standing = {name: Standing(active, aliases) for name, (active, aliases) in content["standing"].items()}
    hidden = [tuple(name) for name in content["hidden"]]
    return Notes(
        generation=content["generation"],
        default=content["default"],
        asked=content["asked"],
        forgotten=content["forgotten"],
        hidden=hidden,
        wishes=wishes,
        refused=refused,
        standing=standing,
    )


def _as_json(notes: Notes) -> dict[str, Any]:
    return {
        "generation": notes.generation,
        "default": notes.default,
        "asked": notes.asked,
        "forgotten": notes.forgotten,
        "hidden": notes.hidden,
        "wishes": {name: [wish.off, sorted(wish.on), sorted(wish.out)] for name, wish in notes.wishes.items()},
        "refused": notes.refused,
        "standing": {name: [what.active, dict(what.aliases)] for name, what in notes.standing.items()},
    }
