"""What the protocol tells of server and models: metadata, configuration, statistics, the repository's index.

Every function returns plain dictionaries in the protocol's JSON form, whose names are also those of its protobuf
messages.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from app import __version__
from app.errors import BadRequestError
from app.families import BATCH_SIZES
from app.loading import LoadedModel
from app.metrics import Metrics
from app.repository import Repository, State
from app.runs import DEFAULT_URGENCY
from app.tensors import TensorSpec
from app.v2.inference import LEVELS, takes_images, urgency_of

SERVER_NAME = "convoy"
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
EXTENSIONS = (
    "classification",
    "schedule_policy",
    "model_configuration",
    "model_repository",
    "binary_tensor_data",
    "statistics",
)
"""Those that work; `schedule_policy` is the request parameters `timeout` and `priority`."""
IMAGES_PARAMETER = "encoded_images"
_STATES = {
    State.LOADING: "LOADING",
    State.READY: "READY",
    State.FAILED: "UNAVAILABLE",
    State.UNLOADING: "UNLOADING",
    State.UNLOADED: "UNAVAILABLE",
}
_PHASES = {"queue": "queue", "compute_input": "decode", "compute_infer": "infer", "compute_output": "post"}
"""Phase of the statistics → stage of `convoy_stage_duration_seconds`."""


def server_metadata() -> dict[str, Any]:
    """Return `ServerMetadata`."""
    return {"name": SERVER_NAME, "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(model: LoadedModel, repository: Repository) -> dict[str, Any]:
    """Return `ModelMetadata`: the tensors of the graph itself, and the versions that take work.

    That an image classifier also takes encoded images, under the same input's name, is in its configuration.
    """
    return {
        "name": model.name,
        "versions": [version.version for version in served(repository, model.name)] or [model.version],
        "platform": PLATFORM,
        "inputs": [_tensor_metadata(spec) for spec in model.inputs],
        "outputs": [_tensor_metadata(spec) for spec in model.outputs],
    }


def model_config(model: LoadedModel) -> dict[str, Any]:
    """Return `ModelConfig` as Triton describes models: dimensions without that of the rows where rows batch."""
    labelled = "model.json" if model.manifest is not None else ""
    config: dict[str, Any] = {
        "name": model.name,
        "platform": PLATFORM,
        "backend": BACKEND,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": model.max_batch,
        "input": [
            {
                **_tensor_config(spec, model),
                "format": "FORMAT_NHWC" if spec.name == takes_images(model) else "FORMAT_NONE",
            }
            for spec in model.inputs
        ],
        "output": [{**_tensor_config(spec, model), "label_filename": labelled} for spec in model.outputs],
        "instance_group": [
            {
                "name": f"{model.name}_0",
                "kind": "KIND_CPU" if model.provider == "cpu" else "KIND_GPU",
                "count": model.batcher.parallel,
            }
        ],
        "default_model_filename": "model.onnx",
        "parameters": {},
    }
    if model.max_batch > 1:
        default = next(level for level in range(1, LEVELS + 1) if urgency_of(level) == DEFAULT_URGENCY)
        config["dynamic_batching"] = {"priority_levels": LEVELS, "default_priority_level": default}
    elif model.unbatched_why:
        config["parameters"]["unbatched_why"] = {"string_value": model.unbatched_why}
    if name := takes_images(model):
        sentence = f"Input '{name}' also takes JPEG, PNG and WebP files, as BYTES of shape [N] or [N,1]."
        config["parameters"][IMAGES_PARAMETER] = {"string_value": sentence}
    return config


def statistics(models: Iterable[LoadedModel], metrics: Metrics) -> dict[str, Any]:
    """Return `ModelStatistics` of models, summed over all processes of the service.

    Success and failure count every answered request that asked for an inference, whatever its protocol; the phases
    are those of `convoy_stage_duration_seconds`, `compute_input` being the decoding of images.
    """
    sums = metrics.sums(
        metrics.images.name,
        metrics.request_duration.name,
        metrics.stage_duration.name,
        metrics.batches.name,
        metrics.batch_seconds.name,
        metrics.last_inference.name,
    )
    return {"model_stats": [_model_statistics(model.name, model.version, metrics, sums) for model in models]}


def repository_index(repository: Repository, *, ready_only: bool = False) -> list[dict[str, str]]:
    """Return `RepositoryIndex`: every model, its version and state."""
    index = []
    for entry in repository.entries.values():
        # A folder that holds no version is somebody's mistake, to be told.
        for found in entry.versions.values() or [entry]:
            if found.state is State.READY or not ready_only:
                index.append(
                    {
                        "name": entry.name,
                        "version": found.version,
                        "state": _STATES[found.state],
                        "reason": found.reason,
                    }
                )
    return index


def served(repository: Repository, name: str | None = None) -> list[LoadedModel]:
    """Return what takes work: every version of one model, or of all, the oldest first."""
    entries = [entry for entry in repository.entries.values() if name in (None, entry.name)]
    versions = [version for entry in entries for version in reversed(list(entry.versions.values()))]
    return [version.model for version in versions if version.model is not None]


def refuse_foreign(parameters: Iterable[str]) -> None:
    """Check the parameters of a request to load a model.

    Raises:
        BadRequestError: they bring a configuration, or files: models come from the models directory alone.
    """
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise BadRequestError(
                f"The parameter '{name[:80]}' is refused: models come from the models directory alone."
            )


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _tensor_config(spec: TensorSpec, model: LoadedModel) -> dict[str, Any]:
    kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
    dims = spec.shape[1:] if model.max_batch else spec.shape
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": list(dims)}


Sums = Mapping[str, Mapping[tuple[str, ...], list[float]]]


def _model_statistics(name: str, version: str, metrics: Metrics, sums: Sums) -> dict[str, Any]:
    durations = {"success": [0.0, 0.0], "fail": [0.0, 0.0]}
    for (model, _, its_version, code), slots in sums[metrics.request_duration.name].items():
        if (model, its_version) == (name, version):
            total = durations["success" if code == "200" else "fail"]
            total[0] += sum(slots[:-1])
            total[1] += slots[-1]
    inference_stats = {outcome: _duration(*total) for outcome, total in durations.items()}
    for phase, stage in _PHASES.items():
        slots = sums[metrics.stage_duration.name].get((name, stage, version), [0.0, 0.0])
        inference_stats[phase] = _duration(sum(slots[:-1]), slots[-1])
    inference_stats |= {phase: _duration(0, 0) for phase in ("cache_hit", "cache_miss")}
    counts = sums[metrics.batches.name].get((name, version), [])
    seconds = sums[metrics.batch_seconds.name].get((name, version), [])
    last = sums[metrics.last_inference.name].get((name, version), [0.0])
    return {
        "name": name,
        "version": version,
        "last_inference": int(last[0] * 1000),
        "inference_count": int(sums[metrics.images.name].get((name, version), [0.0])[0]),
        "execution_count": int(sum(counts)),
        "inference_stats": inference_stats,
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": _duration(count, 0),
                "compute_infer": _duration(count, spent),
                "compute_output": _duration(count, 0),
            }
            for size, count, spent in zip(BATCH_SIZES, counts, seconds, strict=False)
            if count
        ],
    }


def _duration(count: float, seconds: float) -> dict[str, int]:
    return {"count": int(count), "ns": round(seconds * 1e9)}
