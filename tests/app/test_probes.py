"""Liveness and readiness of a real service in the states in which an orchestrator must not confuse them.

A slow start is in `test_lifecycle.py`; here: draining, full, stuck.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.manifest import write_tensor_manifest
from tests.app.watching import free_port
from tests.bundles import make_bundle, plain_image
from tests.servers import ConvoyProcess, alone, convoy

RED = plain_image("red")
FOR_EVER = 12345.0
"""What a stuck graph is asked for when it shall never answer."""


def make_stuck(models: Path) -> None:
    """Write a model of tensors that gives back its input, and at `FOR_EVER` never ends."""
    one_step = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum", "sum"], ["next"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [1]),
        ],
    )
    constants = {
        "for_ever": np.array([FOR_EVER], np.float32),
        "many": np.array([2**62], np.int64),
        "none": np.array([0], np.int64),
        "yes": np.array(True),
        "scalar": np.array([], np.int64),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Equal", ["x", "for_ever"], ["stuck"]),
            helper.make_node("Where", ["stuck", "many", "none"], ["one_trips"]),
            helper.make_node("Reshape", ["one_trips", "scalar"], ["trips"]),
            helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=one_step),
        ],
        "stuck",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    directory = models / "stuck" / "1"
    directory.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, directory / "model.onnx")
    write_tensor_manifest(directory, {"name": "stuck", "version": "1", "opset": 18, "batching": "never"})


@pytest.fixture(scope="module")
def stuck_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("stuck") / "models"
    make_stuck(models)
    make_bundle(models, "colours")
    return models


@pytest.fixture(scope="module")
def slow_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("slow") / "models"
    make_bundle(models, "slow", slow=True)
    return models


@contextmanager
def probed(models: Path, log: Path, **settings: object) -> Iterator[tuple[ConvoyProcess, httpx.Client]]:
    """Run a server with a client for its port of probes."""
    port = free_port()
    with (
        convoy(models, log, probe_port=port, **settings) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as probes,
    ):
        yield server, probes


def wait_for(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.02)


def inside_or_answered(server: ConvoyProcess) -> float:
    metrics = server.metrics()
    return metrics["convoy_inflight_images"] + metrics.get('convoy_images_total{model="slow",version="1"}', 0)


def infer(client: httpx.Client, value: float) -> httpx.Response:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [value]}
    return client.post("/v2/models/stuck/infer", json={"inputs": [tensor]})


def test_while_it_drains_it_is_not_ready_and_answers_what_it_has(slow_models, tmp_path):
    settings = {"sessions": 1, "max_batch": 1}
    with probed(slow_models, tmp_path / "log", **settings) as (server, probes), ThreadPoolExecutor(4) as pool:
        assert probes.get("/readyz").status_code == 200
        clients = [httpx.Client(base_url=server.url, timeout=30) for _ in range(4)]
        five = [("image", ("red.png", RED))] * 5  # half a second of work: more than looking takes
        answers = [pool.submit(client.post, "/predict", files=five) for client in clients]
        wait_for(lambda: inside_or_answered(server) == 20)
        server.process.terminate()
        wait_for(lambda: probes.get("/readyz").status_code == 503)
        assert "Draining" in probes.get("/readyz").json()["reason"]
        assert probes.get("/livez").status_code == 200
        assert not all(answer.done() for answer in answers), "nothing was left to drain"
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert server.process.wait(15) == 0
        for client in clients:
            client.close()


@alone
def test_full_it_stays_ready(stuck_models, tmp_path):
    settings = {"sessions": 1, "stuck_s": 0, "max_inflight_images": 2, "default_model": "colours"}
    with probed(stuck_models, tmp_path / "log", **settings) as (server, probes), ThreadPoolExecutor(2) as pool:
        # Nothing comes out any more, so what is inside stays, and the next finds it full.
        lost = [pool.submit(infer_alone, server.url) for _ in range(2)]
        wait_for(lambda: server.metrics()["convoy_inflight_images"] == 2)
        refused = infer(server.client, 7)
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        for client in (probes, server.client):
            assert client.get("/readyz").status_code == 200
            assert client.get("/livez").status_code == 200
        server.process.kill()
        assert [type(answer.exception()) for answer in lost] == [httpx.RemoteProtocolError] * 2


def infer_alone(url: str) -> httpx.Response:
    with httpx.Client(base_url=url, timeout=60) as client:
        return infer(client, FOR_EVER)


@alone
def test_a_session_that_is_stuck_is_not_alive(stuck_models, tmp_path):
    settings = {"sessions": 1, "stuck_s": 0.5, "default_model": "colours"}
    with probed(stuck_models, tmp_path / "log", **settings) as (server, probes), ThreadPoolExecutor(1) as pool:
        assert infer(server.client, 7).json()["outputs"][0]["data"] == [7]
        assert probes.get("/livez").status_code == 200
        with httpx.Client(base_url=server.url, timeout=60) as client:
            lost = pool.submit(infer, client, FOR_EVER)
            wait_for(lambda: probes.get("/livez").status_code == 503)
            told = probes.get("/livez").json()
            assert told["live"] is False and "its session is stuck" in told["reason"]
            assert server.client.get("/livez").status_code == 503
            asked = server.client.get("/v2/health/live")
            assert (asked.status_code, asked.json()["live"]) == (503, False)
            # What else is there goes on working until the orchestrator acts.
            assert server.client.post("/predict", content=RED).status_code == 200
            server.process.kill()
            with pytest.raises(httpx.TransportError):
                lost.result()


@alone
def test_a_worker_with_a_stuck_session_is_replaced_and_the_service_is_alive(stuck_models, tmp_path):
    settings = {"workers": 2, "sessions": 1, "stuck_s": 0.5, "default_model": "colours"}
    with probed(stuck_models, tmp_path / "log", **settings) as (server, probes):
        with httpx.Client(base_url=server.url, timeout=60) as client, pytest.raises(httpx.TransportError):
            infer(client, FOR_EVER)
        assert probes.get("/livez").status_code == 200
        said = [line for line in server.lines() if line["message"] == "worker hangs: killing it"]
        assert len(said) == 1
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert client.post("/predict", content=RED).status_code == 200
