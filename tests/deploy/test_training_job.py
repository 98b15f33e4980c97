"""The training Job: its pods find each other. `run_training_job.py` runs its command."""

from tests.deploy.kustomize import ON_CPU, one, render

TRAINED = (*ON_CPU, "training")


def test_pods_find_each_other_by_the_names_that_the_service_gives():
    manifests = render(TRAINED)
    job, service = one(manifests, "Job"), one(manifests, "Service", "convoy-training")
    spec, name = job["spec"], job["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    flags = dict(part.split("=", 1) for part in pod["containers"][0]["args"] if "=" in part)
    [port] = service["spec"]["ports"]
    assert flags["--rdzv-endpoint"] == f"{name}-0.{pod['subdomain']}:{port['port']}"
    assert {spec["completions"], spec["parallelism"], int(flags["--nnodes"])} == {2}


def test_a_pod_that_is_lost_is_replaced_by_one_that_goes_on():
    spec = one(render(TRAINED), "Job")["spec"]
    [container] = spec["template"]["spec"]["containers"]
    assert "--resume-or-begin" in container["args"], "torchrun in a new pod knows of no start before"
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert spec["maxFailedIndexes"] == 0, "the others would wait for a node that does not come again"
