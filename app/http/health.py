"""Probes and metrics: is the process alive, does it want traffic, and its numbers."""

from collections.abc import Callable

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from app.http.schemas import Live, Ready
from app.metrics import CONTENT_TYPE, Metrics
from app.repository import Repository

WhyNotReady = Callable[[], str]


def routes(repository: Repository, metrics: Metrics, why_not_ready: WhyNotReady) -> APIRouter:
    """Return the probes and the metrics route; `why_not_ready` says what is missing, or nothing."""
    router = APIRouter(tags=["operations"])

    @router.get("/livez", summary="Whether the process answers")
    async def livez() -> Live:
        return Live()

    @router.get("/readyz", summary="Whether the service wants traffic", responses={503: {"model": Ready}})
    async def readyz() -> Ready:
        reason = why_not_ready()
        states = {entry.name: entry.state.value for entry in repository.entries.values()}
        ready = Ready(ready=not reason, reason=reason, models=states)
        # A response of our own skips FastAPI's: the status depends on the content.
        return JSONResponse(ready.model_dump(), 200 if ready.ready else 503)  # type: ignore[return-value]

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics_text() -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return router
