"""`GET /models`: what is loaded, in which state, and what it is."""

from fastapi import APIRouter

from app.errors import UnknownModelError
from app.http.schemas import ErrorResponse, ModelDetail, ModelList, ModelSummary
from app.repository import Entry, Repository

# Also keeps FastAPI from promising a 422 of its own shape.
ANY_FAULT = {"model": ErrorResponse, "description": "Any other fault"}


def routes(repository: Repository) -> APIRouter:
    """Return the routes that describe models."""
    router = APIRouter(tags=["models"])

    @router.get("/models", summary="All models")
    async def models() -> ModelList:
        return ModelList(default=repository.default, models=[_summary(entry) for entry in repository.entries.values()])

    @router.get("/models/{model}", summary="One model", responses={404: {"model": ErrorResponse}, "default": ANY_FAULT})
    async def model(model: str) -> ModelDetail:
        entry = repository.entries.get(model)
        if entry is None:
            raise UnknownModelError(
                f"There is no model '{model[:80]}' here; there are: {', '.join(repository.entries)}."
            )
        manifest = entry.model.manifest.model_dump(mode="json") if entry.model else None
        return ModelDetail(**_summary(entry).model_dump(), manifest=manifest)

    return router


def _summary(entry: Entry) -> ModelSummary:
    summary = ModelSummary(name=entry.name, version=entry.version, state=entry.state.value, reason=entry.reason)
    if entry.model is None:
        return summary
    manifest = entry.model.manifest
    return summary.model_copy(
        update={
            "description": manifest.description,
            "classes": len(manifest.labels),
            "provider": entry.model.provider,
            "digest": manifest.model.sha256,
        }
    )
