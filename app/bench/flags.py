"""What the words of `convoy bench` and `convoy tune` have in common: numbers within bounds, files to write."""

import math
from collections.abc import Callable
from pathlib import Path

from app.errors import BadRequestError


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number within bounds."""

    def parse(text: str) -> int:
        if not least <= int(text) <= most:
            raise ValueError
        return int(text)

    parse.__name__ = f"whole number from {least} to {most}"
    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """Return an argparse type: a number within bounds."""

    def parse(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and least <= value <= most):
            raise ValueError
        return value

    parse.__name__ = f"number from {least:g} to {most:g}"
    return parse


def check_folder(target: Path) -> None:
    """Say before anything is measured that a file could not be written.

    Raises:
        BadRequestError: its folder is not there.
    """
    if not target.absolute().parent.is_dir():
        raise BadRequestError(f"The file {target} cannot be written: there is no folder {target.parent}.")


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        BadRequestError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadRequestError(f"The file {path} cannot be written: {error.strerror}.") from error
