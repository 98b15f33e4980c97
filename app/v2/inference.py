"""One inference of the protocol, whatever it came by: checked against its model, run, and put into the answer's form.

A front turns its message into an `InferRequest`, awaits `infer` inside the ticket's block, and turns the
`InferResponse` into its own form. Every rule of the protocol that is not a matter of one wire is here, once.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from app.engine import Engine, GiveUp, Prediction, Stages, Tell
from app.errors import BadRequestError, TooLargeError
from app.loading import LoadedModel
from app.runs import DEFAULT_URGENCY, LAST_URGENCY
from app.scores import best
from app.tensors import DATATYPES, Array, TensorSpec
from app.tickets import Ticket
from app.v2.tensors import Data, Tensor, to_array, to_objects, to_strings

Scores = NDArray[np.float32]
Pixels = NDArray[np.uint8]

LEVELS = LAST_URGENCY + 1
"""Levels of `priority`, 1 the highest."""
MAX_CLASSIFICATION = 2**31 - 1
MAX_SIZE = 2**63 - 1
MAX_MICROSECONDS = 10**12
SLOW_ELEMENTS, SLOW_BYTES = 20_000, 1_000_000
"""More values, or bytes of strings, are turned into arrays off the event loop: 20,000 take 2 ms."""
_FORM_PARAMETERS = frozenset({"binary_data_output"})
"""Parameters that say nothing about how a request is run."""
_OF_STREAMS = "triton_enable_empty_final_response"
_SHARED_MEMORY = "shared_memory_region"


@dataclass(slots=True)
class InputTensor:
    """An input as it came: `data` is a buffer in the binary form, or a sequence of values."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: Data
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class WantedOutput:
    """An output that is asked for; `parameters` may hold `classification`."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class InferRequest:
    """One request; without outputs it asks for all."""

    inputs: Sequence[InputTensor]
    outputs: Sequence[WantedOutput] = ()
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class InferResponse:
    """The answer.

    Attributes:
        model: that gave it.
        id: the request's.
        outputs: in the order in which they were asked for, else the model's.
        rows: how many rows were run.
        stages: where the time went.
        ran_at: `time.monotonic()` at which the model had answered; the front observes the stage `post` from then on.
    """

    model: LoadedModel
    id: str
    outputs: list[Tensor]
    rows: int
    stages: Stages
    ran_at: float


async def infer(
    engine: Engine, model: LoadedModel, request: InferRequest, ticket: Ticket, max_rows: int
) -> InferResponse:
    """Answer one request.

    Args:
        engine: runs the model.
        model: from `engine.model()`.
        request: as the client sent it; nothing in it is trusted.
        ticket: from `engine.admit()`, whose block this runs in; the request's parameters may shorten its deadline and
            change its urgency.
        max_rows: more rows in one request are refused.

    Raises:
        BadRequestError: something in the request is malformed, or not what the model takes or gives.
        TooLargeError: too many rows, or an image that is too large.
        BadImageError, QueueFullError, InferenceError: as `Engine.classify` and `Engine.infer`.
    """
    _apply(request.parameters, ticket)
    wanted = _wanted(model, request.outputs)
    tensors = _in_order(model, request.inputs)
    if model.manifest is not None and tensors[0].datatype == "BYTES":
        images = _images(tensors[0], max_rows)
        prediction = await engine.classify(model, images, ticket)
        arrays: tuple[Array, ...] = (prediction.probabilities,)
        rows, stages = len(images), prediction.stages
    else:
        started = time.monotonic()
        inputs = await _arrays(model, tensors, max_rows)
        decode_s = time.monotonic() - started
        model.metrics.decode.observe(decode_s)
        inference = await engine.infer(model, inputs, ticket)
        arrays, stages = inference.outputs, inference.stages
        stages.decode_s = decode_s
        rows = len(inputs[0]) if model.max_batch else 1
    return _respond(model, request.id, wanted, arrays, rows, stages)


@dataclass(slots=True)
class SmallRequest:
    """A request to a classifier that was checked, and is small enough to be answered without a task.

    Attributes:
        model: that it is for.
        rows: how many rows it has.
        data: one encoded image, or uint8 pixels `[rows, height, width, 3]`.
        id, wanted: as the answer needs them.
    """

    model: LoadedModel
    rows: int
    data: bytes | Array
    id: str
    wanted: list[tuple[int, TensorSpec, int]]

    def begin(self, engine: Engine, ticket: Ticket, tell: Tell) -> GiveUp:
        """Have it run; see `Engine.begin`."""
        if isinstance(self.data, bytes):
            return engine.begin(self.model, self.data, ticket, tell)
        return engine.begin_pixels(self.model, cast(Pixels, self.data), ticket, tell)

    def respond(self, prediction: Prediction) -> InferResponse:
        """Return the answer."""
        return _respond(self.model, self.id, self.wanted, (prediction.probabilities,), self.rows, prediction.stages)


def small_request(model: LoadedModel, request: InferRequest, max_rows: int) -> SmallRequest | None:
    """Do the checks of `infer` for a request that may need no task; None: it needs one.

    Raises:
        As `infer`, of what is wrong with the request itself.
    """
    if model.manifest is None or not request.parameters.keys() <= _FORM_PARAMETERS:
        return None
    wanted = _wanted(model, request.outputs)
    tensors = _in_order(model, request.inputs)
    data: bytes | Array
    if tensors[0].datatype == "BYTES":
        images = _images(tensors[0], max_rows)
        rows, data = len(images), images[0]
        if rows > 1:
            return None
    else:
        shape = _shape_for(model.inputs[0], tensors[0], model)
        rows = shape[0]
        if not isinstance(tensors[0].data, bytes | memoryview):
            return None
        _refuse_many_rows(rows, max_rows)
        data = to_array(tensors[0].name, tensors[0].datatype, shape, tensors[0].data)
    return SmallRequest(model, rows, data, request.id, wanted)


def _respond(
    model: LoadedModel,
    identifier: str,
    wanted: Sequence[tuple[int, TensorSpec, int]],
    arrays: Sequence[Array],
    rows: int,
    stages: Stages,
) -> InferResponse:
    ran_at = time.monotonic()
    outputs = [_output(model, spec, arrays[place], classes) for place, spec, classes in wanted]
    return InferResponse(model, identifier, outputs, rows, stages, ran_at)


def urgency_of(priority: int) -> int:
    """Return the urgency, 0 (first) to 7 (last), of the protocol's priority: 1 is the highest, 0 the default."""
    return min(priority - 1, LAST_URGENCY) if priority else DEFAULT_URGENCY


def takes_images(model: LoadedModel) -> str:
    """Return the name of the input that takes encoded images as BYTES; empty: the model takes only tensors."""
    return model.inputs[0].name if model.manifest is not None else ""


def _apply(parameters: Mapping[str, Any], ticket: Ticket) -> None:
    """Apply a request's own parameters; those that nobody knows are passed over, as Triton does."""
    if not parameters:
        return
    _refuse_shared_memory("The request", parameters)
    for name, value in parameters.items():
        if not isinstance(value, bool | int | float | str):
            raise BadRequestError(f"The parameter '{name[:80]}' must be a string, a number or a bool.")
        if name.startswith("triton_") and name != _OF_STREAMS:
            raise BadRequestError(
                f"The parameter '{name[:80]}' is refused: names that start with triton_ are reserved."
            )
    if timeout := _whole(parameters, "timeout", MAX_MICROSECONDS):
        ticket.shorten(time.monotonic() + timeout / 1e6)
    if priority := _whole(parameters, "priority", 2**32 - 1):
        ticket.urgency = urgency_of(priority)


def _whole(parameters: Mapping[str, Any], name: str, limit: int) -> int:
    """Return a whole number from 0 to `limit` among parameters; 0 where it is not there."""
    value = parameters.get(name, 0)
    if type(value) is not int or not 0 <= value <= limit:
        raise BadRequestError(f"The parameter '{name}' must be a whole number from 0 to {limit}.")
    return value


def _wanted(model: LoadedModel, outputs: Sequence[WantedOutput]) -> list[tuple[int, TensorSpec, int]]:
    """Return place, spec and wanted classes (0: the tensor itself) of each output to answer with."""
    if not outputs:
        return [(place, spec, 0) for place, spec in enumerate(model.outputs)]
    places = {spec.name: place for place, spec in enumerate(model.outputs)}
    wanted = []
    for output in outputs:
        place = places.pop(output.name, None)
        if place is None:
            raise _unknown("output", output.name, model.outputs, model)
        spec, classes = model.outputs[place], 0
        if output.parameters:
            _refuse_shared_memory(f"Output '{output.name}'", output.parameters)
            classes = _whole(output.parameters, "classification", MAX_CLASSIFICATION)
        if classes and spec.datatype == "BYTES":
            raise BadRequestError(f"Output '{spec.name}' is BYTES, of which there is no classification.")
        wanted.append((place, spec, classes))
    return wanted


def _in_order(model: LoadedModel, inputs: Sequence[InputTensor]) -> list[InputTensor]:
    """Return the inputs in the model's order: exactly the model's, each once."""
    by_name = {tensor.name: tensor for tensor in inputs}
    ordered = [by_name[spec.name] for spec in model.inputs if spec.name in by_name]
    if len(ordered) != len(model.inputs) or len(inputs) != len(ordered):
        raise _other_inputs(model, inputs)
    for tensor in ordered:
        _refuse_shared_memory(f"Input '{tensor.name}'", tensor.parameters)
    return ordered


def _other_inputs(model: LoadedModel, inputs: Sequence[InputTensor]) -> BadRequestError:
    known = [spec.name for spec in model.inputs]
    names = [tensor.name for tensor in inputs]
    if len(names) > len(known):
        twice = " one of them twice," if len(set(names)) < len(names) else ""
        return BadRequestError(
            f"The request has {len(names):,} inputs,{twice} but model '{model.name}' takes {_names(model.inputs)}."
        )
    for name in names:
        if name not in known:
            return _unknown("input", name, model.inputs, model)
    missing = next(name for name in known if name not in names)
    return BadRequestError(
        f"Input '{missing}' is missing: model '{model.name}' takes {_names(model.inputs)}, each once."
    )


def _images(tensor: InputTensor, max_rows: int) -> list[bytes]:
    """Return the encoded images in a tensor of BYTES."""
    shape = _checked_shape(tensor)
    if len(shape) != 1 and (len(shape) != 2 or shape[1] != 1):
        raise BadRequestError(
            f"Encoded images for '{tensor.name}' come as BYTES of shape [N] or [N,1], not {_shown(shape)}."
        )
    _refuse_many_rows(shape[0], max_rows)
    return to_strings(tensor.name, shape, tensor.data)


async def _arrays(model: LoadedModel, inputs: Sequence[InputTensor], max_rows: int) -> list[Array]:
    """Return an array per input; what takes long is done beside the event loop."""
    shapes = [_shape_for(spec, tensor, model) for spec, tensor in zip(model.inputs, inputs, strict=True)]
    if model.max_batch:
        rows = shapes[0][0]
        for shape in shapes:
            if shape[0] != rows:
                raise BadRequestError(
                    f"The inputs have different numbers of rows, the first dimension: {_shown(shape)}."
                )
        _refuse_many_rows(rows, max_rows)
    for tensor in inputs:
        if _is_slow(tensor):
            return await asyncio.to_thread(_convert, inputs, shapes)
    return _convert(inputs, shapes)


def _convert(inputs: Sequence[InputTensor], shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    return [
        _texts(tensor, shape)
        if tensor.datatype == "BYTES"
        else to_array(tensor.name, tensor.datatype, shape, tensor.data)
        for tensor, shape in zip(inputs, shapes, strict=True)
    ]


def _texts(tensor: InputTensor, shape: tuple[int, ...]) -> Array:
    """Return a tensor of BYTES as an array of `str`, as graphs take it."""
    try:
        texts = [element.decode() for element in to_strings(tensor.name, shape, tensor.data)]
    except UnicodeDecodeError:
        raise BadRequestError(f"Input '{tensor.name}' has an element that is no UTF-8 text.") from None
    return to_objects(texts).reshape(shape)


def _is_slow(tensor: InputTensor) -> bool:
    """Tell whether a tensor's elements are many, and objects: a buffer of numbers is never looked through."""
    data = tensor.data
    if isinstance(data, bytes | bytearray | memoryview):
        return tensor.datatype == "BYTES" and len(data) > SLOW_BYTES
    return len(data) > SLOW_ELEMENTS or (len(data) > 0 and isinstance(data[0], list))


def _shape_for(spec: TensorSpec, tensor: InputTensor, model: LoadedModel) -> tuple[int, ...]:
    """Return a tensor's shape, if it and the datatype are what a model takes."""
    if tensor.datatype != spec.datatype:
        known = "" if tensor.datatype in DATATYPES else ", which is no datatype"
        images = ", or encoded images as BYTES of shape [N]" if spec.name == takes_images(model) else ""
        raise BadRequestError(
            f"Input '{spec.name}' is {tensor.datatype[:80]}{known}; model '{model.name}' takes {spec.datatype}{images}."
        )
    shape = _checked_shape(tensor)
    if not spec.takes(shape):
        raise BadRequestError(
            f"Input '{spec.name}' has shape {_shown(shape)}; model '{model.name}' takes {_shown(spec.shape)}, "
            "where -1 is any size."
        )
    return shape


def _checked_shape(tensor: InputTensor) -> tuple[int, ...]:
    """Return a tensor's shape: int64 numbers of at least 1, whose product may be anything."""
    for size in tensor.shape:
        if type(size) is not int or not 1 <= size <= MAX_SIZE:
            raise BadRequestError(
                f"Input '{tensor.name}' has shape {_shown(tensor.shape)}: every dimension is a whole number from 1 to "
                "2⁶³-1."
            )
    return tuple(tensor.shape)


def _output(model: LoadedModel, spec: TensorSpec, array: Array, classes: int) -> Tensor:
    if not classes:
        return Tensor(spec.name, spec.datatype, array)
    manifest = model.manifest or model.tensor_manifest
    labels = manifest.labels if manifest is not None else ()
    rows = array.reshape(len(array), -1) if model.max_batch else array.reshape(1, -1)
    named = to_objects([entry for row in rows for entry in classify(row, labels, classes)])
    shape = (len(rows), -1) if model.max_batch else (-1,)
    return Tensor(spec.name, "BYTES", named.reshape(shape))


def classify(values: Array, labels: Sequence[str], k: int) -> list[bytes]:
    """Return the `k` largest of `[classes]`, best first and equal ones in class order, each as `score:index:label`.

    A `k` beyond the number of classes gives all of them, as Triton does; without labels it is `score:index`.
    """
    named = labels if len(labels) == len(values) else ()
    if values.dtype.kind == "f":
        ranked = [(index, f"{score:f}") for index, score in best(cast(Scores, values), k)]
    else:
        ranked = [(index, str(int(values[index]))) for index, _ in best(cast(Scores, values.astype(np.float64)), k)]
    return [f"{score}:{index}{f':{named[index]}' if named else ''}".encode() for index, score in ranked]


def _refuse_many_rows(rows: int, limit: int) -> None:
    if rows > limit:
        raise TooLargeError(
            f"The request has {rows:,} rows, more than {limit}: send them in several requests.", code="too_many_images"
        )


def _refuse_shared_memory(what: str, parameters: Mapping[str, Any]) -> None:
    if _SHARED_MEMORY in parameters:
        raise BadRequestError(f"{what} is in shared memory, which is not offered: send it in the request.")


def _unknown(kind: str, name: str, specs: Sequence[TensorSpec], model: LoadedModel) -> BadRequestError:
    twice = any(spec.name == name for spec in specs)
    fault = f"asks for {kind} '{name}' twice" if twice else f"names the {kind} '{name[:80]}'"
    verb = "takes" if kind == "input" else "gives"
    return BadRequestError(f"The request {fault}; model '{model.name}' {verb} {_names(specs)}.")


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"'{spec.name}'" for spec in specs)


def _shown(shape: Sequence[object]) -> str:
    """Return a shape for a sentence, however long it and whatever is in it."""
    sizes = [str(size) if type(size) is int and abs(size) <= MAX_SIZE else "…" for size in shape[:8]]
    return "[" + ",".join(sizes) + (",…]" if len(shape) > 8 else "]")
