"""The composition root: one settings object in, a running service out. Everything is built here and handed down."""

import asyncio
import gc
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI

from app import runtime
from app.admission import Admission, Limits
from app.board import Board
from app.cluster.front import Links
from app.cluster.wire import Mailbox
from app.cpus import share_of_cpus
from app.cuda import Cuda
from app.engine import LocalEngine
from app.errors import DeviceLostError, SettingsError
from app.http.application import create_app
from app.http.bodies import BodyLimits
from app.images import forbid_pillow_guesses
from app.journal import Journal
from app.keys import Keyring
from app.loading import LoadedModel, Loader
from app.metrics import Metrics
from app.operations import Operations
from app.pages import LONG_AGO, WriterState
from app.probes import Probes
from app.repository import Repository
from app.sessions import place
from app.settings import Settings
from app.tensorrt import Engines
from app.tls import certificate_of
from app.tracing import Tracer, asked_by, is_switched_off
from app.versions import Selection, Shelf, default_of, find_models
from app.vitals import Vitals

if TYPE_CHECKING:
    from app.grpc.server import Front

log = logging.getLogger(__name__)

GARBAGE_THRESHOLD = 20_000
"""Allocations between two collections of the youngest garbage; Python's 700 are one request of a few images."""
PATIENCE_S = 5.0
"""Beyond a request's deadline, how long it may still hold a version that has been replaced."""
STEP_S = 0.02


class Service:
    """Everything that lives as long as the process: metrics, models, engine, and the application over them."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics | None = None,
        board: Board | None = None,
        mailbox: socket.socket | None = None,
    ) -> None:
        """Build everything; nothing runs yet.

        Args:
            settings: this process's settings.
            metrics: where it counts, and its page; None: by itself.
            board: where all workers read what operators ask for; None: there is but this one.
            mailbox: through which this process meets engines, which then have the sessions.

        Raises:
            SettingsError: the models directory is missing or empty, or key file or certificate are broken.
            RuntimeMissingError: there is no usable ONNX Runtime.
        """
        runtime.check_wheels(runtime.installed_wheels())
        forbid_pillow_guesses()
        self.settings = settings
        self.cpus = share_of_cpus(settings.workers)
        self.draining = self._device_lost = False
        self.fault: SettingsError | None = None
        self.metrics = metrics or Metrics(slo_s=settings.slo_ms / 1000)
        self.metrics.show_promise()
        self.page = self.metrics.page
        self.probes = Probes(self.metrics, self.show, settings.stuck_s)
        self.keyring = Keyring(settings.keys)
        self.certificate = certificate_of(settings)
        self.tracer = _tracer_of(settings, self.page.number)
        self._journal = Journal(self.metrics, settings.access_log, settings.access_log_ratio, self.tracer)
        self._shown: object = None
        self._mailbox = mailbox
        # Twice what may be inside: as much again may have been given up, and not yet let go.
        most_rows = 2 * settings.max_inflight_images
        renames = bool(settings.model_name)
        self._links = Links(self.metrics, renames=renames, most_rows=most_rows) if settings.engines else None
        self._loader = self._links or loader_of(settings, self.metrics, self.cpus)
        board = board or Board()
        # Models may have come and gone since the service started: what held then is not asked of a later worker.
        is_first = board.read().default is None
        shelf = Shelf(settings.models, settings.model_name)
        folders = find_models(shelf) if is_first else shelf.folders()
        names = {folder.name for folder in folders}
        self._notes = board.join(default_of(names, settings.default_model) if is_first else "")
        self.repository = Repository(
            shelf,
            self.metrics,
            folders=folders,
            default=self._notes.default or "",
            load=self._load_version,
            selection=Selection.parse(settings.versions),
            patience_s=settings.request_timeout_ms / 1000 + PATIENCE_S,
            board=board,
        )
        self.operations = Operations(self.repository, board, self.page, self.metrics.pages, watch_s=settings.watch_s)
        admission = Admission(
            Limits(
                images=settings.max_inflight_images,
                bytes=settings.max_inflight_bytes,
                pixels=settings.max_inflight_pixels,
                model_images=settings.limits_of_models(names if is_first else None),
                queue_target_s=settings.queue_target_ms / 1000,
            ),
            self.metrics,
        )
        decode_threads = settings.decode_threads or self.cpus
        self.engine = LocalEngine(
            self.repository,
            admission,
            decode_threads=decode_threads,
            max_image_pixels=settings.max_image_pixels,
        )
        self.vitals = Vitals(
            self.metrics,
            self.repository,
            device=settings.device,
            decode_threads=decode_threads,
            threads_per_session=settings.threads_per_session,
        )
        self.app = create_app(
            engine=self.engine,
            repository=self.repository,
            operations=self.operations,
            metrics=self.metrics,
            probes=self.probes,
            keyring=self.keyring,
            limits=BodyLimits(
                max_body_bytes=min(settings.max_body_bytes, settings.max_inflight_bytes),
                max_images=min(settings.max_images_per_request, settings.max_inflight_images),
            ),
            request_timeout_ms=settings.request_timeout_ms,
            journal=self._journal,
            lifespan=self._lifespan,
        )
        self.is_cut_off: Callable[[], bool] = lambda: False
        """Whether somebody has asked twice for the end; the server knows."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when state or models are others; the server may want to know."""
        self.grpc = self._grpc_front() if settings.grpc_port else None
        self.grpc_is_open = self.grpc is None

    def why_not_ready(self) -> str:
        """Return why the service should get no traffic, or an empty string."""
        if self.draining:
            return "Draining: the service is about to stop."
        return self._missing_models() or ("" if self.grpc_is_open else "Starting: the gRPC port is not open yet.")

    def _missing_models(self) -> str:
        return self.repository.why_not_ready(self.settings.require_all_models)

    @property
    def is_loading(self) -> bool:
        """Whether models that are not there may yet come."""
        return not self.repository.started or (self.repository.is_coming and bool(self._missing_models()))

    def state(self) -> WriterState:
        """Return where this process is between its start and its end."""
        if self.draining:
            return WriterState.DRAINING
        if not self.why_not_ready():
            return WriterState.READY
        return WriterState.LOADING if self.repository.is_coming or not self.grpc_is_open else WriterState.FAILED

    def show(self) -> None:
        """Show in the page that the event loop turns, and in which state models and process are."""
        self.page.beat()
        self.page.show_run(LONG_AGO if self._device_lost else self.repository.running_since)
        self.vitals.show()
        if self.grpc is not None:
            self.grpc.show(not self.why_not_ready())
        models = {entry.name: entry.state.value for entry in self.repository.entries.values()}
        note = {"reason": self.why_not_ready(), "models": models, "loading": self._loader.progress.told}
        shown = self.state(), {**note, **self.operations.note}
        if shown != self._shown:
            self.page.tell(*shown)
            self._shown = shown
            self.on_change()

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Load models beside the running server, so that probes are answered meanwhile; at the end stop everything."""
        self._loop = asyncio.get_running_loop()
        if self._links is not None and self._mailbox is not None:
            Mailbox(self._mailbox, self._links.meet)
        if self.tracer is not None:
            self.tracer.start()
        loader = threading.Thread(target=self._load, name="loader", daemon=True)
        loader.start()
        self.vitals.start()
        yield
        self.vitals.close()
        self.operations.close()
        if self.grpc is not None:
            while not self.grpc.is_over and not self.is_cut_off():
                await asyncio.sleep(STEP_S)
            if not self.grpc.is_over:
                await self.grpc.cut_off()
                return
        await asyncio.to_thread(self.repository.close)
        if self._links is not None:
            self._links.close()
        self.engine.close()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)
        log.info("stopped")

    def _load(self) -> None:
        try:
            self.operations.start(self._notes)
        except SettingsError as fault:  # no model can be served so: the process ends, and `serve` raises it
            self.fault = fault
            return
        # What was loaded stays: a collection that walked through it would hold up every request that is inside.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_THRESHOLD, 10, 50)
        while not (self.grpc_is_open or self.draining or self.fault):  # it opens within a tick of the loop
            time.sleep(STEP_S)
        reason = self._missing_models()
        if reason:
            log.error("not ready", extra={"reason": reason})
        else:
            log.info("ready", extra={"default_model": self.repository.default, "cpus": self.cpus})
        self.operations.run()

    def _grpc_front(self) -> "Front":
        # Its core writes lines of its own between those of the log: of each failed handshake one.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        try:
            from app.grpc.server import create_front
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"grpc_port needs the extra grpc, of which {error.name} is missing: pip install 'convoy-serve[grpc]'."
            ) from None
        return create_front(
            engine=self.engine,
            repository=self.repository,
            metrics=self.metrics,
            journal=self._journal,
            keyring=self.keyring,
            certificate=self.certificate,
            why_not_ready=self.why_not_ready,
            operations=self.operations,
            settings=self.settings,
        )

    def _load_version(self, name: str, version: str, directory: Path) -> tuple[LoadedModel, float | None]:
        try:
            return self._loader.load(name, version, directory, self._loop)
        except DeviceLostError:
            self._device_lost = True
            raise


def loader_of(settings: Settings, metrics: Metrics, cpus: int) -> Loader:
    """Return what opens models in this process, with sessions for so many processors."""
    return Loader(
        metrics,
        device=place(settings.device, settings.plugin, settings.plugin_hardware, settings.plugin_options),
        sessions=settings.sessions,
        cpus=cpus,
        threads_per_session=settings.threads_per_session,
        max_batch=settings.max_batch,
        linger_s=settings.linger_ms / 1000,
        gpu=Cuda(
            settings.cuda_search,
            settings.cuda_nhwc,
            settings.cuda_tf32,
            settings.cuda_graphs,
            settings.cuda_memory_mb * 1_000_000,
        ),
        engines=Engines(settings.max_batch, settings.tensorrt_cache, settings.tensorrt_fp16),
        renames=bool(settings.model_name),
    )


def _tracer_of(settings: Settings, worker: int) -> Tracer | None:
    """Return what traces requests, if somebody asks for it: the settings, or OpenTelemetry's own variables.

    Raises:
        SettingsError: the settings ask for it, and it is not installed.
    """
    if not (settings.trace_endpoint or asked_by(os.environ)) or is_switched_off(os.environ):
        return None
    try:
        from app.otlp import create_sink
    except ModuleNotFoundError as error:
        missing = f"needs the extra otel, of which {error.name} is missing: pip install 'convoy-serve[otel]'."
        if settings.trace_endpoint:
            raise SettingsError(f"trace_endpoint {missing}") from None
        # The variables may be meant for all services of a platform, and are no reason not to serve.
        log.warning(f"no traces: OTEL_EXPORTER_OTLP_ENDPOINT {missing}")
        return None
    sink = create_sink(settings.trace_endpoint, "https" if settings.tls_certificate else "http", worker)
    return Tracer(sink, settings.trace_ratio)
