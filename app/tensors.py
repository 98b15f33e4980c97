"""Tensors as the world outside names them: datatypes of the Open Inference Protocol, and what a graph takes and gives.

Pure: knows neither requests nor how a graph runs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
"""Any array of numbers, or of strings as objects."""

VARIABLE = -1
"""A dimension that each request may choose."""

DATATYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
"""Datatype → NumPy's; a graph's strings are BYTES, held as `str` objects."""

_OF_GRAPH = {
    "bool": "BOOL",
    "float16": "FP16",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
} | {f"{sign}int{bits}": f"{sign}int{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32, 64)}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: as the graph has it.
        datatype: a key of `DATATYPES`.
        shape: its dimensions; -1: variable.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """NumPy's name of the datatype."""
        return DATATYPES[self.datatype]

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Tell whether an array of this shape fits."""
        return len(shape) == len(self.shape) and all(
            wanted in (VARIABLE, found) for wanted, found in zip(self.shape, shape, strict=True)
        )


def datatype_of(kind: str) -> str | None:
    """Return the datatype of ONNX Runtime's `tensor(float)`; None: it is none that travels (a sequence, bfloat16)."""
    return _OF_GRAPH.get(kind.removeprefix("tensor(").removesuffix(")")) if kind.startswith("tensor(") else None
