"""What is known of a request from its first byte to its last: id, metrics, one log line.

A pure ASGI middleware around the whole application. Handlers leave what they learn (model, images, error code) in the
request's `Trace`; nothing here decides anything.
"""

import asyncio
import itertools
import json
import logging
import re
import secrets
import time
from dataclasses import dataclass
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.metrics import Metrics

log = logging.getLogger("convoy.access")

CLIENT_GONE = 499
"""Not sent to anybody: counted for clients that disconnect before their answer (nginx's number for it)."""

_GOOD_ID = re.compile(rb"[\x21-\x7e]{1,128}")
# Unique over processes by 80 random bits, and in this one by counting: a fifth of the cost of a UUID.
_ID_START = secrets.token_hex(10)
_ids = itertools.count()
_FAILED_INSIDE = frozenset({500, 504})
"""Statuses of requests that were admitted: not refusals, so not in `convoy_rejected_total`."""
_QUIET = frozenset({"/livez", "/readyz", "/metrics", "/ping", "/v2/health/live", "/v2/health/ready"})
_INTERNAL_ERROR = json.dumps(
    {"error": "Something broke inside; the log has it under this request's id.", "code": "internal"}
).encode()
_CUT_OFF = json.dumps(
    {"error": "The service is stopping, and this request was not done in time; send it again.", "code": "draining"}
).encode()


@dataclass(slots=True)
class Trace:
    """One request, as metrics and log see it."""

    request_id: str
    started: float
    route: str = ""
    model: str = ""
    version: str = ""
    images: int = 0
    status: int = CLIENT_GONE
    code: str = ""
    key: str = ""
    """Name of the key that it came with; the key itself is in no log."""


def trace_of(scope: Scope) -> Trace:
    """Return the trace that `Observe` put into a request's scope."""
    return cast(Trace, scope["convoy.trace"])


class Observe:
    """Gives every request an id, counts and times it, logs it, and turns a crash into a 500 in the one shape."""

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = Trace(_request_id(scope), time.monotonic())
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
                await _send_plainly(send_with_id, 503, _CUT_OFF)
        except Exception:
            log.exception("request failed", extra={"request_id": trace.request_id})
            if trace.status == CLIENT_GONE:  # nothing was sent yet
                trace.code = "internal"
                await _send_plainly(send_with_id, 500, _INTERNAL_ERROR)
        finally:
            self._record(scope, trace)

    def _record(self, scope: Scope, trace: Trace) -> None:
        seconds = time.monotonic() - trace.started
        route = trace.route or getattr(scope.get("route"), "path", "unmatched")
        self._metrics.requests.labels(trace.model, trace.version, route, trace.status).inc()
        self._metrics.request_duration.labels(trace.model, route, trace.version, trace.status).observe(seconds)
        if trace.code and trace.status not in _FAILED_INSIDE:
            self._metrics.rejected.labels(trace.model, trace.code).inc()
        if self._access_log and route not in _QUIET:
            fields = {
                "request_id": trace.request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": trace.status,
                "ms": round(seconds * 1000, 2),
            }
            if trace.model:
                fields |= {"model": trace.model, "images": trace.images}
            if trace.key:
                fields["key"] = trace.key
            if trace.code:
                fields["code"] = trace.code
            log.info("request", extra=fields)


def _request_id(scope: Scope) -> str:
    """Return the client's X-Request-Id where it is short printable ASCII, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _GOOD_ID.fullmatch(value):
            return cast(bytes, value).decode()
    return f"{_ID_START}{next(_ids):012x}"


async def _send_plainly(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
