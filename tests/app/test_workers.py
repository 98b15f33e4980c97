"""Several workers on one port: balance, sums, probes, shares, faults. Real processes, watched from outside."""

import os
import resource
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app import pages
from app.cpus import share_of_cpus
from app.pages import Page, WriterState, private_page
from app.probes import readiness
from app.settings import Settings
from app.workers import HANGS_S, TICK_S, Worker, share_of
from tests.app.watching import free_port, logged_with, messages, probe_url, wait_for, worker_pids
from tests.bundles import plain_image
from tests.servers import ConvoyProcess, alone, convoy

RED = plain_image("red")


@pytest.fixture(scope="module")
def pair(models: Path, tmp_path_factory) -> Iterator[ConvoyProcess]:
    """Two workers and a port for probes, for tests that leave them as they are."""
    log = tmp_path_factory.mktemp("pair") / "log"
    with convoy(models, log, default_model="colours", workers=2, probe_port=free_port()) as server:
        yield server


def test_connections_opened_at_once_are_spread_evenly(pair):
    # Where processors are scarce a worker may sleep through its turns: five bursts, of which the best counts.
    # tests/app/test_accept.py holds every burst to it.
    pair.client.close()
    bursts = [burst(pair, f"burst-{number}") for number in range(5)]
    pair.client = httpx.Client(base_url=pair.url, timeout=30)
    assert all(sorted(by_worker) == [1, 2] for by_worker in bursts)
    assert min(max(by_worker.values()) for by_worker in bursts) <= 18, bursts


def burst(server: ConvoyProcess, name: str) -> Counter[int]:
    """Open 32 connections at once and return how many each worker got."""
    connections = [socket.socket() for _ in range(32)]
    for connection in connections:
        connection.setblocking(False)
        connection.connect_ex((server.client.base_url.host, server.client.base_url.port))
    for connection in connections:
        connection.settimeout(10)
        connection.sendall(b"GET /models HTTP/1.1\r\nHost: x\r\nX-Request-Id: %s\r\n\r\n" % name.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    wait_for(lambda: len(logged_with(server, name)) == 32)
    for connection in connections:
        connection.close()
    return Counter(line["worker"] for line in logged_with(server, name))


@alone
def test_each_worker_plans_for_its_share_of_the_processors(pair):
    wait_for(lambda: len(messages(pair, "ready")) == 2)
    share = share_of_cpus(2)
    assert [line["cpus"] for line in messages(pair, "ready")] == [share, share]
    pair.client.post("/models/other/predict", content=RED)
    sessions = [name for name in pair.metrics() if name.startswith("convoy_session_busy") and '"other"' in name]
    assert len(sessions) == share


def test_counters_are_summed_over_the_workers(pair):
    key = 'convoy_requests_total{code="200",model="other",route="/models/{model}/predict",version="1"}'
    before = pair.metrics().get(key, 0)
    clients = [httpx.Client(base_url=pair.url, headers={"X-Request-Id": "summed"}) for _ in range(8)]
    for client in clients:
        assert client.post("/models/other/predict", content=RED).status_code == 200
    for source in (pair.url, probe_url(pair), pair.url, pair.url):
        text = httpx.get(f"{source}/metrics").text
        [line] = [line for line in text.splitlines() if line.startswith(key)]
        assert float(line.rsplit(" ", 1)[1]) == before + 8
    for client in clients:
        client.close()
    wait_for(lambda: len(logged_with(pair, "summed")) == 8)
    assert {line["worker"] for line in logged_with(pair, "summed")} == {1, 2}
    info = {key: value for key, value in pair.metrics().items() if key.startswith("convoy_model_info")}
    assert set(info.values()) == {1}


def test_the_probe_port_has_the_three_routes_and_no_others(pair):
    url = probe_url(pair)
    assert httpx.get(f"{url}/livez").json() == {"live": True}
    assert httpx.get(f"{url}/readyz").json() == pair.client.get("/readyz").json()
    assert httpx.get(f"{url}/metrics").headers["content-type"] == pair.client.get("/metrics").headers["content-type"]
    assert httpx.head(f"{url}/readyz").status_code == 200
    assert httpx.post(f"{url}/predict", content=RED).json()["code"] == "not_found"
    assert httpx.post(f"{url}/livez").status_code == 405


def test_the_probe_port_keeps_no_head_that_does_not_end(pair):
    host, port = probe_url(pair).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: here\r\nX-Long: " + b"x" * 17_000)
        assert connection.recv(64).startswith(b"HTTP/1.1 400")


def test_connections_wait_while_there_are_no_descriptors(pair):
    pids = worker_pids(pair).values()
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids}
    address = (pair.client.base_url.host, pair.client.base_url.port)
    try:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (32, limits[pid][1]))
        connections = [socket.create_connection(address) for _ in range(80)]
        wait_for(lambda: {line["worker"] for line in messages(pair, "cannot accept connections")} == {1, 2})
        for connection in connections:
            connection.close()
    finally:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits[pid])
    assert httpx.get(f"{pair.url}/livez", timeout=10).status_code == 200


def test_convoy_health_asks_the_probe_port(pair):
    command = [sys.executable, "-m", "app.cli", "health", "--port", "1", "--probe-port", probe_url(pair).split(":")[2]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "ready\n")


def test_probes_are_answered_while_nobody_accepts(pair):
    url, pids = probe_url(pair), worker_pids(pair).values()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{pair.url}/livez", timeout=0.3)
        assert httpx.get(f"{url}/livez", timeout=5).status_code == 200
        assert httpx.get(f"{url}/readyz", timeout=5).json()["workers"].keys() == {"1", "2"}
        assert "convoy_requests_total{" in httpx.get(f"{url}/metrics", timeout=5).text
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert pair.client.get("/livez").status_code == 200


@alone
def test_one_worker_answers_probes_on_their_port_too(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours", probe_port=free_port()) as server:
        url = probe_url(server)
        assert httpx.get(f"{url}/readyz").json() == server.client.get("/readyz").json()
        assert "workers" not in httpx.get(f"{url}/readyz").json()
        assert httpx.get(f"{url}/metrics").text.count("# TYPE") == server.client.get("/metrics").text.count("# TYPE")
        assert server.stop() == 0


def test_a_probe_port_in_use_is_one_sentence(models):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for workers in (1, 2):
            result = serve(models, "--probe-port", port, "--workers", workers)
            assert result.returncode == 2
            assert f"Cannot listen on 127.0.0.1 port {port}: Address already in use" in result.stderr
            assert "; set --probe-port or CONVOY_PROBE_PORT" in result.stderr


def serve(models: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", "serve", "--models", models, "--port", 0, "--log-level", "error"]
    return subprocess.run([*map(str, command), *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--default-model", "nobody"), "There is no model 'nobody' to be the default; there are: colours, other."),
        (("--device", "cuda"), "device is cuda, but"),
    ],
)
def test_a_fault_of_the_settings_is_one_sentence_and_no_loop(models, arguments, sentence):
    result = serve(models, "--workers", 2, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"convoy: {sentence}")
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_nobody_elses(models, closed, tmp_path):
    port, probe_port = free_port(), free_port()
    command = f"exec {sys.executable} -m app.cli serve --workers 2 --engines 1 --default-model colours {closed}"
    environment = {
        **os.environ, "CONVOY_MODELS": str(models), "CONVOY_PORT": str(port), "CONVOY_PROBE_PORT": str(probe_port)
    }  # fmt: skip
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(["sh", "-c", command], env=environment, stdout=out, stderr=out)
    try:
        wait_for(lambda: process.poll() is not None or _is_ready(probe_port))
        assert process.poll() is None
        assert httpx.post(f"http://127.0.0.1:{port}/predict", content=RED).status_code == 200
    finally:
        process.terminate()
        assert process.wait(timeout=15) == 0


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False


@alone
def test_the_supervisor_loads_neither_runtime_nor_framework(pair):
    probe = "import sys, app.workers; print(sorted({'fastapi', 'onnxruntime', 'PIL'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "[]\n"
    assert "onnxruntime" not in Path(f"/proc/{pair.process.pid}/maps").read_text()
    assert "onnxruntime" in Path(f"/proc/{worker_pids(pair)[1]}/maps").read_text()


def test_a_worker_whose_loop_stands_still_is_seen():
    page = private_page()
    worker = Worker(page, [sys.executable, "-c", "import sys; sys.stdin.read()"], Settings(), [])
    ticks = int(HANGS_S / TICK_S)
    try:
        assert not any(worker.hangs() for _ in range(2 * ticks)), "it has not begun to serve"
        page.tell(WriterState.READY, {})
        page.beat()
        assert not any(worker.hangs() for _ in range(ticks))
        page.beat()
        assert not any(worker.hangs() for _ in range(ticks))
        assert any(worker.hangs() for _ in range(10))
    finally:
        worker.process.kill()
        worker.process.wait(10)
        assert worker.reap() and not worker.reap()
    assert page.pid == 0


def test_shares_add_up_to_the_whole_and_fit_the_largest_request():
    settings = Settings(max_inflight_images=1000, max_inflight_bytes=10**9, max_images_per_request=64)
    share = share_of(settings, 3)
    assert share.max_inflight_images == 334
    assert share.max_inflight_bytes == 333_333_334
    assert share_of(settings, 64).max_inflight_images == 64
    limited = Settings(model_limits="pets=5, imagenet=64", max_inflight_pixels=9)
    assert share_of(limited, 2).model_limits == "pets=3,imagenet=32"
    assert share_of(limited, 2).max_inflight_pixels == 5
    assert share_of(Settings(max_inflight_images=10), 4).max_inflight_images == 10


def writer(number: int, state: WriterState, **note: object) -> Page:
    page = private_page()
    page.number = number
    page.tell(state, note)
    page.beat()
    return page


def test_one_ready_worker_makes_the_service_ready():
    loading = writer(1, WriterState.LOADING, reason="Loading: a.", models={"a": "loading"})
    ready = writer(2, WriterState.READY, reason="", models={"a": "ready"})
    assert readiness([loading, ready]) == (
        200,
        {"ready": True, "reason": "", "models": {"a": "ready"}, "workers": {"1": "Loading: a.", "2": "ready"}},
    )
    ready.release()
    status, content = readiness([loading, ready])
    assert (status, content["reason"], content["workers"]) == (503, "Loading: a.", {"1": "Loading: a."})
    loading.release()
    assert readiness([loading, ready])[1]["reason"] == "No worker is running."


def test_a_worker_that_is_silent_is_not_ready():
    page = writer(1, WriterState.READY, reason="", models={"a": "ready"})
    page.slots[pages._HEARTBEAT] -= 100
    status, content = readiness([page, writer(2, WriterState.LOADING, reason="Loading: a.")])
    assert status == 503
    assert content["workers"]["1"].startswith("Worker 1 has not answered for 1")
