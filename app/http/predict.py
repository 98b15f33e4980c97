"""`POST /predict` and its siblings: images in, labels and probabilities out."""

import asyncio
import json
import time
from collections.abc import Awaitable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from app.engine import Engine, Prediction
from app.errors import BadRequestError, DeadlineError
from app.http.bodies import BodyLimits, read_images
from app.http.observe import CLIENT_GONE, trace_of
from app.http.schemas import ErrorResponse, ImagesBody, PredictResponse
from app.scores import top_k

DEFAULT_TOP_K = 5

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

    async def answer(self, request: Request, name: str | None, k: int | None, timeout_ms: int | None) -> Response:
        """Read a request's images, classify them, and return the response."""
        trace = trace_of(request.scope)
        model = self._engine.model(name)
        trace.model, trace.version = model.manifest.name, model.manifest.version
        k = _checked_top_k(k, len(model.manifest.labels))
        timeout_s = min(timeout_ms or self._timeout_ms, self._timeout_ms) / 1000
        deadline = trace.started + timeout_s
        with self._engine.admit() as ticket, model.metrics.inflight_requests.track_inprogress():
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    images = await read_images(request, ticket, self._limits)
                trace.images = len(images)
                work = self._engine.classify(model, images, deadline, ticket)
                prediction = await _unless_client_leaves(request, work)
            except TimeoutError:
                raise DeadlineError("The deadline passed before the whole body had arrived.") from None
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            return _response(prediction, k)


def routes(predictor: Predictor) -> APIRouter:
    """Return the prediction routes."""
    router = APIRouter(tags=["predict"])
    documented: dict[str, Any] = {
        "response_model": PredictResponse,
        "responses": _ERRORS,
        "openapi_extra": {"requestBody": _BODY},
    }

    @router.post("/predict", summary="Classify with the default model", **documented)
    async def predict(request: Request, top_k: TopK | None = None, timeout_ms: TimeoutMs = None) -> Response:
        return await predictor.answer(request, None, top_k, timeout_ms)

    @router.post("/models/{model}/predict", summary="Classify with a model", **documented)
    async def predict_with(
        request: Request, model: str, top_k: TopK | None = None, timeout_ms: TimeoutMs = None
    ) -> Response:
        return await predictor.answer(request, model, top_k, timeout_ms)

    return router


def _checked_top_k(k: int | None, classes: int) -> int:
    if k is None:
        return min(DEFAULT_TOP_K, classes)
    if k > classes:
        raise BadRequestError(f"top_k = {k} is more than the model's {classes} classes.")
    return k


async def _unless_client_leaves(request: Request, work: Awaitable[Prediction]) -> Prediction:
    """Await `work`; cancel it and raise ClientDisconnect when the client leaves first."""
    answer = asyncio.ensure_future(work)
    # The body has been read, so the next message can only be the disconnect.
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        leaving.cancel()
        answer.cancel()


def _response(prediction: Prediction, k: int) -> Response:
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
    model.metrics.post.observe(time.monotonic() - started)
    headers = {
        "Server-Timing": f"decode;dur={stages.decode_s * 1000:.2f}, queue;dur={stages.queue_s * 1000:.2f}, "
        f"infer;dur={stages.infer_s * 1000:.2f}",
        "X-Model-Digest": manifest.model.sha256,
        "X-Provider": model.provider,
    }
    return Response(body, media_type="application/json", headers=headers)
