"""`POST /predict` and its siblings: images in, labels and probabilities out.

The hot path, so a plain ASGI endpoint: `Front` hands it these requests before FastAPI's stack sees them. The routes are
FastAPI's all the same, for the OpenAPI document and for wrong methods.
"""

import asyncio
import json
import time
from collections.abc import Coroutine
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Header, Query
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.engine import Engine, Prediction
from app.errors import BadRequestError, ConvoyError, DeadlineError
from app.http.bodies import BodyLimits, ClientGoneError, Head, read_images
from app.http.errors import send_error
from app.http.observe import trace_of
from app.http.schemas import ErrorResponse, ImagesBody, PredictResponse
from app.scores import top_k

DEFAULT_TOP_K = 5

ROUTE, MODEL_ROUTE = "/predict", "/models/{model}/predict"
_MODEL_PREFIX, _MODEL_SUFFIX = MODEL_ROUTE.split("{model}")

TopK = Annotated[int, Query(ge=1, description="How many classes to return, best first; at most the number there is.")]
TimeoutMs = Annotated[
    int | None,
    Header(alias="Timeout-Ms", ge=1, description="Deadline in milliseconds; the server's own bounds it."),
]

_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_FORM = {"schema": {"type": "object", "properties": {"file": _FILES}}}
_BODY = {
    "required": True,
    "description": "One image as raw bytes; or a form with one or more files; or base64 in JSON.",
    "content": {
        "image/jpeg": _IMAGE,
        "image/png": _IMAGE,
        "image/webp": _IMAGE,
        "application/octet-stream": _IMAGE,
        "multipart/form-data": _FORM,
        "application/json": {"schema": ImagesBody.model_json_schema()},
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "Malformed request"},
    404: {"model": ErrorResponse, "description": "Unknown model"},
    413: {"model": ErrorResponse, "description": "Body, image or number of images too large"},
    415: {"model": ErrorResponse, "description": "Content type not taken"},
    422: {"model": ErrorResponse, "description": "Not a decodable image; the whole request is refused"},
    429: {"model": ErrorResponse, "description": "Full; Retry-After says when to come back"},
    503: {"model": ErrorResponse, "description": "Model loading or failed"},
    504: {"model": ErrorResponse, "description": "Deadline passed"},
}


class Predictor:
    """Answers prediction requests from an engine."""

    def __init__(self, engine: Engine, limits: BodyLimits, timeout_ms: int) -> None:
        self._engine = engine
        self._limits = limits
        self._timeout_ms = timeout_ms

    async def answer(self, name: str | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Read a request's images, classify them with the model `name` (None: the default one), and send the answer."""
        try:
            await self._classify(name, scope, receive, send)
        except ConvoyError as fault:
            await send_error(fault, trace_of(scope), send)
        except ClientGoneError:
            return

    async def _classify(self, name: str | None, scope: Scope, receive: Receive, send: Send) -> None:
        trace = trace_of(scope)
        model = self._engine.model(name)
        trace.model, trace.version = model.manifest.name, model.manifest.version
        head = Head.of(scope)
        k = _wanted_top_k(scope["query_string"], len(model.manifest.labels))
        deadline = trace.started + min(head.timeout_ms or self._timeout_ms, self._timeout_ms) / 1000
        with self._engine.admit() as ticket, model.metrics.inflight_requests.track_inprogress():
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    images = await read_images(head, receive, ticket, self._limits)
            except TimeoutError:
                raise DeadlineError("The deadline passed before the whole body had arrived.") from None
            trace.images = len(images)
            prediction = await _unless_client_leaves(receive, self._engine.classify(model, images, deadline, ticket))
        await _send(prediction, k, send)


class Front:
    """The application as the server sees it: predictions go straight to their endpoint, all else to FastAPI.

    On 32×32 JPEGs FastAPI's stack took half of the event loop's time of a request.
    """

    def __init__(self, app: ASGIApp, predictor: Predictor) -> None:
        self._app = app
        self._predictor = predictor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] == "http" and scope["method"] == "POST":
            path: str = scope["path"]
            if path == ROUTE:
                trace_of(scope).route = ROUTE
                await self._predictor.answer(None, scope, receive, send)
                return
            name = path.removeprefix(_MODEL_PREFIX).removesuffix(_MODEL_SUFFIX)
            if path == f"{_MODEL_PREFIX}{name}{_MODEL_SUFFIX}" and name and "/" not in name:
                trace_of(scope).route = MODEL_ROUTE
                await self._predictor.answer(name, scope, receive, send)
                return
        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._head(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer HEAD as GET, which load balancers expect of a probe; the server leaves the body out."""
        as_get = {**scope, "method": "GET"}
        await self._app(as_get, receive, send)
        scope["route"] = as_get.get("route")


class _Direct(Response):
    """What a route's function returns to have the predictor answer by itself."""

    def __init__(self, predictor: Predictor, name: str | None) -> None:
        super().__init__()
        self._predictor = predictor
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._predictor.answer(self._name, scope, receive, send)


def routes(predictor: Predictor) -> APIRouter:
    """Return the prediction routes."""
    router = APIRouter(tags=["predict"])
    documented: dict[str, Any] = {
        "response_model": PredictResponse,
        "responses": _ERRORS,
        "openapi_extra": {"requestBody": _BODY},
    }

    @router.post(ROUTE, summary="Classify with the default model", **documented)
    async def predict(top_k: TopK | None = None, timeout_ms: TimeoutMs = None) -> Response:
        return _Direct(predictor, None)

    @router.post(MODEL_ROUTE, summary="Classify with a model", **documented)
    async def predict_with(model: str, top_k: TopK | None = None, timeout_ms: TimeoutMs = None) -> Response:
        return _Direct(predictor, model)

    return router


def _wanted_top_k(query: bytes, classes: int) -> int:
    """Return `top_k` of a query string, or the default.

    Raises:
        BadRequestError: it is no whole number from 1 to the number of classes.
    """
    values = [value for name, value in parse_qsl(query, keep_blank_values=True) if name == b"top_k"] if query else []
    if not values:
        return min(DEFAULT_TOP_K, classes)
    if not (values[-1].isdigit() and 1 <= int(values[-1][:9]) <= classes):
        shown = values[-1][:40].decode("utf-8", "replace")
        raise BadRequestError(f"top_k = {shown!r} is not a whole number from 1 to the model's {classes} classes.")
    return int(values[-1])


async def _unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, Prediction]) -> Prediction:
    """Await `work`; cancel it and raise ClientGoneError when the client leaves first."""
    answer = asyncio.ensure_future(work)
    # The body has been read, so the next message can only be the disconnect.
    leaving = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGoneError
        return answer.result()
    finally:
        leaving.cancel()
        answer.cancel()


async def _send(prediction: Prediction, k: int, send: Send) -> None:
    started = time.monotonic()
    model, stages = prediction.model, prediction.stages
    manifest = model.manifest
    results = [
        {
            "top": [
                {"label": score.label, "index": score.index, "probability": score.probability}
                for score in top_k(row, manifest.labels, k)
            ]
        }
        for row in prediction.probabilities
    ]
    content = {"model": manifest.name, "version": manifest.version, "results": results}
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    timing = (
        f"decode;dur={stages.decode_s * 1000:.2f}, queue;dur={stages.queue_s * 1000:.2f}, "
        f"infer;dur={stages.infer_s * 1000:.2f}"
    )
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"server-timing", timing.encode()),
        (b"x-model-digest", manifest.model.sha256.encode()),
        (b"x-provider", model.provider.encode()),
    ]
    model.metrics.post.observe(time.monotonic() - started)
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
