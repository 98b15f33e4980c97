"""The manifests of k8s/base: valid, restricted, and their times add up.

No API server is here to judge them: schemas and the pod security rules below stand in for it.
"""

import copy
from typing import Any

import kubernetes_validate
import pytest

import app
from app.settings import Settings

KUBERNETES = "1.37"
VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"
}  # fmt: skip


def restricted_violations(pod: dict[str, Any]) -> list[str]:
    """Judge a pod spec by the Pod Security Standard "restricted", as of Kubernetes 1.35, for Linux.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/
    """
    found = [field for field in ("hostNetwork", "hostPID", "hostIPC") if pod.get(field)]
    context = pod.get("securityContext", {})
    if context.get("sysctls"):
        found.append("sysctls")
    for volume in pod.get("volumes", ()):
        if not set(volume) - {"name"} <= VOLUMES:
            found.append(f"volume {volume['name']}")
    kinds = ("initContainers", "containers", "ephemeralContainers")
    for container in (container for kind in kinds for container in pod.get(kind, ())):
        found += [f"{container['name']}: {reason}" for reason in _container_violations(container, context)]
    return found


def _container_violations(container: dict[str, Any], pod_context: dict[str, Any]) -> list[str]:
    own = container.get("securityContext", {})
    inherited = {**pod_context, **own}
    capabilities = own.get("capabilities", {})
    rules = {
        "privileged": not own.get("privileged"),
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "capabilities.drop": "ALL" in capabilities.get("drop", ()),
        "capabilities.add": set(capabilities.get("add", ())) <= {"NET_BIND_SERVICE"},
        "runAsNonRoot": inherited.get("runAsNonRoot") is True,
        "runAsUser": inherited.get("runAsUser") != 0,
        "seccompProfile": inherited.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
        "appArmorProfile": inherited.get("appArmorProfile", {}).get("type") != "Unconfined",
        "seLinuxOptions": not inherited.get("seLinuxOptions"),
        "procMount": own.get("procMount", "Default") == "Default",
        "hostPort": not any(port.get("hostPort") for port in container.get("ports", ())),
    }
    return [rule for rule, kept in rules.items() if not kept]


@pytest.fixture
def pod(resources: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = copy.deepcopy(resources["Deployment"]["spec"]["template"]["spec"])
    return spec


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    [only] = pod["containers"]
    return dict(only)


@pytest.fixture
def environment(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def test_resources(resources):
    assert set(resources) == {"Namespace", "ServiceAccount", "Deployment", "Service"}


@pytest.mark.parametrize("kind", ["Namespace", "ServiceAccount", "Deployment", "Service"])
def test_follows_the_schema(resources, kind):
    kubernetes_validate.validate(resources[kind], KUBERNETES, strict=True)


def test_everything_is_in_the_namespace_that_is_made(resources):
    made = resources["Namespace"]["metadata"]["name"]
    assert {resource["metadata"].get("namespace", made) for resource in resources.values()} == {made}


def test_namespace_enforces_what_the_pod_keeps(resources, pod):
    assert resources["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert restricted_violations(pod) == []


@pytest.mark.parametrize(
    ("where", "change", "expected"),
    [
        ("pod", {"hostNetwork": True}, "hostNetwork"),
        ("pod", {"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}, "volume host"),
        ("pod", {"securityContext": {}}, "convoy: runAsNonRoot"),
        ("container", {"securityContext": {}}, "convoy: allowPrivilegeEscalation"),
        ("container", {"ports": [{"containerPort": 8000, "hostPort": 8000}]}, "convoy: hostPort"),
        ("context", {"privileged": True}, "convoy: privileged"),
        ("context", {"capabilities": {"drop": ["ALL"], "add": ["SYS_PTRACE"]}}, "convoy: capabilities.add"),
        ("context", {"capabilities": {"drop": ["NET_RAW"]}}, "convoy: capabilities.drop"),
        ("context", {"runAsUser": 0}, "convoy: runAsUser"),
        ("context", {"seccompProfile": {"type": "Unconfined"}}, "convoy: seccompProfile"),
        ("context", {"procMount": "Unmasked"}, "convoy: procMount"),
    ],
)
def test_restricted_rules_see_a_violation(pod, where, change, expected):
    container = pod["containers"][0]
    {"pod": pod, "container": container, "context": container["securityContext"]}[where].update(change)
    assert expected in restricted_violations(pod)


def test_termination_leaves_time_to_drain(pod, container, environment):
    settings = Settings.from_sources(environment)
    wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert wait >= 5
    assert pod["terminationGracePeriodSeconds"] >= wait + settings.drain_timeout_s + 5


def test_probes_ask_the_right_question(container):
    paths = {probe: container[probe]["httpGet"]["path"] for probe in container if probe.endswith("Probe")}
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    assert {container[probe]["httpGet"]["port"] for probe in paths} == {"probes"}
    assert all(container[probe]["timeoutSeconds"] >= 2 for probe in paths)


def test_start_may_take_five_minutes(container):
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 300


def test_settings_are_ones_the_service_takes(container, environment, dockerfile):
    settings = Settings.from_sources(environment)
    assert settings.host == "0.0.0.0"
    assert container["ports"] == [
        {"name": "http", "containerPort": settings.port},
        {"name": "probes", "containerPort": settings.probe_port},
    ]
    assert f"{settings.models}" == dockerfile.environment("runtime")["CONVOY_MODELS"]
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"


def test_kubernetes_adds_no_settings_of_its_own(resources, pod):
    # Kubernetes derives variables from a Service's name, and ours begin with CONVOY_.
    assert resources["Service"]["metadata"]["name"] == "convoy"
    assert pod["enableServiceLinks"] is False


def test_prometheus_is_told_the_port_of_the_probes(resources, environment):
    annotations = resources["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": environment["CONVOY_PROBE_PORT"]}


def test_runs_as_the_images_user(pod, dockerfile):
    context = pod["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == dockerfile.find("USER")[0]


def test_root_is_read_only_and_scratch_space_is_bounded(pod, container):
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]
    [volume] = pod["volumes"]
    assert volume["emptyDir"]["sizeLimit"]
    assert "medium" not in volume["emptyDir"], "memory-backed scratch space counts against the memory limit"


def test_no_token_is_mounted(resources, pod):
    assert resources["ServiceAccount"]["automountServiceAccountToken"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == resources["ServiceAccount"]["metadata"]["name"]


def test_cpu_is_whole_and_guaranteed(container):
    resources = container["resources"]
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"]
    assert int(resources["limits"]["cpu"]) >= 1


def test_service_finds_the_pods(resources):
    service, template = resources["Service"]["spec"], resources["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert resources["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    [spread] = template["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= labels.items()
    assert service["ports"][0]["targetPort"] == template["spec"]["containers"][0]["ports"][0]["name"]


def test_image_is_this_version(container):
    assert container["image"] == f"convoy:{app.__version__}-cpu"
