"""The compose file: on loopback only, hardened, and every file it mounts is there."""

import re
import subprocess
import sys

import pytest

from app.settings import Settings
from tests.deploy.kustomize import ON_CPU, pods, render

SERVICES = ("convoy", "convoy-gpu", "prometheus", "grafana")
OURS = ("convoy", "convoy-gpu")


def _seconds(duration: str) -> int:
    assert duration.endswith("s")
    return int(duration.removesuffix("s"))


def test_follows_the_compose_specification(root):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run(
        [*command, root / "docker-compose.yml"], capture_output=True, text=True, timeout=120, cwd=root
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_services(compose):
    assert tuple(compose["services"]) == SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_published_on_loopback_only(compose, name):
    ports = compose["services"][name]["ports"]
    assert ports
    assert [port for port in ports if not str(port).startswith("127.0.0.1:")] == []


def test_no_two_services_publish_the_same_port(compose):
    ports = [port.split(":")[1] for service in compose["services"].values() for port in service["ports"]]
    assert len(ports) == len(set(ports))


@pytest.mark.parametrize("name", SERVICES)
def test_hardened(compose, name):
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert all("size=" in mount for mount in service["tmpfs"])
    assert service["healthcheck"]["test"][0] == "CMD"


def test_sessions_are_planned_for_what_their_memory_is_bounded_for(compose):
    service = compose["services"]["convoy"]
    cpus, memory = (re.fullmatch(r"\$\{\w+:-(\d+)g?\}", service[key]).group(1) for key in ("cpus", "mem_limit"))
    [pod] = pods(render(ON_CPU)).values()
    limits = pod["containers"][0]["resources"]["limits"]
    assert (cpus, f"{memory}Gi") == (limits["cpu"], limits["memory"]), "as in a cluster"


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_other_peoples_images_are_pinned(compose, name):
    _, tag = compose["services"][name]["image"].split(":")
    assert tag.count(".") == 2


@pytest.mark.parametrize("name", SERVICES)
def test_mounted_files_exist_and_cannot_be_written(compose, root, name):
    for volume in compose["services"][name].get("volumes", ()):
        source, target, *mode = volume.split(":")
        if source.startswith("./"):
            assert (root / source).exists(), source
            assert mode == ["ro"], target
        else:
            assert source in compose["volumes"]


@pytest.mark.parametrize("name", OURS)
def test_settings_are_ones_the_service_takes(compose, name):
    environment = compose["services"][name]["environment"]
    settings = Settings.from_sources(environment)
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    assert _seconds(compose["services"][name]["stop_grace_period"]) >= settings.drain_timeout_s + 5


@pytest.mark.parametrize(("name", "target"), [("convoy", "cpu"), ("convoy-gpu", "gpu")])
def test_builds_the_target_it_is_named_after(compose, dockerfile, name, target):
    service = compose["services"][name]
    assert service["build"] == {"context": ".", "target": target}
    assert target in {line.stage for line in dockerfile}
    assert service["ports"][0].endswith(":" + dockerfile.find("EXPOSE")[0])


def test_prometheus_has_the_rules(compose, prometheus_config, root):
    assert prometheus_config["rule_files"] == ["rules/*.yml"]
    assert "./deploy/prometheus/rules:/etc/prometheus/rules:ro" in compose["services"]["prometheus"]["volumes"]
    assert list((root / "deploy/prometheus/rules").glob("*.yml"))


def test_gpu_is_asked_for_under_its_profile_only(compose):
    services = compose["services"]
    assert [name for name in SERVICES if services[name].get("profiles")] == ["convoy-gpu"]
    assert [name for name in SERVICES if "deploy" in services[name]] == ["convoy-gpu"]
    [device] = services["convoy-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert services["convoy-gpu"]["environment"]["CONVOY_DEVICE"] == "cuda"


def test_nothing_started_by_default_waits_for_the_gpu(compose):
    waits = {other for service in compose["services"].values() for other in service.get("depends_on", ())}
    assert waits == {"prometheus"}


def test_grafana_has_no_account_to_break_into(compose):
    environment = compose["services"]["grafana"]["environment"]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert not [name for name in environment if "PASSWORD" in name]
