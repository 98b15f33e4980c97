"""What models, runs and versions may be called: the manifest's rules, told before anything is computed."""

import re
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from app.manifest import Name, Version
from training.errors import ExportError


def check_name(name: str) -> None:
    """Refuse a name that the manifest would.

    Raises:
        ExportError: the name has other than lower-case letters, digits and `.`, `_`, `-`.
    """
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ExportError(
            f"{_quoted(name)} cannot name a model: give --name of lower-case letters, digits, '.', '_' and '-'."
        ) from None


def check_version(version: str) -> None:
    """Refuse a version that the manifest would.

    Raises:
        ExportError: it is no whole number from 1 to 999,999,999.
    """
    try:
        TypeAdapter(Version).validate_python(version)
    except ValidationError:
        raise ExportError(
            f"{_quoted(version)} cannot be a version: give --version a whole number from 1, "
            "or leave it out for the next free one."
        ) from None


def name_of(data: Path) -> str:
    """Name a run after its data: `data/My Flowers` → `my-flowers`, `cifar-10-python.tar.gz` → `cifar-10-python`."""
    name = data.resolve().name.partition(".tar")[0].removesuffix(".tgz").lower()
    return re.sub(r"[^a-z0-9._-]+", "-", name).strip("._-")[:64]


def is_text(name: str) -> bool:
    """Say whether a name can be printed: Linux takes any bytes for one, and Python gives the odd ones as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _quoted(text: str) -> str:
    return f"'{text}'" if text.isprintable() else ascii(text)


def next_version(models_dir: Path, name: str) -> str:
    """Return the number after the highest version of a model."""
    folder = models_dir / name
    taken = [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []
    return str(max(taken, default=0) + 1)
