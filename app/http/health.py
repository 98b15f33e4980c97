"""Probes and metrics on the main port: `app/probes.py` answers, so that any worker speaks for the whole service."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.http.schemas import Live, Ready
from app.probes import Probes


def routes(probes: Probes) -> APIRouter:
    """Return the probes and the metrics route."""
    router = APIRouter(tags=["operations"])

    @router.get("/livez", summary="Whether the process works", responses={503: {"model": Live}})
    async def livez() -> Live:
        status, content = probes.live()
        return JSONResponse(content, status)  # type: ignore[return-value]

    @router.get("/readyz", summary="Whether the service wants traffic", responses={503: {"model": Ready}})
    async def readyz() -> Ready:
        status, content = probes.ready()
        # A response of our own skips FastAPI's: the status depends on the content.
        return JSONResponse(content, status)  # type: ignore[return-value]

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics_text(request: Request) -> Response:
        content, kind = probes.metrics(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": kind})

    return router
