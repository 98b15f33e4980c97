"""The JSON that goes over the wire, as the OpenAPI document shows it."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ImagesBody(BaseModel):
    """The JSON form of a prediction request."""

    model_config = ConfigDict(extra="forbid")

    images: list[str] = Field(min_length=1, description="Encoded images (JPEG, PNG, WebP), each in base64.")


class TopEntry(BaseModel):
    """One class of an answer."""

    label: str
    index: int = Field(description="The class's place in the model's labels.")
    probability: float


class Result(BaseModel):
    """The answer for one image."""

    top: list[TopEntry] = Field(description="The most probable classes, best first.")


class PredictResponse(BaseModel):
    """The answer to a prediction request: one result per image, in order."""

    model: str
    version: str
    results: list[Result]


class ErrorResponse(BaseModel):
    """Every error, on every route."""

    error: str = Field(description="One sentence for a person.")
    code: str = Field(description="The reason, for a program.")


class Tensor(BaseModel):
    """One input or output of a model."""

    name: str
    datatype: str = Field(description="As the Open Inference Protocol names it.")
    shape: list[int] = Field(description="-1: variable.")


class VersionDetail(BaseModel):
    """One version of a model."""

    version: str
    state: str = Field(description="loading, ready, failed, unloading or unloaded.")
    reason: str = Field(
        default="", description="Why it failed, or why what has changed in its directory is not served."
    )
    active: bool = Field(description="Whether it answers whoever names no version.")
    aliases: list[str] = Field(description="Other names for it.")
    provider: str = Field(default="", description="Where it runs: cpu, cuda or tensorrt.")
    digest: str = Field(default="", description="SHA-256 of the ONNX file.")
    inputs: list[Tensor] = Field(default_factory=list)
    outputs: list[Tensor] = Field(default_factory=list)
    max_batch: int = Field(default=0, description="Rows of a run; 0: each request runs alone.")
    unbatched_why: str = Field(default="", description="Why rows of different requests never share a run.")
    load_seconds: float = Field(default=0.0, description="How long loading it took, with all proofs.")


class ModelSummary(BaseModel):
    """One model, as the list shows it; where nothing else is said, its active version."""

    name: str
    version: str
    state: str = Field(description="loading, ready, failed, unloading or unloaded.")
    reason: str = Field(description="Why it failed, or why another version is not served; else empty.")
    description: str = ""
    classes: int = 0
    provider: str = Field(default="", description="Where it runs: cpu, cuda or tensorrt.")
    digest: str = Field(default="", description="SHA-256 of the ONNX file.")
    aliases: dict[str, str] = Field(default_factory=dict, description="Other names for versions.")
    versions: list[VersionDetail] = Field(description="All that are loaded or in the folder, newest first.")


class ModelDetail(ModelSummary):
    """One model with its manifest."""

    manifest: dict[str, Any] | None = Field(default=None, description="The bundle's model.json, once it is loaded.")


class ModelList(BaseModel):
    """All models of the service."""

    default: str = Field(description="The model of POST /predict.")
    models: list[ModelSummary]


class Live(BaseModel):
    """Whether the process works, and if not, why."""

    live: bool
    reason: str = ""


class Ready(BaseModel):
    """Whether the service wants traffic, and why not."""

    ready: bool
    reason: str = ""
    models: dict[str, str] = Field(default_factory=dict, description="State of each model.")
    workers: dict[str, str] | None = Field(
        default=None, description="With several workers: ready, or why not, for each."
    )
    loading: list[str] | None = Field(
        default=None, description="While something is opened: which model, in which step, for how long."
    )
