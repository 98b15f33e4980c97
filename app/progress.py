"""Progress: what is being done before a model is ready, for whoever waits for it.

One step at a time, on the thread that loads; read by others. Knows nothing of what the steps do.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

WORTH_TELLING_S = 1.0
"""Shorter steps come and go without a word."""
WORTH_LOGGING_S = 10.0


class Progress:
    """The step that a loading model is in, and since when."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._step: tuple[str, float] | None = None

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Be in a step for the length of a block; a step within another takes its place for as long as it lasts."""
        outer, self._step = self._step, (what, started := self._clock())
        try:
            yield
        finally:
            self._step = outer
            if (seconds := self._clock() - started) > WORTH_LOGGING_S:
                log.info("loading", extra={"step": what, "seconds": round(seconds, 1)})

    @property
    def told(self) -> str:
        """The step with its seconds so far, whole ones; empty: there is none, or it has only begun."""
        step = self._step
        if step is None or (seconds := self._clock() - step[1]) < WORTH_TELLING_S:
            return ""
        return f"{step[0]}, for {seconds:.0f} s"
