"""Protobuf messages ⇄ the protocol's core: nothing here decides, except which form of a message is none."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from app.errors import BadRequestError, TooLargeError
from app.grpc import inference_pb2 as pb
from app.v2.inference import InferRequest, InferResponse, InputTensor, WantedOutput
from app.v2.tensors import to_bytes

Answer = TypeVar("Answer", bound=Message)

EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"
"""Set by Triton's client on each request of a stream that asks for it; here every response is the final one."""
FINAL_RESPONSE = "triton_final_response"

MAX_PARTS = 1000
"""Inputs, outputs or parameters of one request."""
MAX_TYPED_ELEMENTS = 4_000_000
TYPED_ELEMENT_BYTES = 40
"""An element of `contents` as a Python object in a list; raw contents cost their own bytes."""

_LISTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Datatype → the list of `InferTensorContents` that its elements are in."""


def cost_of(message: pb.ModelInferRequest) -> int:
    """Return how many bytes a request takes while it is inside: its message, and typed elements as objects beside it.

    Raises:
        TooLargeError: it has more typed elements than one request may have.
        BadRequestError: it has more parts than any model has tensors.
    """
    for name, parts in (("inputs", message.inputs), ("outputs", message.outputs), ("parameters", message.parameters)):
        if len(parts) > MAX_PARTS:
            raise BadRequestError(f"The request has {len(parts):,} {name}; at most {MAX_PARTS:,} are taken.")
    elements = sum(len(values) for tensor in message.inputs for _, values in tensor.contents.ListFields())
    if elements > MAX_TYPED_ELEMENTS:
        raise TooLargeError(
            f"The request holds {elements:,} values in contents, more than {MAX_TYPED_ELEMENTS:,}: "
            "send tensors as raw_input_contents.",
            code="too_many_values",
        )
    return message.ByteSize() + elements * TYPED_ELEMENT_BYTES


def request_of(message: pb.ModelInferRequest) -> InferRequest:
    """Return a request for the core; nothing in it is checked against the model yet.

    Raises:
        BadRequestError: the tensors' data is not where it belongs.
    """
    parameters = _parameters(message.parameters)
    parameters.pop(EMPTY_FINAL_RESPONSE, None)
    return InferRequest(
        inputs=list(_inputs(message)),
        outputs=[WantedOutput(output.name, _parameters(output.parameters)) for output in message.outputs],
        id=message.id,
        parameters=parameters,
    )


def response_of(response: InferResponse) -> pb.ModelInferResponse:
    """Return the message for an answer, its tensors raw."""
    tensors = pb.ModelInferResponse.InferOutputTensor
    return pb.ModelInferResponse(
        model_name=response.model.name,
        model_version=response.model.version,
        id=response.id,
        outputs=[
            tensors(name=output.name, datatype=output.datatype, shape=output.shape) for output in response.outputs
        ],
        raw_output_contents=[to_bytes(output.array) for output in response.outputs],
    )


def filled(message: Answer, values: Mapping[str, Any]) -> Answer:
    """Fill a message from the same thing's JSON form, passing over what the message has no field for."""
    return ParseDict(dict(values), message, ignore_unknown_fields=True)


def _inputs(message: pb.ModelInferRequest) -> Iterator[InputTensor]:
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise BadRequestError(
            f"The request has {len(message.inputs):,} inputs, but {len(raw):,} raw_input_contents: one each, or none."
        )
    for index, tensor in enumerate(message.inputs):
        typed = _typed(tensor)
        if raw and typed:
            raise BadRequestError(f"Input '{tensor.name[:80]}' has contents beside the request's raw_input_contents.")
        yield InputTensor(
            tensor.name,
            tensor.datatype,
            list(tensor.shape),
            raw[index] if raw else typed,
            _parameters(tensor.parameters),
        )


def _typed(tensor: pb.ModelInferRequest.InferInputTensor) -> Sequence[Any]:
    """Return the elements of `contents`; empty where there are none."""
    filled_lists = tensor.contents.ListFields() if tensor.HasField("contents") else []
    if not filled_lists:
        return ()
    name, wanted = tensor.name[:80], _LISTS.get(tensor.datatype)
    if wanted is None:
        raise BadRequestError(
            f"Input '{name}' is {tensor.datatype[:80]}, for which contents has no list: send raw_input_contents."
        )
    for descriptor, _ in filled_lists:
        if descriptor.name != wanted:
            raise BadRequestError(
                f"Input '{name}' has elements in {descriptor.name}; those of {tensor.datatype} belong in {wanted}."
            )
    return list(filled_lists[0][1])


def _parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Return parameters by name; one without a value is passed over."""
    named = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is not None:
            named[name] = getattr(parameter, choice)
    return named
