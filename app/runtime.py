"""The only door to ONNX Runtime.

Owns what must be true before the library is imported: its telemetry is off, and exactly one of its two wheels is
installed. Knows nothing of models or requests. Every other module asks here: `ort = runtime.load()`.
"""

import os
from functools import cache
from importlib import import_module, metadata
from types import ModuleType

from app.errors import RuntimeMissingError

WHEELS = ("onnxruntime", "onnxruntime-gpu")
WARNINGS_AND_WORSE = 2


def installed_wheels() -> dict[str, str]:
    """Return the ONNX Runtime distributions of this environment with their versions."""
    found = {}
    for name in WHEELS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def load() -> ModuleType:
    """Import ONNX Runtime with its telemetry off, and return the module.

    Since 1.29 the Linux wheels report process, session and model events unless `ORT_DISABLE_TELEMETRY` is set before
    the library initialises, so no other module may import it directly (tests/test_architecture.py).

    Raises:
        RuntimeMissingError: no ONNX Runtime wheel is installed, or both are (each overwrites the other's files).
    """
    check_wheels(installed_wheels())
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    onnxruntime.set_default_logger_severity(WARNINGS_AND_WORSE)
    module: ModuleType = onnxruntime
    return module


def tool(name: str) -> ModuleType:
    """Return one of the library's tools, such as `quantization`, which change graphs and need the extra `train`."""
    load()
    return import_module(f"onnxruntime.{name}")


def check_wheels(found: dict[str, str]) -> None:
    """Raise RuntimeMissingError unless exactly one ONNX Runtime wheel is among `found` (name → version)."""
    if not found:
        raise RuntimeMissingError(
            "ONNX Runtime is not installed: install convoy-serve[cpu], or convoy-serve[gpu] on a machine with CUDA."
        )
    if len(found) > 1:
        listed = " and ".join(f"{name} {version}" for name, version in found.items())
        raise RuntimeMissingError(
            f"Both {listed} are installed, and each overwrites the other's files: uninstall both, "
            "then install convoy-serve[cpu] or convoy-serve[gpu]."
        )
