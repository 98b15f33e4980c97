"""The device that training computes on, and the promise that it computes the same twice."""

import ctypes
import os
import platform

import torch

from training.errors import RecipeError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's `mallopt`, from <malloc.h>."""
NEVER = 2**31 - 1


def choose_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`.

    Raises:
        RecipeError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda: PyTorch finds no CUDA device here; use --device cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # Each of torchrun's processes has a GPU of its own.
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def deterministic() -> None:
    """Make operations repeat bit for bit; one that cannot on CUDA warns and is used all the same."""
    # cuBLAS reads this when it is first used, and repeats itself only with it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def keep_memory() -> None:
    """Let this process keep what it frees, for the next step of a training to use again.

    By itself glibc gives large blocks back to the kernel when they are freed, and the kernel clears each page that it
    hands out: the activations of every step anew. Does nothing where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, NEVER)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def describe(device: torch.device, processes: int = 1) -> str:
    """Say what the figures of a run were measured on."""
    several = f"{processes} processes on " if processes > 1 else ""
    if device.type == "cuda":
        return f"{several}{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{several}{torch.get_num_threads()} CPU cores ({platform.machine()}), torch {torch.__version__}"
