"""`/v1/…`: the REST interface of TensorFlow Serving, which KServe's first protocol follows.

One answer serves the clients of both where they ask the same path. The checks of tensors are `app/v2/`'s; the JSON is
`v1_messages.py`'s; this room has paths, headers and statuses.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope

from app.engine import Engine
from app.errors import NotOfferedError, UnavailableError
from app.http.bodies import PARSE_IN_THREAD_BYTES, BodyLimits, read_body
from app.http.connection import Connection
from app.http.direct import Direct, admitted, answer_json
from app.http.observe import trace_of
from app.http.schemas import ErrorResponse
from app.http.v1_messages import metadata, parse, version_status, write
from app.http.v2_messages import cost_of, deflate, inflate
from app.repository import Repository
from app.v2.inference import SLOW_ELEMENTS, infer
from app.v2.metadata import repository_index

MODEL = "/v1/models/{model}"
VERSION = MODEL + "/versions/{version}"
LABEL = MODEL + "/labels/{label}"

Asked = tuple[str, str | None]
"""A model's name, and the version or label if one is asked for."""

SLOW_JSON_COST = 4_000_000
"""JSON that becomes more than this in memory is parsed off the event loop: 100,000 numbers take 3 ms."""

_FAULTS: dict[int | str, Any] = {"default": {"model": ErrorResponse, "description": "Any fault"}}
_INSTANCES = {
    "type": "object",
    "description": "instances or inputs: nested numbers, or images as objects with b64.",
    "properties": {"signature_name": {"type": "string"}, "instances": {"type": "array", "items": {}}, "inputs": {}},
}
_BODY = {"required": True, "content": {"application/json": {"schema": _INSTANCES}}}
_EXAMPLE = {"predictions": [[0.9, 0.1]]}
_NOT_OFFERED = {
    "explain": "Explanations are not offered yet; :predict is.",
    "classify": "Classification of tf.Example records is not offered: send images or tensors to :predict.",
    "regress": "Regression of tf.Example records is not offered: send tensors to :predict.",
}


class Asker:
    """Answers predict requests from an engine."""

    def __init__(self, engine: Engine, limits: BodyLimits, timeout_ms: int) -> None:
        self._engine = engine
        self._limits = limits
        self._timeout_ms = timeout_ms

    async def answer(
        self, name: str, version: str | None, scope: Scope, receive: Receive, connection: Connection
    ) -> None:
        """Read a request, run it, and send the answer. Any Content-Type will do: curl -d sends that of a form."""
        model = self._engine.model(name, version)
        limit = self._limits.max_body_bytes
        with admitted(self._engine, model, scope, connection, self._timeout_ms) as (head, ticket):
            body = await read_body(head, receive, ticket, limit)
            if head.content_encoding != "identity":
                body = await inflate(body, head.content_encoding, ticket, limit)
            if cost := cost_of(body):
                ticket.hold_bytes(cost)
            most = self._limits.max_images
            if len(body) > PARSE_IN_THREAD_BYTES or cost > SLOW_JSON_COST:
                request, in_rows = await asyncio.to_thread(parse, body, model, most)
            else:
                request, in_rows = parse(body, model, most)
            response = await infer(self._engine, model, request, ticket, most)
            trace_of(scope).images = response.rows
        accepted = next((value for header, value in scope["headers"] if header == b"accept-encoding"), b"")
        if sum(tensor.array.size for tensor in response.outputs) > SLOW_ELEMENTS:
            content = await asyncio.to_thread(write, response, in_rows)
        else:
            content = write(response, in_rows)
        content, encoding = await deflate(content, accepted.decode("latin-1"))
        trace_of(scope).wrote(model.metrics, response.ran_at)
        await answer_json(scope, connection, model, response.stages, content, encoding)


def routes(engine: Engine, repository: Repository, limits: BodyLimits, timeout_ms: int) -> APIRouter:
    """Return the protocol's routes."""
    router = APIRouter(tags=["v1"])

    @router.get("/v1/models", summary="Names of all models")
    async def models() -> dict[str, list[str]]:
        return {"models": list(dict.fromkeys(entry["name"] for entry in repository_index(repository)))}

    asker = Asker(engine, limits, timeout_ms)
    for path, asked in ((MODEL, _by_name), (VERSION, _by_version), (LABEL, _by_label)):
        _add_routes(router, path, asked, engine, repository, asker)
    return router


def _by_name(model: str) -> Asked:
    return model, None


def _by_version(model: str, version: str) -> Asked:
    return model, version


def _by_label(model: str, label: str) -> Asked:
    return model, label  # which is what others call an alias


def _add_routes(
    router: APIRouter,
    path: str,
    asked: Callable[..., Asked],
    engine: Engine,
    repository: Repository,
    asker: Asker,
) -> None:
    """Add the routes of one model; `asked` takes its name, and a version or label, from the path."""
    Chosen = Annotated[Asked, Depends(asked)]  # noqa: N806 - a type
    answers: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse}, **_FAULTS}

    @router.get(path, summary="Status", responses=answers)
    async def status(chosen: Chosen) -> dict[str, Any]:
        return _status(engine, repository, *chosen)  # type: ignore[return-value]  # its status depends on it

    @router.get(f"{path}/metadata", summary="Tensors", responses=answers)
    async def described(chosen: Chosen) -> dict[str, Any]:
        return metadata(engine.model(*chosen))

    @router.post(
        f"{path}:predict",
        summary="Predict",
        response_class=JSONResponse,
        responses={200: {"content": {"application/json": {"example": _EXAMPLE}}}, **_FAULTS},
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(chosen: Chosen) -> Response:
        return Direct(partial(asker.answer, *chosen))

    for verb, sentence in _NOT_OFFERED.items():

        async def refuse(sentence: str = sentence) -> Response:
            raise NotOfferedError(sentence)

        router.add_api_route(f"{path}:{verb}", refuse, methods=["POST"], include_in_schema=False)


def _status(engine: Engine, repository: Repository, name: str, version: str | None) -> Response:
    """Return KServe's answer and TensorFlow Serving's in one; 503, as KServe's server has it, where it is not ready.

    Raises:
        UnknownModelError: there is no such model, version or label.
    """
    reason, wanted = "", version
    try:
        model = engine.model(name, version)
        wanted = model.version if version else None  # a label stands for it
    except UnavailableError as fault:
        reason = fault.message
    content: dict[str, Any] = {"name": name, "ready": not reason}
    content["model_version_status"] = [
        version_status(entry)
        for entry in repository_index(repository)
        if entry["name"] == name and wanted in (None, entry["version"])
    ]
    if not reason:
        return JSONResponse(content)
    return JSONResponse(content | {"error": reason, "code": "unavailable"}, HTTPStatus.SERVICE_UNAVAILABLE)
