"""What a call returns, and how it is read from the service's JSON.

Fields that a later service adds are passed over, so that an older client goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Label:
    """One class of an answer."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        top: the most probable classes, best first; at least one.
        model, version: which model said so.
        digest: SHA-256 of its ONNX file.
        provider: where it ran: cpu, cuda or tensorrt.
        request_id: the id of the request in the service's log; images that were sent together share it.
        server_ms: what the request took in the service, milliseconds, by stage: decode, queue, infer.
    """

    top: tuple[Label, ...]
    model: str
    version: str
    digest: str = ""
    provider: str = ""
    request_id: str = ""
    server_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.top[0].label

    @property
    def probability(self) -> float:
        """Its probability."""
        return self.top[0].probability


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the service.

    Attributes:
        state: as the service names it; `ready` means that it answers.
        reason: why it failed; else empty.
        default: whether it answers who names no model; known only from the list of all.
        manifest: labels, pixel recipe, figures and provenance; None in the list of all, and before it is loaded.
    """

    name: str
    version: str
    state: str
    reason: str = ""
    description: str = ""
    classes: int = 0
    provider: str = ""
    digest: str = ""
    default: bool = False
    manifest: Mapping[str, Any] | None = None

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self.state == "ready"


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the service wants traffic; true or false in a condition.

    Attributes:
        reason: why not; also that nobody answers.
        models: the state of each model.
    """

    ready: bool
    reason: str = ""
    models: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.ready


# Each of these raises KeyError, TypeError, ValueError or AttributeError on what is not of Convoy's shape.


def read_predictions(content: Any, headers: Mapping[str, str], count: int) -> list[Prediction]:
    """Return the predictions of an answer to `count` images."""
    rows = content["results"]
    if len(rows) != count or not all(row["top"] for row in rows):
        raise ValueError("results that are not one for each image")
    model, version = str(content["model"]), str(content["version"])
    digest, provider, request_id = (headers.get(f"x-{name}", "") for name in ("model-digest", "provider", "request-id"))
    server_ms = read_timing(headers.get("server-timing", ""))
    return [
        Prediction(tuple(map(_read_label, row["top"])), model, version, digest, provider, request_id, server_ms)
        for row in rows
    ]


def read_timing(header: str) -> dict[str, float]:
    """Return the durations of a `Server-Timing` header, milliseconds: `decode;dur=0.10, queue;dur=…`."""
    durations = {}
    for entry in header.split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            try:
                if key == "dur":
                    durations[name] = float(value)
            except ValueError:
                continue
    return durations


def read_models(content: Any) -> list[Model]:
    """Return the models of `GET /models`."""
    return [_model(entry, default=entry["name"] == content["default"]) for entry in content["models"]]


def read_model(content: Any) -> Model:
    """Return the model of `GET /models/{model}`."""
    return _model(content)


def read_readiness(content: Any) -> Readiness:
    """Return what `GET /readyz` says."""
    return Readiness(bool(content["ready"]), content.get("reason") or "", dict(content.get("models") or {}))


def _read_label(entry: Any) -> Label:
    return Label(str(entry["label"]), int(entry["index"]), float(entry["probability"]))


_OPTIONAL = ("reason", "description", "classes", "provider", "digest", "manifest")


def _model(entry: Any, *, default: bool = False) -> Model:
    optional = {name: entry[name] for name in _OPTIONAL if name in entry}
    return Model(str(entry["name"]), str(entry["version"]), str(entry["state"]), default=default, **optional)
