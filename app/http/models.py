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
        manifest = None
        if entry.model is not None and (known := entry.model.manifest or entry.model.tensor_manifest):
            manifest = known.model_dump(mode="json")
        return ModelDetail(**_summary(entry).model_dump(), manifest=manifest)

    return router


def _summary(entry: Entry) -> ModelSummary:
    summary = ModelSummary(name=entry.name, version=entry.version, state=entry.state.value, reason=entry.reason)
    if entry.model is None:
        return summary
    model = entry.model
    known = model.manifest or model.tensor_manifest
    return summary.model_copy(
        update={
            "description": known.description if known else "",
            "classes": len(known.labels) if known else 0,
            "provider": model.provider,
            "digest": model.digest,
        }
    )
