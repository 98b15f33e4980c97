"""`GET /models`: what is loaded, in which state, and what it is; and loading and unloading."""

from typing import Any

from fastapi import APIRouter

from app.errors import UnknownModelError
from app.http.schemas import ErrorResponse, ModelDetail, ModelList, ModelSummary, Tensor, VersionDetail
from app.operations import Operations
from app.repository import Entry, Repository, Version
from app.tensors import TensorSpec

# Also keeps FastAPI from promising a 422 of its own shape.
ANY_FAULT = {"model": ErrorResponse, "description": "Any other fault"}
OPERATION_FAULTS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "No model's name, or no version's"},
    401: {"model": ErrorResponse, "description": "No key, or an unknown one"},
    403: {"model": ErrorResponse, "description": "A key without the scope admin"},
    404: {"model": ErrorResponse, "description": "Unknown model or version"},
    409: {"model": ErrorResponse, "description": "A version could not be loaded; what was served before still is"},
    503: {"model": ErrorResponse, "description": "Not every worker has done it in time"},
    "default": ANY_FAULT,
}


def routes(repository: Repository, operations: Operations) -> APIRouter:
    """Return the routes that describe models, load and unload them."""
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
        return _detail(entry)

    @router.post("/models/{model}/load", summary="Look at a model's folder again", responses=OPERATION_FAULTS)
    async def load(model: str) -> ModelDetail:
        return _detail(await operations.load(model))

    @router.post("/models/{model}/unload", summary="Take a model from service", responses=OPERATION_FAULTS)
    async def unload(model: str) -> ModelDetail:
        return _detail(await operations.unload(model))

    @router.post(
        "/models/{model}/versions/{version}/load", summary="Serve one version more", responses=OPERATION_FAULTS
    )
    async def load_version(model: str, version: str) -> ModelDetail:
        return _detail(await operations.load(model, version))

    @router.post(
        "/models/{model}/versions/{version}/unload", summary="Take a version from service", responses=OPERATION_FAULTS
    )
    async def unload_version(model: str, version: str) -> ModelDetail:
        return _detail(await operations.unload(model, version))

    return router


def _detail(entry: Entry) -> ModelDetail:
    manifest = None
    if entry.model is not None and (known := entry.model.manifest or entry.model.tensor_manifest):
        manifest = known.model_dump(mode="json")
    return ModelDetail(**_summary(entry).model_dump(), manifest=manifest)


def _summary(entry: Entry) -> ModelSummary:
    summary = ModelSummary(
        name=entry.name,
        version=entry.version,
        state=entry.state.value,
        reason=entry.reason,
        aliases=dict(entry.aliases),
        versions=[_version(entry, version) for version in entry.versions.values() if version.version],
    )
    model = entry.model
    if model is None:
        return summary
    known = model.manifest or model.tensor_manifest
    return summary.model_copy(
        update={
            "description": known.description if known else "",
            "classes": len(known.labels) if known else 0,
            "provider": model.provider,
            "digest": model.digest,
        }
    )


def _version(entry: Entry, version: Version) -> VersionDetail:
    detail = VersionDetail(
        version=version.version,
        state=version.state.value,
        reason=version.reason,
        active=version.version == entry.active,
        aliases=[alias for alias, number in entry.aliases.items() if number == version.version],
    )
    model = version.model
    if model is None:
        return detail
    return detail.model_copy(
        update={
            "provider": model.provider,
            "digest": model.digest,
            "inputs": [_tensor(spec) for spec in model.inputs],
            "outputs": [_tensor(spec) for spec in model.outputs],
            "max_batch": model.max_batch,
            "unbatched_why": model.unbatched_why,
            "load_seconds": round(version.load_s, 3),
        }
    )


def _tensor(spec: TensorSpec) -> Tensor:
    return Tensor(name=spec.name, datatype=spec.datatype, shape=list(spec.shape))
