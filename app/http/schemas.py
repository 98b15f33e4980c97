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


class ModelSummary(BaseModel):
    """One model, as the list shows it."""

    name: str
    version: str
    state: str = Field(description="loading, ready or failed.")
    reason: str = Field(description="Why it failed; else empty.")
    description: str = ""
    classes: int = 0
    provider: str = Field(default="", description="Where it runs: cpu or cuda.")
    digest: str = Field(default="", description="SHA-256 of the ONNX file.")


class ModelDetail(ModelSummary):
    """One model with its manifest."""

    manifest: dict[str, Any] | None = Field(default=None, description="The bundle's model.json, once it is loaded.")


class ModelList(BaseModel):
    """All models of the service."""

    default: str = Field(description="The model of POST /predict.")
    models: list[ModelSummary]


class Live(BaseModel):
    """The process answers."""

    live: bool = True


class Ready(BaseModel):
    """Whether the service wants traffic, and why not."""

    ready: bool
    reason: str = ""
    models: dict[str, str] = Field(default_factory=dict, description="State of each model.")
    workers: dict[str, str] | None = Field(
        default=None, description="With several workers: ready, or why not, for each."
    )
