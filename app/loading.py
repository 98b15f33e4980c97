"""Loading: from a version's directory to a model that has proved itself and takes work.

A directory holds a bundle (an image classifier, whose golden answers must come out) or any ONNX graph, which is served
as tensors. Knows nothing of which versions there are, nor of requests.
"""

import asyncio
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from app.batchable import fit_of, sample, why_rows_run_alone
from app.batcher import Batcher
from app.cuda import Cuda, batch_sizes
from app.drift import Sampler
from app.errors import BadRequestError, BundleError
from app.golden import prove, prove_tensors
from app.manifest import (
    GOLDEN_DIRECTORY,
    MANIFEST_FILE,
    MODEL_FILE,
    Bundle,
    Manifest,
    TensorManifest,
    read_manifest,
    sha256_of,
    verify_files,
    verify_tensor_files,
)
from app.metrics import Metrics, ModelMetrics
from app.plugins import Plugin
from app.progress import Progress
from app.runs import Runs
from app.sessions import ClassifierSession, Device, OnnxSession, Session
from app.tensorrt import Engines
from app.tensors import VARIABLE, Array, TensorSpec

DEVICE_SESSIONS = 2
"""Of a model on a GPU, if nobody says: one keeps it busy, and with two one copies while the other computes."""

_AnySession = TypeVar("_AnySession", bound=OnnxSession)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoadedModel:
    """A model that has proved itself and takes work.

    Attributes:
        name, version: what it is asked for by.
        digest: SHA-256 of its ONNX file.
        provider: where it runs, `cpu`, `cuda`, `tensorrt` or a plug-in's name.
        inputs, outputs: its tensors, in the graph's order.
        max_batch: rows of a run; 0: each request runs alone, in whatever shapes the graph takes.
        unbatched_why: where rows of different requests never share a run, why not; else empty.
        manifest: of an image classifier; None: it takes tensors only.
        tensor_manifest: what is known of a model of tensors, if anything is.
        batcher: runs it.
        metrics: its series.
        sampler: looks at some of an image classifier's predictions; None: it takes tensors only.
    """

    name: str
    version: str
    digest: str
    provider: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    unbatched_why: str
    manifest: Manifest | None
    tensor_manifest: TensorManifest | None
    batcher: Runs
    metrics: ModelMetrics
    sampler: Sampler | None = None

    @property
    def classifier(self) -> Manifest:
        """The manifest of an image classifier.

        Raises:
            BadRequestError: it takes tensors, not images.
        """
        if self.manifest is None:
            raise BadRequestError(
                f"Model '{self.name}' takes tensors, not images: ask /v2/models/{self.name}/infer.", code="not_images"
            )
        return self.manifest

    def kind_of(self, inputs: Sequence[Array]) -> Hashable:
        """Return what tells with whose rows these may share a run."""
        if not self.max_batch:
            return object()
        if all(VARIABLE not in spec.shape[1:] for spec in self.inputs):
            return None
        return tuple(array.shape[1:] for array in inputs)


class Loader:
    """Opens versions with one set of options."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        device: Device | Plugin,
        sessions: int,
        cpus: int = 1,
        threads_per_session: int,
        max_batch: int,
        linger_s: float,
        engines: Engines | None = None,
        gpu: Cuda | None = None,
        renames: bool = False,
    ) -> None:
        # `sessions` 0: as many as there are `cpus`, where those compute; two where another device does.
        # `renames`: a model is called what it is asked for by, whatever name its manifest has.
        self._renames = renames
        self._metrics = metrics
        self._device = device
        self._sessions, self._cpus = sessions, cpus
        self._threads = threads_per_session
        self._max_batch = max_batch
        self._linger_s = linger_s
        self._gpu = gpu
        self._engines = (engines or Engines()).at_least(max_batch)
        self.progress = Progress()
        """What is being done for the version that is being opened."""

    def load(
        self, name: str, version: str, directory: Path, loop: asyncio.AbstractEventLoop
    ) -> tuple[LoadedModel, float | None]:
        """Open a version, have it prove itself, warm it up, and start its batcher; blocks.

        Args:
            name: what its manifest must say that it is, if it has one.
            version: the same.
            directory: where its files are.
            loop: the event loop that will submit to it.

        Returns:
            The model, and the largest difference from its golden answers; None: it has none.

        Raises:
            BundleError: it is incomplete, altered, or does not reproduce its golden answers.
            SettingsError: a setting makes every model impossible (a device that is not there).
        """
        with self.progress.step(f"{name} {version}"):
            manifest = manifest_of(name, version, directory, self._renames)
            if isinstance(manifest, Manifest):
                return self._load_classifier(Bundle(directory, manifest), loop)
            return self._load_tensors(name, version, directory, manifest, loop)

    def _load_classifier(self, bundle: Bundle, loop: asyncio.AbstractEventLoop) -> tuple[LoadedModel, float]:
        manifest = bundle.manifest
        verify_files(bundle)
        sessions = self._opened(f"{manifest.name} {manifest.version}", lambda: self._classifier_session(bundle))
        differences = [0.0] * len(sessions)

        def prepare(number: int) -> None:
            differences[number] = prove(bundle, sessions[number].classify)
            warm_up(bundle, sessions[number], self._max_batch)

        metrics = self._metrics.for_model(manifest.name, manifest.version)
        model = LoadedModel(
            manifest.name,
            manifest.version,
            manifest.model.sha256,
            sessions[0].provider,
            sessions[0].inputs,
            sessions[0].outputs,
            self._max_batch,
            "",
            manifest,
            None,
            self._start(sessions, self._max_batch, loop, metrics, prepare),
            metrics,
            Sampler(manifest, self._metrics),
        )
        return model, max(differences)

    def _load_tensors(
        self,
        name: str,
        version: str,
        directory: Path,
        manifest: TensorManifest | None,
        loop: asyncio.AbstractEventLoop,
    ) -> tuple[LoadedModel, float | None]:
        path = directory / (manifest.model.file if manifest else MODEL_FILE)
        if manifest is not None:
            verify_tensor_files(directory, manifest)
        sessions = self._opened(
            f"{name} {version}", lambda: OnnxSession(path, self._device, self._threads, self._engines, self._gpu)
        )
        difference = None
        if manifest is not None and manifest.golden is not None:
            difference = max(prove_tensors(directory, manifest, session) for session in sessions)
        max_batch, why = self._how_it_batches(sessions[0], manifest)
        if sessions[0].provider == "tensorrt" and not max_batch and sessions[0].has_variable_inputs:
            raise BundleError(
                f"{path} takes whatever shapes each request has ({why}), and TensorRT would build an engine for each: "
                "serve it with device cuda."
            )

        def prepare(number: int) -> None:
            if max_batch > 1:
                sessions[number].bind(batch_sizes(max_batch))
            _warm_up_tensors(sessions[number], max_batch)

        metrics = self._metrics.for_model(name, version)
        row_by_row = bool(max_batch) and all(spec.shape[0] == 1 for spec in sessions[0].inputs)
        model = LoadedModel(
            name,
            version,
            manifest.model.sha256 if manifest else sha256_of(path),
            sessions[0].provider,
            tuple(map(_with_variable_rows, sessions[0].inputs)) if row_by_row else sessions[0].inputs,
            tuple(map(_with_variable_rows, sessions[0].outputs)) if row_by_row else sessions[0].outputs,
            max_batch,
            why,
            None,
            manifest,
            self._start(sessions, max(1, max_batch), loop, metrics, prepare),
            metrics,
        )
        return model, difference

    def _how_it_batches(self, session: OnnxSession, manifest: TensorManifest | None) -> tuple[int, str]:
        """Return the rows of a run (0: each request runs alone), and why rows of different requests never share one."""
        if manifest is not None and manifest.batching == "never":
            return 0, "Its manifest says that requests run alone."
        why = why_rows_run_alone(session)
        if why:
            return 0, why
        if all(spec.shape[0] == 1 for spec in session.inputs):
            return 1, "The first dimension is fixed at 1: rows run one by one."
        return self._max_batch, ""

    def _opened(self, which: str, open_one: Callable[[], _AnySession]) -> list[_AnySession]:
        """Return as many sessions as there are to be, made one after the other."""
        sessions: list[_AnySession] = []
        slow = ", for which TensorRT takes the engine that it has kept, or builds one, in minutes"
        while not sessions or len(sessions) < self.planned(sessions[0].provider):
            told = f"{which}: session {len(sessions) + 1}{slow if self._device == 'tensorrt' else ''}"
            with self.progress.step(told):
                sessions.append(open_one())
        return sessions

    def planned(self, provider: str) -> int:
        """Return how many sessions a model has that runs there."""
        by_cpus = provider == "cpu" or (isinstance(self._device, Plugin) and self._device.hardware == "cpu")
        return self._sessions or (self._cpus if by_cpus else DEVICE_SESSIONS)

    def _classifier_session(self, bundle: Bundle) -> ClassifierSession:
        # All golden images go through in one run.
        engines = self._engines.at_least(len(bundle.manifest.golden.images))
        session = ClassifierSession(bundle.model_path, self._device, self._threads, engines, self._gpu)
        check_graph(bundle, session)
        session.bind(batch_sizes(self._max_batch))
        return session

    def _start(
        self,
        sessions: Sequence[Session],
        max_batch: int,
        loop: asyncio.AbstractEventLoop,
        metrics: ModelMetrics,
        prepare: Callable[[int], None],
    ) -> Batcher:
        """Have every session prepared on its own thread, and return what runs them."""
        # On one GPU, sessions that try kernels at the same time would measure each other.
        turn = nullcontext() if sessions[0].provider == "cpu" else threading.Lock()
        failed = threading.Event()

        def prepare_in_turn(number: int) -> None:
            with turn:
                if failed.is_set():  # another has, and none is used
                    return
                try:
                    prepare(number)
                except BaseException:
                    failed.set()
                    raise

        with self.progress.step(f"{metrics.model} {metrics.version}: golden answers and first runs"):
            return Batcher(
                sessions,
                max_batch=max_batch,
                linger_s=self._linger_s,
                loop=loop,
                metrics=metrics,
                prepare=prepare_in_turn,
            )


def manifest_of(name: str, version: str, directory: Path, renames: bool) -> Manifest | TensorManifest | None:
    """Return what a version's directory says of itself; None: there is a graph that nothing is said of.

    Args:
        name: what it must say that it is.
        version: the same.
        directory: where its files are.
        renames: it is called `name`, whatever it says.

    Raises:
        BundleError: there is nothing, or it is another's.
    """
    manifest = _manifest_in(directory)
    if manifest is not None and renames:
        manifest = manifest.model_copy(update={"name": name})
    if manifest is not None and (manifest.name, manifest.version) != (name, version):
        raise BundleError(f"{directory} holds the manifest of {manifest.name} version {manifest.version}.")
    return manifest


def _manifest_in(directory: Path) -> Manifest | TensorManifest | None:
    """Return what a version's directory says of itself; None: there is a graph that nothing is said of.

    A golden set without a manifest is a bundle that has lost it, not a plain graph.
    """
    alone = not (directory / MANIFEST_FILE).exists() and not (directory / GOLDEN_DIRECTORY).exists()
    if alone and (directory / MODEL_FILE).exists():
        return None
    return read_manifest(directory)


def _with_variable_rows(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name, spec.datatype, (VARIABLE, *spec.shape[1:]))


def check_graph(bundle: Bundle, session: OnnxSession) -> None:
    """Check that a graph takes what the manifest's recipe gives and returns one number per label.

    Raises:
        BundleError: a dimension differs.
    """
    pixels, labels = bundle.manifest.pixels, bundle.manifest.labels
    taken, given = session.inputs[0].shape, session.outputs[0].shape
    if taken != (VARIABLE, pixels.height, pixels.width, 3):
        raise BundleError(
            f"{bundle.model_path} takes images of shape {list(taken)}, but the manifest's recipe makes "
            f"[N, {pixels.height}, {pixels.width}, 3]."
        )
    if len(given) != 2 or given[1] != len(labels):
        raise BundleError(
            f"{bundle.directory}: the manifest lists {len(labels)} labels, but the graph gives {given[-1]} classes."
        )


def warm_up(bundle: Bundle, session: Session, max_batch: int) -> None:
    """Run the batches that a session should have seen, so that no request pays for a first run.

    A GPU picks its kernels for each size that it knows. On CPU what counts is the
    memory of the largest: afterwards no size's first run costs more than its second (measured), and a replaced worker
    is back 0.2 s sooner with EfficientNet-Lite0.
    """
    pixels = bundle.manifest.pixels
    for rows in [max_batch] if session.provider == "cpu" else batch_sizes(max_batch):
        session.run(np.zeros((rows, pixels.height, pixels.width, 3), np.uint8))


def _warm_up_tensors(session: OnnxSession, max_batch: int) -> None:
    """Run the largest batch, on a GPU each; a graph that takes nothing that can be guessed stays cold."""
    fit = fit_of(session)
    if fit is not None:
        for rows in [max(1, max_batch)] if session.provider == "cpu" else batch_sizes(max(1, max_batch)):
            session.run(*sample(session.inputs, rows, fit))


Load = Callable[[str, str, Path], tuple[LoadedModel, float | None]]
"""`Loader.load` with its event loop."""
