"""Binding: a graph's runs over buffers that stay where they are, in batches of a few sizes.

A GPU copies from memory that it knows without the processor, chooses kernels for each size of a batch, and replays
recorded launches only at the same addresses. So rows are written into one buffer per input, filled up to the next size.
Works on any provider. Knows ONNX Runtime's sessions; nothing of models, batchers or CUDA.

ONNX Runtime's own binding is used where launches are recorded, and only there: it copies an input to the device when
that is bound, not when the graph runs, so that a buffer which is bound once is read once (seen with a provider whose
device was no processor; the processor's provider hides it). Rows that a run is given as an array it copies itself. That
it does so on CUDA's stream and without Python's lock is read, and not measured.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
            recorded: a device (`cuda`), on which tensors lie at fixed addresses, for recordings; else empty: each run
                copies rows to the device and scores back.
        """
        self._session = session
        self._copied_s = 0.0
        self._sizes = tuple(sizes)
        self._inputs = [_buffer(spec, self._sizes[-1], allocate) for spec in inputs]
        self._input_names = [spec.name for spec in inputs]
        self._output_names = [spec.name for spec in outputs]
        self._options = run_options()
        self._recordings = {
            size: self._recorded(inputs, outputs, size, run_options(), recorded)
            for size in (self._sizes if recorded else ())
        }

    def copied_s(self) -> float:
        """Return the time that went into copying since this was last asked, seconds.

        Of rows into the buffers, and of scores out of them; where launches are recorded, also to the device and back,
        which otherwise the provider does as part of the run.
        """
        seconds, self._copied_s = self._copied_s, 0.0
        return seconds

    def padding(self, rows: int) -> int:
        """Return how many rows a batch of so many is filled up with."""
        rest = rows % self._sizes[-1]
        return self._size_for(rest) - rest if rest else 0

    def join(self, parts: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        """Write the rows of several requests one after the other, where `run` wants them; at most the largest size."""
        rows = sum(len(part[0]) for part in parts)
        joined = tuple([buffer[:rows] for buffer in self._inputs])
        with self._copying():
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
        with self._copying():
            for buffer, array in zip(self._inputs, inputs, strict=True):
                if array.ctypes.data != buffer.ctypes.data:  # else `join` has written it here
                    buffer[:rows] = array
        size = self._size_for(rows)
        try:
            found = self._recordings[size]() if self._recordings else self._plain(size)
        except Exception:
            # Rows that no kernel takes would else go on to be what later, smaller batches are filled up with.
            for buffer in self._inputs:
                buffer[:] = 0
            raise
        return tuple([array[:rows] for array in found])

    def _plain(self, size: int) -> list[Array]:
        fed = {name: buffer[:size] for name, buffer in zip(self._input_names, self._inputs, strict=True)}
        outputs: list[Array] = self._session.run(self._output_names, fed, self._options)
        return outputs

    @contextmanager
    def _copying(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._copied_s += time.perf_counter() - started

    def _size_for(self, rows: int) -> int:
        return next(size for size in self._sizes if size >= rows)

    def _recorded(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], size: int, options: Any, device: str
    ) -> Callable[[], list[Array]]:
        binding, make = self._session.io_binding(), runtime.load().OrtValue.ortvalue_from_shape_and_type
        options.add_run_config_entry(GRAPH_ID, str(size))

        def bound(specs: Sequence[TensorSpec], bind: Callable[[str, Any], None]) -> list[Any]:
            values = []
            for spec in specs:
                value = make((size, *spec.shape[1:]), spec.dtype.type, device, 0)
                bind(spec.name, value)
                values.append(value)
            return values

        taken = bound(inputs, binding.bind_ortvalue_input)
        given = bound(outputs, binding.bind_ortvalue_output)

        def run() -> list[Array]:
            with self._copying():
                for value, buffer in zip(taken, self._inputs, strict=True):
                    value.update_inplace(buffer[:size])
            self._session.run_with_iobinding(binding, options)
            with self._copying():
                return [value.numpy().copy() for value in given]

        return run


def _buffer(spec: TensorSpec, rows: int, allocate: Allocate) -> Array:
    shape = (rows, *spec.shape[1:])
    size = int(np.prod(shape, dtype=np.int64)) * spec.dtype.itemsize
    return allocate(size)[:size].view(spec.dtype).reshape(shape)
