"""A front's engines: which there are, and what they have opened. An engine that is replaced is given the same models.

Knows nothing of HTTP, images or sessions.
"""

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any

from app.cluster.link import Link
from app.cluster.remote_batcher import SAME_EVERYWHERE, RemoteBatcher
from app.cluster.wire import REASON_LENGTH
from app.drift import Sampler
from app.errors import BundleError, SettingsError
from app.loading import LoadedModel, manifest_of
from app.manifest import Manifest
from app.metrics import Metrics
from app.pages import Page
from app.progress import Progress

log = logging.getLogger(__name__)


class Links:
    """The engines that there are now, and what they are to have opened."""

    def __init__(self, metrics: Metrics, *, renames: bool = False, most_rows: int = sys.maxsize) -> None:
        """Begin without any; see `meet`.

        Args:
            metrics: where models count, and the engines' pages.
            renames: a model is called what it is asked for by, whatever name its manifest has.
            most_rows: an engine that has more of them, given up or not, gets none.
        """
        self._most_rows = most_rows
        self._metrics = metrics
        self.progress = Progress()
        """Of this process's part in opening a version; the engines show theirs."""
        self._renames = renames
        self._links: list[Link] = []
        self._batchers: set[RemoteBatcher] = set()
        self._tokens = count(1)
        self._met = threading.Event()
        self._stopping = False

    @property
    def count(self) -> int:
        """How many engines there are."""
        return len(self._links)

    def _page_of(self, number: int) -> Page | None:
        """Return an engine's page, by its number; None: it has none."""
        return next((page for page in self._metrics.engines if page.number == number), None)

    def meet(self, number: int, connection: socket.socket) -> None:
        """Have one more engine, which is given every model that the others have."""
        link = Link(number, connection, self._page_of(number), self._most_rows, self._lose)
        self._links.append(link)
        self._met.set()
        for batcher in self._batchers:
            batcher.join(link)

    def _lose(self, link: Link) -> None:
        """Have one engine less."""
        if link not in self._links:
            return
        self._links.remove(link)
        if not self._stopping:
            log.error("engine lost", extra={"engine": link.number, "requests": link.pending})
        for batcher in self._batchers:
            batcher.part(link)

    def close(self) -> None:
        """End every connection; on the loop."""
        self._stopping = True
        for link in list(self._links):
            link.hang_up()

    def load(
        self, name: str, version: str, directory: Path, loop: asyncio.AbstractEventLoop
    ) -> tuple[LoadedModel, float | None]:
        """Have every engine open a version, and return it as `Loader.load` does; blocks, on a thread.

        Raises:
            BundleError: it is incomplete, altered, or does not reproduce its golden answers.
            SettingsError: a setting makes every model impossible (a device that is not there).
        """
        manifest = manifest_of(name, version, directory, self._renames)
        metrics = self._metrics.for_model(name, version)
        batcher = RemoteBatcher(self._links, next(self._tokens), name, version, directory, loop, metrics)
        with self.progress.step(f"{name} {version}: waiting for the engines"):
            while (said := self._opened(batcher, loop)) is None:
                pass
        if "fault" in said:
            loop.call_soon_threadsafe(self._forget, batcher)
            raise {"settings": SettingsError}.get(said["fault"], BundleError)(said["reason"])
        if manifest is not None and manifest.model.sha256 != said["digest"]:
            loop.call_soon_threadsafe(self._forget, batcher)
            raise BundleError(f"{directory} was changed while it was opened: have it looked at again.")
        batcher.on_end(lambda: self._forget(batcher))
        classifier = manifest if isinstance(manifest, Manifest) else None
        model = LoadedModel(
            name,
            version,
            said["digest"],
            said["provider"],
            batcher.inputs,
            batcher.outputs,
            said["max_batch"],
            said["unbatched_why"],
            classifier,
            None if isinstance(manifest, Manifest) else manifest,
            batcher,
            metrics,
            Sampler(classifier, self._metrics) if classifier is not None else None,
        )
        return model, said["difference"]

    def _opened(self, batcher: "RemoteBatcher", loop: asyncio.AbstractEventLoop) -> Any:
        """Return what the engines say of a model: a fault if one of them has found any; None: they all went away."""
        self._met.wait()
        said: Future[Any] = Future()
        loop.call_soon_threadsafe(self._ask, batcher, said)
        return said.result()

    def _ask(self, batcher: "RemoteBatcher", said: "Future[Any]") -> None:
        if not self._links:
            self._met.clear()
            said.set_result(None)
            return
        self._batchers.add(batcher)
        waiting, answers = set(self._links), list[Any]()

        def told(link: Link, answer: Any) -> None:
            waiting.discard(link)
            if answer is not None:
                answers.append(answer)
            if not waiting and not said.done():
                faults = [answer for answer in answers if "fault" in answer] or _disagreement(answers)
                found = next(iter(faults or answers), None)
                if found is not None and not faults:
                    batcher.describe(found)
                said.set_result(found)

        for link in list(self._links):
            batcher.join(link, lambda answer, link=link: told(link, answer))  # type: ignore[misc]

    def _forget(self, batcher: "RemoteBatcher") -> None:
        self._batchers.discard(batcher)
        batcher.leave()


def _disagreement(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a fault where engines have found different things; else nothing."""
    for key in SAME_EVERYWHERE:
        found = [answer[key] for answer in answers]
        if any(other != found[0] for other in found):
            reason = f"The engines do not agree on its {key}: {', '.join(map(str, found))}."
            return [{"fault": "bundle", "reason": reason[:REASON_LENGTH]}]
    return []
