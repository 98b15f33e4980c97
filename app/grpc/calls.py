"""What is around every call: its id, its key, its deadline, its status, metrics, one log line.

A method gets its request and a `Call`, in which it leaves what it learns (model, images), and returns its response or
raises a fault. Faults become statuses here and nowhere else. Messages are parsed here too: what is none is the
client's mistake, which gRPC's own parsing would tell as a fault of the service.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from app.errors import AbandonedError, BadRequestError, ConvoyError, QueueFullError
from app.journal import BROKEN, CLIENT_GONE, Journal, Trace, id_for

log = logging.getLogger("convoy.access")

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = tuple[tuple[str, str], ...]
Answer = TypeVar("Answer", bound=Message)

OK = 200
STREAM_DEPTH = 64
"""Requests of one stream inside at once; the next is read when the first of them is answered."""
_STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(slots=True)
class Call(Trace):
    """One request, as its method, metrics and log see it; its route is the full name of its method.

    Attributes:
        deadline: when its client gives up, `time.monotonic()`; infinite where it never does.
    """

    deadline: float = float("inf")


Method = Callable[[Any, Call], Awaitable[Answer]]
Parse = Callable[[bytes], Message]
Entry = Callable[[Context, str], str]
"""Lets a call of a route in, and returns the name of its key, or raises a fault."""


def status_of(fault: ConvoyError) -> grpc.StatusCode:
    """Return what a fault is called in gRPC."""
    return _STATUSES.get(fault.status, grpc.StatusCode.INTERNAL)


class Calls:
    """Makes a service's methods into handlers, and knows which calls are inside."""

    def __init__(self, journal: Journal, *, enter: Entry) -> None:
        self._journal = journal
        self._enter = enter
        self._readers: set[asyncio.Task[None]] = set()
        self._may_answer = asyncio.Event()
        self._may_answer.set()
        self.begun = 0
        """Calls that ever came in."""
        self.inside = 0
        """Requests that have no answer yet; idle streams are none."""
        self.cutting_off = False
        """Whether a call that is cancelled from now on ends because the service does."""

    def unary(self, route: str, method: Method[Answer], parse: Parse, *, quiet: bool = False) -> Any:
        """Return the handler of a method that takes one request.

        Args:
            route: the method's full name.
            method: answers the request.
            parse: makes the request of its bytes.
            quiet: without a log line.
        """

        async def serve(data: bytes, context: Context) -> Answer:
            call = self._begin(context, route)
            self.begun += 1
            self.inside += 1
            try:
                call.key = self._enter(context, route)
                answer = await method(_parsed(parse, data), call)
                await self._may_answer.wait()
                context.set_trailing_metadata((("x-request-id", call.request_id),))
                call.status = OK
                return answer
            except (asyncio.CancelledError, AbandonedError):
                self._note_cancellation(call)
                raise asyncio.CancelledError from None  # gRPC's own way to end a call that nobody waits for
            except Exception as error:
                fault = self._fault(call, error)
            finally:
                self.inside -= 1
                self._record(call, quiet)
            del data  # the abort, which gRPC keeps with the call, holds this frame
            return await _abort(context, call, fault)

        return grpc.unary_unary_rpc_method_handler(serve, None, message_to_bytes)

    def stream(
        self,
        route: str,
        method: Method[Answer],
        parse: Parse,
        refusal: Callable[[Any, ConvoyError], Answer],
    ) -> Any:
        """Return the handler of a method that answers each request of a stream, in their order.

        Args:
            route: the method's full name.
            method: answers one request.
            parse: makes a request of its bytes.
            refusal: makes the response to a request out of its fault; the stream goes on after it. A client that sends
                the metadata `triton_grpc_error: true` wants the stream to end with the fault's status instead.
        """

        async def one(data: bytes, context: Context, strict: bool) -> Answer:
            call = self._begin(context, route)
            self.inside += 1
            request = None
            try:
                call.key = self._enter(context, route)
                request = _parsed(parse, data)
                answer = await method(request, call)
                call.status = OK
                return answer
            except (asyncio.CancelledError, AbandonedError):
                self._note_cancellation(call)
                raise asyncio.CancelledError from None  # gRPC's own way to end a call that nobody waits for
            except Exception as error:
                fault = self._fault(call, error)
            finally:
                self.inside -= 1
                self._record(call, quiet=False)
            del data
            if strict:
                request = None
                await _abort(context, call, fault)
            return refusal(request, fault)

        async def serve(requests: AsyncIterator[bytes], context: Context) -> None:
            strict = dict(context.invocation_metadata() or ()).get("triton_grpc_error") == "true"
            try:
                self._enter(context, route)
            except ConvoyError as fault:
                call = self._begin(context, route)
                self._fault(call, fault)
                self._record(call, quiet=False)
                await _abort(context, call, fault)
            line = _Line(requests, lambda data: one(data, context, strict))
            self._readers.add(line.reader)
            line.reader.add_done_callback(self._readers.discard)
            try:
                async for answer in line:
                    await context.write(answer)
                if line.reader.cancelled():
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "The service is stopping: open a new stream.")
            finally:
                line.close()

        return grpc.stream_stream_rpc_method_handler(serve, None, message_to_bytes)

    def hold_answers(self) -> None:
        """Keep the answers of single calls back from now on, so that whoever waits for one sends nothing else."""
        self._may_answer.clear()

    def let_answers_go(self) -> None:
        """Send what was held back."""
        self._may_answer.set()

    def stop_reading(self) -> None:
        """Take no more requests from open streams; each ends when what was read is answered."""
        for reader in self._readers:
            reader.cancel()

    def _note_cancellation(self, call: Call) -> None:
        """Note why a call was cancelled before or after its work: its time was over, the service ends, or it left."""
        if time.monotonic() >= call.deadline:
            call.status, call.code = 504, "deadline"
        elif self.cutting_off:
            call.status, call.code = 503, "draining"

    def _fault(self, call: Call, error: Exception) -> ConvoyError:
        """Return what to tell for whatever a method raised, and leave it in the call."""
        if isinstance(error, ConvoyError):
            fault = error
        else:
            log.exception("request failed", exc_info=error, extra=call.ids)
            fault = ConvoyError(BROKEN)
        call.code, call.status = fault.code, fault.status
        # Its traceback holds the frames that it went through, and they hold the request: a ring, once a frame holds it,
        # that only the garbage collector opens, which here comes seldom.
        return fault.with_traceback(None)

    def _begin(self, context: Context, route: str) -> Call:
        started = time.monotonic()
        remaining = context.time_remaining()
        deadline = float("inf") if remaining is None else started + remaining
        metadata = dict(context.invocation_metadata() or ())
        call = Call(id_for(_to_bytes(metadata.get("x-request-id"))), started, route, deadline=deadline)
        if (tracer := self._journal.tracer) is not None:
            parent, state = _to_bytes(metadata.get("traceparent")), _to_bytes(metadata.get("tracestate"))
            call.trace_id, call.marks = tracer.sample(parent, state)
        return call

    def _record(self, call: Call, quiet: bool) -> None:
        if call.marks is not None:
            call.marks.outcome = _outcome_of(call.status)
        self._journal.record(call, "gRPC", call.route, quiet=quiet)


class _Line:
    """Requests of a stream on their way, in order; iterating gives their answers."""

    def __init__(self, requests: AsyncIterator[bytes], answer: Callable[[bytes], Awaitable[Any]]) -> None:
        self._answer = answer
        self._room = asyncio.Semaphore(STREAM_DEPTH)
        self._running: deque[asyncio.Future[Any]] = deque()
        self._news = asyncio.Event()
        self.reader = asyncio.create_task(self._read(requests))
        self.reader.add_done_callback(lambda _: self._news.set())

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            while self._running:
                yield await self._running[0]
                self._running.popleft()
                self._room.release()
            if self.reader.done():
                if not self.reader.cancelled():
                    self.reader.result()  # raises what ended it, if that was an error
                return
            self._news.clear()
            await self._news.wait()

    def close(self) -> None:
        """Give up what is not answered yet."""
        for task in (self.reader, *self._running):
            task.cancel()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        async for data in requests:
            await self._room.acquire()
            self._running.append(asyncio.ensure_future(self._answer(data)))
            self._news.set()


def message_to_bytes(message: Message) -> bytes:
    """Serialise a response."""
    return message.SerializeToString()


def _to_bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def _outcome_of(status: int) -> str:
    """Return what gRPC calls the status that a call ended with."""
    if status == OK:
        return grpc.StatusCode.OK.name
    if status == CLIENT_GONE:
        return grpc.StatusCode.CANCELLED.name
    return _STATUSES.get(status, grpc.StatusCode.INTERNAL).name


def _parsed(parse: Parse, data: bytes) -> Message:
    try:
        return parse(data)
    except DecodeError:
        raise BadRequestError(f"The {len(data):,} bytes of the message are not what this method takes.") from None


async def _abort(context: Context, call: Call, fault: ConvoyError) -> NoReturn:
    """End a call with a fault: its status, its sentence, its code and, where it says so, when to come back."""
    trailing: Metadata = (("x-request-id", call.request_id), ("code", fault.code))
    if isinstance(fault, QueueFullError):
        trailing += (("retry-after", str(fault.retry_after_s)),)
    await context.abort(status_of(fault), fault.message, trailing)
