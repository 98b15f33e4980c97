"""V2 messages on the wire of REST: a body becomes an `InferRequest`, an `InferResponse` a body.

The binary tensor extension puts tensors behind the JSON, whose length a header tells; both may be compressed. What a
message costs to take apart is bounded before it is taken apart.
"""

import asyncio
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic_core import from_json

from app.engine import Stages
from app.errors import BadRequestError, BodyTooLargeError, TooLargeError, UnsupportedMediaTypeError
from app.loading import LoadedModel
from app.tensors import VARIABLE
from app.tickets import Ticket
from app.v2.inference import InferRequest, InferResponse, InputTensor, WantedOutput, takes_images
from app.v2.tensors import Tensor, to_bytes, to_values

MAX_TENSORS = 1024
"""Inputs, or outputs, that a request may name."""
MAX_KNOWN_HEAD = 1024
"""So much JSON before binary tensors is remembered: a client sends the same again and again, but for sizes or ids."""
SMALL_JSON = 65_536
"""What so much JSON makes in memory needs no bound: 3 MB at most."""
MAX_JSON_COST = 100_000_000
"""Bytes that a request's JSON may become: 2.5 million numbers. Parsing holds the interpreter's lock to its end."""
_COSTS = ((b",", 40), (b"[", 80), (b"{", 300), (b'"', 30))
"""What stands behind each character in memory, bytes: a number, a list, an object, half a string."""
INFLATE_STEP = 262_144
MIN_COMPRESSED = 1024
"""A smaller answer fits into one packet as it is."""
COMPRESS_IN_THREAD = 65_536
_ENCODINGS = {"gzip": 31, "deflate": 15}
"""Content-Encoding → zlib's window bits."""
_EITHER = 47


@dataclass(frozen=True, slots=True)
class _Head:
    """What the JSON of a request says; requests share it, so nobody changes anything in it."""

    inputs: Sequence[Mapping[str, Any]]
    outputs: Sequence[WantedOutput]
    id: str
    parameters: Mapping[str, Any]
    binary: Mapping[str, bool]
    binary_by_default: bool


@dataclass(slots=True)
class Message:
    """A request as REST has it: which outputs are wanted in binary form is a matter of this wire alone."""

    request: InferRequest
    binary: Mapping[str, bool]
    binary_by_default: bool = False

    def wants_binary(self, output: str) -> bool:
        """Tell whether an output goes out in binary form."""
        return self.binary.get(output, self.binary_by_default)


def parse(body: bytes, header_length: int | None, model: LoadedModel) -> Message:
    """Take a request apart; tensors are not looked into.

    Args:
        body: all of it, not compressed any more.
        header_length: the header Inference-Header-Content-Length; None: the body is JSON alone, 0: one raw tensor.
        model: for a raw tensor, whose shape is the model's.

    Raises:
        BadRequestError: it is no request of the protocol; the sentence names the place.
    """
    if header_length == 0:
        return Message(_raw_request(body, model), {}, binary_by_default=True)
    if header_length is not None and header_length > len(body):
        raise BadRequestError(
            f"Inference-Header-Content-Length is {header_length:,}, but the body has {len(body):,} bytes."
        )
    if header_length is None:
        head, rest = _read_head(body), None
    else:
        head = (_known_head if header_length <= MAX_KNOWN_HEAD else _read_head)(body[:header_length])
        rest = memoryview(body)[header_length:]
    request = InferRequest(_with_data(head.inputs, rest), head.outputs, head.id, head.parameters)
    return Message(request, head.binary, head.binary_by_default)


def _read_head(text: bytes) -> _Head:
    document = json_object(text)
    inputs = _tensors(document, "inputs")
    if not inputs:
        raise BadRequestError("The request has no inputs.")
    described = _tensors(document, "outputs")
    parameters = _parameters(document, "The request")
    identifier = document.get("id")
    if not isinstance(identifier, str | None):
        raise BadRequestError("The request's id must be a string.")
    outputs = [WantedOutput(_text(output, "name", "outputs"), _parameters(output, "An output")) for output in described]
    binary = {
        output.name: _flag(output.parameters, "binary_data") for output in outputs if "binary_data" in output.parameters
    }
    return _Head(inputs, outputs, identifier or "", parameters, binary, _flag(parameters, "binary_data_output"))


_known_head = lru_cache(maxsize=256)(_read_head)


def cost_of(head: bytes | memoryview) -> int:
    """Return how many bytes JSON may become, or 0 where it is small.

    Raises:
        TooLargeError: more than one request may cost.
    """
    if len(head) <= SMALL_JSON:
        return 0
    text = bytes(head)
    cost = sum(text.count(character) * bytes_each for character, bytes_each in _COSTS)
    if cost > MAX_JSON_COST:
        raise TooLargeError(
            "The request's JSON holds too many values: send tensors in binary form, behind the JSON.",
            code="json_too_large",
        )
    return cost


async def inflate(body: bytes, encoding: str, ticket: Ticket, limit: int) -> bytes:
    """Decompress a body, held against the ticket as it grows.

    Raises:
        UnsupportedMediaTypeError: the encoding is neither gzip nor deflate.
        BadRequestError: the body is not compressed so, or damaged.
        BodyTooLargeError: it becomes more than `limit` bytes.
        QueueFullError: the service holds too many bytes already.
    """
    if encoding not in _ENCODINGS:
        raise UnsupportedMediaTypeError(f"Content-Encoding {encoding[:40]} is not taken: use gzip, deflate or none.")
    inflater = zlib.decompressobj(_EITHER)
    pieces: list[bytes] = []
    size, data = 0, body
    try:
        while not inflater.eof:
            # The first step on the event loop: all that most requests have.
            step = inflater.decompress if not pieces else _in_thread(inflater.decompress)
            piece = step(data, INFLATE_STEP)
            if not isinstance(piece, bytes):
                piece = await piece
            data = inflater.unconsumed_tail
            if not piece and not data and not inflater.eof:
                raise BadRequestError(f"The body ends in the middle of its {encoding} data.")
            size += len(piece)
            if size > limit:
                pieces.clear()
                raise BodyTooLargeError(f"The body is too large: at most {limit:,} bytes are taken, decompressed.")
            ticket.hold_bytes(len(piece))
            pieces.append(piece)
    except zlib.error as error:
        raise BadRequestError(f"The body is not sound {encoding} data: {error}.") from None
    if inflater.unused_data:
        raise BadRequestError(f"The body goes on after the end of its {encoding} data.")
    return b"".join(pieces)


class Writer:
    """Writes the answers of one model; what is the same in every answer is serialised once."""

    def __init__(self, model: LoadedModel) -> None:
        self._headers = f"x-model-digest: {model.digest}\r\nx-provider: {model.provider}\r\n"
        self._start = f'{{"model_name":{json.dumps(model.name)},"model_version":{json.dumps(model.version)}'
        self._names = {spec.name: json.dumps(spec.name, ensure_ascii=False) for spec in model.outputs}

    def write(self, response: InferResponse, message: Message) -> tuple[bytes, int]:
        """Return the body of an answer, and how many bytes of it are JSON; 0: nothing in it is binary.

        Raises:
            BadRequestError: an output that is wanted as JSON cannot be written so.
        """
        described, tail = [], []
        for tensor in response.outputs:
            start = (
                f'{{"name":{self._names[tensor.name]},"datatype":"{tensor.datatype}",'
                f'"shape":[{",".join(map(str, tensor.shape))}]'
            )
            if message.wants_binary(tensor.name):
                tail.append(to_bytes(tensor.array))
                described.append(f'{start},"parameters":{{"binary_data_size":{len(tail[-1])}}}}}')
            else:
                described.append(f'{start},"data":{_json_values(tensor)}}}')
        identifier = f',"id":{json.dumps(response.id, ensure_ascii=False)}' if response.id else ""
        head = f'{self._start}{identifier},"outputs":[{",".join(described)}]}}'.encode()
        return (b"".join([head, *tail]), len(head)) if tail else (head, 0)

    def head(self, stages: Stages, request_id: str, json_length: int, encoding: str) -> bytes:
        """Return the headers of an answer, lines that end in CRLF."""
        lines = (
            f"content-type: {'application/octet-stream' if json_length else 'application/json'}\r\n{self._headers}"
            f"x-request-id: {request_id}\r\nserver-timing: decode;dur={stages.decode_s * 1000:.2f}, "
            f"queue;dur={stages.queue_s * 1000:.2f}, infer;dur={stages.infer_s * 1000:.2f}\r\n"
        )
        if json_length:
            lines += f"inference-header-content-length: {json_length}\r\n"
        if encoding:
            lines += f"content-encoding: {encoding}\r\nvary: accept-encoding\r\n"
        return lines.encode()


async def deflate(body: bytes, accepted: str) -> tuple[bytes, str]:
    """Return an answer's body in an encoding that the client accepts, and that encoding; empty: as it is."""
    if len(body) > COMPRESS_IN_THREAD:
        return await asyncio.to_thread(deflate_now, body, accepted)
    return deflate_now(body, accepted)


def deflate_now(body: bytes, accepted: str) -> tuple[bytes, str]:
    """Do what `deflate` does at once."""
    encoding = _wanted_encoding(accepted) if accepted and len(body) >= MIN_COMPRESSED else ""
    if not encoding:
        return body, ""
    compressor = zlib.compressobj(1, wbits=_ENCODINGS[encoding])
    return compressor.compress(body) + compressor.flush(), encoding


def _wanted_encoding(accepted: str) -> str:
    """Return the first of our encodings that an Accept-Encoding names and does not refuse; empty: none."""
    for part in accepted.lower().split(","):
        name, _, weight = part.partition(";")
        if name.strip() in _ENCODINGS and weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000"):
            return name.strip()
    return ""


def _in_thread(function: Callable[[bytes, int], bytes]) -> Callable[[bytes, int], Any]:
    return lambda data, limit: asyncio.to_thread(function, data, limit)


def json_object(text: bytes | memoryview) -> dict[str, Any]:
    """Return the object that JSON text holds.

    Raises:
        BadRequestError: it is no JSON, or no object.
    """
    try:
        document = from_json(bytes(text), allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"The request is not JSON: {error}.") from None
    if not isinstance(document, dict):
        raise BadRequestError("The request's JSON must be an object.")
    return document


def _tensors(document: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the list of objects under `inputs` or `outputs`."""
    tensors = document.get(kind)
    if tensors is None:
        return []
    if not isinstance(tensors, list) or not all(isinstance(tensor, dict) for tensor in tensors[:MAX_TENSORS]):
        raise BadRequestError(f"The request's {kind} must be a list of objects.")
    if len(tensors) > MAX_TENSORS:
        raise BadRequestError(f"The request has {len(tensors):,} {kind}; at most {MAX_TENSORS:,} are looked at.")
    return tensors


def _with_data(inputs: Sequence[Mapping[str, Any]], rest: memoryview | None) -> list[InputTensor]:
    """Return the inputs, each with its values from the JSON or its part of what follows the JSON."""
    tensors, at = [], 0
    for described in inputs:
        name = _text(described, "name", "inputs")
        where = f"Input '{name[:80]}'"
        parameters = _parameters(described, where)
        shape, values = described.get("shape"), described.get("data")
        if not isinstance(shape, list):
            raise BadRequestError(f"{where} lacks its shape, a list of whole numbers.")
        tensor = InputTensor(name, _text(described, "datatype", where), shape, values or [], parameters)
        tensors.append(tensor)
        size = parameters.get("binary_data_size")
        if size is None and values is None and rest and len(inputs) == 1:
            size = len(rest)  # a single input may leave its size out; an image then comes without a length before it
            if tensor.datatype == "BYTES" and shape in ([1], [1, 1]) and not _has_length(rest):
                tensor.data, at = [bytes(rest)], size
                continue
        if size is None:
            if not isinstance(values, list):
                raise BadRequestError(f"{where} lacks its data, a list; or binary_data_size, and data behind the JSON.")
            continue
        if values is not None:
            raise BadRequestError(f"{where} has both data and binary_data_size.")
        if type(size) is not int or size < 0:
            raise BadRequestError(f"{where} has a binary_data_size that is no whole number of at least 0.")
        if rest is None:
            raise BadRequestError(f"{where} has binary_data_size, but Inference-Header-Content-Length is not sent.")
        if size > len(rest) - at:
            raise BadRequestError(f"{where} has a binary_data_size beyond the {len(rest) - at:,} bytes left for it.")
        tensor.data = rest[at : at + size]
        at += size
    if rest is not None and at != len(rest):
        raise BadRequestError(f"{len(rest) - at:,} bytes behind the JSON belong to no input.")
    return tensors


def _has_length(data: memoryview) -> bool:
    return len(data) >= 4 and int.from_bytes(data[:4], "little") == len(data) - 4


def _raw_request(body: bytes, model: LoadedModel) -> InferRequest:
    """Return the request whose one input is all of the body, in the only shape that its size leaves open."""
    if len(model.inputs) != 1:
        raise BadRequestError(
            f"A body that is one raw tensor needs a model of one input; '{model.name}' has {len(model.inputs)}."
        )
    spec = model.inputs[0]
    open_dimensions = spec.shape.count(VARIABLE)
    if spec.datatype == "BYTES":
        return InferRequest([InputTensor(spec.name, "BYTES", [1] * len(spec.shape), [body])])
    fixed = spec.dtype.itemsize
    for size in spec.shape:
        fixed *= 1 if size == VARIABLE else size
    count, odd = divmod(len(body), fixed)
    if takes_images(model) and (odd or not count):
        return InferRequest([InputTensor(spec.name, "BYTES", [1], [body])])
    if open_dimensions > 1 or odd or (count != 1 and not open_dimensions):
        raise BadRequestError(
            f"A body of {len(body):,} bytes is no raw tensor for '{spec.name}', which is {spec.datatype} "
            f"{list(spec.shape)} with at most one -1 to be told from the size."
        )
    shape = [count if size == VARIABLE else size for size in spec.shape]
    return InferRequest([InputTensor(spec.name, spec.datatype, shape, body)])


def _text(described: Mapping[str, Any], field: str, where: str) -> str:
    value = described.get(field)
    if not isinstance(value, str) or not value:
        raise BadRequestError(f"{where}: the {field} is missing, or no string.")
    return value


def _parameters(described: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    parameters = described.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise BadRequestError(f"{where} has parameters that are no object.")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise BadRequestError(f"The parameter '{name}' must be true or false.")
    return value


def _json_values(tensor: Tensor) -> str:
    return json.dumps(to_values(tensor.name, tensor.array), ensure_ascii=False, separators=(",", ":"))
