"""Versions below these have known holes that an image upload service would be hit by."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent

FLOORS = {
    "pillow": "12.3.0",  # bomb bypasses, out-of-bounds writes: CVE-2026-55379 and twelve more
    "python-multipart": "0.0.31",  # GHSA-v9pg-7xvm-68hf and its predecessors
    "starlette": "1.0.1",  # CVE-2026-48710, path poisoning by the Host header
    "h11": "0.16.0",  # CVE-2025-43859, chunked smuggling
    "onnx": "1.21.0",  # CVE-2026-27489, reading through symbolic links
    "onnxruntime": "1.29.0",  # out-of-bounds and path fixes of 1.25 to 1.29
    "protobuf": "6.33.5",  # CVE-2026-0994
    "torch": "2.10.0",  # CVE-2026-24747, torch.load(weights_only=True)
}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pairs}


@pytest.mark.parametrize(("package", "floor"), FLOORS.items())
def test_no_version_with_known_holes(package, floor):
    assert Version(metadata.version(package)) >= Version(floor)
    assert Version(pinned()[package]) >= Version(floor)


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in [*project["dependencies"], *(text for extra in extras for text in extra)]]


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_dependency_is_pinned_within_its_bounds(requirement):
    version = pinned().get(requirement.name.lower().replace("_", "-"))
    assert version is not None, f"{requirement.name} is not in constraints.txt"
    assert requirement.specifier.contains(version)


def test_the_development_environment_and_the_gpu_image_do_not_share_cuda_packages():
    """PyTorch pins CUDA packages of its own; a second opinion in constraints.txt makes it impossible to install."""
    assert [name for name in pinned() if name.startswith(("nvidia-", "cuda-", "triton"))] == ["nvidia-ml-py"]


def test_the_two_runtimes_have_one_version():
    assert pinned()["onnxruntime"] == pinned()["onnxruntime-gpu"]


def test_no_address_or_path_in_the_constraints():
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and "@" not in text and "file:" not in text
