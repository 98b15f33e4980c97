"""Manifests as `kubectl apply -k` would send them: overlays of k8s/ with components upon them."""

import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = tuple(sorted(path.name for path in (K8S / "overlays").iterdir()))
COMPONENTS = tuple(sorted(path.name for path in (K8S / "components").iterdir()))

ON_CPU, ON_GPU, ON_TENSORRT, BY_KSERVE = ("cpu",), ("gpu",), ("gpu-tensorrt",), ("kserve",)
VARIANTS: tuple[tuple[str, ...], ...] = (
    *((overlay,) for overlay in OVERLAYS),
    *(("gpu" if component == "dra" else "cpu", component) for component in COMPONENTS),
    (*ON_TENSORRT, "dra"),
    # All that go together, as in docs/operations.md.
    ("gpu", "monitoring", "autoscaling-keda", "gateway", "dra", "model-fetch", "tracing", "training"),
)
"""An overlay, and the components upon it."""

Manifest = dict[str, Any]


def kubectl() -> str:
    """Return the program: what the virtual environment has before what the machine has."""
    found = shutil.which("kubectl", path=sysconfig.get_path("scripts")) or shutil.which("kubectl")
    if found is None:
        pytest.skip("kubectl is not installed (`make kubectl`), so nothing can be rendered")
    return found


def kustomize(directory: Path) -> list[Manifest]:
    """Render one kustomization."""
    built = subprocess.run([kubectl(), "kustomize", directory], capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr[-2000:]
    assert "deprecated" not in built.stderr, built.stderr
    return list(yaml.load_all(built.stdout, yaml.CSafeLoader))


@functools.cache
def _rendered(variant: tuple[str, ...]) -> str:
    overlay, *components = variant
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch).resolve()
        k8s = os.path.relpath(K8S.resolve(), directory)
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [f"{k8s}/overlays/{overlay}"],
            "components": [f"{k8s}/components/{component}" for component in components],
        }
        (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return yaml.safe_dump_all(kustomize(directory))


def render(variant: tuple[str, ...]) -> list[Manifest]:
    """Return a variant's manifests, which are the caller's own."""
    return list(yaml.load_all(_rendered(variant), yaml.CSafeLoader))


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """Return the one of that kind, and of that name where there are several."""
    [found] = [each for each in manifests if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    return found


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return every pod spec in manifests, by whose it is; a ServingRuntime's is one but for what KServe adds."""
    found = {}
    for manifest in manifests:
        owner = f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["kind"] in ("Deployment", "Job"):
            found[owner] = manifest["spec"]["template"]["spec"]
        elif manifest["kind"] == "ServingRuntime":
            found[owner] = {key: manifest["spec"][key] for key in ("containers", "volumes")}
    return found
