"""The application, assembled: observation, keys, the direct way for predictions, and FastAPI for all routes."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp

from app import __version__
from app.engine import Engine
from app.http import errors, health, models, predict, torchserve, v1, v2
from app.http.auth import Guard, describe
from app.http.bodies import BodyLimits
from app.http.connection import WholeRequest
from app.http.direct import Front
from app.http.observe import Observe, Record
from app.journal import Journal, Trace
from app.keys import Keyring
from app.metrics import Metrics
from app.operations import Operations
from app.probes import Probes
from app.repository import Repository

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

DESCRIPTION = """
Post an image, get labels and probabilities. Every error is `{"error": "<one sentence>", "code": "<reason>"}`.
"""


def create_app(
    *,
    engine: Engine,
    repository: Repository,
    operations: Operations,
    metrics: Metrics,
    probes: Probes,
    keyring: Keyring,
    limits: BodyLimits,
    request_timeout_ms: int,
    journal: Journal,
    lifespan: Lifespan,
) -> ASGIApp:
    """Return the application over an engine and a repository; `lifespan` starts and stops them."""
    # FastAPI's own /docs loads its scripts from a public CDN: blank in a closed network.
    app = FastAPIOffline(
        title="Convoy", version=__version__, description=DESCRIPTION, lifespan=lifespan, redirect_slashes=False
    )
    errors.install(app)
    predictor = predict.Predictor(engine, limits, request_timeout_ms)
    inferrer = v2.Inferrer(engine, limits, request_timeout_ms)
    routers = [
        predict.routes(predictor),
        v2.routes(engine, repository, operations, metrics, probes, inferrer),
        v1.routes(engine, repository, limits, request_timeout_ms),
        torchserve.routes(engine, probes, limits, request_timeout_ms),
        models.routes(repository, operations),
        health.routes(probes),
    ]
    for router in routers:
        app.include_router(router)

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/docs")
        return JSONResponse({"status": "alive"})  # KServe's client asks here, in its first protocol

    if keyring.guarded:
        describe(app)

    def begin(request: WholeRequest, trace: Trace, record: Record) -> bool:
        first = inferrer.begin if request.head.path.endswith("/infer") else predictor.begin
        return first(request, trace, record)

    guard = Guard(
        Front(app, [(predict.way_of, predictor.answer), (v2.way_of, inferrer.answer)]),
        begin,
        keyring,
        [route for router in routers for route in router.routes],
    )
    return Observe(guard, guard.begin, journal)
