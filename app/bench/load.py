"""The load generator: requests in a closed or an open loop over keep-alive connections, on the running event loop.

Owns connections and the moments of sending. Knows nothing of images or of how figures are shown. It must cost little,
because it often shares a machine with the service: raw protocols and a parser in C, no HTTP client.
"""

import asyncio
import itertools
import sys
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httptools

from app.bench.report import Report, Strain, report_of
from app.bench.requests import Endpoint
from app.bench.samples import UNANSWERED, Samples
from app.bench.ticker import Ticker

RETURN_S = 0.1
"""A closed-loop client whose connection failed, or that was refused without Retry-After, comes back after this: a
service that is gone or full is not hammered."""
CONNECT_TIMEOUT_S = 5.0
HEARTBEAT_S = 0.01


@dataclass(frozen=True, slots=True)
class Plan:
    """One run of load.

    `rate` None is the closed loop: each of `connections` sends its next request when the answer is there, or after a
    refusal (429) when Retry-After says so. Otherwise `rate` requests are due each second, whatever the service does,
    over at most `connections`; a latency counts from the moment at which its request was due.
    """

    endpoint: Endpoint
    requests: Sequence[bytes]
    """Whole HTTP/1.1 requests (`build_requests`), sent in turn."""
    images_per_request: int = 1
    connections: int = 16
    rate: float | None = None
    seconds: float = 10.0
    warm_up_s: float = 2.0
    """Load before anything is counted."""
    patience_s: float = 5.0
    """How long answers are awaited after the last request; what is missing then counts as unanswered."""


async def run_load(plan: Plan, stop: asyncio.Event | None = None) -> Report:
    """Run a plan and report what was measured; setting `stop` ends it early, with what there is by then."""
    stop = stop or asyncio.Event()
    samples = Samples()
    begin = time.monotonic() + plan.warm_up_s
    loop: _ClosedLoop | _OpenLoop = (_ClosedLoop if plan.rate is None else _OpenLoop)(plan, samples, begin)
    watch = _Watch(begin)
    loop.start()
    await _first_of(stop.wait(), asyncio.sleep(begin + plan.seconds - time.monotonic()))
    end = min(time.monotonic(), begin + plan.seconds)
    strain = watch.stop(end)
    await loop.finish(1.0 if stop.is_set() else plan.patience_s)
    return report_of(
        samples,
        begin=begin,
        end=end,
        interrupted=stop.is_set(),
        images_per_request=plan.images_per_request,
        held_back=loop.held_back,
        connections=loop.most_open,
        strain=strain,
    )


def measure(plan: Plan) -> Report:
    """Run a plan on an event loop of its own; blocks."""
    with new_runner() as runner:
        return runner.run(run_load(plan))


def new_runner() -> asyncio.Runner:
    """Return a runner over uvloop, where there is one."""
    if sys.platform == "win32":
        return asyncio.Runner()
    import uvloop

    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the service."""

    status: int
    body: str


async def ask(endpoint: Endpoint, request: bytes, timeout_s: float = 30.0) -> Answer:
    """Send one request and return its answer; the body of a 200 is left out.

    Raises:
        OSError: nothing listens, or the connection ended before the answer; TimeoutError is one.
    """
    samples = Samples()
    once = _Once()
    async with asyncio.timeout(timeout_s):
        connection = await _connect(endpoint, samples, once)
        connection.send(request, time.monotonic())
        await once.over
    connection.close()
    status = int(samples.arrays()[2][0])
    if status < 0:
        raise ConnectionError(samples.reason(status))
    return Answer(status, samples.first_bodies.get(status, ""))


class _Owner(Protocol):
    """Who is told what becomes of a connection."""

    def ready(self, connection: "Connection") -> None:
        """The answer is whole (or the connection new): it may send."""
        ...

    def lost(self, connection: "Connection") -> None:
        """The connection is gone; its request, if any, is noted."""
        ...


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way; httptools calls the `on_…` methods."""

    def __init__(self, samples: Samples, owner: _Owner, count_from: float = 0.0) -> None:
        self._samples = samples
        self._owner = owner
        self._count_from = count_from
        self._parser: Any = httptools.HttpResponseParser(self)
        self._transport: Any = None  # uvloop's transports are no asyncio.Transport
        self._due = 0.0
        self.busy = False
        self.not_before = 0.0
        """When the service wants to see this client again, by the monotonic clock."""
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def send(self, request: bytes, due: float) -> None:
        """Send a request that was due at `due`."""
        self.busy = True
        self._due = due
        self._timing = b""
        self._retry_after: bytes | None = None
        self._body = b""
        self._transport.write(request)

    def close(self) -> None:
        """Close it; a request on its way is noted as unanswered."""
        if self.busy:
            self.busy = False
            self._samples.add(self._due, UNANSWERED)
            self._transport.abort()  # close() would wait until a stuck service has taken the rest of the request
        else:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail("the answer is not HTTP")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Note the request that was on its way, and say that the connection is gone."""
        self._fail("closed before the answer was whole" if error is None else reason_of(error))
        if not self.closed.done():
            self.closed.set_result(None)
        self._owner.lost(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take the two headers that are reported."""
        match name.lower():
            case b"server-timing":
                self._timing = value
            case b"retry-after":
                self._retry_after = value

    def on_body(self, data: bytes) -> None:
        """Keep what a refusal says, if it is the first of its kind."""
        status = self._parser.get_status_code()
        if status != 200 and status not in self._samples.first_bodies:
            self._body += data

    def on_message_complete(self) -> None:
        """Note the answer; the connection is free again."""
        if not self.busy:
            return
        self.busy = False
        samples, status = self._samples, self._parser.get_status_code()
        samples.add(self._due, status)
        if status != 200:
            samples.keep_body(status, self._body)
        if status == 429:
            self.not_before = time.monotonic() + _pause_s(self._retry_after)
        if self._due >= self._count_from:
            samples.retry_after += status == 429 and self._retry_after is not None
            if self._timing and status == 200:
                samples.add_stages(self._timing)
        if self._parser.should_keep_alive():
            self._owner.ready(self)
        else:
            self.close()

    def _fail(self, reason: str) -> None:
        if self.busy:
            self.busy = False
            self._samples.add_failure(self._due, reason)


class _ClosedLoop:
    """As many clients as connections; each sends its next request when its answer is there, and it may come again."""

    held_back = 0

    def __init__(self, plan: Plan, samples: Samples, begin: float) -> None:
        self._plan = plan
        self._samples = samples
        self._begin = begin
        self._end = begin + plan.seconds
        self._requests = itertools.cycle(plan.requests)
        self._clients: list[asyncio.Task[None]] = []
        self._connections: set[Connection] = set()
        self._going = True
        self.most_open = 0

    def start(self) -> None:
        """Let every client connect and begin."""
        self._clients = [asyncio.create_task(self._client()) for _ in range(self._plan.connections)]

    async def finish(self, patience_s: float) -> None:
        """Send nothing more, and wait for the answers."""
        self._going = False
        await _drain(self._connections, patience_s)
        await _end(self._clients)

    def ready(self, connection: Connection) -> None:
        """Send the next request, now or when the service wants to see this client again."""
        now = time.monotonic()
        if not self._going or max(now, connection.not_before) >= self._end:
            connection.close()
        elif now < connection.not_before:
            asyncio.get_running_loop().call_later(connection.not_before - now, self._again, connection)
        else:
            connection.send(next(self._requests), now)

    def lost(self, connection: Connection) -> None:
        """Forget the connection; its client opens another."""
        self._connections.discard(connection)

    def _again(self, connection: Connection) -> None:
        if connection in self._connections:  # else its client waits for the moment by itself
            self.ready(connection)

    async def _client(self) -> None:
        while self._going and (due := time.monotonic()) < self._end:
            try:
                connection = await _connect(self._plan.endpoint, self._samples, self, self._begin)
            except OSError as error:
                self._samples.add_failure(due, reason_of(error))
                await asyncio.sleep(RETURN_S)
                continue
            self._connections.add(connection)
            self.most_open = max(self.most_open, len(self._connections))
            self.ready(connection)
            await connection.closed
            await asyncio.sleep(connection.not_before - time.monotonic())


class _OpenLoop:
    """Requests at constant distances, each over a connection that is idle, or a new one, or the next that gets free."""

    def __init__(self, plan: Plan, samples: Samples, begin: float) -> None:
        assert plan.rate is not None
        self._plan = plan
        self._rate = plan.rate
        self._samples = samples
        self._begin = begin
        self._requests = itertools.cycle(plan.requests)
        self._first = time.monotonic()
        self._arrived = 0
        self._most_arrivals = round((begin + plan.seconds - self._first) * plan.rate)
        self._idle: deque[Connection] = deque()
        self._waiting: deque[float] = deque()
        self._connections: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._going = True
        self.most_open = 0
        self.held_back = 0
        """Requests of the measured time that had to wait for a connection because all allowed ones were busy."""

    def start(self) -> None:
        """Let requests arrive."""
        self._ticker = Ticker(1 / self._rate, self._tick)

    async def finish(self, patience_s: float) -> None:
        """Let nothing more arrive, send what waits, and wait for the answers; note what never left."""
        self._ticker.close()
        deadline = time.monotonic() + patience_s
        while self._waiting and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._going = False
        for due in self._waiting:
            self._samples.add(due, UNANSWERED)
        self._waiting.clear()
        await _drain(self._connections, deadline - time.monotonic())
        await _end(self._opening)

    def ready(self, connection: Connection) -> None:
        """Send what waits; otherwise be idle."""
        if self._waiting:
            connection.send(next(self._requests), self._waiting.popleft())
        elif self._going:
            self._idle.append(connection)
        else:
            connection.close()

    def lost(self, connection: Connection) -> None:
        """Forget the connection; open another for what waits."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._waiting and self._going:
            self._open_one()

    def _tick(self) -> None:
        due = self._first + self._arrived / self._rate
        now = time.monotonic()
        while due <= now and self._arrived < self._most_arrivals:
            self._arrive(due)
            self._arrived += 1
            due = self._first + self._arrived / self._rate

    def _arrive(self, due: float) -> None:
        if self._idle:
            self._idle.popleft().send(next(self._requests), due)
            return
        self._waiting.append(due)
        if len(self._connections) + len(self._opening) < self._plan.connections:
            self._open_one()
        else:
            self.held_back += due >= self._begin

    def _open_one(self) -> None:
        task = asyncio.create_task(self._open())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self) -> None:
        try:
            connection = await _connect(self._plan.endpoint, self._samples, self, self._begin)
        except OSError as error:
            if self._waiting:
                self._samples.add_failure(self._waiting.popleft(), reason_of(error))
            if self._waiting:
                self._open_one()
            return
        self._connections.add(connection)
        self.most_open = max(self.most_open, len(self._connections))
        self.ready(connection)


class _Once:
    """The owner of a connection that is asked one thing."""

    def __init__(self) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ready(self, connection: Connection) -> None:
        if not self.over.done():
            self.over.set_result(None)

    lost = ready


class _Watch:
    """How much of a processor the event loop takes, and how late it comes to its work, from `begin` on."""

    def __init__(self, begin: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._lags: list[float] = []
        self._began = begin
        self._busy_at_begin = 0.0
        self._timer = self._loop.call_later(begin - time.monotonic(), self._begin)

    def _begin(self) -> None:
        self._began, self._busy_at_begin = time.monotonic(), time.thread_time()
        self._beat(self._began)

    def _beat(self, due: float) -> None:
        now = time.monotonic()
        self._lags.append(now - due)
        self._timer = self._loop.call_later(HEARTBEAT_S, self._beat, now + HEARTBEAT_S)

    def stop(self, end: float) -> Strain:
        """Return what was seen."""
        self._timer.cancel()
        busy = (time.thread_time() - self._busy_at_begin) / (end - self._began) if end > self._began else 0.0
        lags = sorted(self._lags)
        return Strain(busy_share=min(busy, 1.0), lag_p99_ms=max(lags[int(len(lags) * 0.99)] * 1000, 0) if lags else 0.0)


async def _connect(endpoint: Endpoint, samples: Samples, owner: _Owner, count_from: float = 0.0) -> Connection:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        _, connection = await loop.create_connection(
            lambda: Connection(samples, owner, count_from), endpoint.host, endpoint.port
        )
    return connection


async def _drain(connections: set[Connection], patience_s: float) -> None:
    """Wait for the answers that are on their way, then close every connection."""
    deadline = time.monotonic() + patience_s
    while any(connection.busy for connection in connections) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    gone = [connection.closed for connection in connections]
    for connection in list(connections):
        connection.close()
    await asyncio.gather(*gone)


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks and await them; a fault of one is raised."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled():
            task.result()


async def _first_of(*what: Coroutine[Any, Any, Any]) -> None:
    tasks = [asyncio.ensure_future(one) for one in what]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _pause_s(retry_after: bytes | None) -> float:
    """Return how long a refused client stays away; a date instead of seconds counts as nothing said."""
    return float(retry_after[:9]) if retry_after is not None and retry_after.isdigit() else RETURN_S


def reason_of(error: Exception) -> str:
    """Return a few words for a connection's fault, the same for every connection."""
    match error:
        case ConnectionRefusedError():
            return "connection refused"
        case ConnectionResetError():
            return "reset by the server"
        case TimeoutError():
            return "no connection in time"
        case OSError():
            return error.strerror or str(error) or type(error).__name__
    return type(error).__name__
