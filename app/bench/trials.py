"""What a candidate of the search does in truth: a `convoy serve` with its settings, and load on it."""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, Self

from app.bench.load import Plan, new_runner, run_load
from app.bench.report import Report
from app.bench.requests import Endpoint, build_requests
from app.bench.search import Candidate, Trial, settings_of
from app.bench.server import serving
from app.manifest import Bundle

OPEN_CONNECTIONS = 512
WARM_UP_S = 0.7
PATIENCE_S = 2.0


class Trials:
    """Measures candidates; keeps one service running until other settings have their turn."""

    def __init__(self, bundle: Bundle, images: Sequence[bytes], limit_ms: float) -> None:
        self._bundle = bundle
        self._images = images
        self._limit_ms = limit_ms
        self._here = ExitStack()
        self._service = ExitStack()
        self._settings: Candidate | None = None
        self._endpoint = Endpoint("", 0, "")

    def __enter__(self) -> Self:
        folder = Path(self._here.enter_context(tempfile.TemporaryDirectory(prefix="convoy-tune-")))
        # Only the one model: the others would be loaded, proved and warmed for every candidate.
        self._models = folder / "models"
        versions = self._models / self._bundle.manifest.name
        versions.mkdir(parents=True)
        # A copy: the service takes no link that leads out of its models directory.
        shutil.copytree(self._bundle.directory, versions / self._bundle.manifest.version)
        self._runner = self._here.enter_context(new_runner())
        return self

    def __exit__(self, *_: object) -> None:
        self._service.close()
        self._here.close()

    def closed(self, candidate: Candidate, connections: int, seconds: float) -> Trial:
        """Measure with so many connections, each sending when its answer is there; however long the queue takes."""
        report = self._load({**candidate, "queue_target_ms": 0.0}, connections, None, seconds)
        return self._trial(candidate, "closed", connections, report)

    def open(self, candidate: Candidate, rate: float, seconds: float) -> Trial:
        """Measure at so many requests a second, with all of `settings_of`."""
        report = self._load(settings_of(candidate, self._limit_ms), OPEN_CONNECTIONS, rate, seconds)
        return self._trial(candidate, "open", rate, report)

    def _trial(self, candidate: Candidate, loop: Literal["closed", "open"], asked: float, report: Report) -> Trial:
        latency = report.latency_ms
        return Trial(
            candidate,
            loop,
            asked,
            requests_per_s=report.requests_per_s,
            mean_ms=latency.mean if latency else None,
            p99_ms=latency.p99 if latency else None,
            share_within=report.share_within(self._limit_ms),
        )

    def _load(self, settings: Candidate, connections: int, rate: float | None, seconds: float) -> Report:
        if settings != self._settings:
            self._service.close()
            self._settings = None
            model = {"default_model": self._bundle.manifest.name}
            server = self._service.enter_context(serving(self._models, model | dict(settings)))
            self._settings = settings
            self._endpoint = Endpoint.of(server.url)
        plan = Plan(
            self._endpoint,
            build_requests(self._endpoint, self._images),
            connections=connections,
            rate=rate,
            seconds=seconds,
            warm_up_s=WARM_UP_S,
            patience_s=max(PATIENCE_S, 2 * self._limit_ms / 1000),
        )
        return self._runner.run(run_load(plan))
