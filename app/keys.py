"""API keys: the file with their digests, who a key belongs to, and what it may do.

A line of the file is a name, scopes and a digest: `shop predict,metrics 3f0c…`. The key itself is in no file: it is
random, shown once by `convoy key`, and known by its SHA-256. Knows nothing of HTTP: any front hands over what a client
presents, and gets back whose key that is, or the fault to tell.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from app.errors import ForbiddenError, SettingsError, UnauthorizedError
from app.watch import Watch

log = logging.getLogger(__name__)

KEY_PREFIX = "convoy_"
"""Begins every key, so that one that got into a repository or a log is found by whoever scans for secrets."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_LINE = "a line is a name, scopes and a SHA-256 of 64 hex digits, as `convoy key` prints it"


class Access(StrEnum):
    """What a key may do. None of them includes another."""

    PREDICT = "predict"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True)
class Key:
    """One line of the file."""

    name: str
    scopes: frozenset[Access]
    digest: bytes


class Keyring:
    """The keys of a service. Without a file everything but administration is open, and that is closed."""

    def __init__(self, path: str = "") -> None:
        """Read the file; an empty path: there is none.

        Raises:
            SettingsError: it cannot be read, or a line is wrong.
        """
        self._path = Path(path)
        self.guarded = bool(path)
        """Whether there is a key file."""
        self._keys: tuple[Key, ...] = ()
        self._watch = Watch([self._path] if path else [])
        if self.guarded:
            self._keys = read_keys(self._path)
            if not self._keys:
                log.warning("the key file holds no key: nobody can ask", extra={"file": path})

    def refresh(self) -> None:
        """Read the file again if it has changed; to be called about once a second.

        A broken file leaves the keys as they are.
        """
        if not self._watch.have_changed():
            return
        try:
            self._keys = read_keys(self._path)
        except SettingsError as fault:
            log.error("the key file is broken: the keys before it stay valid", extra={"reason": fault.message})
            return
        log.info("keys read", extra={"file": str(self._path), "keys": len(self._keys)})

    def admit(self, presented: bytes | None, needed: Access | None) -> str:
        """Let a request in, or refuse it.

        Args:
            presented: the key that came with it (`presented_in`); None: there was none.
            needed: what the route asks for; None: nothing.

        Returns:
            The name of the key; empty where none was needed.

        Raises:
            UnauthorizedError: a key is needed, and none or an unknown one was presented.
            ForbiddenError: the key is known, and lacks the scope.
        """
        if needed is None or not (self.guarded or needed is Access.ADMIN):
            return ""
        if not self.guarded:
            raise UnauthorizedError(
                "Loading and unloading models always needs a key, and this service has none: start it with --keys."
            )
        if presented is None:
            raise UnauthorizedError("This needs a key: send it as Authorization: Bearer KEY, or as X-API-Key: KEY.")
        key = self._find(presented)
        if key is None:
            raise UnauthorizedError("This key is not known here: it was mistyped, or withdrawn.")
        if needed not in key.scopes:
            raise ForbiddenError(f"The key of '{key.name}' is not for this: it lacks the scope {needed}.")
        return key.name

    def _find(self, presented: bytes) -> Key | None:
        """Look at every key for as long, whichever it is: time tells nothing."""
        digest = hashlib.sha256(presented).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


def presented_in(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the key among a request's headers, whose names are in lower case; Bearer goes before X-API-Key."""
    found = None
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            found = value
    return found


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read a key file; empty lines and what follows a # are passed over.

    Raises:
        SettingsError: it cannot be read, a line is wrong, or a name or a key is there twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SettingsError(f"The key file {path} cannot be read: {error.strerror}.") from error
    except ValueError:
        raise SettingsError(f"The key file {path} is not UTF-8 text.") from None
    keys: list[Key] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if words:
            key = _key_of(words, f"{path} line {number}")
            if any(key.name == other.name or key.digest == other.digest for other in keys):
                raise SettingsError(f"{path} line {number}: the name or the key of '{key.name}' is there twice.")
            keys.append(key)
    return tuple(keys)


def _key_of(words: list[str], where: str) -> Key:
    # The words are not shown: somebody may have put the key itself there.
    if len(words) != 3 or not NAME.fullmatch(words[0]) or not _DIGEST.fullmatch(words[2]):
        raise SettingsError(f"{where}: {_LINE}.")
    return Key(words[0], scopes_of(words[1], where), bytes.fromhex(words[2]))


def scopes_of(text: str, where: str) -> frozenset[Access]:
    """Read scopes, separated by commas; `where` leads the sentence of a fault.

    Raises:
        SettingsError: one of them is none.
    """
    try:
        return frozenset(Access(word) for word in text.split(","))
    except ValueError:
        raise SettingsError(f"{where}: scopes are {', '.join(Access)}, separated by commas.") from None


def make_key(name: str, scopes: frozenset[Access]) -> tuple[str, str]:
    """Return a new key and the line for it.

    Raises:
        SettingsError: the name is none.
    """
    if not NAME.fullmatch(name):
        raise SettingsError(f"A key's name has letters, digits and . _ - @, at most 64 of them; '{name[:80]}' is none.")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    ordered = ",".join(scope for scope in Access if scope in scopes)
    return key, f"{name} {ordered} {hashlib.sha256(key.encode()).hexdigest()}"


def append_key(path: Path, name: str, line: str) -> None:
    """Add a line to a key file, which is made if it is not there.

    Raises:
        SettingsError: the file is broken or cannot be written, or has a key of that name.
    """
    before = ""
    if path.exists():
        if any(key.name == name for key in read_keys(path)):
            raise SettingsError(f"{path} has a key of '{name}' already: delete its line first, or take another name.")
        before = path.read_text(encoding="utf-8")
    separator = "" if not before or before.endswith("\n") else "\n"
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8") as file:
            file.write(f"{separator}{line}\n")
    except OSError as error:
        raise SettingsError(f"The key file {path} cannot be written: {error.strerror}.") from error
