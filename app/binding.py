"""Binding: a graph's runs over buffers that stay where they are, in batches of a few sizes.

A GPU copies from memory that it knows without the processor, chooses kernels for each size of a batch, and replays
recorded launches only at the same addresses. So rows are written into one buffer per input, filled up to the next size,
and the scores are read from one buffer per output. Works on any provider, and is tested on the CPU's. Knows ONNX
Runtime's sessions; nothing of models, batchers or CUDA.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app import runtime
from app.tensors import VARIABLE, Array, TensorSpec

GRAPH_ID = "gpu_graph_id"
"""The run option that tells recordings apart."""
Allocate = Callable[[int], NDArray[np.uint8]]


def can_bind(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Tell whether all tensors vary in their rows alone, and hold numbers."""
    return all(
        spec.datatype != "BYTES" and spec.shape[:1] == (VARIABLE,) and VARIABLE not in spec.shape[1:]
        for spec in (*inputs, *outputs)
    )


class Bound:
    """One session's buffers and bindings; used by one thread at a time."""

    def __init__(
        self,
        session: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        sizes: Sequence[int],
        allocate: Allocate,
        run_options: Callable[[], Any],
        *,
        recorded: str = "",
    ) -> None:
        """Make the buffers for the largest size.

        Args:
            session: ONNX Runtime's.
            inputs: for which `can_bind` holds.
            outputs: the same.
            sizes: of batches, rising.
            allocate: returns zeroed memory of so many bytes.
            run_options: makes options for a run.
            recorded: a device (`cuda`), on which tensors lie at fixed addresses, for recordings; else empty: the
                provider copies to and from the buffers in each run.
        """
        self._session = session
        self._sizes = tuple(sizes)
        self._inputs = [_buffer(spec, self._sizes[-1], allocate) for spec in inputs]
        self._outputs = [_buffer(spec, self._sizes[-1], allocate) for spec in outputs]
        self._runs = [
            self._recorded(inputs, outputs, size, run_options(), recorded)
            if recorded
            else self._copied(inputs, outputs, size, run_options())
            for size in self._sizes
        ]

    def padding(self, rows: int) -> int:
        """Return how many rows a batch of so many is filled up with."""
        rest = rows % self._sizes[-1]
        return self._place(rest)[1] - rest if rest else 0

    def join(self, parts: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        """Write the rows of several requests one after the other, where `run` wants them; at most the largest size."""
        rows = sum(len(part[0]) for part in parts)
        joined = tuple([buffer[:rows] for buffer in self._inputs])
        for target, arrays in zip(joined, zip(*parts, strict=True), strict=True):
            np.concatenate(arrays, out=target)
        return joined

    def run(self, *inputs: Array) -> tuple[Array, ...]:
        """Turn inputs into outputs, both in the graph's order, each with as many rows as came."""
        rows, largest = len(inputs[0]), self._sizes[-1]
        if rows <= largest:
            return self._run(inputs, rows)
        chunks = [
            self._run([array[start : start + largest] for array in inputs], min(largest, rows - start))
            for start in range(0, rows, largest)
        ]
        return tuple([np.concatenate(arrays) for arrays in zip(*chunks, strict=True)])

    def _run(self, inputs: Sequence[Array], rows: int) -> tuple[Array, ...]:
        for buffer, array in zip(self._inputs, inputs, strict=True):
            if array.ctypes.data != buffer.ctypes.data:  # else `join` has written it here
                buffer[:rows] = array
        index, size = self._place(rows)
        self._runs[index](size)
        return tuple([buffer[:rows].copy() for buffer in self._outputs])

    def _place(self, rows: int) -> tuple[int, int]:
        return next((index, size) for index, size in enumerate(self._sizes) if size >= rows)

    def _copied(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], size: int, options: Any
    ) -> Callable[[int], None]:
        binding = self._session.io_binding()
        for spec, buffer in zip(inputs, self._inputs, strict=True):
            binding.bind_input(spec.name, "cpu", 0, buffer.dtype.type, (size, *spec.shape[1:]), buffer.ctypes.data)
        for spec, buffer in zip(outputs, self._outputs, strict=True):
            shape = (size, *spec.shape[1:])
            binding.bind_output(spec.name, "cpu", 0, buffer.dtype.type, shape, buffer.ctypes.data)

        def run(_: int) -> None:
            self._session.run_with_iobinding(binding, options)

        return run

    def _recorded(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], size: int, options: Any, device: str
    ) -> Callable[[int], None]:
        binding, make = self._session.io_binding(), runtime.load().OrtValue.ortvalue_from_shape_and_type
        options.add_run_config_entry(GRAPH_ID, str(size))

        def bound(specs: Sequence[TensorSpec], buffers: Sequence[Array], bind: Callable[[str, Any], None]) -> list[Any]:
            values = []
            for spec, buffer in zip(specs, buffers, strict=True):
                value = make((size, *spec.shape[1:]), buffer.dtype.type, device, 0)
                bind(spec.name, value)
                values.append(value)
            return values

        taken = bound(inputs, self._inputs, binding.bind_ortvalue_input)
        given = bound(outputs, self._outputs, binding.bind_ortvalue_output)

        def run(size: int) -> None:
            for value, buffer in zip(taken, self._inputs, strict=True):
                value.update_inplace(buffer[:size])
            self._session.run_with_iobinding(binding, options)
            for value, buffer in zip(given, self._outputs, strict=True):
                buffer[:size] = value.numpy()

        return run


def _buffer(spec: TensorSpec, rows: int, allocate: Allocate) -> Array:
    shape = (rows, *spec.shape[1:])
    size = int(np.prod(shape, dtype=np.int64)) * spec.dtype.itemsize
    return allocate(size)[:size].view(spec.dtype).reshape(shape)
