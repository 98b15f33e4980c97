"""Which route needs which key: decided here alone, from method and path, before anything of a body is read.

What is not named needs the scope `predict`: a route that somebody adds is closed until it is opened here.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from fastapi import FastAPI
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import ConvoyError
from app.http.connection import WholeRequest
from app.http.errors import send_error
from app.http.observe import Begin, Record, trace_of
from app.journal import Trace
from app.keys import Access, Keyring, presented_in

OPEN = frozenset(
    {
        "/livez",
        "/readyz",
        "/ping",
        "/v2/health/live",
        "/v2/health/ready",
        # The page for people, which a browser opens without a key, and which names no model.
        "/",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json",
    }
)
_OPEN_FILES = "/static-offline-docs/"
_ADMIN = "/v2/repository/"
_OPERATION = re.compile(r"/models/[^/]+(/versions/[^/]+)?/(load|unload)")
_INDEX = "/v2/repository/index"
"""Lists what is there, as `GET /models` does: the only one of its kind that changes nothing."""


@lru_cache(maxsize=1024)
def access_of(path: str) -> Access | None:
    """Return what a path asks of a key; None: nothing."""
    # The router's patterns end in $, which also matches before a last newline: %0A opened every load and unload.
    path = path.removesuffix("\n")
    if path in OPEN or path.startswith(_OPEN_FILES):
        return None
    if (path.startswith(_ADMIN) and path != _INDEX) or _OPERATION.fullmatch(path):
        return Access.ADMIN
    return Access.METRICS if path == "/metrics" else Access.PREDICT


def describe(app: FastAPI) -> None:
    """Say in an application's OpenAPI document which routes need a key, so that its page has a place for one."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        document.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        for path, operations in document["paths"].items():
            for operation in operations.values() if access_of(path) else ():
                operation["security"] = [{"bearer": []}, {"key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # which is how FastAPI has it extended


class Guard:
    """Lets in who has a key for what is asked; refuses others in the one shape."""

    def __init__(self, app: ASGIApp, begin: Begin, keyring: Keyring, routes: Sequence[BaseRoute]) -> None:
        """Stand before an application.

        Args:
            app: whoever answers those who are let in.
            begin: answers some of them without a task.
            keyring: the keys.
            routes: for the name of the route that was refused, in metrics and log.
        """
        self._app = app
        self._begin = begin
        self._keyring = keyring
        self._routes = routes

    def begin(self, request: WholeRequest, trace: Trace, record: Record) -> bool:
        """Have one request answered without a task, if it is one for that.

        Raises:
            ConvoyError: it is refused, and will be again in ASGI's way, where that is told.
        """
        trace.key = self._admit(request.head.path, request.head.headers)
        return self._begin(request, trace, record)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] == "http":
            try:
                # scope["path"] is what routes are found by; a URL made of the Host header may say something else.
                trace_of(scope).key = self._admit(scope["path"], scope["headers"])
            except ConvoyError as fault:
                await self._refuse(fault, scope, send)
                return
        await self._app(scope, receive, send)

    def _admit(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return the name of the key that opens a path, empty where none is needed, or raise why it stays closed."""
        needed = access_of(path)
        if needed is None or not (self._keyring.guarded or needed is Access.ADMIN):
            return ""
        return self._keyring.admit(presented_in(headers), needed)

    async def _refuse(self, fault: ConvoyError, scope: Scope, send: Send) -> None:
        trace = trace_of(scope)
        matches = (getattr(route, "path", "") for route in self._routes if route.matches(scope)[0] is Match.FULL)
        trace.route = next(matches, "")
        await send_error(fault, scope, send)
