"""What a person or a log sees of work under way: lines on stdout; on stderr bars for a person, for a log rare lines."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]
LINE_EVERY_S = 60.0
"""Of a counting that nobody watches: a log tells that it goes on, and is not filled by it."""


def say(text: str) -> None:
    """Print a line at once: a log that is read while a training runs must not lag behind."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Write a span of time as people say it: `9 s`, `5 min 24 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


@contextmanager
def counting(what: str, total: int, rounds_after: int = 0, *, shown: bool = True) -> Iterator[Advance]:
    """Show a bar, or now and then a line where nobody watches; the value yielded advances it: `advance(32, note="…")`.

    Args:
        what: what is counted.
        total: until when; 0: nobody knows.
        rounds_after: how many more such countings follow; with some, the time left of all is told too.
        shown: whether anything is told.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    begun = time.monotonic()
    next_line = begun + LINE_EVERY_S
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task, done, last_note = progress.add_task(what, total=total or None, note=""), 0, ""

        def advance(count: int, note: str | None = None) -> None:
            nonlocal done, last_note, next_line
            done += count
            if note is not None:
                last_note = note
            now = time.monotonic()
            left = _time_left(now - begun, done, total, rounds_after)
            progress.update(task, advance=count, note=f"{last_note}{left if rounds_after else ''}")
            if shown and not console.is_terminal and now >= next_line:
                next_line = now + LINE_EVERY_S
                share = f"{done / total:.0%}" if total else f"{done:,}"
                sys.stderr.write(f"{what}: {share}  {last_note}{left}\n")
                sys.stderr.flush()

        yield advance


def _time_left(passed_s: float, done: int, total: int, rounds_after: int) -> str:
    """Say how long it still takes, this round and all, if it goes on as it went; nothing where that cannot be told."""
    if not done or not total:
        return ""
    round_s = passed_s * total / done
    this = round_s - passed_s
    whole = f", {duration(this + rounds_after * round_s)} in all" if rounds_after else ""
    return f"  {duration(this)} left{whole}"
