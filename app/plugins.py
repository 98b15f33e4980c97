"""Plug-in providers: libraries that ONNX Runtime loads beside its own, for devices that it does not know by itself.

Owns finding such a library, registering it and choosing among its devices. Knows nothing of bundles, batches or
requests; `sessions.py` alone asks. Settings alone name a library, never a model or a request, for it is
code that runs here. https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

from app import runtime
from app.errors import SettingsError

Hardware = Literal["any", "cpu", "gpu", "npu"]
SUFFIX = "ExecutionProvider"


@dataclass(frozen=True, slots=True)
class Plugin:
    """A provider that is loaded as a library, in place of a device that ONNX Runtime knows.

    Attributes:
        library: a package that brings one (`onnxruntime_ep_webgpu`), or the path of the library.
        hardware: on which kind of its devices; the first that it finds.
        options: the provider's own, by name.
    """

    library: str
    hardware: Hardware = "any"
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, library: str, hardware: Hardware, options: str) -> "Plugin":
        """Return the plug-in that settings describe; `options` as in `precision=FP16,num_of_threads=1`.

        Raises:
            SettingsError: there is no library, or the options are not of that form.
        """
        if not library:
            raise SettingsError(
                "device is plugin: say by plugin which, a package such as onnxruntime_ep_webgpu or a library's path."
            )
        found = []
        for part in filter(None, (part.strip() for part in options.split(","))):
            name, equals, value = part.partition("=")
            if not (name and equals):
                raise SettingsError(f"plugin_options has '{part}': write name=value, as in num_of_threads=1.")
            found.append((name.strip(), value.strip()))
        return cls(library, hardware, tuple(found))


def name_of(provider: str) -> str:
    """Return what a provider is called in answers and metrics: `WebGpuExecutionProvider` → `webgpu`."""
    return provider.removesuffix(SUFFIX).lower()


def device_of(plugin: Plugin) -> Any:
    """Return ONNX Runtime's device that a plug-in runs on, whose `ep_name` is the provider's; loads the library first.

    Raises:
        SettingsError: the library is not there, is none of this kind, or finds no such device on this machine.
    """
    path = _path_of(plugin.library)
    names = _register(path)
    devices = [device for device in runtime.load().get_ep_devices() if device.ep_name in names]
    kinds = [device.device.type.name.lower() for device in devices]
    for device, kind in zip(devices, kinds, strict=True):
        if plugin.hardware in ("any", kind):
            return device
    found = f"only {', '.join(kinds)}" if kinds else "none"
    raise SettingsError(
        f"plugin: {plugin.library} finds no device that it can run on here"
        f"{'' if plugin.hardware == 'any' else f' of the kind {plugin.hardware}'} ({found})."
    )


def _path_of(library: str) -> str:
    if "/" in library or Path(library).suffix == ".so":
        if not Path(library).is_file():
            raise SettingsError(f"plugin: there is no file {library}.")
        return str(Path(library).resolve())
    if not library.isidentifier() or importlib.util.find_spec(library) is None:
        raise SettingsError(f"plugin: the package {library} is not installed here.")
    try:
        return cast(str, import_module(library).get_library_path())
    except Exception as error:
        raise SettingsError(f"plugin: the package {library} brings no library of a provider: {error}.") from error


@cache
def _register(path: str) -> frozenset[str]:
    """Have ONNX Runtime load a library, once in a process; returns its providers' names, of those that find devices."""
    ort = runtime.load()
    before = {device.ep_name for device in ort.get_ep_devices()}
    try:
        ort.register_execution_provider_library(f"convoy:{path}", path)
    except Exception as error:  # ONNX Runtime raises a dozen unrelated classes, some straight from pybind11
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SettingsError(f"plugin: {path} is no library of a provider: {reason}") from error
    return frozenset({device.ep_name for device in ort.get_ep_devices()} - before)
