"""Faults become responses here and nowhere else: `{"error": "<one sentence>", "code": "<reason>"}`."""

import json
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from app.errors import BadRequestError, ConvoyError, QueueFullError, UnauthorizedError
from app.http.observe import trace_of


def install(app: FastAPI) -> None:
    """Teach an application to answer every fault in the one shape."""
    app.add_exception_handler(ConvoyError, _convoy_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def answer_to(fault: ConvoyError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Return status, headers and body of the response for a fault."""
    body = json.dumps({"error": fault.message, "code": fault.code}, ensure_ascii=False).encode("utf-8", "replace")
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if isinstance(fault, QueueFullError):
        headers.append((b"retry-after", b"%d" % fault.retry_after_s))
    if isinstance(fault, UnauthorizedError):
        headers.append((b"www-authenticate", b'Bearer realm="convoy"'))
    if fault.closes:
        headers.append((b"connection", b"close"))
    return fault.status, headers, body


async def send_error(fault: ConvoyError, scope: Scope, send: Send) -> None:
    """Send the response for a fault, and leave its code in the request's trace."""
    trace_of(scope).code = fault.code
    status, headers, body = answer_to(fault)
    # Who asked before sending the body, and is refused, may send it or not: what comes next cannot be told.
    if not fault.closes and any(name == b"expect" for name, _ in scope["headers"]):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _ErrorResponse(Response):
    """A fault as FastAPI's exception handlers want it."""

    def __init__(self, fault: ConvoyError) -> None:
        super().__init__()
        self._fault = fault

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_error(self._fault, scope, send)


async def _convoy_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ConvoyError)
    return _ErrorResponse(error)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place, name = problem["loc"][0], problem["loc"][-1]
    fault = BadRequestError(f"{place} parameter {name} = {problem.get('input')!r}: {problem['msg'].lower()}.")
    return _ErrorResponse(fault)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer what the framework itself refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    sentences = {
        HTTPStatus.NOT_FOUND: f"There is nothing at {path}; /docs lists all routes.",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{request.method} is not a method of {path}.",
    }
    sentence = sentences.get(HTTPStatus(error.status_code), str(error.detail))
    code = HTTPStatus(error.status_code).name.lower()
    trace_of(request.scope).code = code
    return JSONResponse({"error": sentence, "code": code}, error.status_code, error.headers)
