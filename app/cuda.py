"""CUDA: what ONNX Runtime's provider is told, which batches a GPU runs, memory that it reads by itself, broken devices.

Owns the provider's options and the calls to CUDA's own library. Knows nothing of bundles, batches or requests;
`sessions.py` alone asks. Options: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
"""

import ctypes
import re
import weakref
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Search = Literal["exhaustive", "heuristic", "default"]

LIBRARY = "libcudart.so.13"
DRIVER = "libcuda.so.1"
"""The host's, that NVIDIA's toolkit mounts into containers."""
# What CUDA says when the context is gone: the process that has it can do nothing more on that device.
# https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html
_LOST = re.compile(
    r"CUDA(?: driver)? (?:failure|error)[ :]*(?:214|220|221|700|702|709|710|714|715|716|717|718|719|720|721|725)\b"
    r"|illegal memory access|uncorrectable ECC|unspecified launch failure|device-side assert|misaligned address"
    r"|illegal instruction|launch timed out|hardware stack error|(?:GPU|device) (?:is lost|has fallen off the bus)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Cuda:
    """How graphs run in the CUDA provider.

    Attributes:
        search: how cuDNN chooses a convolution's algorithm: by trying all of them for each batch size before the model
            is ready, by a rule, or always the same.
        nhwc: let convolutions run on channels-last tensors.
        tf32: let float32 products be rounded to 10 bits of mantissa, as tensor cores want them. Probabilities then
            differ by 0.0005 to 0.045 (`python -m benchmarks.tf32`, emulated), more than golden sets tolerate.
        graphs: record the launches of each batch size once, and replay them.
        memory_bytes: the arena of each session, at most; 0: all there is.
    """

    search: Search = "exhaustive"
    nhwc: bool = False
    tf32: bool = False
    graphs: bool = False
    memory_bytes: int = 0


def options(cuda: Cuda) -> dict[str, str]:
    """Return the provider's options."""
    found = {
        "cudnn_conv_algo_search": cuda.search.upper(),
        "prefer_nhwc": f"{cuda.nhwc:d}",
        "use_tf32": f"{cuda.tf32:d}",
        "enable_cuda_graph": f"{cuda.graphs:d}",
        # Doubling at each need, as it else does, takes memory that nobody uses and others on this GPU want.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if cuda.memory_bytes:
        found["gpu_mem_limit"] = f"{cuda.memory_bytes}"
    return found


def batch_sizes(rows: int) -> tuple[int, ...]:
    """Return the batches that a GPU runs: every power of two below `rows`, and that.

    Kernels are chosen, and launches recorded, for each of them before a model is ready; whatever comes is filled up to
    the next.
    """
    return (*(1 << power for power in range(rows.bit_length()) if 1 << power < rows), rows)


def missing_driver() -> str:
    """Return a sentence that says so where NVIDIA's driver is not found, else nothing.

    ONNX Runtime says it only in its log; its error tells of graph nodes and the processor.
    """
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return f"NVIDIA's driver ({DRIVER}) is not found here; a container gets it from the host, if it is given a GPU."
    return ""


def is_lost(reason: str) -> bool:
    """Tell by what a failed run said whether the device is gone for this process, for ever."""
    return _LOST.search(reason) is not None


def pinned(size: int) -> NDArray[np.uint8]:
    """Return memory that the GPU reads and writes by itself, uint8 `[size]`; ordinary memory where CUDA has none left.

    From ordinary memory the driver copies twice, and the processor waits for the first copy. It is given back when the
    last array over it is gone, so that models may be swapped for ever.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return np.zeros(size, np.uint8)
    address = ctypes.c_void_p()
    if library.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(max(1, size)), 1) or not address.value:
        return np.zeros(size, np.uint8)
    memory = (ctypes.c_uint8 * size).from_address(address.value)
    weakref.finalize(memory, library.cudaFreeHost, address).atexit = False  # the process's end gives back all there is
    found: NDArray[np.uint8] = np.ctypeslib.as_array(memory)
    found[:] = 0
    return found
