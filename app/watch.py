"""Whether files have changed, and rest: they are not read halfway through being written."""

from collections.abc import Iterable
from pathlib import Path


class Watch:
    """Looks at a few files whenever it is asked, which should be about once a second."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Take the files as they are now for known."""
        self._files = list(files)
        self._known = self._before = self._look()

    def have_changed(self) -> bool:
        """Tell, once for each change, whether the files are others than before, and the same as a look ago."""
        now, before = self._look(), self._before
        self._before = now
        if now == self._known or now != before:
            return False
        self._known = now
        return True

    def _look(self) -> list[tuple[int, ...]]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, ...]:
    """Return what is another when a file is written, replaced or taken away."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino
