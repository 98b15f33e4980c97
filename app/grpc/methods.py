"""The methods of `GRPCInferenceService`: each takes a message and gives a message, by the same core as REST."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from app.engine import Engine
from app.errors import ConvoyError, UnavailableError, UnknownModelError
from app.grpc import inference_pb2 as pb
from app.grpc.calls import Call, Calls, Context
from app.grpc.messages import FINAL_RESPONSE, cost_of, filled, parse_inference, request_of, response_of
from app.metrics import Metrics
from app.operations import Operations
from app.repository import Repository
from app.tickets import Ticket
from app.v2 import metadata
from app.v2.inference import infer

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

_NOT_OFFERED = {
    "SharedMemory": "Shared memory is not offered.",
    "TraceSetting": "Tracing is not offered.",
    "LogSettings": "Changing the log over the API is not offered.",
}
"""Part of a method's name in Triton's service → what it is answered."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What one request may be.

    Attributes:
        rows: rows or images of a request.
        timeout_ms: the longest that a request may take.
    """

    rows: int
    timeout_ms: int


class Methods(grpc.GenericRpcHandler):
    """The service, over an engine and a repository."""

    def __init__(
        self,
        engine: Engine,
        repository: Repository,
        metrics: Metrics,
        calls: Calls,
        limits: CallLimits,
        why_not_ready: Callable[[], str],
        operations: Operations,
    ) -> None:
        self._engine = engine
        self._repository = repository
        self._metrics = metrics
        self._calls = calls
        self._limits = limits
        self._why_not_ready = why_not_ready
        self._operations = operations
        quiet = {"quiet": True}
        offered: list[tuple[str, Any, Any, dict[str, bool]]] = [
            ("ServerLive", self._server_live, pb.ServerLiveRequest.FromString, quiet),
            ("ServerReady", self._server_ready, pb.ServerReadyRequest.FromString, quiet),
            ("ModelReady", self._model_ready, pb.ModelReadyRequest.FromString, quiet),
            ("ServerMetadata", self._server_metadata, pb.ServerMetadataRequest.FromString, {}),
            ("ModelMetadata", self._model_metadata, pb.ModelMetadataRequest.FromString, {}),
            ("ModelConfig", self._model_config, pb.ModelConfigRequest.FromString, {}),
            ("ModelStatistics", self._model_statistics, pb.ModelStatisticsRequest.FromString, {}),
            ("ModelInfer", self._model_infer, parse_inference, {}),
            ("RepositoryIndex", self._repository_index, pb.RepositoryIndexRequest.FromString, {}),
            ("RepositoryModelLoad", self._load, pb.RepositoryModelLoadRequest.FromString, {}),
            ("RepositoryModelUnload", self._unload, pb.RepositoryModelUnloadRequest.FromString, {}),
        ]
        self._handlers = {
            f"/{SERVICE}/{name}": calls.unary(f"/{SERVICE}/{name}", method, parse, **options)
            for name, method, parse, options in offered
        }
        route = f"/{SERVICE}/ModelStreamInfer"
        self._handlers[route] = calls.stream(route, self._model_stream_infer, parse_inference, _refused_in_stream)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Return a method's handler; None: it is none of this service."""
        handler = self._handlers.get(details.method)
        if handler is None and details.method.startswith(f"/{SERVICE}/"):
            sentences = [sentence for part, sentence in _NOT_OFFERED.items() if part in details.method]
            return grpc.unary_unary_rpc_method_handler(_not_offered(sentences[0])) if sentences else None
        return handler

    async def _server_live(self, request: pb.ServerLiveRequest, call: Call) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, request: pb.ServerReadyRequest, call: Call) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=not self._why_not_ready())

    async def _model_ready(self, request: pb.ModelReadyRequest, call: Call) -> pb.ModelReadyResponse:
        try:
            self._engine.model(request.name, request.version or None)
        except (UnknownModelError, UnavailableError):  # Triton's answer too, where others have an error
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def _server_metadata(self, request: pb.ServerMetadataRequest, call: Call) -> pb.ServerMetadataResponse:
        return filled(pb.ServerMetadataResponse(), metadata.server_metadata())

    async def _model_metadata(self, request: pb.ModelMetadataRequest, call: Call) -> pb.ModelMetadataResponse:
        model = self._engine.model(request.name, request.version or None)
        return filled(pb.ModelMetadataResponse(), metadata.model_metadata(model, self._repository))

    async def _model_config(self, request: pb.ModelConfigRequest, call: Call) -> pb.ModelConfigResponse:
        model = self._engine.model(request.name, request.version or None)
        return pb.ModelConfigResponse(config=filled(pb.ModelConfig(), metadata.model_config(model)))

    async def _model_statistics(self, request: pb.ModelStatisticsRequest, call: Call) -> pb.ModelStatisticsResponse:
        models = metadata.served(self._repository, request.name or None)
        if request.name:
            model = self._engine.model(request.name, request.version or None)
            models = [model] if request.version else models
        return filled(pb.ModelStatisticsResponse(), metadata.statistics(models, self._metrics))

    async def _repository_index(self, request: pb.RepositoryIndexRequest, call: Call) -> pb.RepositoryIndexResponse:
        index = metadata.repository_index(self._repository, ready_only=request.ready)
        return filled(pb.RepositoryIndexResponse(), {"models": index})

    async def _model_infer(self, request: pb.ModelInferRequest, call: Call) -> pb.ModelInferResponse:
        model = self._engine.model(request.model_name, request.model_version or None)
        call.model, call.version = model.name, model.version
        deadline = min(call.deadline, call.started + self._limits.timeout_ms / 1000)
        with self._engine.admit(model, deadline) as ticket, _Leaving(ticket, call, self._calls):
            if call.marks is not None:
                ticket.follow(call.marks)
            ticket.hold_bytes(cost_of(request))
            response = await infer(self._engine, model, request_of(request), ticket, self._limits.rows)
        call.images = response.rows
        answer = response_of(response)
        call.wrote(model.metrics, response.ran_at)
        return answer

    async def _model_stream_infer(self, request: pb.ModelInferRequest, call: Call) -> pb.ModelStreamInferResponse:
        response = await self._model_infer(request, call)
        response.parameters[FINAL_RESPONSE].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=response)

    async def _load(self, request: pb.RepositoryModelLoadRequest, call: Call) -> pb.RepositoryModelLoadResponse:
        name = _model_of(request)
        metadata.refuse_foreign(request.parameters)
        await self._operations.load(name)
        return pb.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    async def _unload(self, request: pb.RepositoryModelUnloadRequest, call: Call) -> pb.RepositoryModelUnloadResponse:
        name = _model_of(request)
        await self._operations.unload(name)
        return pb.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)


class _Leaving:
    """Tells a ticket why its task was cancelled: gRPC does that itself when a client leaves or its time is over."""

    __slots__ = ("_call", "_calls", "_ticket")

    def __init__(self, ticket: Ticket, call: Call, calls: Calls) -> None:
        self._ticket, self._call, self._calls = ticket, call, calls

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError) and not self._calls.cutting_off:
            over = time.monotonic() >= self._call.deadline
            self._ticket.cancelled_for("deadline" if over else "disconnected")


def _model_of(request: pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest) -> str:
    """Return the model's name, which KServe's clients have where Triton's have the repository's."""
    return request.model_name or request.repository_name


def _refused_in_stream(request: pb.ModelInferRequest | None, fault: ConvoyError) -> pb.ModelStreamInferResponse:
    response = pb.ModelInferResponse(model_name=request.model_name if request else "", id=request.id if request else "")
    return pb.ModelStreamInferResponse(error_message=fault.message, infer_response=response)


def _not_offered(sentence: str) -> Any:
    async def refuse(data: bytes, context: Context) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, sentence)

    return refuse
