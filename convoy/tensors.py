"""NumPy arrays to and from the Open Inference Protocol, with its binary tensors behind the JSON.

Loads NumPy when it is first used: who has arrays has it.
"""

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time it is the caller's to load
    import numpy as np
    from numpy.typing import NDArray

LENGTH_HEADER = "Inference-Header-Content-Length"
"""Tells how many bytes of the body are JSON."""
_DATATYPES = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign}int{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
}
"""NumPy's names → the protocol's."""
_NAMES = {datatype: name for name, datatype in _DATATYPES.items()}
_LENGTH = 4
"""Bytes of the number before each element of BYTES."""


def pack(inputs: Mapping[str, "NDArray[Any]"]) -> tuple[bytes, int]:
    """Return the body of an inference request, and how many bytes of it are JSON.

    Raises:
        TypeError: an input is no array, or of a type that the protocol does not have.
        ValueError: there is no input.
    """
    if not inputs:
        raise ValueError("infer needs at least one input: {name: array}.")
    described, tail = [], []
    for name, array in inputs.items():
        datatype, data = _packed(name, array)
        size = {"binary_data_size": len(data)}
        described.append({"name": name, "datatype": datatype, "shape": list(array.shape), "parameters": size})
        tail.append(data)
    head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    return b"".join([head, *tail]), len(head)


def unpack(body: bytes, json_length: int) -> dict[str, "NDArray[Any]"]:
    """Return the outputs of an answer by name; elements of BYTES are `bytes` objects.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is no answer of the protocol.
    """
    if not 0 <= json_length <= len(body):
        raise ValueError("JSON longer than the body")
    content = json.loads(body[:json_length])
    outputs, at = {}, json_length
    for output in content["outputs"]:
        shape = tuple(int(side) for side in output["shape"])
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            flat = _of_values(output["datatype"], output["data"])
        else:
            if not 0 <= size <= len(body) - at:
                raise ValueError("a tensor that ends beyond the body")
            flat = _of_bytes(output["datatype"], body[at : at + size], math.prod(shape))
            at += size
        outputs[str(output["name"])] = flat.reshape(shape)
    if at != len(body):
        raise ValueError("a body that goes on after its tensors")
    return outputs


def _packed(name: str, array: "NDArray[Any]") -> tuple[str, bytes]:
    import numpy as np

    if not isinstance(array, np.ndarray):
        raise TypeError(f"Input '{name}' is of type {type(array).__name__}: give a NumPy array.")
    if array.dtype.kind in "OSU":
        return "BYTES", b"".join(_element(name, element) for element in array.ravel().tolist())
    datatype = _DATATYPES.get(array.dtype.name)
    if datatype is None:
        raise TypeError(f"Input '{name}' is an array of {array.dtype}, which the protocol does not have.")
    return datatype, array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _element(name: str, element: object) -> bytes:
    if not isinstance(element, bytes | str):
        raise TypeError(f"Input '{name}' holds a {type(element).__name__}: an array of objects holds str or bytes.")
    data = element.encode() if isinstance(element, str) else element
    return len(data).to_bytes(_LENGTH, "little") + data


def _of_bytes(datatype: str, data: bytes, count: int) -> "NDArray[Any]":
    import numpy as np

    if datatype != "BYTES":
        dtype = np.dtype(_NAMES[datatype]).newbyteorder("<")
        return np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))  # a copy: the caller's to change
    elements, at = [], 0
    while at < len(data):
        start = at + _LENGTH
        at = start + int.from_bytes(data[at:start], "little")
        elements.append(data[start:at])
    if at != len(data) or len(elements) != count:
        raise ValueError("strings that end beyond their tensor")
    return _objects(elements)


def _of_values(datatype: str, values: list[Any]) -> "NDArray[Any]":
    import numpy as np

    if datatype != "BYTES":
        return np.array(values, _NAMES[datatype])
    flat: list[Any] = values
    while flat and isinstance(flat[0], list):
        flat = [value for row in flat for value in row]
    return _objects([str(value).encode() for value in flat])


def _objects(elements: list[bytes]) -> "NDArray[np.object_]":
    import numpy as np

    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array
