"""Several workers on one port: balance, sums, deaths, reload, stop. Real processes, watched from outside."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from app.cpus import usable_cpus
from app.pages import Page, private_page
from app.probes import readiness
from app.settings import Settings
from app.workers import HANGS_S, TICK_S, Worker, share_of
from tests.bundles import make_bundle, plain_image
from tests.servers import ConvoyProcess, convoy

RED = plain_image("red")


@pytest.fixture(scope="module")
def pair(models: Path, tmp_path_factory) -> Iterator[ConvoyProcess]:
    """Two workers and a port for probes, for tests that leave them as they are."""
    log = tmp_path_factory.mktemp("pair") / "log"
    with convoy(models, log, default_model="colours", workers=2, probe_port=free_port()) as server:
        yield server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def probe_url(server: ConvoyProcess) -> str:
    environment = Path(f"/proc/{server.process.pid}/environ").read_bytes().split(b"\0")
    [port] = [text.partition(b"=")[2] for text in environment if text.startswith(b"CONVOY_PROBE_PORT=")]
    return f"http://127.0.0.1:{port.decode()}"


def worker_pids(server: ConvoyProcess) -> dict[int, int]:
    """Return the process id of each running worker."""
    started = {line["worker"]: line["pid"] for line in server.lines() if line["message"] == "worker started"}
    return {number: pid for number, pid in started.items() if is_running(pid)}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.02)


def messages(server: ConvoyProcess, message: str) -> list[dict]:
    return [line for line in server.lines() if line["message"] == message]


def logged_with(server: ConvoyProcess, request_id: str) -> list[dict]:
    return [line for line in server.lines() if line.get("request_id") == request_id]


def all_ready(server: ConvoyProcess, count: int = 2) -> bool:
    try:
        workers = httpx.get(f"{server.url}/readyz", timeout=5).json()["workers"]
    except httpx.TransportError:
        return False
    return list(workers.values()) == ["ready"] * count


@contextmanager
def load(url: str, clients: int = 4) -> Iterator[list[object]]:
    """Send requests on keep-alive connections for as long as the `with` block runs; yields the outcomes so far."""
    outcomes: list[object] = []
    stop = threading.Event()

    def send() -> None:
        with httpx.Client(base_url=url, timeout=20) as client:
            while not stop.is_set():
                try:
                    outcomes.append(client.post("/predict", content=RED).status_code)
                except httpx.TransportError as error:
                    outcomes.append(error)

    threads = [threading.Thread(target=send) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_connections_opened_at_once_are_spread_evenly(pair):
    address = (pair.client.base_url.host, pair.client.base_url.port)
    pair.client.close()
    connections = [socket.socket() for _ in range(32)]
    for connection in connections:
        connection.setblocking(False)
        connection.connect_ex(address)
    for number, connection in enumerate(connections):
        connection.settimeout(10)
        connection.sendall(b"GET /models?spread=%d HTTP/1.1\r\nHost: x\r\nX-Request-Id: spread\r\n\r\n" % number)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    wait_for(lambda: len(logged_with(pair, "spread")) == 32)
    for connection in connections:
        connection.close()
    pair.client = httpx.Client(base_url=pair.url, timeout=30)
    by_worker = Counter(line["worker"] for line in logged_with(pair, "spread"))
    assert sorted(by_worker) == [1, 2]
    assert max(by_worker.values()) <= 18, by_worker


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


def test_a_killed_worker_is_replaced_and_no_counter_falls(models, tmp_path):
    settings = {"default_model": "colours", "workers": 2, "probe_port": free_port(), "access_log": False}
    with convoy(models, tmp_path / "log", **settings) as server:
        url = probe_url(server)
        server.client.close()
        server.client = httpx.Client(base_url=url)
        scrapes: list[dict[str, float]] = []
        with load(server.url) as outcomes:
            for round_number in (1, 2):
                victim = max(worker_pids(server).values())
                scrapes.append(server.metrics())
                os.kill(victim, signal.SIGKILL)
                while len(messages(server, "worker started")) < 2 + round_number or not all_ready(server):
                    scrapes.append(server.metrics())
                    time.sleep(0.02)
            settled = len(outcomes)
            wait_for(lambda: len(outcomes) > settled + 50)
        scrapes.append(server.metrics())
        failures = [outcome for outcome in outcomes if outcome != 200]
        assert len(failures) <= 2 * 4, failures  # only what the killed ones were working on
        assert all(isinstance(failure, httpx.TransportError) for failure in failures), failures
        deaths = messages(server, "worker died")
        assert [death["cause"] for death in deaths] == ["signal SIGKILL"] * 2
        assert {death["replaced_in_s"] for death in deaths} <= {0.1, 0.2}
        for earlier, later in itertools.pairwise(scrapes):
            counters = [key for key in earlier if key.startswith("convoy_") and is_counter(key)]
            assert counters
            fallen = [key for key in counters if later[key] < earlier[key]]
            assert fallen == []
        answered = scrapes[-1]['convoy_requests_total{code="200",model="colours",route="/predict",version="1"}']
        assert answered >= outcomes.count(200)
        assert scrapes[-1]["convoy_inflight_images"] == 0
        assert server.stop() == 0


def is_counter(key: str) -> bool:
    return key.partition("{")[0].endswith(("_total", "_bucket", "_count", "_sum"))


def test_a_signal_lets_every_worker_finish_what_it_accepted(tmp_path):
    models = tmp_path / "models"
    make_bundle(models, "slow", slow=True)
    settings = {"workers": 2, "sessions": 1, "max_batch": 2, "probe_port": free_port()}
    with convoy(models, tmp_path / "log", **settings) as server, ThreadPoolExecutor(8) as pool:
        clients = [httpx.Client(base_url=server.url, timeout=30) for _ in range(8)]
        for client in clients:
            client.get("/livez")
        answers = [pool.submit(client.post, "/predict", content=RED) for client in clients]
        inside = 'convoy_inflight_requests{model="slow"}'
        done = 'convoy_images_total{model="slow",version="1"}'
        server.client.close()
        server.client = httpx.Client(base_url=probe_url(server))
        wait_for(lambda: (shown := server.metrics())[inside] + shown[done] >= 8)
        assert server.stop() == 0
        assert [future.result().status_code for future in answers] == [200] * 8
        assert sorted(line.get("worker", 0) for line in messages(server, "stopped")) == [0, 1, 2]
        assert not messages(server, "worker died")
        assert not worker_pids(server)
        for client in clients:
            client.close()


def test_requests_go_on_while_the_service_stops_and_none_is_lost(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours", workers=2, access_log=False) as server:
        url = server.url
        with load(url, clients=3) as outcomes:
            wait_for(lambda: len(outcomes) > 30)
            assert server.stop() == 0
        failures = [outcome for outcome in outcomes if outcome != 200]
        # Afterwards the port is closed; a request that was accepted is never cut off.
        assert {type(failure) for failure in failures} <= {httpx.ConnectError}, Counter(map(repr, failures))


def test_a_second_signal_cuts_off_what_still_runs(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours", workers=2) as server:
        address = (server.client.base_url.host, server.client.base_url.port)
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nonly this")
            wait_for(lambda: server.metrics()["convoy_inflight_bytes"] == 9)
            server.process.send_signal(signal.SIGINT)
            wait_for(lambda: len(messages(server, "stopped")) == 1)  # the worker that has nothing to do
            assert server.process.poll() is None
            assert server.stop(signal_number=signal.SIGINT) == 0
        assert not worker_pids(server)
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_reload_loses_no_request_and_reads_the_models_again(tmp_path):
    models = tmp_path / "models"
    make_bundle(models, "colours")
    with convoy(models, tmp_path / "log", workers=2, access_log=False) as server:
        before = worker_pids(server)
        make_bundle(models, "colours", "2")
        with load(server.url) as outcomes:
            wait_for(lambda: len(outcomes) > 30)
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda: messages(server, "reloaded"))
            settled = len(outcomes)
            wait_for(lambda: len(outcomes) > settled + 30)
        assert [outcome for outcome in outcomes if outcome != 200] == []
        after = worker_pids(server)
        assert len(after) == 2 and not set(after.values()) & set(before.values())
        assert httpx.post(f"{server.url}/predict", content=RED).json()["version"] == "2"
        answered = sum(
            value for key, value in server.metrics().items() if 'route="/predict"' in key and "_total" in key
        )
        assert answered >= len(outcomes)
        assert server.stop() == 0


def test_a_reload_that_fails_leaves_the_old_workers(tmp_path):
    models = tmp_path / "models"
    bundle = make_bundle(models, "colours")
    with convoy(models, tmp_path / "log", workers=2) as server:
        before = worker_pids(server)
        manifest = bundle.directory / "model.json"
        good = manifest.read_text()
        manifest.write_text(json.dumps({**json.loads(good), "labels": ["x"]}))
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: messages(server, "reload given up: the old workers stay"))
        [line] = messages(server, "reload given up: the old workers stay")
        assert "failed to load" in line["reason"]
        wait_for(lambda: worker_pids(server) == before)
        assert server.client.post("/predict", content=RED).status_code == 200
        manifest.write_text(good)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: messages(server, "reloaded"))


def test_with_one_worker_a_reload_is_refused_in_a_line(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours") as server:
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: [line for line in server.lines() if "--workers 2" in line["message"]])
        assert server.client.post("/predict", content=RED).status_code == 200
        assert server.stop() == 0


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


def test_workers_end_by_themselves_when_the_supervisor_is_killed(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours", workers=2) as server:
        pids = worker_pids(server).values()
        assert len(pids) == 2
        server.process.kill()
        wait_for(lambda: not any(map(is_running, pids)))
        assert len(messages(server, "the supervisor is gone: draining")) == 2
        assert sorted(line["worker"] for line in messages(server, "stopped")) == [1, 2]


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
        page.tell(page.state.READY, {})
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
    assert share.sessions == share.decode_threads == max(1, usable_cpus() // 3)
    assert share_of(settings, 64).max_inflight_images == 64
    assert share_of(Settings(sessions=5, decode_threads=7), 2).sessions == 5
    assert share_of(Settings(max_inflight_images=10), 4).max_inflight_images == 10


def writer(number: int, state: int, **note: object) -> Page:
    page = private_page()
    page.number = number
    page.tell(page.state.__class__(state), note)
    page.beat()
    return page


def test_one_ready_worker_makes_the_service_ready():
    loading = writer(1, 2, reason="Loading: a.", models={"a": "loading"})
    ready = writer(2, 3, reason="", models={"a": "ready"})
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
    page = writer(1, 3, reason="", models={"a": "ready"})
    page.slots[2] -= 100
    status, content = readiness([page, writer(2, 2, reason="Loading: a.")])
    assert status == 503
    assert content["workers"]["1"].startswith("Worker 1 has not answered for 1")
