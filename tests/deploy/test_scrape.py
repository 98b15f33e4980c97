"""A real Prometheus scrapes a real, loaded service, and every query of the dashboard finds something in it."""

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.bundles import plain_image
from tests.deploy.test_monitoring import queries, without_grafana
from tests.servers import ConvoyProcess, convoy

NEEDS_PROMETHEUS = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus (Debian package of that name) is not installed"
)
pytestmark = NEEDS_PROMETHEUS

# Nothing is refused or dropped unless something goes wrong.
MAY_BE_EMPTY = "convoy_dropped_total"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConvoyProcess]:
    """A service under light load for as long as the tests of this module run."""
    stop = threading.Event()

    def load(server: ConvoyProcess) -> None:
        with httpx.Client(base_url=server.url) as client:
            while not stop.is_set():
                client.post("/predict", content=plain_image("red"))
                client.post("/models/other/predict", content=b"not an image")
                stop.wait(0.02)

    log = tmp_path_factory.mktemp("scraped") / "log"
    with convoy(models, log, default_model="colours") as server:
        loader = threading.Thread(target=load, args=(server,))
        loader.start()
        yield server
        stop.set()
        loader.join()


@pytest.fixture(scope="module")
def prometheus(service: ConvoyProcess, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Prometheus with the shipped configuration, but for the target's address and a faster pace."""
    config = yaml.safe_load((root / "deploy/prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    address = service.url.removeprefix("http://")
    job = next(job for job in config["scrape_configs"] if job["job_name"] == "convoy")
    job.update(static_configs=[{"targets": [address]}], dns_sd_configs=[])
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "rules").mkdir()
    for path in (root / "deploy/prometheus/rules").glob("*.yml"):
        rules = yaml.safe_load(path.read_text())
        for group in rules["groups"]:
            group.pop("interval", None)
        (folder / "rules" / path.name).write_text(yaml.safe_dump(rules))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                wait_until(lambda: is_ready(client))
                # Rates need two scrapes, a second apart.
                wait_until(lambda: value(client, 'sum(count_over_time(up{job="convoy"}[1m]))') >= 4)
                yield client
        finally:
            process.send_signal(signal.SIGTERM)


def result(client: httpx.Client, query: str) -> list[dict]:
    answer = client.get("/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", (query, answer)
    found: list[dict] = answer["data"]["result"]
    return found


def value(client: httpx.Client, query: str) -> float:
    found = result(client, query)
    return float(found[0]["value"][1]) if found else 0.0


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.2)


def test_the_service_is_a_healthy_target(prometheus: httpx.Client):
    assert value(prometheus, 'up{job="convoy"}') == 1


def test_counters_are_what_the_service_says(prometheus: httpx.Client, service: ConvoyProcess):
    key = 'convoy_requests_total{code="200",model="colours",route="/predict",version="1"}'
    before = service.metrics()[key]
    wait_until(lambda: value(prometheus, key) >= before)
    assert value(prometheus, key) <= service.metrics()[key]


def test_every_query_of_the_dashboard_returns_data(prometheus: httpx.Client, root: Path):
    dashboard = json.loads((root / "deploy/grafana/dashboards/convoy.json").read_text())
    everything = [without_grafana(query) for query in queries(dashboard)]
    assert len(everything) > 10

    def empty() -> list[str]:
        return [query for query in everything if MAY_BE_EMPTY not in query and not result(prometheus, query)]

    try:
        wait_until(lambda: not empty(), timeout_s=20)
    except AssertionError:
        assert empty() == []
