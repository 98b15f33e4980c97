"""Every knob of the service: name with unit, default, why.

One field here is a flag (`--max-batch`), an environment variable (`CONVOY_MAX_BATCH`), a name in a settings file
(`max_batch = 16`) and a row of README. Flags win over the environment, and that over the file. An unknown name is an
error wherever it stands, never ignored.
"""

import difflib
import ipaddress
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.errors import SettingsError

ENVIRONMENT_PREFIX = "CONVOY_"
API_KEY_VARIABLE = "CONVOY_API_KEY"
"""The key that commands which ask a service send along; no setting of a service."""
CLIENT_VARIABLES = frozenset({"CONVOY_URL", API_KEY_VARIABLE})
"""May be set where a command of the service runs, and say nothing to it: see docs/client.md."""


class Settings(BaseModel):
    """The service's settings, immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: str = Field(
        default="", description="File of settings, `name = value` in TOML; flags and environment win over it."
    )
    host: str = Field(
        default="127.0.0.1", description="Address to listen on. Containers set 0.0.0.0; a laptop stays private."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    probe_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="A second port for /livez, /readyz and /metrics, answered also when the first is full; 0: none.",
    )
    grpc_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port of the Open Inference Protocol over gRPC (extra grpc); 0: none. Workers share it.",
    )
    workers: int = Field(
        default=1,
        ge=0,
        le=64,
        description="Processes that share the port, each with sessions of its own; 0: one per usable CPU.",
    )
    engines: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Processes that own the sessions, one per GPU, fed by all workers; 0: each worker has its own.",
    )
    keys: str = Field(
        default="", description="File of API keys (convoy key); without one, everything but load and unload is open."
    )
    tls_certificate: str = Field(
        default="",
        description="Certificate and its chain (PEM): the port then speaks HTTPS. Read again when renewed.",
    )
    tls_key: str = Field(default="", description="Its private key (PEM); empty: it is in the certificate's file.")
    tls_key_password_file: str = Field(default="", description="File with the key's password, if it has one.")
    tls_client_ca: str = Field(
        default="", description="Authorities (PEM): only clients with a certificate from one of them may connect."
    )
    models: Path = Field(default=Path("models"), description="Directory of bundles: <name>/<version>/model.json.")
    model_name: str = Field(
        default="",
        pattern=r"^([a-z0-9][a-z0-9._-]{0,63})?$",
        description="The models directory is itself one model of this name: its versions, or one version's files.",
    )
    default_model: str = Field(
        default="", description="The model of POST /predict. Empty: imagenet, or the only model that is there."
    )
    versions: str = Field(
        default="latest",
        pattern=r"^(all|latest(:[1-9][0-9]{0,8})?)$",
        description="Versions served of each model: latest, latest:N or all; its versions.toml may say otherwise.",
    )
    watch_s: float = Field(
        default=0.0,
        ge=0,
        le=86_400,
        description="Look this often whether the models directory has changed, and follow it; 0: only when told.",
    )
    device: Literal["auto", "cpu", "cuda", "tensorrt", "plugin"] = Field(
        default="auto",
        description="auto takes CUDA where it works and says what it took; cuda, tensorrt, plugin: that, or no start.",
    )
    plugin: str = Field(
        default="",
        description="With device plugin: a package that brings a provider (onnxruntime_ep_openvino), or its library.",
    )
    plugin_hardware: Literal["any", "cpu", "gpu", "npu"] = Field(
        default="any", description="Which of the devices that it finds; any: the first."
    )
    plugin_options: str = Field(
        default="", description="The provider's own options, as in num_of_threads=1,precision=FP16."
    )
    tensorrt_cache: str = Field(
        default="",
        description="Directory that keeps TensorRT's engines, which take minutes to build. Empty: built at each start.",
    )
    tensorrt_fp16: bool = Field(
        default=False, description="Let TensorRT compute in half precision; the golden answers must still come out."
    )
    cuda_search: Literal["exhaustive", "heuristic", "default"] = Field(
        default="exhaustive",
        description="How cuDNN chooses algorithms: try all for each batch size at load, by a rule, or one for all.",
    )
    cuda_nhwc: bool = Field(default=False, description="Let convolutions run on channels-last tensors in CUDA.")
    cuda_tf32: bool = Field(
        default=False,
        description="Let CUDA and TensorRT round float32 products to TF32; the golden answers must still come out.",
    )
    cuda_graphs: bool = Field(
        default=False, description="Record the launches of each batch size once and replay them: for small networks."
    )
    cuda_memory_mb: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="GPU memory for each session's tensors, in millions of bytes; 0: all.",
    )
    sessions: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Sessions per model and worker, each with its thread; 0: the usable CPUs, shared out; "
        "2 where another device computes.",
    )
    threads_per_session: int = Field(
        default=1, ge=1, le=256, description="Threads inside a session. Many sessions of one beat one of many on CPU."
    )
    max_batch: int = Field(
        default=16, ge=1, le=1024, description="Images per session run at most; larger batches leave a CPU's cache."
    )
    linger_ms: float = Field(
        default=0.0, ge=0, le=1000, description="Wait this long for a batch to fill. 0: run what waits when free."
    )
    decode_threads: int = Field(
        default=0, ge=0, le=256, description="Threads that decode, per worker; 0: the usable CPUs, shared out."
    )
    max_inflight_images: int = Field(
        default=256, ge=1, le=1_000_000, description="Images inside the service at once; beyond it requests get 429."
    )
    max_inflight_bytes: int = Field(
        default=256_000_000,
        ge=1,
        le=10**12,
        description="Bytes of request bodies held at once; beyond it requests get 429.",
    )
    max_inflight_pixels: int = Field(
        default=400_000_000,
        ge=1,
        le=10**12,
        description="Pixels waiting to be decoded at once, by the images' headers; beyond it requests get 429.",
    )
    model_limits: str = Field(
        default="",
        description="Images of single models inside at once, as in imagenet=64,pets=200; others share the whole.",
    )
    queue_target_ms: float = Field(
        default=1000.0,
        ge=0,
        le=3_600_000,
        description="A longer queue is an overload: it is then kept short, and others get 429. 0: no such rule.",
    )
    max_body_bytes: int = Field(
        default=32_000_000, ge=1, le=10**12, description="Largest request body; larger ones get 413."
    )
    max_images_per_request: int = Field(
        default=64, ge=1, le=100_000, description="Images in one request; more get 413."
    )
    max_image_pixels: int = Field(
        default=50_000_000,
        ge=1,
        le=10**9,
        description="Pixels of one image, by its header, before decoding; more get 413.",
    )
    request_timeout_ms: int = Field(
        default=30_000,
        ge=1,
        le=86_400_000,
        description="Deadline of a request, from its headers to its answer; Timeout-Ms shortens it.",
    )
    slo_ms: float = Field(
        default=250.0,
        ge=0.1,
        le=86_400_000,
        description="An answer within this time is a good one, for metrics and alerts; the others are counted as slow.",
    )
    keep_alive_s: int = Field(
        default=75,
        ge=1,
        le=86_400,
        description="Idle time of a connection. Above the usual proxy's 60, so that the proxy closes first.",
    )
    drain_timeout_s: int = Field(
        default=30, ge=1, le=86_400, description="After SIGTERM, time to finish what was accepted before it is cut off."
    )
    stuck_s: float = Field(
        default=60.0,
        ge=0,
        le=86_400,
        description="A batch that runs for longer is stuck: /livez fails, and of several workers that one is replaced; "
        "0: never.",
    )
    require_all_models: bool = Field(
        default=False, description="/readyz needs every model ready, not only the default one."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="auto: text on a terminal, JSON elsewhere."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severity that is logged."
    )
    access_log: bool = Field(default=True, description="One line a request.")
    access_log_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Share of requests that get their line; those that went wrong always do."
    )
    trace_endpoint: str = Field(
        default="",
        pattern=r"^(https?://.+)?$",
        description="OpenTelemetry collector, http://host:4318 (extra otel). Empty: OTEL_EXPORTER_OTLP_ENDPOINT says.",
    )
    trace_ratio: float = Field(
        default=0.01, ge=0, le=1, description="Share of requests that are traced, where the caller has not decided."
    )

    def limits_of_models(self, names: Collection[str] | None) -> dict[str, int]:
        """Return `model_limits` as numbers, for models that are there; None: whatever models there are.

        Raises:
            SettingsError: it is not of that form, or names another model.
        """
        limits = {}
        for part in filter(None, (part.strip() for part in self.model_limits.split(","))):
            name, _, limit = part.partition("=")
            if names is not None and name not in names:
                raise SettingsError(
                    f"model_limits names '{name}', which is no model here; there are: {', '.join(sorted(names))}."
                )
            if not limit.isdecimal() or not int(limit):
                raise SettingsError(f"model_limits has '{part}': write name=number, above 0, as in imagenet=64.")
            limits[name] = int(limit)
        return limits

    def is_private(self) -> bool:
        """Tell whether nobody but this machine can reach the port."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def local_url(self, port: int = 0) -> str:
        """Return where a service with these settings answers on this machine; `port`: on its port for probes."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        scheme = "https" if self.tls_certificate and not port else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port or self.port}"

    @classmethod
    def from_sources(cls, environment: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> Self:
        """Read settings from `CONVOY_…` variables, flags (field name → value) and the file that one of them names.

        Flags win over the environment, the environment over the file, the file over defaults.

        Raises:
            SettingsError: an unknown name or an impossible value; the sentence names the variable, flag or file.
        """
        values: dict[str, Any] = {}
        origin: dict[str, str] = {}
        for variable, value in environment.items():
            if not variable.startswith(ENVIRONMENT_PREFIX) or variable in CLIENT_VARIABLES:
                continue
            field = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            if field not in cls.model_fields:
                raise SettingsError(_unknown_variable(variable, cls.model_fields))
            values[field] = value
            origin[field] = variable
        for field, value in (flags or {}).items():
            values[field] = value
            origin[field] = flag_of(field)
        if values.get("settings"):
            file = str(values["settings"])
            for field, value in _read_file(file, cls.model_fields).items():
                if field not in values:
                    values[field] = value
                    origin[field] = f"{file}: {field}"
        for field, value in values.items():
            if value == "":  # an unset ${X} of a compose file; as a host it would mean every address
                raise SettingsError(f"{origin[field]} is empty: give it a value, or leave it out.")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            field = str(problem["loc"][0])
            raise SettingsError(_impossible_value(origin.get(field, field), problem["input"], problem["msg"])) from None


def flag_of(field: str) -> str:
    """Return the command-line flag of a field: `max_batch` → `--max-batch`."""
    return "--" + field.replace("_", "-")


def variable_of(field: str) -> str:
    """Return the environment variable of a field: `max_batch` → `CONVOY_MAX_BATCH`."""
    return ENVIRONMENT_PREFIX + field.upper()


def _read_file(file: str, fields: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings of a TOML file, whose names are fields and whose values are not yet checked."""
    try:
        found = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"The settings file {file} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise SettingsError(f"The settings file {file} is not TOML: {error}.") from error
    for name, value in found.items():
        if name == "settings" or name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else "`convoy serve --help` lists all settings."
            raise SettingsError(f"{file}: {name} is no setting of a file: {hint}")
        if isinstance(value, dict | list):
            raise SettingsError(f"{file}: {name} is a table or a list: a setting is one value.")
    return found


def _unknown_variable(variable: str, fields: Mapping[str, object]) -> str:
    known = [variable_of(field) for field in fields]
    close = difflib.get_close_matches(variable, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "`convoy serve --help` lists all settings."
    if variable.endswith(("_SERVICE_HOST", "_SERVICE_PORT")) or "_PORT_" in variable:
        hint = "Kubernetes sets it for a Service of that name: put enableServiceLinks: false into the pod spec."
    return f"The environment variable {variable} is no setting: {hint}"


def _impossible_value(name: str, value: object, reason: str) -> str:
    sentence = f"{name} cannot be {value!r}: {reason[:1].lower()}{reason[1:]}."
    if str(value).startswith("tcp://"):
        sentence += " Kubernetes set it for a Service named convoy: put enableServiceLinks: false into the pod spec."
    return sentence
