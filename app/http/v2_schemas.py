"""The JSON of the Open Inference Protocol, as the OpenAPI document shows it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
]
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_PARAMETERS = {
    "type": "object",
    "additionalProperties": {"anyOf": [{"type": kind} for kind in ("string", "number", "boolean")]},
}
_SHAPE = {"type": "array", "items": {"type": "integer", "minimum": 1}}
_DATATYPE = {"type": "string", "enum": list(Datatype.__args__)}  # type: ignore[attr-defined]
_NAME = {"type": "string", "minLength": 1}
_DATA = {"type": "array", "description": "Elements in row-major order, flat or nested as the shape."}

INFER_BODY: dict[str, Any] = {
    "required": True,
    "description": "JSON; or JSON followed by binary tensors, its length in Inference-Header-Content-Length.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "parameters": _PARAMETERS,
                    "inputs": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["name", "shape", "datatype"],
                            "properties": {
                                "name": _NAME,
                                "shape": _SHAPE,
                                "datatype": _DATATYPE,
                                "parameters": _PARAMETERS,
                                "data": _DATA,
                            },
                        },
                    },
                    "outputs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {"name": _NAME, "parameters": _PARAMETERS},
                        },
                    },
                },
            }
        },
        "application/octet-stream": _BINARY,
    },
}
INFER_RESPONSE: dict[str, Any] = {
    "description": "The outputs; as JSON, or with binary tensors behind it.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["model_name", "model_version", "outputs"],
                "properties": {
                    "model_name": {"type": "string"},
                    "model_version": {"type": "string"},
                    "id": {"type": "string"},
                    "outputs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["name", "shape", "datatype"],
                            "properties": {
                                "name": _NAME,
                                "shape": {"type": "array", "items": {"type": "integer"}},
                                "datatype": _DATATYPE,
                                "parameters": _PARAMETERS,
                                "data": _DATA,
                            },
                        },
                    },
                },
            }
        },
        "application/octet-stream": _BINARY,
    },
}
INDEX_BODY: dict[str, Any] = {
    "requestBody": {
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"ready": {"type": "boolean", "description": "Only those that are ready."}},
                }
            }
        }
    }
}
OPERATION_BODY: dict[str, Any] = {
    "requestBody": {
        "content": {
            "application/json": {"schema": {"type": "object", "properties": {"parameters": {"type": "object"}}}}
        }
    }
}


class ServerMetadata(BaseModel):
    """What the server is, and which extensions of the protocol it has."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """Whether the server works; with 503 also why not."""

    live: bool


class ServerReady(BaseModel):
    """Whether the server wants requests; with 503 also why not."""

    ready: bool


class ModelNames(BaseModel):
    """All models."""

    models: list[str]


class TensorMetadata(BaseModel):
    """One input or output."""

    name: str
    datatype: Datatype
    shape: list[int] = Field(description="-1: any size.")


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    """Whether a model takes requests; with 503 also why not."""

    name: str
    ready: bool


class ModelConfig(BaseModel):
    """A model's configuration, as Triton has it."""

    model_config = ConfigDict(extra="allow")

    name: str
    platform: str
    backend: str
    max_batch_size: int = Field(description="0: requests run alone, and dims hold every dimension.")
    input: list[dict[str, Any]]
    output: list[dict[str, Any]]


class StatisticDuration(BaseModel):
    """How often, and how long in all."""

    count: int
    ns: int


class InferenceStatistics(BaseModel):
    """Requests by outcome, and those that were answered by phase."""

    success: StatisticDuration
    fail: StatisticDuration
    queue: StatisticDuration
    compute_input: StatisticDuration
    compute_infer: StatisticDuration
    compute_output: StatisticDuration
    cache_hit: StatisticDuration
    cache_miss: StatisticDuration


class BatchStatistics(BaseModel):
    """Session runs of one size."""

    batch_size: int
    compute_input: StatisticDuration
    compute_infer: StatisticDuration
    compute_output: StatisticDuration


class ModelStatistics(BaseModel):
    """Statistics of one version of a model, over all processes of the service."""

    name: str
    version: str
    last_inference: int = Field(description="Unix time, ms; 0: never.")
    inference_count: int = Field(description="Rows that were answered.")
    execution_count: int = Field(description="Session runs.")
    inference_stats: InferenceStatistics
    batch_stats: list[BatchStatistics]


class Statistics(BaseModel):
    """Statistics of models."""

    model_stats: list[ModelStatistics]


class IndexEntry(BaseModel):
    """One version of a model in the repository."""

    name: str
    version: str
    state: str = Field(description="UNKNOWN, READY, UNAVAILABLE, LOADING or UNLOADING.")
    reason: str


class Loaded(BaseModel):
    """The model is loaded, in every worker."""

    name: str
    load: bool


class Unloaded(BaseModel):
    """The model is unloaded, in every worker."""

    name: str
    unload: bool
