"""Deaths, signals, reloads of several workers under load: nothing that was accepted is lost."""

import itertools
import json
import os
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from app.pages import WriterState
from tests.app.watching import free_port, is_running, load, messages, pages_of, probe_url, wait_for, worker_pids
from tests.bundles import make_bundle, plain_image
from tests.servers import ConvoyProcess, alone, convoy

RED = plain_image("red")


def all_ready(server: ConvoyProcess, count: int = 2) -> bool:
    try:
        workers = httpx.get(f"{server.url}/readyz", timeout=5).json()["workers"]
    except httpx.TransportError:
        return False
    return list(workers.values()) == ["ready"] * count


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


@pytest.mark.parametrize("workers", [1, 2])
def test_requests_go_on_while_the_service_stops_and_none_is_lost(models, tmp_path, workers):
    with convoy(models, tmp_path / "log", default_model="colours", workers=workers, access_log=False) as server:
        url = server.url
        with load(url, clients=3) as outcomes:
            wait_for(lambda: len(outcomes) > 30)
            assert server.stop() == 0
        failures = [outcome for outcome in outcomes if outcome != 200]
        # Afterwards the port is closed; a request that was accepted is never cut off.
        assert {type(failure) for failure in failures} <= {httpx.ConnectError}, Counter(map(repr, failures))


@alone
def test_a_second_signal_cuts_off_what_still_runs(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours", workers=2) as server:
        address = (server.client.base_url.host, server.client.base_url.port)
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nonly this")
            wait_for(lambda: server.metrics()["convoy_inflight_bytes"] == 9)
            server.process.send_signal(signal.SIGINT)
            wait_for(lambda: len(messages(server, "stopped")) == 1)  # the worker that has nothing to do
            assert server.process.poll() is None
            pages = pages_of(server)
            wait_for(lambda: sum(page.pid > 0 for page in pages) == 1)
            [drains] = [page for page in pages if page.pid]
            assert drains.state is WriterState.DRAINING
            heartbeat = drains.heartbeat
            wait_for(lambda: drains.heartbeat > heartbeat)  # else it would be taken for hung, and killed
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


def test_workers_end_by_themselves_when_the_supervisor_is_killed(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours", workers=2) as server:
        pids = worker_pids(server).values()
        assert len(pids) == 2
        server.process.kill()
        wait_for(lambda: not any(map(is_running, pids)))
        assert len(messages(server, "the supervisor is gone: draining")) == 2
        assert sorted(line["worker"] for line in messages(server, "stopped")) == [1, 2]
