"""The engine process: owns the sessions, and batches over all fronts.

It reads rows where the fronts have put them, runs them through the same batchers as a process that does everything by
itself, and writes the scores into the same place. Several fronts that ask for the same files share one model. Whoever
is gone has nothing run any more. Knows nothing of HTTP, images or answers.
"""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from app import logs
from app.cluster.slab import SMALLEST_ROOM, Slab, create_slab, packed_bytes
from app.cluster.wire import (
    NUMBER,
    PACKET_BYTES,
    REASON_LENGTH,
    REPLY,
    REQUEST,
    SHARE,
    Kind,
    Mailbox,
    Packets,
    Reply,
    Request,
    Share,
    Status,
    heard,
    recorded,
    records_of,
    spoken,
)
from app.errors import ConvoyError, DeviceLostError, SettingsError, UnavailableError
from app.gone import Gone
from app.loading import Load, LoadedModel
from app.metrics import Metrics
from app.pages import LONG_AGO, WriterState
from app.progress import Progress
from app.runs import Job, Runs
from app.tensors import Array
from app.versions import Stamp, stamp_of
from app.vitals import Vitals

log = logging.getLogger(__name__)

TICK_S = 0.1
REASON_BYTES = SMALLEST_ROOM - 256


class _Opened:
    """A model that fronts have opened; it is closed when the last of them has closed it."""

    def __init__(self, name: str, version: str, loading: "asyncio.Future[tuple[LoadedModel, float | None]]") -> None:
        self.name, self.version = name, version
        self.loading = loading
        self.users = 0

    @property
    def model(self) -> LoadedModel | None:
        """What was loaded; None: it is being loaded, or cannot be."""
        if not self.loading.done() or self.loading.cancelled() or self.loading.exception() is not None:
            return None
        return self.loading.result()[0]

    @property
    def batcher(self) -> Runs | None:
        """What runs it; None as above."""
        model = self.model
        return None if model is None else model.batcher


class _Run:
    """A batch in which sampled requests have rows, as the batcher's `BatchMarks`."""

    __slots__ = ("_number", "_parts", "_taken_at")

    def __init__(self, number: int, taken_at: float) -> None:
        self._number, self._taken_at = number, taken_at
        self._parts: list[tuple[_Answer, int]] = []

    def add(self, answer: "_Answer", rows: int) -> None:
        """Note a request's rows."""
        self._parts.append((answer, rows))

    def end(self, started: float, seconds: float, *, rows: int, requests: int, session: int, **_: object) -> None:
        """Note the run for those who are sampled; on the session's thread, before their answers go out."""
        for answer, own in self._parts:
            answer.shares.append(
                Share(
                    answer.number,
                    self._number & 0xFFFFFFFF,
                    session,
                    own,
                    rows,
                    requests,
                    self._taken_at,
                    started,
                    seconds,
                )
            )


class _Answer:
    """A request of a front: whom its job answers, and what the job notes, as the batcher's `Marks`."""

    __slots__ = ("_front", "_numbers", "_sampled", "given_up", "job", "number", "opened", "room", "shares", "size")

    def __init__(self, front: "_Front", request: Request, opened: _Opened, numbers: Iterator[int]) -> None:
        self._front = front
        self._numbers = numbers
        self._sampled = bool(request.sampled)
        self.number, self.room, self.size = request.number, request.room, request.size
        self.opened = opened
        self.job: Job | None = None
        self.given_up = False
        self.shares: list[Share] = []

    def take(self, batch: _Run | None, taken_at: float, rows: int) -> _Run | None:
        """Note that a session has taken some rows; under the line's lock."""
        self._front.mark_taken(self.room)
        if self._sampled:
            batch = batch or _Run(next(self._numbers), taken_at)
            batch.add(self, rows)
        return batch

    def done(self) -> bool:
        """Tell that the end always matters, whoever waits: only then the room is free."""
        return self.job is None

    def set_result(self, outputs: tuple[Array, ...], /) -> None:
        """Write the scores into the room, and tell."""
        self._front.finish(self, outputs)

    def set_exception(self, error: Exception, /) -> None:
        """Tell what went wrong."""
        self._front.fail(self, error)


class EngineProcess:
    """Serves fronts with the models that they ask for, on the running loop."""

    def __init__(self, metrics: Metrics, load: Load, progress: Progress | None = None) -> None:
        """Prepare.

        Args:
            metrics: where it counts, and its page.
            load: opens a version; called on a thread of its own, one version at a time.
            progress: how far it is with that; None: nobody knows.
        """
        self._progress = progress or Progress()
        self._page = metrics.page
        self._load = load
        self._loop = asyncio.get_running_loop()
        self._fronts: set[_Front] = set()
        self._models: dict[tuple[str, str, str, Stamp], _Opened] = {}
        self._gone = Gone(metrics)
        # One at a time: ONNX Runtime while it makes a session, and a GPU's memory, want it so.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._stopping = self._device_lost = False
        self.batches = count(1)
        """Numbers that tell batches apart."""

    def meet(self, number: int, connection: socket.socket) -> None:
        """Serve one more front."""
        self._fronts.add(_Front(self, number, connection))

    def part(self, front: "_Front") -> None:
        """Forget a front that is gone."""
        self._fronts.discard(front)

    def stop(self) -> None:
        """End as soon as no front is left: whoever is still there has requests to answer."""
        self._stopping = True

    async def run(self, vitals: Vitals) -> None:
        """Serve until `stop`, and show how this process is."""
        vitals.start()
        shown = None
        while self._fronts or not self._stopping:
            self._page.beat()
            running = min(filter(None, (model.batcher.running_since for model in self._loaded())), default=0.0)
            self._page.show_run(LONG_AGO if self._device_lost else running)
            vitals.show()
            if (loading := self._progress.told) != shown:
                self._page.tell(WriterState.READY, {"loading": loading})
                shown = loading
            await asyncio.sleep(TICK_S)

    def show_queues(self) -> int:
        """Show each model's line and sessions; returns how many sessions run here."""
        return sum(model.batcher.show() for model in self._loaded())

    def providers(self) -> set[str]:
        """Return where models run: `cpu`, `cuda`, `tensorrt` or a plug-in's name."""
        return {model.provider for model in self._loaded()}

    def _loaded(self) -> list[LoadedModel]:
        return [opened.model for opened in self._models.values() if opened.model is not None]

    async def open(self, name: str, version: str, directory: str) -> tuple[_Opened, LoadedModel, float | None]:
        """Open a version for one more front, or share the one that is open, if its files are the same."""
        key = name, version, directory, await asyncio.to_thread(stamp_of, Path(directory))
        opened = self._models.get(key)
        if opened is None:
            loading = self._loop.run_in_executor(self._loader, self._load, name, version, Path(directory))
            opened = self._models[key] = _Opened(name, version, loading)
        opened.users += 1
        try:
            model, difference = await asyncio.shield(opened.loading)
        except BaseException as error:
            self._device_lost = self._device_lost or isinstance(error, DeviceLostError)
            self.let_go(opened)
            raise
        return opened, model, difference

    def let_go(self, opened: _Opened) -> None:
        """Close a model that one front less uses; the last one ends it, and what waits in its line is still run."""
        opened.users -= 1
        if opened.users:
            return
        self._models = {key: other for key, other in self._models.items() if other is not opened}
        if not opened.loading.done():  # nobody waits for it any more; it closes when it is there
            opened.loading.add_done_callback(lambda _: self._close(opened))
        else:
            self._close(opened)

    def _close(self, opened: _Opened) -> None:
        batcher = opened.batcher
        if batcher is None:
            return
        threading.Thread(target=batcher.close, name=f"retire-{opened.name}", daemon=True).start()
        log.info("model closed", extra={"model": opened.name, "version": opened.version})
        there: dict[str, set[str]] = {}
        for other in self._models.values():
            there.setdefault(other.name, set()).add(other.version)
        self._gone.settle(there)


class _Front:
    """One front, as the engine sees it: its slab, the models that it has opened, its requests."""

    def __init__(self, engine: EngineProcess, number: int, connection: socket.socket) -> None:
        self._engine = engine
        self._number = number
        self._loop = asyncio.get_running_loop()
        self._slab: Slab | None = None
        self._models: dict[int, tuple[_Opened, LoadedModel]] = {}
        self._opening: dict[int, asyncio.Task[None]] = {}
        self._answers: dict[int, _Answer] = {}
        self._replies: list[Reply] = []
        self._shares: list[Share] = []
        self._packets = Packets(connection, self._take, self._lost)

    def mark_taken(self, room: int) -> None:
        """Note in the slab that the rows in a room are being run; on a session's thread."""
        if self._slab is not None:
            self._slab.mark_taken(room)

    def finish(self, answer: _Answer, outputs: tuple[Array, ...]) -> None:
        """Write scores into the room that the rows were in, and tell the front."""
        job, answer.job = answer.job, None
        if job is None or self._slab is None:
            return
        status = Status.DONE
        if not answer.given_up:
            try:
                self._write(self._slab, answer, outputs)
            except Exception as error:  # a batch has other answers too
                log.exception("scores could not be handed over", extra={"front": self._number})
                self._write_reason(answer.room, f"Its scores could not be handed over: {error}.")
                status = Status.FAILED
        self._end(answer, job, status)

    def _write(self, slab: Slab, answer: _Answer, outputs: tuple[Array, ...]) -> None:
        """Write scores where the front finds them."""
        size = packed_bytes(outputs)
        if size <= answer.size:
            slab.pack(answer.room, outputs)
            return
        descriptor, extra = create_slab(size)
        extra.pack(0, outputs)
        extra.close()
        self._packets.send(spoken(Kind.LARGE, answer.number, size), descriptor)

    def fail(self, answer: _Answer, error: Exception) -> None:
        """Tell the front what went wrong with a request, none of whose other rows is wanted any more."""
        job, answer.job = answer.job, None
        if job is None or self._slab is None:
            return
        if job.waiting_rows and answer.opened.batcher is not None:
            answer.opened.batcher.abandon(job)
        status = Status.CLOSED if isinstance(error, UnavailableError) else Status.FAILED
        self._write_reason(answer.room, error.message if isinstance(error, ConvoyError) else str(error))
        self._end(answer, job, status)

    def _end(self, answer: _Answer, job: Job, status: Status) -> None:
        self._answers.pop(answer.number, None)
        if not self._replies:
            self._loop.call_soon(self._flush)  # one packet for all of a batch
        self._shares += answer.shares
        self._replies.append(Reply(answer.number, status, job.queued_s, job.infer_s))

    def _flush(self) -> None:
        shares, self._shares = self._shares, []
        replies, self._replies = self._replies, []
        for packet in recorded(Kind.BATCHES, SHARE, shares):
            self._packets.send(packet)
        for packet in recorded(Kind.ANSWERS, REPLY, replies):
            self._packets.send(packet)

    def _take(self, kind: Kind, packet: bytes, descriptors: list[int]) -> None:
        match kind:
            case Kind.JOBS:
                for record in records_of(REQUEST, packet):
                    self._begin(Request(*record))
            case Kind.GIVE_UP:
                for (number,) in records_of(NUMBER, packet):
                    self._give_up(number)
            case Kind.OPEN:
                token, wanted = heard(packet)
                self._opening[token] = self._loop.create_task(self._open(token, *wanted))
            case Kind.CLOSE:
                self._close(heard(packet)[0])
            case Kind.HELLO:
                _, size = heard(packet)
                self._slab = Slab(descriptors[0], size)
            case _:
                log.error("a front speaks out of turn", extra={"front": self._number, "kind": kind.name})
        for descriptor in descriptors:
            os.close(descriptor)

    def _begin(self, request: Request) -> None:
        opened, model = self._models.get(request.model, (None, None))
        if opened is None or model is None or self._slab is None:
            self._refuse(request, "The model is being unloaded; try again.")
            return
        answer = _Answer(self, request, opened, self._engine.batches)
        self._answers[request.number] = answer
        try:
            inputs = self._slab.unpack(request.room, request.size)
            answer.job = model.batcher.submit(
                inputs,
                request.rows,
                request.deadline,
                request.urgency,
                model.kind_of(inputs),
                answer,
                answer,
            )
        except UnavailableError as error:
            del self._answers[request.number]
            self._refuse(request, error.message)
        except Exception as error:  # a packet has other requests too
            log.exception("a request could not be read", extra={"front": self._number})
            del self._answers[request.number]
            self._refuse(request, f"The rows could not be read: {error}.", Status.FAILED)

    def _refuse(self, request: Request, reason: str, status: Status = Status.CLOSED) -> None:
        if self._slab is not None:
            self._write_reason(request.room, reason)
            for packet in recorded(Kind.ANSWERS, REPLY, [Reply(request.number, status, 0.0, 0.0)]):
                self._packets.send(packet)

    def _write_reason(self, room: int, reason: str) -> None:
        """Write a sentence into a room, as much of it as fits into the smallest one."""
        if self._slab is not None:
            text = reason.encode()[:REASON_BYTES].decode(errors="ignore")
            self._slab.pack(room, (np.array([text], object),))

    def _give_up(self, number: int) -> None:
        answer = self._answers.get(number)
        if answer is None or answer.job is None:  # it has just ended
            return
        job = answer.job
        answer.given_up = True
        if not job.waiting_rows:  # a session has all of it, and will tell
            return
        if answer.opened.batcher is not None:
            answer.opened.batcher.abandon(job)
        if job.waiting_rows:  # none was taken meanwhile, or not all
            # A batch that has some of it already may go on reading the room: what comes of that, nobody gets.
            answer.job = None
            self._end(answer, job, Status.DROPPED)

    async def _open(self, token: int, name: str, version: str, directory: str) -> None:
        try:
            opened, model, difference = await self._engine.open(name, version, directory)
        except DeviceLostError:
            return  # this process ends, and the one that takes its place is asked
        except Exception as error:
            kind = "settings" if isinstance(error, SettingsError) else "bundle"
            reason = error.message if isinstance(error, ConvoyError) else f"{type(error).__name__}: {error}"
            self._packets.send(spoken(Kind.OPENED, token, {"fault": kind, "reason": reason[:REASON_LENGTH]}))
            return
        finally:
            self._opening.pop(token, None)
        if not self._packets.is_open:
            self._engine.let_go(opened)
            return
        if token in self._models:  # asked for twice, as an engine came: what was opened first is what runs
            self._engine.let_go(opened)
            opened, model = self._models[token]
        said = spoken(Kind.OPENED, token, described(model, difference))
        if len(said) > PACKET_BYTES:
            self._engine.let_go(opened)
            reason = f"Its tensors' names and shapes take {len(said):,} bytes, and {PACKET_BYTES:,} can be told."
            said = spoken(Kind.OPENED, token, {"fault": "bundle", "reason": reason})
        else:
            self._models[token] = opened, model
        self._packets.send(said)

    def _close(self, token: int) -> None:
        opened, _ = self._models.pop(token, (None, None))
        if opened is not None:
            self._engine.let_go(opened)

    def _lost(self) -> None:
        """The front has ended, or died: what it had waiting is not run."""
        log.info("front gone", extra={"front": self._number, "requests": len(self._answers)})
        for answer in self._answers.values():
            job, answer.job = answer.job, None  # what has not come into its line yet never will
            if job is not None and answer.opened.batcher is not None:
                answer.opened.batcher.abandon(job)
        for token in list(self._models):
            self._close(token)
        self._answers.clear()
        if self._slab is not None:
            self._slab.close()  # sessions that still read it hold it
            self._slab = None
        self._engine.part(self)


def described(model: LoadedModel, difference: float | None) -> dict[str, Any]:
    """Return what a front must know of a model that an engine has opened, for JSON."""
    return {
        "digest": model.digest,
        "provider": model.provider,
        "inputs": [[spec.name, spec.datatype, list(spec.shape)] for spec in model.inputs],
        "outputs": [[spec.name, spec.datatype, list(spec.shape)] for spec in model.outputs],
        "max_batch": model.max_batch,
        "unbatched_why": model.unbatched_why,
        "parallel": model.batcher.parallel,
        "difference": difference,
    }


async def serve(
    metrics: Metrics,
    load: "LoadOn",
    mailbox: socket.socket,
    lifeline: int,
    *,
    device: str,
    threads_per_session: int,
    progress: Progress | None = None,
) -> None:
    """Be an engine until SIGTERM, or until the supervisor is gone.

    Args:
        metrics: where it counts, and its page.
        load: opens a version for a loop.
        mailbox: through which fronts are met.
        lifeline: a pipe's end that is closed when the supervisor is gone.
        device: where models should run.
        threads_per_session: inside each session.
        progress: how far `load` is; None: nobody knows.
    """
    loop = asyncio.get_running_loop()
    engine = EngineProcess(metrics, lambda name, version, directory: load(name, version, directory, loop), progress)
    meetings = Mailbox(mailbox, engine.meet)

    def supervisor_is_gone() -> None:
        loop.remove_reader(lifeline)
        log.error("the supervisor is gone: ending with the last front")
        engine.stop()

    loop.add_signal_handler(signal.SIGTERM, engine.stop)
    loop.add_signal_handler(signal.SIGUSR1, logs.change_level, 1)
    loop.add_signal_handler(signal.SIGUSR2, logs.change_level, -1)
    loop.add_reader(lifeline, supervisor_is_gone)
    vitals = Vitals(metrics, engine, device=device, decode_threads=0, threads_per_session=threads_per_session)
    await engine.run(vitals)
    vitals.close()
    meetings.close()


LoadOn = Callable[[str, str, Path, asyncio.AbstractEventLoop], tuple[LoadedModel, float | None]]
"""`Loader.load`."""
