"""`POST /predict` and its siblings: images in, labels and probabilities out.

The hot path, so it goes the direct way, and one small image without a task. The routes are FastAPI's all the same,
for the OpenAPI document and for wrong methods.
"""

import json
import re
import time
from functools import lru_cache
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import parse_qsl
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Header, Query
from starlette.responses import Response
from starlette.types import Receive, Scope

from app.engine import Engine, Prediction
from app.errors import BadRequestError
from app.http.bodies import RAW_TYPES, BodyLimits, Head, read_images
from app.http.connection import Connection, RequestHead, WholeRequest
from app.http.direct import DEFAULT, Asked, Direct, admitted
from app.http.observe import Record, trace_of
from app.http.schemas import ErrorResponse, ImagesBody, PredictResponse
from app.http.taskless import Plan, TasklessPrediction
from app.journal import Trace
from app.loading import LoadedModel
from app.scores import JsonWriter

DEFAULT_TOP_K = 5

ROUTE, MODEL_ROUTE = "/predict", "/models/{model}/predict"
VERSION_ROUTE = "/models/{model}/versions/{version}/predict"
_WAY = re.compile(r"/models/([^/]+)(?:/versions/([^/]+))?/predict")

_COUNT = re.compile(r"[0-9]{1,9}")
TopK = Annotated[int, Query(ge=1, description="How many classes to return, best first; at most the number there is.")]
TimeoutMs = Annotated[
    int | None,
    Header(alias="Timeout-Ms", ge=1, description="Deadline in milliseconds; the server's own bounds it."),
]

_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_FORM = {"schema": {"type": "object", "properties": {"file": _FILES}}}
IMAGE_BODY = {
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
    401: {"model": ErrorResponse, "description": "No key, or an unknown one"},
    403: {"model": ErrorResponse, "description": "The key is not for this"},
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
        self._forms: WeakKeyDictionary[LoadedModel, _Form] = WeakKeyDictionary()

    def begin(self, request: WholeRequest, trace: Trace, record: Record) -> bool:
        """Begin to answer a whole request without a task; False: it is not one for that.

        Raises:
            Exception: whatever went wrong before there was anything to wait for. Nothing is held, and `answer` meets
                it again.
        """
        head = request.head
        if head.plan is None:
            head.plan = _plan_for(head, self._limits)
        plan: Plan = head.plan
        if not plan.is_taskless:
            return False
        model = self._engine.model(*plan.asked)
        form = self._form_of(model)
        k = _wanted_top_k(head.query, form.classes)
        timeout_ms = self._timeout_ms if plan.timeout_ms is None else min(plan.timeout_ms, self._timeout_ms)
        ticket = self._engine.admit(model, trace.started + timeout_ms / 1000, plan.urgency)
        if trace.marks is not None:
            ticket.follow(trace.marks)
        trace.route, trace.model, trace.version, trace.images = plan.route, form.name, form.version, 1
        TasklessPrediction(request, ticket, trace, record, form, k).begin(self._engine, model)
        return True

    async def answer(self, scope: Scope, receive: Receive, connection: Connection) -> None:
        """Read a request's images, classify them with the model that its path names, and send the answer."""
        trace = trace_of(scope)
        _, asked = way_of(scope["path"]) or ("", DEFAULT)
        model = self._engine.model(*asked)
        form = self._form_of(model)
        k = _wanted_top_k(scope["query_string"], form.classes)
        with admitted(self._engine, model, scope, connection, self._timeout_ms) as (head, ticket):
            images = await read_images(head, receive, ticket, self._limits)
            trace.images = len(images)
            prediction = await self._engine.classify(model, images, ticket)
        started = time.monotonic()
        headers, body = form.fill(prediction, k, trace.request_id)
        trace.wrote(model.metrics, started)
        trace.status = HTTPStatus.OK
        await connection.answer(HTTPStatus.OK, headers, body)

    def _form_of(self, model: LoadedModel) -> "_Form":
        return self._forms.get(model) or self._forms.setdefault(model, _Form(model))


def _plan_for(request: RequestHead, limits: BodyLimits) -> Plan:
    way = way_of(request.path)
    try:
        head = Head.of(request.headers)
    except BadRequestError:
        return Plan(is_taskless=False)
    is_image = head.content_type in RAW_TYPES and head.content_encoding == "identity"
    if way is None or not is_image or not 0 < request.body_bytes <= limits.max_body_bytes:
        return Plan(is_taskless=False)
    return Plan(True, *way, head.timeout_ms, head.urgency)


class _Form:
    """The answers of one model, with everything filled in that is the same in all of them."""

    def __init__(self, model: LoadedModel) -> None:
        manifest = model.classifier
        self.name, self.version = manifest.name, manifest.version
        self.classes = len(manifest.labels)
        self._writer = JsonWriter(manifest.labels)
        self._start = json.dumps({"model": manifest.name, "version": manifest.version}, separators=(",", ":"))[:-1]
        self._headers = (
            "content-type: application/json\r\n"
            f"x-model-digest: {manifest.model.sha256}\r\n"
            f"x-provider: {model.provider}\r\n"
        )

    def fill(self, prediction: Prediction, k: int, request_id: str) -> tuple[bytes, bytes]:
        """Return the headers, lines that end in CRLF, and the body of an answer."""
        write, stages = self._writer.write, prediction.stages
        results = ",".join([write(row, k) for row in prediction.probabilities])
        headers = (
            f"{self._headers}x-request-id: {request_id}\r\nserver-timing: decode;dur={stages.decode_s * 1000:.2f}, "
            f"queue;dur={stages.queue_s * 1000:.2f}, infer;dur={stages.infer_s * 1000:.2f}\r\n"
        )
        return headers.encode(), f'{self._start},"results":[{results}]}}'.encode()


@lru_cache(maxsize=1024)
def way_of(path: str) -> tuple[str, Asked] | None:
    """Return a prediction's route, and what its path asks for; None: it is none."""
    if path == ROUTE:
        return ROUTE, DEFAULT
    found = _WAY.fullmatch(path)
    if found is None:
        return None
    name, version = found.groups()
    return MODEL_ROUTE if version is None else VERSION_ROUTE, (name, version)


def routes(predictor: Predictor) -> APIRouter:
    """Return the prediction routes."""
    router = APIRouter(tags=["predict"])
    documented: dict[str, Any] = {
        "response_model": PredictResponse,
        "responses": _ERRORS,
        "openapi_extra": {"requestBody": IMAGE_BODY},
    }

    @router.post(ROUTE, summary="Classify with the default model", **documented)
    async def predict(top_k: TopK | None = None, timeout_ms: TimeoutMs = None) -> Response:
        return Direct(predictor.answer)

    @router.post(MODEL_ROUTE, summary="Classify with a model", **documented)
    async def predict_with(model: str, top_k: TopK | None = None, timeout_ms: TimeoutMs = None) -> Response:
        return Direct(predictor.answer)

    @router.post(VERSION_ROUTE, summary="Classify with a version of a model, or an alias", **documented)
    async def predict_with_version(
        model: str, version: str, top_k: TopK | None = None, timeout_ms: TimeoutMs = None
    ) -> Response:
        return Direct(predictor.answer)

    return router


@lru_cache(maxsize=1024)
def _wanted_top_k(query: bytes, classes: int) -> int:
    """Return `top_k` of a query string, or the default, which may be more than there are.

    Raises:
        BadRequestError: it is no whole number from 1 to the number of classes.
    """
    # As text: of bytes with an escaped letter beyond ASCII the standard library raises UnicodeEncodeError.
    values = [value for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True) if name == "top_k"]
    if not values:
        return DEFAULT_TOP_K
    k = int(values[-1]) if _COUNT.fullmatch(values[-1]) else 0
    if not 1 <= k <= classes:
        raise BadRequestError(
            f"top_k = {values[-1][:40]!r} is not a whole number from 1 to the model's {classes} classes."
        )
    return k
