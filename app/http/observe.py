"""Every HTTP request's trace, from its first byte to its last; `app/journal.py` writes it down.

A pure ASGI middleware around the whole application. Handlers leave what they learn (model, images, error code) in the
request's `Trace`; nothing here decides anything.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.connection import Heads, WholeRequest
from app.journal import BROKEN, CLIENT_GONE, Journal, Trace, id_for

log = logging.getLogger("convoy.access")

_QUIET = frozenset({"/livez", "/readyz", "/metrics", "/ping", "/v2/health/live", "/v2/health/ready"})
CUT_OFF = "The service is stopping, and this request was not done in time; send it again."

Record = Callable[[Trace, str, str], None]
"""Counts and logs a request that is over; takes its trace, method and path."""
Begin = Callable[[WholeRequest, Trace, Record], bool]


def trace_of(scope: Scope) -> Trace:
    """Return the trace that `Observe` put into a request's scope."""
    return cast(Trace, scope["convoy.trace"])


class Observe:
    """Gives every request an id, counts and times it, logs it, and turns a crash into a 500 in the one shape."""

    def __init__(self, app: ASGIApp, begin: Begin, journal: Journal) -> None:
        """Watch an application.

        Args:
            app: answers in ASGI's way.
            begin: answers without a task, if the request is one for that.
            journal: where requests are written down.
        """
        self.heads = Heads()
        self._app = app
        self._begin = begin
        self._journal = journal

    def begin(self, request: WholeRequest) -> bool:
        """Serve one request without a task, if it is one for that; what goes wrong at once is told in ASGI's way."""
        try:
            return self._begin(request, self._trace_of(request.head.headers), self._record)
        except Exception:  # met again there, and named
            return False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = self._trace_of(scope["headers"])
        scope["convoy.trace"] = trace

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", trace.request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the drain is over, and this request was not
            if trace.status == CLIENT_GONE:
                trace.code = "draining"
                await _send_plainly(send_with_id, 503, CUT_OFF, trace.code)
        except Exception:
            log.exception("request failed", extra=trace.ids)
            if trace.status == CLIENT_GONE:  # nothing was sent yet
                trace.code = "internal"
                await _send_plainly(send_with_id, 500, BROKEN, trace.code)
        finally:
            trace.route = trace.route or getattr(scope.get("route"), "path", "unmatched")
            self._record(trace, scope["method"], scope["path"])

    def _trace_of(self, headers: Sequence[tuple[bytes, bytes]]) -> Trace:
        trace = Trace(_request_id(headers), time.monotonic())
        if (tracer := self._journal.tracer) is not None:
            named = dict(headers)
            trace.trace_id, trace.marks = tracer.sample(named.get(b"traceparent"), named.get(b"tracestate"))
        return trace

    def _record(self, trace: Trace, method: str, path: str) -> None:
        self._journal.record(trace, method, path, quiet=trace.route in _QUIET)


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    return id_for(next((value for name, value in headers if name == b"x-request-id"), None))


async def _send_plainly(send: Send, status: int, sentence: str, code: str) -> None:
    body = json.dumps({"error": sentence, "code": code}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
