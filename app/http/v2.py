"""`/v2/…`: the Open Inference Protocol over REST, as the clients of Triton, KServe, MLServer and OVMS speak it.

Inference goes the direct way, like predictions; what is asked once a connection is FastAPI's. The rules of the protocol
are `app/v2/`'s; this room has the paths, the headers and the statuses.
"""

import asyncio
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Depends, Header
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope

from app.engine import Engine, GiveUp, Prediction, Tell
from app.errors import BadRequestError, NotOfferedError, UnavailableError
from app.http.bodies import BodyLimits, Head, read_body, too_large
from app.http.connection import Connection, RequestHead, WholeRequest
from app.http.direct import Direct, admitted
from app.http.observe import Record, trace_of
from app.http.schemas import ErrorResponse
from app.http.taskless import Plan, TasklessPrediction
from app.http.v2_messages import SMALL_JSON, Message, Writer, cost_of, deflate, deflate_now, inflate, json_object, parse
from app.http.v2_schemas import (
    INDEX_BODY,
    INFER_BODY,
    INFER_RESPONSE,
    OPERATION_BODY,
    IndexEntry,
    Loaded,
    ModelConfig,
    ModelMetadata,
    ModelNames,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    Statistics,
    Unloaded,
)
from app.journal import Trace
from app.loading import LoadedModel
from app.metrics import Metrics
from app.operations import Operations
from app.probes import Probes
from app.repository import Repository
from app.tickets import Ticket
from app.v2 import metadata
from app.v2.inference import SLOW_ELEMENTS, SmallRequest, infer, small_request

MODEL = "/v2/models/{model}"
VERSION = MODEL + "/versions/{version}"
_WAY = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
MAX_DOCUMENT_BYTES = 65_536
"""Body of a request that is no inference."""
_LENGTH_HEADER = b"inference-header-content-length"

Named = tuple[str, str | None]
"""A model's name, and the version if one is asked for."""
JsonLength = Annotated[
    int | None,
    Header(alias="Inference-Header-Content-Length", ge=0, description="Bytes of JSON before binary tensors."),
]

_ANY_FAULT: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorResponse, "description": "Unknown model or version"},
    503: {"model": ErrorResponse, "description": "Model loading or failed"},
    "default": {"model": ErrorResponse, "description": "Any other fault"},
}
_INFER_FAULTS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "Malformed request, or not what the model takes"},
    413: {"model": ErrorResponse, "description": "Body, image or number of rows too large"},
    415: {"model": ErrorResponse, "description": "Content-Encoding not taken"},
    422: {"model": ErrorResponse, "description": "Not a decodable image; the whole request is refused"},
    429: {"model": ErrorResponse, "description": "Full; Retry-After says when to come back"},
    504: {"model": ErrorResponse, "description": "Deadline passed"},
}


class Inferrer:
    """Answers the protocol's inference requests from an engine."""

    def __init__(self, engine: Engine, limits: BodyLimits, timeout_ms: int) -> None:
        self._engine = engine
        self._limits = limits
        self._timeout_ms = timeout_ms
        self._writers: WeakKeyDictionary[LoadedModel, Writer] = WeakKeyDictionary()

    def begin(self, request: WholeRequest, trace: Trace, record: Record) -> bool:
        """Begin to answer a whole request without a task; False: it is not one for that.

        Raises:
            Exception: whatever went wrong before there was anything to wait for. Nothing is held, and `answer` meets
                it again.
        """
        head = request.head
        if head.plan is None:
            head.plan = _plan_for(head, self._limits)
        plan: _Plan = head.plan
        if not plan.is_taskless:
            return False
        model = self._engine.model(*plan.asked)
        message = parse(request.body, plan.json_length, model)
        small = small_request(model, message.request, self._limits.max_images)
        if small is None:
            return False
        timeout_ms = self._timeout_ms if plan.timeout_ms is None else min(plan.timeout_ms, self._timeout_ms)
        ticket = self._engine.admit(model, trace.started + timeout_ms / 1000, plan.urgency)
        if trace.marks is not None:
            ticket.follow(trace.marks)
        trace.route, trace.model, trace.version, trace.images = plan.route, model.name, model.version, small.rows
        answering = _Taskless(self._engine, small, message, self._writer_of(model), plan.accepted)
        TasklessPrediction(request, ticket, trace, record, answering, 0).begin(answering, model)
        return True

    async def answer(self, scope: Scope, receive: Receive, connection: Connection) -> None:
        """Read a request, whose path names the model, run it, and send the answer."""
        trace = trace_of(scope)
        _, asked = way_of(scope["path"]) or ("", ("", None))
        model = self._engine.model(*asked)
        writer = self._writer_of(model)
        header_length, accepted = _more_of(scope["headers"])
        limit = self._limits.max_body_bytes
        with admitted(self._engine, model, scope, connection, self._timeout_ms) as (head, ticket):
            body = await read_body(head, receive, ticket, limit)
            if head.content_encoding != "identity":
                body = await inflate(body, head.content_encoding, ticket, limit)
            if cost := cost_of(body if header_length is None else memoryview(body)[:header_length]):
                ticket.hold_bytes(cost)
            message = parse(body, header_length, model)
            response = await infer(self._engine, model, message.request, ticket, self._limits.max_images)
            trace.images = response.rows
        if sum([tensor.array.size for tensor in response.outputs]) > SLOW_ELEMENTS:
            answer, json_length = await asyncio.to_thread(writer.write, response, message)
        else:
            answer, json_length = writer.write(response, message)
        answer, encoding = await deflate(answer, accepted)
        headers = writer.head(response.stages, trace.request_id, json_length, encoding)
        trace.wrote(model.metrics, response.ran_at)
        trace.status = HTTPStatus.OK
        await connection.answer(HTTPStatus.OK, headers, answer)

    def _writer_of(self, model: LoadedModel) -> Writer:
        return self._writers.get(model) or self._writers.setdefault(model, Writer(model))


class _Taskless:
    """A small request on its way without a task: how it is run, and how its answer is written."""

    __slots__ = ("_accepted", "_engine", "_message", "_small", "_writer")

    def __init__(self, engine: Engine, small: SmallRequest, message: Message, writer: Writer, accepted: str) -> None:
        self._engine = engine
        self._small = small
        self._message = message
        self._writer = writer
        self._accepted = accepted

    def begin(self, model: LoadedModel, body: bytes, ticket: Ticket, tell: Tell) -> GiveUp:
        """Have it run."""
        return self._small.begin(self._engine, ticket, tell)

    def fill(self, prediction: Prediction, k: int, request_id: str) -> tuple[bytes, bytes]:
        """Return the headers, lines that end in CRLF, and the body of the answer."""
        answer, json_length = self._writer.write(self._small.respond(prediction), self._message)
        answer, encoding = deflate_now(answer, self._accepted)
        return self._writer.head(prediction.stages, request_id, json_length, encoding), answer


@dataclass(frozen=True, slots=True)
class _Plan(Plan):
    """What the head of an inference request says."""

    json_length: int | None = None
    accepted: str = ""


def _plan_for(request: RequestHead, limits: BodyLimits) -> _Plan:
    way = way_of(request.path)
    try:
        head = Head.of(request.headers)
        json_length, accepted = _more_of(request.headers)
    except BadRequestError:
        return _Plan(is_taskless=False)
    is_small = 0 < request.body_bytes <= min(limits.max_body_bytes, SMALL_JSON)
    if way is None or not is_small or head.content_encoding != "identity":
        return _Plan(is_taskless=False)
    return _Plan(True, *way, head.timeout_ms, head.urgency, json_length, accepted)


@lru_cache(maxsize=1024)
def way_of(path: str) -> tuple[str, Named] | None:
    """Return an inference request's route, and what its path asks for; None: it is none."""
    found = _WAY.fullmatch(path)
    if found is None:
        return None
    name, version = found.groups()
    return f"{MODEL if version is None else VERSION}/infer", (name, version)


def routes(
    engine: Engine,
    repository: Repository,
    operations: Operations,
    metrics: Metrics,
    probes: Probes,
    inferrer: Inferrer,
) -> APIRouter:
    """Return the protocol's routes."""
    router = APIRouter(prefix="/v2", tags=["v2"])
    _add_server_routes(router, repository, metrics, probes)
    for path, asked in ((MODEL, _by_name), (VERSION, _by_version)):
        _add_model_routes(router, path.removeprefix("/v2"), asked, engine, repository, metrics, inferrer)
    _add_repository_routes(router, repository, operations)
    _add_refusals(router)
    return router


def _add_server_routes(router: APIRouter, repository: Repository, metrics: Metrics, probes: Probes) -> None:
    @router.get("/", include_in_schema=False)  # as the protocol's own document has it
    @router.get("", summary="Server metadata")
    async def server() -> ServerMetadata:
        return ServerMetadata(**metadata.server_metadata())

    @router.get("/health/live", summary="Whether the server is alive", responses={503: {"model": ServerLive}})
    async def live() -> ServerLive:
        status, content = probes.live()
        reason = content.get("reason", "")
        return _health({"live": status == HTTPStatus.OK}, reason)  # type: ignore[return-value]

    @router.get("/health/ready", summary="Whether the server is ready", responses={503: {"model": ServerReady}})
    async def ready() -> ServerReady:
        status, content = probes.ready()
        return _health({"ready": status == HTTPStatus.OK}, content["reason"])  # type: ignore[return-value]

    @router.get("/models", summary="Names of all models")
    async def models() -> ModelNames:
        return ModelNames(models=list(repository.entries))

    @router.get("/models/stats", summary="Statistics of all models")
    async def statistics() -> Statistics:
        return Statistics(**metadata.statistics(metadata.served(repository), metrics))


def _by_name(model: str) -> Named:
    return model, None


def _by_version(model: str, version: str) -> Named:
    return model, version


def _add_model_routes(
    router: APIRouter,
    prefix: str,
    asked: Callable[..., Named],
    engine: Engine,
    repository: Repository,
    metrics: Metrics,
    inferrer: Inferrer,
) -> None:
    """Add the routes of one model; `asked` takes its name, and its version, from the path."""
    Chosen = Annotated[Named, Depends(asked)]  # noqa: N806 - a type

    @router.get(prefix, summary="Model metadata", responses=_ANY_FAULT)
    async def described(chosen: Chosen) -> ModelMetadata:
        model = engine.model(*chosen)
        return ModelMetadata(**metadata.model_metadata(model, repository))

    @router.get(
        f"{prefix}/ready", summary="Whether a model is ready", responses=_ANY_FAULT | {503: {"model": ModelReady}}
    )
    async def ready(chosen: Chosen) -> ModelReady:
        try:
            engine.model(*chosen)
        except UnavailableError as fault:
            return _health({"name": chosen[0], "ready": False}, fault.message)  # type: ignore[return-value]
        return ModelReady(name=chosen[0], ready=True)

    @router.get(f"{prefix}/config", summary="Model configuration", responses=_ANY_FAULT)
    async def config(chosen: Chosen) -> ModelConfig:
        return ModelConfig(**metadata.model_config(engine.model(*chosen)))

    @router.get(f"{prefix}/stats", summary="Statistics of a model", responses=_ANY_FAULT)
    async def statistics(chosen: Chosen) -> Statistics:
        name, version = chosen
        model = engine.model(name, version)
        models = metadata.served(repository, name) if version is None else [model]
        return Statistics(**metadata.statistics(models, metrics))

    @router.post(
        f"{prefix}/infer",
        summary="Infer",
        responses={200: INFER_RESPONSE, **_ANY_FAULT, **_INFER_FAULTS},
        openapi_extra={"requestBody": INFER_BODY},
    )
    async def infer(chosen: Chosen, length: JsonLength = None) -> Response:
        return Direct(inferrer.answer)


def _add_repository_routes(router: APIRouter, repository: Repository, operations: Operations) -> None:
    """Add the model repository extension; that load and unload need an administrator's key is `auth.py`'s."""

    @router.post(
        "/repository/index",
        summary="Versions in the repository, with states",
        responses=_ANY_FAULT,
        openapi_extra=INDEX_BODY,
    )
    async def index(request: Request) -> list[IndexEntry]:
        ready_only = (await _small_document(request)).get("ready", False)
        if not isinstance(ready_only, bool):
            raise BadRequestError("The index's field 'ready' must be true or false.")
        return [IndexEntry(**entry) for entry in metadata.repository_index(repository, ready_only=ready_only)]

    @router.post(
        "/repository/models/{model}/load",
        summary="Load a model, or load it again",
        responses=_ANY_FAULT,
        openapi_extra=OPERATION_BODY,
    )
    async def load(model: str, request: Request) -> Loaded:
        parameters = (await _small_document(request)).get("parameters") or {}
        if not isinstance(parameters, dict):
            raise BadRequestError("The parameters of a load must be an object.")
        metadata.refuse_foreign(parameters)
        await operations.load(model)
        return Loaded(name=model, load=True)

    @router.post(
        "/repository/models/{model}/unload",
        summary="Unload a model",
        responses=_ANY_FAULT,
        openapi_extra=OPERATION_BODY,
    )
    async def unload(model: str, request: Request) -> Unloaded:
        await _small_document(request)
        await operations.unload(model)
        return Unloaded(name=model, unload=True)


async def _small_document(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body, whatever its Content-Type says; empty where there is no body.

    Raises:
        BadRequestError: it is no JSON object.
        BodyTooLargeError: it is no small one.
    """
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_DOCUMENT_BYTES:
                raise too_large(MAX_DOCUMENT_BYTES)
    except ClientDisconnect:
        raise BadRequestError("The body ended before it was complete.") from None
    return json_object(body) if body.strip() else {}


def _add_refusals(router: APIRouter) -> None:
    """Answer the routes of extensions that are not offered, which clients of Triton may try."""
    refused = {
        "/systemsharedmemory/{rest:path}": "Shared memory",
        "/cudasharedmemory/{rest:path}": "Shared memory",
        "/models/{model}/trace/setting": "Tracing",
        "/trace/setting": "Tracing",
        "/logging": "Changing the log over the API",
    }
    for path, what in refused.items():

        async def refuse(what: str = what) -> Response:
            raise NotOfferedError(f"{what} is not offered.")

        router.add_api_route(path, refuse, methods=["GET", "POST"], include_in_schema=False)


def _health(content: dict[str, Any], reason: str) -> Response:
    """Return 200 for what is ready or alive; else 503, with the reason as every error has it."""
    if False not in content.values():
        return JSONResponse(content)
    # A response of our own skips FastAPI's: the status depends on the content.
    return JSONResponse(content | {"error": reason, "code": "unavailable"}, HTTPStatus.SERVICE_UNAVAILABLE)


def _more_of(headers: Iterable[tuple[bytes, bytes]]) -> tuple[int | None, str]:
    """Return the headers Inference-Header-Content-Length and Accept-Encoding.

    Raises:
        BadRequestError: the first is no whole number.
    """
    length, accepted = None, ""
    for name, value in headers:
        if name == _LENGTH_HEADER:
            if not value.isdigit() or len(value) > 18:
                shown = value[:40].decode("latin-1")
                raise BadRequestError(f"The header Inference-Header-Content-Length = {shown!r} is no whole number.")
            length = int(value)
        elif name == b"accept-encoding":
            accepted = value.decode("latin-1")
    return length, accepted
