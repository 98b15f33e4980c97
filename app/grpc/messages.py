"""Protobuf messages ⇄ the protocol's core: nothing here decides, except which form of a message is none."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError, Message

from app.errors import BadRequestError, TooLargeError
from app.grpc import inference_pb2 as pb
from app.v2.inference import InferRequest, InferResponse, InputTensor, WantedOutput
from app.v2.tensors import to_bytes

Answer = TypeVar("Answer", bound=Message)
_Nested = dict[int, Any]

EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"
"""Set by Triton's client on each request of a stream that asks for it; here every response is the final one."""
FINAL_RESPONSE = "triton_final_response"

SMALL_MESSAGE = 256 * 1024
MAX_FIELDS = 20_000
"""Fields of a large message, those of its inputs among them; a list of numbers is one, a string or an image is one."""
MAX_PARTS = 1000
"""Inputs, outputs or parameters of one request."""
MAX_TYPED_ELEMENTS = 4_000_000
TYPED_ELEMENT_BYTES = 40
"""An element of `contents` as a Python object in a list; raw contents cost their own bytes."""

_CONTENTS: _Nested = dict.fromkeys(range(1, 6), MAX_TYPED_ELEMENTS) | {
    6: MAX_TYPED_ELEMENTS * 4,
    7: MAX_TYPED_ELEMENTS * 8,
}
_INPUT: _Nested = {5: _CONTENTS}
_REQUEST: _Nested = {5: _INPUT}
"""By number of field: the message that is in it, or how many bytes its list of numbers may have."""

_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}
"""Wire types of protobuf; a fixed one's bytes."""

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


def parse_inference(data: bytes) -> pb.ModelInferRequest:
    """Parse a request for inference; a large one only after a look at how many parts it is made of.

    A message of 20 MB may hold ten million parts, which take half a gigabyte and a second of the event loop to parse.

    Raises:
        TooLargeError: it has more parts, or more typed elements, than one request may have.
        DecodeError: it is no message.
    """
    if len(data) > SMALL_MESSAGE:
        _count_parts(memoryview(data), _REQUEST, MAX_FIELDS)
    return pb.ModelInferRequest.FromString(data)


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
        raise _too_many_values()
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
    values: Sequence[Any] = filled_lists[0][1]
    return values


def _parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Return parameters by name; one without a value is passed over."""
    named = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is not None:
            named[name] = getattr(parameter, choice)
    return named


def _count_parts(data: memoryview, nested: _Nested, left: int) -> int:
    """Walk over a message's fields, and those of the messages in it; returns how many more there may be."""
    at, size = 0, len(data)
    while at < size:
        left -= 1
        if left < 0:
            raise _too_many_values()
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _LENGTH_DELIMITED:
            length, at = _varint(data, at)
            inside = nested.get(tag >> 3)
            if isinstance(inside, dict):
                left = _count_parts(data[at : at + length], inside, left)
            elif inside is not None and length > inside:
                raise _too_many_values()
            at += length
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in _FIXED:
            at += _FIXED[kind]
        else:
            raise DecodeError
    return left


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at a place, and where it ends."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise DecodeError


def _too_many_values() -> TooLargeError:
    return TooLargeError(
        f"The message has more than {MAX_FIELDS:,} parts, or than {MAX_TYPED_ELEMENTS:,} values in a list: "
        "send tensors as raw_input_contents.",
        code="too_many_values",
    )
