"""Start, readiness, overload, deadlines, disconnects, stop: a real process, watched from outside."""

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.bundles import make_bundle, plain_image
from tests.servers import ConvoyProcess, convoy

RED = plain_image("red")


@pytest.fixture(scope="module")
def slow_models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("slow") / "models"
    make_bundle(root, "slow", slow=True)
    return root


def edit_manifest(directory: Path, change) -> None:
    path = directory / "model.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def alter_model(directory: Path) -> None:
    data = bytearray((directory / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "model.onnx").write_bytes(data)


def change_resize(directory: Path) -> None:
    edit_manifest(directory, lambda manifest: manifest["pixels"].update(resize_short_side=24))


def drop_label(directory: Path) -> None:
    edit_manifest(directory, lambda manifest: manifest["labels"].remove("green"))


def swap_labels(directory: Path) -> None:
    edit_manifest(directory, lambda manifest: manifest["labels"].reverse())


def truncate_golden(directory: Path) -> None:
    path = directory / "golden/noise.jpg"
    path.write_bytes(path.read_bytes()[:-100])


def no_manifest(directory: Path) -> None:
    (directory / "model.json").unlink()


def not_onnx(directory: Path) -> None:
    import hashlib

    data = b"this is not a protocol buffer"
    (directory / "model.onnx").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit_manifest(directory, lambda manifest: manifest["model"].update(sha256=digest, size_bytes=len(data)))


def no_version(directory: Path) -> None:
    for path in directory.iterdir():
        path.rename(directory.parent / path.name)
    directory.rmdir()


def another_name(directory: Path) -> None:
    edit_manifest(directory, lambda manifest: manifest.update(name="somebody-else"))


DAMAGE = {
    alter_model: r"model\.onnx is not the file that was exported",
    change_resize: r"does not reproduce its golden answers: golden/\w+\.\w+ differs by",
    drop_label: r"the manifest lists 5 labels, but the graph gives 6 classes",
    swap_labels: r"is now '\w+', but was '\w+' at export",
    truncate_golden: r"golden/noise\.jpg is not the file that was exported",
    no_manifest: r"model\.json is missing",
    not_onnx: r"is not a graph that ONNX Runtime can load",
    no_version: r"no-version holds no version that can be read: a bundle lies in \S+/no-version/1",
    another_name: r"holds the manifest of somebody-else version 1",
}


def test_every_kind_of_damage_keeps_that_model_out_and_the_others_serve(tmp_path):
    models = tmp_path / "models"
    make_bundle(models, "good")
    for damage in DAMAGE:
        name = damage.__name__.replace("_", "-")
        make_bundle(models, name)
        damage(models / name / "1")
    (models / "README.md").write_text("not a model")
    (models / ".hidden").mkdir()
    with convoy(models, tmp_path / "log", default_model="good") as server:
        states = server.client.get("/readyz").json()
        assert states["ready"] is True
        for damage, sentence in DAMAGE.items():
            name = damage.__name__.replace("_", "-")
            assert states["models"].pop(name) == "failed"
            detail = server.client.get(f"/models/{name}").json()
            assert_one_sentence(detail["reason"], sentence)
            refusal = server.client.post(f"/models/{name}/predict", content=RED)
            assert refusal.status_code == 503 and refusal.json()["code"] == "model_failed"
            assert detail["reason"] in refusal.json()["error"]
            assert [line for line in server.lines() if line.get("reason") == detail["reason"]], "not in the log"
            info = [key for key in server.metrics() if key.startswith("convoy_model_info") and f'"{name}"' in key]
            assert len(info) == 1 and 'state="failed"' in info[0]
        assert states["models"] == {"good": "ready"}
        assert server.client.post("/predict", content=RED).status_code == 200


def assert_one_sentence(text: str, pattern: str) -> None:
    import re

    assert re.search(pattern, text), text
    assert text.endswith(".") and "\n" not in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("settings", "ready"), [({}, True), ({"require_all_models": True}, False), ({"default_model": "bad"}, False)]
)
def test_readiness_follows_the_default_model_or_all(tmp_path, settings, ready):
    models = tmp_path / "models"
    make_bundle(models, "good")
    make_bundle(models, "bad")
    alter_model(models / "bad/1")
    with convoy(models, tmp_path / "log", **{"default_model": "good"} | settings) as server:
        response = server.client.get("/readyz")
        assert response.status_code == (200 if ready else 503)
        assert response.json()["ready"] is ready
        assert ready or "bad" in response.json()["reason"]
        assert server.client.get("/livez").json() == {"live": True}
        assert server.client.post("/models/good/predict", content=RED).status_code == 200


def test_a_default_model_that_is_not_there_is_a_refusal_to_start(models):
    result = run_cli("serve", "--models", models, "--port", 0, "--default-model", "colour")
    assert result.returncode == 2
    assert "There is no model 'colour' to be the default; there are: colours, other." in result.stderr


def test_without_a_default_model_others_are_served_by_name(models, tmp_path):
    with convoy(models, tmp_path / "log") as server:
        assert server.client.get("/readyz").status_code == 200
        refusal = server.client.post("/predict", content=RED)
        assert (refusal.status_code, refusal.json()["code"]) == (404, "unknown_model")
        assert "colours, other" in refusal.json()["error"]
        assert server.client.post("/models/other/predict", content=RED).status_code == 200


def test_folders_that_cannot_be_models_harm_nothing(tmp_path):
    models = tmp_path / "models"
    make_bundle(models, "good")
    for name in (b"bad\xff", b"UPPER", b"with space", b"line\nbreak"):
        (models / os.fsdecode(name) / "1").mkdir(parents=True)
    for version in ("02", "002", "latest", "\u0968"):
        (models / "good" / version).mkdir()
    with convoy(models, tmp_path / "log") as server:
        assert server.client.get("/readyz").json()["models"] == {"good": "ready"}
        assert server.client.post("/models/nobody/predict", content=RED).status_code == 404
        assert server.client.get("/metrics").status_code == 200
        passed_over = [line for line in server.lines() if line["message"].startswith("folder passed over")]
        assert len(passed_over) == 4


def test_the_highest_version_is_served(tmp_path):
    models = tmp_path / "models"
    for version in ("1", "2", "10"):
        make_bundle(models, "colours", version)
    with convoy(models, tmp_path / "log") as server:
        assert server.client.post("/predict", content=RED).json()["version"] == "10"


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_models_directory_without_models_is_one_sentence(tmp_path, kind):
    models = tmp_path / "models"
    if kind == "empty":
        models.mkdir()
    result = run_cli("serve", "--models", models)
    assert result.returncode == 2
    assert str(models) in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_port_in_use_is_one_sentence(models):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_cli("serve", "--models", models, "--port", port)
    assert result.returncode == 2
    assert f"Cannot listen on 127.0.0.1 port {port}: Address already in use" in result.stderr


def test_cuda_that_is_not_there_is_a_refusal_to_start(models):
    result = run_cli("serve", "--models", models, "--port", 0, "--device", "cuda", "--log-level", "error")
    assert result.returncode == 2
    assert result.stderr.startswith("convoy: device is cuda, but")
    assert result.stderr.count("\n") == 1


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_while_models_load_the_probes_answer_and_predictions_are_told_to_wait(slow_models, tmp_path):
    with convoy(slow_models, tmp_path / "log", loaded=False, max_batch=32, sessions=4) as server:
        assert server.client.get("/livez").status_code == 200
        ready = server.client.get("/readyz")
        assert (ready.status_code, ready.json()["models"]) == (503, {"slow": "loading"})
        refusal = server.client.post("/predict", content=RED)
        assert (refusal.status_code, refusal.json()["code"]) == (503, "loading")
        assert server.stop() == 0


@pytest.mark.parametrize(
    "processes", [{"workers": 1}, {"workers": 2}, {"workers": 1, "engines": 1}], ids=["one", "two workers", "an engine"]
)
def test_while_models_load_every_worker_is_shown_as_loading(slow_models, tmp_path, processes):
    """So alerts tell a start that goes on from one that has failed."""
    with convoy(slow_models, tmp_path / "log", loaded=False, max_batch=32, sessions=4, **processes) as server:
        deadline = time.monotonic() + 30
        while (shown := server.metrics())['convoy_workers{state="loading"}'] < processes["workers"]:
            assert time.monotonic() < deadline, shown
            time.sleep(0.02)
        assert shown["convoy_ready"] == 0


def test_overload_is_refused_at_once_and_what_was_accepted_is_answered(slow_models, tmp_path):
    with convoy(slow_models, tmp_path / "log", sessions=1, max_inflight_images=8, max_batch=4) as server:
        with ThreadPoolExecutor(40) as pool, httpx.Client(base_url=server.url, timeout=30) as client:
            responses = list(pool.map(lambda _: client.post("/predict", content=RED), range(40)))
        accepted = [response for response in responses if response.status_code == 200]
        refused = [response for response in responses if response.status_code == 429]
        assert len(accepted) + len(refused) == 40
        assert len(accepted) >= 8 and refused
        assert all(response.json()["results"][0]["top"][0]["label"] == "red" for response in accepted)
        for response in refused:
            assert response.json()["code"] == "queue_full"
            assert 1 <= int(response.headers["retry-after"]) <= 30
        metrics = server.metrics()
        assert metrics['convoy_rejected_total{model="slow",reason="queue_full"}'] == len(refused)
        assert metrics['convoy_images_total{model="slow",version="1"}'] == len(accepted)
        assert metrics["convoy_inflight_images"] == 0
        runs = metrics['convoy_batch_size_count{model="slow"}']
        assert metrics['convoy_batch_size_sum{model="slow"}'] / runs > 1, "nothing was batched"


def test_a_deadline_is_kept(slow_models, tmp_path):
    with convoy(slow_models, tmp_path / "log", sessions=1, max_batch=1) as server:
        with ThreadPoolExecutor(4) as pool:
            busy = [pool.submit(server.client.post, "/predict", content=RED) for _ in range(3)]
            time.sleep(0.03)
            response = server.client.post("/predict", content=RED, headers={"Timeout-Ms": "20"})
            assert (response.status_code, response.json()["code"]) == (504, "deadline")
            assert [future.result().status_code for future in busy] == [200] * 3
        dropped = sum(value for key, value in server.metrics().items() if "dropped_total" in key and "deadline" in key)
        assert dropped == 1


def test_a_body_that_never_ends_runs_into_the_deadline(models, tmp_path):
    with convoy(models, tmp_path / "log", request_timeout_ms=300, default_model="colours") as server:
        host, port = server.client.base_url.host, server.client.base_url.port
        with socket.create_connection((host, port), timeout=10) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nonly this")
            assert connection.recv(4096).startswith(b"HTTP/1.1 504")


def test_a_client_that_leaves_is_not_worked_for(slow_models, tmp_path):
    with convoy(slow_models, tmp_path / "log", sessions=1, max_batch=1) as server:
        host, port = server.client.base_url.host, server.client.base_url.port
        request = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(RED), RED)
        leavers = [socket.create_connection((host, port), timeout=10) for _ in range(12)]
        for connection in leavers:
            connection.sendall(request)
        wait_for(lambda: accepted(server) == 12)
        for connection in leavers:
            connection.close()
        assert server.client.post("/predict", content=RED).status_code == 200
        metrics = server.metrics()
        assert metrics['convoy_batch_size_sum{model="slow"}'] <= 6, "abandoned images were run"
        dropped = 'convoy_dropped_total{model="slow",reason="disconnected",stage="queue"}'
        assert metrics[dropped] >= 6
        gone = 'convoy_requests_total{code="499",model="slow",route="/predict",version="1"}'
        assert metrics[gone] + metrics['convoy_images_total{model="slow",version="1"}'] == 13


def accepted(server: ConvoyProcess) -> float:
    """Images that are inside or have been answered."""
    metrics = server.metrics()
    return metrics["convoy_inflight_images"] + metrics['convoy_images_total{model="slow",version="1"}']


def wait_for(condition, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.005)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_everything_accepted_finish_and_exits_0(slow_models, tmp_path, signal_number):
    with convoy(slow_models, tmp_path / "log", sessions=1, max_batch=2) as server, ThreadPoolExecutor(10) as pool:
        clients = [httpx.Client(base_url=server.url, timeout=30) for _ in range(10)]
        answers = [pool.submit(client.post, "/predict", content=RED) for client in clients]
        wait_for(lambda: accepted(server) == 10)
        assert server.stop(signal_number=signal_number) == 0
        assert [future.result().status_code for future in answers] == [200] * 10
        assert server.lines()[-1]["message"] == "stopped"
        for client in clients:
            client.close()


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_models_load_is_a_clean_stop(slow_models, tmp_path, signal_number, delay_s):
    with convoy(slow_models, tmp_path / "log", loaded=False, max_batch=32, sessions=4) as server:
        time.sleep(delay_s)
        assert server.stop(signal_number=signal_number) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_what_the_drain_cuts_off_is_told_so(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours", drain_timeout_s=1) as server:
        address = (server.client.base_url.host, server.client.base_url.port)
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nonly this")
            wait_for(lambda: server.metrics()["convoy_inflight_bytes"] == 9)
            assert server.stop() == 0
            answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503") and b'"code": "draining"' in answer
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_body_that_is_announced_and_not_sent_holds_nothing(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours", max_inflight_bytes=100_000) as server:
        address = (server.client.base_url.host, server.client.base_url.port)
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n"
        idle = [socket.create_connection(address, timeout=10) for _ in range(8)]
        for connection in idle:
            connection.sendall(head)
        wait_for(lambda: server.metrics()['convoy_inflight_requests{model="colours"}'] == 8)
        assert server.client.post("/predict", content=RED).status_code == 200
        for connection in idle:
            connection.close()


def test_convoy_health_speaks_for_the_service(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours") as server:
        port = server.client.base_url.port
        healthy = run_cli("health", "--port", port)
        assert (healthy.returncode, healthy.stdout) == (0, "ready\n")
    gone = run_cli("health", "--port", port)
    assert gone.returncode == 1 and "does not answer" in gone.stdout


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]", b"null"])
def test_convoy_health_is_not_taken_in_by_others(body):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        result = run_cli("health", "--port", other.server_port)
        thread.join()
    assert result.returncode == 1 and "is not Convoy" in result.stdout


def test_the_service_writes_nothing_beside_its_models(models, tmp_path):
    copy = tmp_path / "models"
    shutil.copytree(models, copy)
    before = sorted(copy.rglob("*"))
    with convoy(copy, tmp_path / "log", default_model="colours") as server:
        server.client.post("/predict", content=RED)
    assert sorted(copy.rglob("*")) == before
