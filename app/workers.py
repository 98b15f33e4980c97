"""Workers: several processes on one listening socket, and engines behind them, watched by one that does nothing else.

The supervisor binds the port, makes the pages, and starts each worker as a fresh interpreter that inherits both by
descriptor; it loads neither ONNX Runtime nor FastAPI. A worker that dies is replaced, one that hangs is killed first.

    SIGTERM, SIGINT   every worker drains and ends; a second signal cuts off what still runs
    SIGHUP            one worker after the other is replaced, each by one that is ready before the old one drains
    SIGUSR1, SIGUSR2  every process logs more, or less, by one level

A worker's standard input is its lifeline: the supervisor writes the settings into it and then holds it open for as long
as it lives. With engines (`app/cluster/`), which start first and end last, it introduces each worker to each of them,
through a mailbox that each process has. Knows processes and pages; nothing of requests or models.
"""

import asyncio
import logging
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path

from app import logs
from app.accept import listen, listen_for_probes, reserve_for_grpc, url_of
from app.board import Board
from app.cluster.wire import introduce
from app.cpus import usable_cpus
from app.errors import ConvoyError, SettingsError
from app.metrics import CAUSES, Metrics
from app.pages import Page, WriterState, create_shared, open_common, open_engines, open_shared
from app.probes import ProbePort, Probes, is_stuck
from app.settings import Settings

log = logging.getLogger(__name__)

EXIT_FAULT = 2
"""A worker's exit status for a fault that the user can mend; the sentence is in its note."""
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 10.0
YOUNG_S = 10.0
"""A worker that dies younger is not replaced at once: it would most likely die again."""
HANGS_S = 30.0
CUT_OFF_S = 3.0
"""Time to end after the drain, or after it was cut off; then a worker is killed."""
TICK_S = 0.05
DESCRIPTORS = 65_536
ALL_WORKERS = ""
"""In place of a model's name, in the series of reloads."""

# The child finds this package where the parent found it, whatever its own directory holds.
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from {} import {} as run; run(*map(int, sys.argv[2:]))"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


def serve(settings: Settings) -> None:
    """Serve until a signal, with as many processes as the settings say; blocks.

    Raises:
        SettingsError: no models, no port, no such device, or several processes on a system that cannot share memory.
        RuntimeMissingError: there is no usable ONNX Runtime.
    """
    _take_all_descriptors()
    if not (settings.keys or settings.is_private()):
        log.warning("whoever reaches this address may ask: no keys are set", extra={"host": settings.host})
    count = settings.workers or usable_cpus()
    if count == 1 and not settings.engines:
        from app import processes

        processes.serve(settings)
        return
    if not hasattr(os, "memfd_create"):
        raise SettingsError("More than one process needs Linux: set --workers 1 or CONVOY_WORKERS=1, and no engines.")
    with listen(settings.host, settings.port) as listener, reserve_for_grpc(settings):
        Supervisor(settings, count, listener, listen_for_probes(settings)).run()


def _take_all_descriptors() -> None:
    """Use as many descriptors as the system allows: shells and service managers often begin with 1,024 of them.

    Each connection is one; a worker that has none left could not meet an engine that comes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def share_of(settings: Settings, workers: int) -> Settings:
    """Return one worker's settings: its share of what may be inside the whole service.

    A share is never smaller than the largest single request, which would otherwise find no worker that may take it.
    """
    images = math.ceil(settings.max_inflight_images / workers)
    body_bytes = math.ceil(settings.max_inflight_bytes / workers)
    return settings.model_copy(
        update={
            "max_inflight_images": max(images, min(settings.max_images_per_request, settings.max_inflight_images)),
            "max_inflight_bytes": max(body_bytes, min(settings.max_body_bytes, settings.max_inflight_bytes)),
            # An image of any size may come where nothing waits, so a small share refuses nobody for ever.
            "max_inflight_pixels": math.ceil(settings.max_inflight_pixels / workers),
            "model_limits": ",".join(_shared_limit(part, workers) for part in settings.model_limits.split(",")),
        }
    )


def _shared_limit(part: str, workers: int) -> str:
    """Return one worker's share of a limit such as `imagenet=64`; what is none is left to the check."""
    name, _, limit = part.strip().partition("=")
    return f"{name}={math.ceil(int(limit) / workers)}" if limit.isdecimal() else part


class Worker:
    """One process, as the supervisor sees it."""

    kind = "worker"

    def __init__(
        self,
        page: Page,
        command: list[str],
        settings: Settings,
        descriptors: list[int],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            page: its.
            command: what it runs; the descriptor of its mailbox is added.
            settings: its.
            descriptors: what it inherits.
            environment: what it has besides this process's.

        Raises:
            OSError: there is no process to be had.
        """
        self.page = page
        self.mailbox, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.mailbox.setblocking(False)  # who reads none of it must not hold up the supervisor
        # A process group of its own: Ctrl-C in a terminal goes to the supervisor alone, which passes it on once.
        try:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[*descriptors, theirs.fileno()],
                process_group=0,
                env={**os.environ, **(environment or {})},
            )
        except OSError:
            self.mailbox.close()
            raise
        finally:
            theirs.close()
        page.take_over(self.process.pid)
        self.started = time.monotonic()
        self.ended = asyncio.Event()
        self.status = 0
        self.reason = ""
        self.hung = False
        """Whether it was killed because its event loop stood still."""
        self._heartbeat = page.heartbeat
        self._silent_ticks = 0
        self._stuck_s = settings.stuck_s
        self._log_level: str = settings.log_level
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(settings.model_dump_json().encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has died already, which is seen like any other death
            pass

    @property
    def number(self) -> int:
        """The worker's number: its page's."""
        return self.page.number

    @property
    def age_s(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.started

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        self.process.send_signal(number)

    def reap(self) -> bool:
        """Tell whether it has ended since the last time; its page is free then."""
        if self.ended.is_set() or self.process.poll() is None:
            return False
        self.status = self.process.returncode
        self.reason = self.page.note.get("reason", "")
        self.page.release()
        self.mailbox.close()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.ended.set()
        return True

    def log_at(self, level: str) -> None:
        """Bring its log a step nearer to a level; call at every tick: of two signals at once only one would arrive."""
        behind = logs.LEVELS.index(level) - logs.LEVELS.index(self._log_level)
        # Before it has begun to heed the signal, that would kill it.
        if behind and self.page.state is not WriterState.STARTING:
            step = 1 if behind > 0 else -1
            self.signal(signal.SIGUSR1 if step > 0 else signal.SIGUSR2)
            self._log_level = logs.LEVELS[logs.LEVELS.index(self._log_level) + step]

    def hangs(self) -> bool:
        """Tell whether its event loop has stood still too long, or a session is stuck in a run; call at every tick.

        For the loop, the supervisor's ticks are counted, not seconds: after a pause of the whole machine or container
        all is well.
        """
        if self.page.heartbeat != self._heartbeat or self.page.state is WriterState.STARTING:
            self._heartbeat, self._silent_ticks = self.page.heartbeat, 0
        else:
            self._silent_ticks += 1
        return self._silent_ticks * TICK_S > HANGS_S or is_stuck(self.page.run_s, self._stuck_s)


class EngineWorker(Worker):
    """A process that runs models for the workers."""

    kind = "engine"


class Place:
    """Where one worker belongs: whoever fills it is replaced when it dies."""

    def __init__(self, start: Callable[[], Worker]) -> None:
        """Fill it; `start` starts a worker for this place."""
        self.start = start
        self.worker = start()


class Supervisor:
    """Starts workers and engines, keeps them running, replaces them, and ends them."""

    engine_entry = "app.workers", "run_engine"
    """Module and function that an engine is; a benchmark has another, over a device that it only pretends to have."""

    def __init__(self, settings: Settings, count: int, listener: socket.socket, probes: socket.socket | None) -> None:
        self._settings = settings
        self._count = count
        self._listener = listener
        engines = settings.engines
        self._memory = create_shared(count + 1, engines)  # one more: during a reload old and new are side by side
        self._pages = open_shared(self._memory, engines)
        self._engine_pages = open_engines(self._memory, engines)
        self._free = list(self._pages)
        self._workers: list[Worker] = []
        """All that run, engines among them."""
        # On the board's page, of which the board needs the note alone.
        common = open_common(self._memory)
        self._metrics = Metrics(common, self._pages, common, engines=self._engine_pages, slo_s=settings.slo_ms / 1000)
        for cause in CAUSES:
            self._metrics.worker_exits.labels(cause).inc(0)
        self._probe_port = ProbePort(Probes(self._metrics), probes)
        self._stopping = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._was_ready = False
        self._fault: SettingsError | None = None

    def run(self) -> None:
        """Supervise until a signal; blocks. Returns when every worker has ended.

        Raises:
            SettingsError: the workers cannot start with these settings.
        """
        asyncio.run(self._run())
        if self._fault is not None:
            raise self._fault

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        handlers: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: self._stop,
            signal.SIGINT: self._stop,
            signal.SIGHUP: self._reload_wanted.set,
            signal.SIGUSR1: lambda: self._change_log_level(1),
            signal.SIGUSR2: lambda: self._change_log_level(-1),
            signal.SIGCHLD: self._reap,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        async with self._probe_port:
            url = url_of(self._listener, secure=bool(self._settings.tls_certificate))
            log.info("listening", extra={"url": url, "workers": self._count})
            engines = [Place(partial(self._start_engine, page)) for page in self._engine_pages]
            places = [Place(self._start) for _ in range(self._count)]
            works: list[Coroutine[None, None, object]] = [
                *map(self._keep, [*engines, *places]),
                self._watch(),
                self._reload_on_demand(places),
            ]
            tasks = [loop.create_task(work) for work in (*works, self._stopping.wait())]
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await self._drain()
            for task in ended:
                task.result()  # raises what ended it, if that was an error
        log.info("stopped")

    def _start(self) -> Worker:
        """Start a worker on the first free page."""
        page = self._free.pop(0)
        descriptors = [self._listener.fileno(), self._memory]
        settings = share_of(self._settings, self._count)
        try:
            worker = Worker(page, _command(("app.workers", "work"), page, descriptors), settings, descriptors)
        except OSError:
            self._free.append(page)
            raise
        self._welcome(worker)
        return worker

    def _start_engine(self, page: Page) -> Worker:
        """Start an engine on its page, with the GPU that is its own where there are several engines."""
        place = page.number - self._engine_pages[0].number
        environment = gpu_of(place, len(self._engine_pages), os.environ)
        command = _command(self.engine_entry, page, [self._memory])
        engine = EngineWorker(page, command, self._settings, [self._memory], environment)
        self._welcome(engine)
        return engine

    def _welcome(self, new: Worker) -> None:
        """Note a process that has started, and introduce it to those that it works with."""
        for other in self._workers:
            if other.kind != new.kind:
                introduce((new.mailbox, new.number), (other.mailbox, other.number))
        self._workers.append(new)
        log.info(f"{new.kind} started", extra={new.kind: new.number, "pid": new.process.pid})

    def _reap(self) -> None:
        """Note which workers have ended."""
        for worker in [worker for worker in self._workers if worker.reap()]:
            self._workers.remove(worker)
            if worker.kind == "worker":
                self._free.append(worker.page)
                self._free.sort(key=lambda page: page.number)

    def _change_log_level(self, steps: int) -> None:
        """Log more or less, in every process, and in those that are yet to start."""
        self._settings = self._settings.model_copy(update={"log_level": logs.change_level(steps)})

    def _stop(self) -> None:
        """Begin to stop; the second time, cut off what still runs."""
        if self._stopping.is_set():
            for worker in self._workers:
                worker.signal(signal.SIGINT)
        self._stopping.set()

    async def _watch(self) -> None:
        """Kill workers that hang, and note when one was ready for the first time."""
        while True:
            await asyncio.sleep(TICK_S)
            for worker in self._workers:
                ready = worker.kind == "worker" and worker.page.state is WriterState.READY
                self._was_ready = self._was_ready or ready
                worker.log_at(self._settings.log_level)
                if not worker.hung and worker.hangs():  # it may take a while to end
                    worker.hung = True
                    log.error(
                        f"{worker.kind} hangs: killing it",
                        extra={worker.kind: worker.number, "pid": worker.process.pid},
                    )
                    worker.signal(signal.SIGKILL)

    async def _keep(self, place: Place) -> None:
        """Keep one place filled, whatever ends its worker."""
        pause = FIRST_PAUSE_S
        while True:
            worker = place.worker
            await worker.ended.wait()
            if self._stopping.is_set():
                return
            if place.worker is not worker:  # a reload has put another one here
                continue
            if worker.status == EXIT_FAULT and not self._was_ready:
                self._fault = SettingsError(worker.reason or "The workers could not start; the log has the reason.")
                self._stopping.set()
                return
            young = worker.age_s < YOUNG_S
            wait = pause if young else 0.0
            pause = min(2 * pause, LAST_PAUSE_S) if young else FIRST_PAUSE_S
            self._metrics.worker_exits.labels("hung" if worker.hung else "died").inc()
            log.error(
                f"{worker.kind} died",
                extra={
                    worker.kind: worker.number,
                    "pid": worker.process.pid,
                    "cause": _cause(worker.status),
                    "lived_s": round(worker.age_s, 1),
                    "replaced_in_s": wait,
                    **({"reason": worker.reason} if worker.status == EXIT_FAULT else {}),
                },
            )
            await self._fill(place, worker, wait)

    async def _fill(self, place: Place, dead: Worker, wait_s: float) -> None:
        """Put a new worker where one has died, unless a reload does so first."""
        while True:
            await asyncio.sleep(wait_s)
            if place.worker is not dead or self._stopping.is_set():
                return
            try:
                place.worker = place.start()
                return
            except OSError as error:
                log.error(f"no {dead.kind} could be started", extra={"reason": str(error), "again_in_s": LAST_PAUSE_S})
                wait_s = LAST_PAUSE_S

    async def _reload_on_demand(self, places: list[Place]) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            try:
                await self._reload(places)
            except OSError as error:
                log.error("reload given up", extra={"reason": str(error)})
                self._metrics.reloaded(ALL_WORKERS, ok=False)

    async def _reload(self, places: list[Place]) -> None:
        """Replace every worker, one after the other; where a new one is no good, the old ones stay."""
        log.info("reloading")
        for place in places:
            new = self._start()
            if not await self._becomes_ready(new):
                reason = new.reason or new.page.note.get("reason", "")
                log.error("reload given up: the old workers stay", extra={"worker": new.number, "reason": reason})
                self._metrics.reloaded(ALL_WORKERS, ok=False)
                await self._end(new)
                return
            old, place.worker = place.worker, new
            await self._end(old)
            log.info("worker replaced", extra={"worker": old.number, "by": new.number, "pid": new.process.pid})
        log.info("reloaded")
        self._metrics.reloaded(ALL_WORKERS, ok=True)

    async def _becomes_ready(self, worker: Worker) -> bool:
        """Wait until a worker is ready, or certain not to become so."""
        while not worker.ended.is_set() and worker.page.state is not WriterState.FAILED:
            if worker.page.state is WriterState.READY:
                return True
            await asyncio.sleep(TICK_S)
        return False

    async def _drain(self) -> None:
        """End every worker, and then the engines; their connections are refused from now on."""
        self._listener.close()
        for kind in ("worker", "engine"):
            await asyncio.gather(*[self._end(worker) for worker in self._workers if worker.kind == kind])

    async def _end(self, worker: Worker) -> None:
        """Let a worker drain and end; kill it where it takes too long."""
        worker.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(worker.ended.wait(), self._settings.drain_timeout_s + CUT_OFF_S)
        except TimeoutError:
            log.error(
                f"{worker.kind} does not end: killing it", extra={worker.kind: worker.number, "pid": worker.process.pid}
            )
            worker.signal(signal.SIGKILL)
            await worker.ended.wait()


def gpu_of(place: int, engines: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what shows an engine the GPU that is its own: one each, in the order of those that may be used.

    Args:
        place: which engine, from 0.
        engines: how many there are; a single one sees all GPUs, and takes the first.
        environment: says which GPUs may be used, if not all: `CUDA_VISIBLE_DEVICES`.
    """
    if engines == 1:
        return {}
    visible = [word for word in environment.get(VISIBLE_GPUS, "").split(",") if word.strip()]
    return {VISIBLE_GPUS: visible[place % len(visible)].strip() if visible else str(place)}


def _command(entry: tuple[str, str], page: Page, descriptors: Sequence[int]) -> list[str]:
    """Return the command of a process that runs a function, given by its module and name."""
    root = str(Path(__file__).parents[1])
    return [sys.executable, "-P", "-c", _BOOT.format(*entry), root, *map(str, (page.number, *descriptors))]


def work(number: int, listener: int, memory: int, mailbox: int) -> None:
    """Be one worker: read settings from standard input, serve, and end the process.

    Args:
        number: the worker's, and its page's.
        listener: descriptor of the listening socket.
        memory: descriptor of the pages.
        mailbox: descriptor of the socket through which it is introduced to engines.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # The supervisor's way to cut off: only the server heeds it, and not what comes after.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifeline = sys.stdin.fileno()
    settings = Settings.model_validate_json(_first_line(lifeline))
    logs.configure(settings.log_format, settings.log_level, worker=number)
    metrics = _metrics_of(settings, memory, number)
    board = Board(open_common(memory), memory)

    def serve_alone() -> None:
        from app import processes

        processes.share(
            settings, socket.socket(fileno=listener), metrics, board, lifeline, socket.socket(fileno=mailbox)
        )

    _be(serve_alone, metrics.page)


def run_engine(number: int, memory: int, mailbox: int) -> None:
    """Be one engine: read settings from standard input, run models for the workers, and end the process.

    Args:
        number: the engine's, and its page's.
        memory: descriptor of the pages.
        mailbox: descriptor of the socket through which it is introduced to workers.
    """

    def run(settings: Settings, metrics: Metrics, lifeline: int, mailbox: socket.socket) -> None:
        from app import processes

        processes.run_models(settings, metrics, lifeline, mailbox)

    be_engine(run, number, memory, mailbox)


def be_engine(
    run: Callable[[Settings, Metrics, int, socket.socket], None], number: int, memory: int, mailbox: int
) -> None:
    """Do what an engine process does around `run`, which gets settings, metrics, lifeline and mailbox."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifeline = sys.stdin.fileno()
    settings = Settings.model_validate_json(_first_line(lifeline))
    logs.configure(settings.log_format, settings.log_level, engine=number)
    metrics = _metrics_of(settings, memory, number)
    _be(lambda: run(settings, metrics, lifeline, socket.socket(fileno=mailbox)), metrics.page)


def _metrics_of(settings: Settings, memory: int, number: int) -> Metrics:
    """Return where a process counts."""
    pages, engines = open_shared(memory, settings.engines), open_engines(memory, settings.engines)
    page = [*pages, *engines][number - 1]
    return Metrics(page, pages, open_common(memory), engines=engines, slo_s=settings.slo_ms / 1000)


def _be(what: Callable[[], None], page: Page) -> None:
    """Do what this process is there for, and end it; a fault that the user can mend is told in its page."""
    status = 0
    try:
        what()
    except ConvoyError as fault:
        page.tell(WriterState.FAILED, {"reason": fault.message})
        status = EXIT_FAULT
    # As in `convoy serve`: native code that is stuck must not hold up the end.
    logging.shutdown()
    os._exit(status)


def _first_line(descriptor: int) -> bytes:
    """Read up to the end of a line and no further, or to the end."""
    line = b""
    while not line.endswith(b"\n") and (data := os.read(descriptor, 1)):
        line += data
    return line


def _cause(status: int) -> str:
    """Say how a process has ended."""
    return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
