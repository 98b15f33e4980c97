"""Faults become responses here and nowhere else: `{"error": "<one sentence>", "code": "<reason>"}`."""

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from app.errors import BadRequestError, ConvoyError, QueueFullError, TooLargeError
from app.http.observe import Trace, trace_of


def install(app: FastAPI) -> None:
    """Teach an application to answer every fault in the one shape."""
    app.add_exception_handler(ConvoyError, _convoy_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def error_response(fault: ConvoyError, trace: Trace) -> Response:
    """Return the response for a fault, and leave its code in the trace."""
    trace.code = fault.code
    headers = {}
    if isinstance(fault, QueueFullError):
        headers["Retry-After"] = str(fault.retry_after_s)
    if isinstance(fault, TooLargeError):
        # The rest of the body may be unread; the connection cannot serve another request.
        headers["Connection"] = "close"
    return JSONResponse({"error": fault.message, "code": fault.code}, fault.status, headers)


async def _convoy_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ConvoyError)
    return error_response(error, trace_of(request.scope))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place, name = problem["loc"][0], problem["loc"][-1]
    fault = BadRequestError(f"{place} parameter {name} = {problem.get('input')!r}: {problem['msg'].lower()}.")
    return error_response(fault, trace_of(request.scope))


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer what the framework itself refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    sentences = {
        HTTPStatus.NOT_FOUND: f"There is nothing at {path}; /docs lists all routes.",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{request.method} is not a method of {path}.",
    }
    sentence = sentences.get(HTTPStatus(error.status_code), str(error.detail))
    code = HTTPStatus(error.status_code).name.lower()
    trace_of(request.scope).code = code
    return JSONResponse({"error": sentence, "code": code}, error.status_code, error.headers)
