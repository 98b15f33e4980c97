"""What a person or a log sees of work under way: lines on stdout, and bars on stderr for a person only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]


def say(text: str) -> None:
    """Print a line at once: a log that is read while a training runs must not lag behind."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def counting(what: str, total: int, *, shown: bool = True) -> Iterator[Advance]:
    """Show a bar; the value yielded advances it: `advance(32, note="loss 0.51")`."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total, note="")

        def advance(count: int, note: str | None = None) -> None:
            progress.update(task, advance=count)
            if note is not None:
                progress.update(task, note=note)

        yield advance
