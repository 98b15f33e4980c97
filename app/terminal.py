"""How answers look on a terminal: a table with a bar while it fills, or lines of JSON."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from app.offline import Answer


def print_json(answers: Iterable[Answer], total: int) -> int:
    """Print one JSON object a line as answers come; return how many of the `total` failed."""
    failures = 0
    for answer in answers:
        line: dict[str, object] = {"file": _shown(answer.path)}
        if answer.error:
            failures += 1
            line["error"] = answer.error
        else:
            line["top"] = [
                {"label": score.label, "index": score.index, "probability": score.probability} for score in answer.top
            ]
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    return failures


def print_table(answers: Iterable[Answer], total: int) -> int:
    """Print a table of all answers, with a bar on standard error until it is complete; return how many failed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("then", style="dim", overflow="fold")
    failures = 0
    for answer in _with_bar(answers, total):
        if answer.error:
            failures += 1
            table.add_row(Text(_shown(answer.path)), Text(answer.error, style="red"), "", "")
            continue
        best, *others = answer.top
        then = ", ".join(f"{score.label} {score.probability:.1%}" for score in others)
        table.add_row(Text(_shown(answer.path)), Text(best.label), f"{best.probability:.1%}", Text(then))
    Console().print(table)
    return failures


def _shown(path: Path) -> str:
    """Return a path's name with whatever is not UTF-8 in it replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def _with_bar(answers: Iterable[Answer], total: int) -> Iterable[Answer]:
    columns = (TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = total == 1 or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield from progress.track(answers, total=total)
