"""KServe's contract, kept by a real service that is started with the rendered arguments of its ServingRuntime."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.app.watching import free_port
from tests.bundles import make_bundle, plain_image
from tests.deploy.kustomize import BY_KSERVE, one, render

NAME = "pets-2"


@contextmanager
def started(mounted: Path) -> Iterator[httpx.Client]:
    """Run what the ServingRuntime runs, on other ports and another directory, as KServe would for `NAME`."""
    [container] = one(render(BY_KSERVE), "ServingRuntime")["spec"]["containers"]
    port, probe_port = free_port(), free_port()
    replaced = {
        "{{.Name}}": NAME,
        "0.0.0.0": "127.0.0.1",
        "=8080": f"={port}",
        "=8081": f"={probe_port}",
        "/mnt/models": f"{mounted}",
    }
    arguments = []
    for argument in container["args"]:
        for what, by in replaced.items():
            argument = argument.replace(what, by)
        arguments.append(argument)
    with (
        subprocess.Popen([sys.executable, "-m", "app.cli", *arguments], stderr=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        try:
            while not is_ready(client, f"http://127.0.0.1:{probe_port}/readyz"):
                assert process.poll() is None
                time.sleep(0.02)
            yield client
        finally:
            process.terminate()
            assert process.wait(15) == 0


def is_ready(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.ConnectError:
        return False


@pytest.mark.parametrize("layout", ["version", "versions"])
def test_one_model_lies_where_kserve_puts_it_and_is_called_as_kserve_says(tmp_path, layout):
    bundle = make_bundle(tmp_path / "made", "colours", "3").directory
    mounted = tmp_path / "mnt" / "models"
    shutil.copytree(bundle if layout == "version" else bundle.parent, mounted)
    with started(mounted) as client:
        assert client.get("/v2").json()["name"]
        assert client.get("/v2/health/live").json() == {"live": True}
        assert client.get("/v2/health/ready").json() == {"ready": True}
        assert client.get(f"/v2/models/{NAME}/ready").json() == {"name": NAME, "ready": True}
        described = client.get(f"/v2/models/{NAME}").json()
        assert (described["name"], described["versions"]) == (NAME, ["3"])
        [tensor] = described["inputs"]
        pixels = {"name": tensor["name"], "datatype": "UINT8", "shape": [1, 16, 16, 3], "data": [0] * 768}
        answer = client.post(f"/v2/models/{NAME}/infer", json={"inputs": [pixels]}).json()
        assert (answer["model_name"], answer["model_version"]) == (NAME, "3")
        assert client.get(f"/v1/models/{NAME}").status_code == 200
        named = client.post(f"/models/{NAME}/predict", content=plain_image("red")).json()
        assert named["results"][0]["top"][0]["label"] == "red"
        assert client.get("/v2/models/colours").status_code == 404
        assert f'model="{NAME}"' in client.get("/metrics").text
