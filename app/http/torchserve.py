"""`/predictions/…`, `/ping`: what clients of TorchServe ask. Its management interface is not offered, on purpose."""

import json
import time
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope

from app.engine import Engine
from app.errors import BadRequestError, NotOfferedError
from app.http.bodies import BodyLimits, read_images
from app.http.connection import Connection
from app.http.direct import Direct, admitted, answer_json
from app.http.observe import trace_of
from app.http.predict import IMAGE_BODY
from app.http.schemas import ErrorResponse
from app.probes import Probes
from app.scores import top_k

CLASSES = 5
"""TorchServe's image classifier tells so many."""
MODEL = "/predictions/{model}"
VERSION = MODEL + "/{version}"

_FAULTS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorResponse, "description": "Any fault"}}


class Classifier:
    """Answers prediction requests from an engine."""

    def __init__(self, engine: Engine, limits: BodyLimits, timeout_ms: int) -> None:
        self._engine = engine
        self._limits = limits
        self._timeout_ms = timeout_ms

    async def answer(
        self, name: str, version: str | None, scope: Scope, receive: Receive, connection: Connection
    ) -> None:
        """Read a request's image, classify it, and send the labels with their probabilities, best first."""
        model = self._engine.model(name, version)
        labels = model.classifier.labels
        with admitted(self._engine, model, scope, connection, self._timeout_ms) as (head, ticket):
            images = await read_images(head, receive, ticket, self._limits)
            if len(images) > 1:
                raise BadRequestError(
                    f"The request has {len(images)} images, but this route answers for one: send them one by one, or "
                    f"all to /models/{model.name}/predict."
                )
            trace_of(scope).images = 1
            prediction = await self._engine.classify(model, images, ticket)
        started = time.monotonic()
        best = {score.label: score.probability for score in top_k(prediction.probabilities[0], labels, CLASSES)}
        body = json.dumps(best, ensure_ascii=False, separators=(",", ":")).encode()
        trace_of(scope).wrote(model.metrics, started)
        await answer_json(scope, connection, model, prediction.stages, body)


def routes(engine: Engine, probes: Probes, limits: BodyLimits, timeout_ms: int) -> APIRouter:
    """Return the routes of TorchServe's inference interface."""
    router = APIRouter(tags=["torchserve"])
    classifier = Classifier(engine, limits, timeout_ms)
    documented: dict[str, Any] = {
        "summary": "Classify one image",
        "response_model": dict[str, float],
        "responses": _FAULTS,
        "openapi_extra": {"requestBody": IMAGE_BODY},
    }

    @router.post(MODEL, **documented)
    @router.put(MODEL, include_in_schema=False)  # curl -T sends it
    async def predict(model: str) -> Response:
        return Direct(partial(classifier.answer, model, None))

    @router.post(VERSION, **documented)
    @router.put(VERSION, include_in_schema=False)
    async def predict_with_version(model: str, version: str) -> Response:
        return Direct(partial(classifier.answer, model, version))

    @router.get("/ping", summary="Whether the service wants traffic", responses={503: {"model": ErrorResponse}})
    async def ping() -> dict[str, str]:
        status, content = probes.ready()
        if status == HTTPStatus.OK:
            return {"status": "Healthy"}
        told = {"status": "Unhealthy", "error": content["reason"], "code": "unavailable"}
        # A response of our own skips FastAPI's: the status depends on the content.
        return JSONResponse(told, status)  # type: ignore[return-value]

    @router.api_route("/explanations/{model}", methods=["POST", "PUT"], include_in_schema=False)
    @router.api_route("/explanations/{model}/{version}", methods=["POST", "PUT"], include_in_schema=False)
    async def explain() -> Response:
        raise NotOfferedError("Explanations are not offered yet; /predictions is.")

    return router
