"""V1 messages: the JSON of TensorFlow Serving and KServe becomes an `InferRequest`, its answer that JSON again.

In the row format (`instances`) every instance has a value for each input, in the column format (`inputs`) every input
has all its values. Which shape they have is told by how they are nested; whether that fits the model, by `app/v2/`.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from app.errors import BadRequestError
from app.http.bodies import too_many
from app.loading import LoadedModel
from app.tensors import Array, TensorSpec
from app.v2.inference import InferRequest, InferResponse, InputTensor, takes_images

BINARY = "b64"
SIGNATURE = "serving_default"
"""What clients that name a signature call the only one that there is."""
_MOST_DIMENSIONS = 32
_DTYPES = {"FP16": "HALF", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING"}
"""Datatypes whose name in TensorFlow is another one."""
_STATES = {
    "LOADING": "LOADING",
    "READY": "AVAILABLE",
    "UNAVAILABLE": "END",
    "UNLOADING": "UNLOADING",
}
"""State of the repository's index → TensorFlow Serving's."""


def parse(body: bytes, model: LoadedModel, max_images: int) -> tuple[InferRequest, bool]:
    """Take a request apart.

    Returns:
        The request, and whether it is in the row format, as its answer is then to be.

    Raises:
        BadRequestError: it is no request of the protocol; the sentence names the place.
        TooLargeError: it has more images than one request may have.
    """
    try:
        document = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"The request is not JSON: {error}.") from None
    if not isinstance(document, dict) or ("instances" in document) == ("inputs" in document):
        raise BadRequestError('The request must be a JSON object with either "instances" or "inputs".')
    if not isinstance(document.get("signature_name", ""), str):
        raise BadRequestError("The request's signature_name must be a string.")
    in_rows = "instances" in document
    columns = _from_rows(document["instances"], model) if in_rows else _from_columns(document["inputs"], model)
    return InferRequest([_tensor(name, values, model, max_images) for name, values in columns.items()]), in_rows


def write(response: InferResponse, in_rows: bool) -> bytes:
    """Return the body of an answer: one value for each instance, or for each output.

    Raises:
        BadRequestError: an output cannot be written so.
    """
    values = {tensor.name: _plain(tensor.name, tensor.array) for tensor in response.outputs}
    answer: Any = next(iter(values.values())) if len(values) == 1 else values
    if in_rows and len(values) > 1:
        answer = _to_rows(values)
    try:
        text = json.dumps(
            {"predictions" if in_rows else "outputs": answer},
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )
    except ValueError:
        raise BadRequestError(
            f"An output of '{response.model.name}' holds NaN or infinity, which JSON lacks: ask /v2 in binary form."
        ) from None
    return text.encode()


def version_status(entry: Mapping[str, str]) -> dict[str, Any]:
    """Return `ModelVersionStatus` of an entry of the repository's index."""
    failed = entry["state"] == "UNAVAILABLE" and entry["reason"]
    return {
        "version": entry["version"],
        "state": _STATES.get(entry["state"], "UNKNOWN"),
        "status": {"error_code": "INTERNAL" if failed else "OK", "error_message": entry["reason"]},
    }


def metadata(model: LoadedModel) -> dict[str, Any]:
    """Return `GetModelMetadataResponse`, with the graph's tensors as the only signature."""
    signature = {
        "inputs": {spec.name: _tensor_info(spec) for spec in model.inputs},
        "outputs": {spec.name: _tensor_info(spec) for spec in model.outputs},
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": model.name, "signature_name": "", "version": model.version},
        "metadata": {"signature_def": {"signature_def": {SIGNATURE: signature}}},
    }


def _tensor_info(spec: TensorSpec) -> dict[str, Any]:
    return {
        "dtype": f"DT_{_DTYPES.get(spec.datatype, spec.datatype)}",
        "tensor_shape": {"dim": [{"size": str(size), "name": ""} for size in spec.shape], "unknown_rank": False},
        "name": spec.name,
    }


def _from_rows(instances: object, model: LoadedModel) -> dict[str, Any]:
    if not isinstance(instances, list) or not instances:
        raise BadRequestError("The request's instances must be a list with at least one in it.")
    if not _is_named(instances[0]):
        if len(model.inputs) > 1:
            known = ", ".join(f"'{spec.name}'" for spec in model.inputs)
            raise BadRequestError(
                f"Model '{model.name}' has the inputs {known}: every instance must be an object with a value for each."
            )
        return {model.inputs[0].name: instances}
    names = list(instances[0])
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for index, instance in enumerate(instances):
        if not _is_named(instance) or instance.keys() != columns.keys():
            raise BadRequestError(f"instances[{index}] has not the inputs that instances[0] has.")
        for name in names:
            columns[name].append(instance[name])
    return _renamed(columns, model)


def _from_columns(inputs: object, model: LoadedModel) -> dict[str, Any]:
    if isinstance(inputs, dict) and _is_named(inputs):
        return _renamed(inputs, model)
    if len(model.inputs) > 1:
        raise BadRequestError(f'Model \'{model.name}\' has several inputs: name each: {{"inputs": {{"a": …}}}}.')
    return {model.inputs[0].name: inputs}


def _renamed(columns: dict[str, Any], model: LoadedModel) -> dict[str, Any]:
    """Return the columns by the model's names: images may be called anything, `image_bytes` for example."""
    if takes_images(model) and len(columns) == 1 and any(map(_is_binary, _as_list(*columns.values()))):
        return {model.inputs[0].name: next(iter(columns.values()))}
    return columns


def _is_named(value: object) -> bool:
    """Tell whether a value is an object of inputs by name; one that has b64 is a value itself."""
    return isinstance(value, dict) and not _is_binary(value)


def _is_binary(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {BINARY}


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _tensor(name: str, values: object, model: LoadedModel, max_images: int) -> InputTensor:
    """Return the input of a name, whose datatype is the model's, or BYTES for encoded images."""
    spec = next((spec for spec in model.inputs if spec.name == name), None)
    if spec is None:  # which is told with the names that there are
        return InputTensor(name, "", (), ())
    elements = _as_list(values)
    if takes_images(model) and any(isinstance(element, dict | str) for element in elements):
        if len(elements) > max_images:  # before any of them is decoded
            raise too_many(max_images)
        return InputTensor(name, "BYTES", [len(elements)], _images(elements))
    shape = _shape_of(elements)
    data = _texts(name, elements) if spec.datatype == "BYTES" else elements
    return InputTensor(name, spec.datatype, shape, data)


def _images(elements: Iterable[object]) -> list[bytes]:
    images = []
    for index, element in enumerate(elements):
        if not isinstance(element, dict) or not _is_binary(element):
            raise BadRequestError(f'Image {index} must be {{"b64": "<base64 of a JPEG, PNG or WebP file>"}}.')
        images.append(_decoded(element, f"Image {index}"))
    return images


def _decoded(element: Mapping[str, object], where: str) -> bytes:
    text = element[BINARY]
    if not isinstance(text, str):
        raise BadRequestError(f"{where}: b64 must be a string.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"{where} is not base64: {error}.") from None


def _texts(name: str, elements: Sequence[Any]) -> list[Any]:
    """Return nested strings, with those that came as b64 decoded."""
    return [
        _texts(name, element)
        if isinstance(element, list)
        else _decoded(element, f"Input '{name}'")
        if _is_binary(element)
        else element
        for element in elements
    ]


def _shape_of(elements: Sequence[Any]) -> list[int]:
    """Return the shape of nested lists by the first element of each."""
    shape: list[int] = []
    value: Any = elements
    while isinstance(value, list) and len(shape) < _MOST_DIMENSIONS:
        shape.append(len(value))
        value = value[0] if value else None
    return shape


def _plain(name: str, array: Array) -> Any:
    """Return an array as nested lists of what JSON has; bytes that are no text, or are called so, in base64."""
    if array.dtype != object:
        return array.tolist()
    as_binary = name.endswith("_bytes")
    flat: list[Any] = [_text_or_binary(element, as_binary) for element in array.ravel().tolist()]
    for size in reversed(array.shape[1:]):
        flat = [flat[start : start + size] for start in range(0, len(flat), size)]
    return flat


def _text_or_binary(element: str | bytes, as_binary: bool) -> str | dict[str, str]:
    content = element.encode() if isinstance(element, str) else element
    if not as_binary:
        try:
            return content.decode()
        except UnicodeDecodeError:
            pass
    return {BINARY: base64.b64encode(content).decode()}


def _to_rows(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes = {len(value) if isinstance(value, list) else 0 for value in values.values()}
    if len(sizes) > 1:
        raise BadRequestError("The outputs have different numbers of rows: ask in the column format, with inputs.")
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
