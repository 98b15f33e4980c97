"""Services whose sessions are in engines: the same answers, and nothing lost but what an engine had. Real processes."""

import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.app.test_probes import FOR_EVER, infer, make_stuck
from tests.app.watching import free_port, is_running, load, messages, probe_url, wait_for, worker_pids
from tests.bundles import COLOURS, make_bundle, noise_image, plain_image
from tests.servers import ConvoyProcess, convoy

RED = plain_image("red")


@pytest.fixture(scope="module")
def engined(models: Path, tmp_path_factory):
    """Two workers over two engines, and a port for probes, for tests that leave them as they are."""
    log = tmp_path_factory.mktemp("engined") / "log"
    with convoy(models, log, default_model="colours", workers=2, engines=2, probe_port=free_port()) as service:
        yield service


def test_the_answers_are_those_of_one_process(engined, server):
    images = [plain_image(colour) for colour in COLOURS]
    images += [noise_image(seed, kind, (40 + seed, 30)) for seed in range(6) for kind in ("JPEG", "PNG")]
    for image in images:
        one, other = (service.client.post("/models/colours/predict", content=image) for service in (server, engined))
        assert one.status_code == other.status_code == 200
        assert one.json() == other.json()
    form = [("images", (f"{number}.png", image)) for number, image in enumerate(images)]
    answers = [service.client.post("/models/other/predict", files=form).json() for service in (server, engined)]
    assert answers[0] == answers[1]
    assert len(answers[0]["results"]) == len(images)


def test_tensors_are_answered_as_by_one_process(engined, server):
    pixels = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    asked = {
        "inputs": [{"name": "image", "shape": list(pixels.shape), "datatype": "UINT8", "data": pixels.ravel().tolist()}]
    }
    answers = [service.client.post("/v2/models/colours/infer", json=asked).json() for service in (server, engined)]
    assert answers[0]["outputs"] == answers[1]["outputs"]


@pytest.mark.parametrize(
    ("content", "status"), [(b"no image", 422), (b"", 400), (RED[: len(RED) // 2], 422)], ids=["text", "empty", "cut"]
)
def test_faults_are_those_of_one_process(engined, server, content, status):
    one, other = (service.client.post("/predict", content=content) for service in (server, engined))
    assert (one.status_code, one.json()) == (other.status_code, other.json())
    assert other.status_code == status


def test_the_sessions_are_in_the_engines_alone(engined):
    for kind in ("worker", "engine"):
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in worker_pids(engined, kind).values()]
        assert ["onnxruntime" in text for text in maps] == [kind == "engine"] * 2
    samples = engined.metrics()
    assert samples['convoy_engines{state="ready"}'] == samples['convoy_workers{state="ready"}'] == 2
    done = 'convoy_images_total{model="colours",version="1"}'
    runs = 'convoy_batch_size_count{model="colours"}'
    before = samples[done]
    assert engined.client.post("/predict", content=RED).status_code == 200
    samples = engined.metrics()
    assert samples[done] == before + 1
    assert samples[runs] > 0
    assert sum(value for key, value in samples.items() if key.startswith("process_resident_memory_bytes{")) > 0


def is_ready(server: ConvoyProcess) -> bool:
    try:
        return httpx.get(f"{probe_url(server)}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_an_engine_that_dies_loses_what_it_had_and_nothing_else(models, tmp_path):
    settings = {"default_model": "colours", "workers": 2, "engines": 1, "probe_port": free_port(), "access_log": False}
    with convoy(models, tmp_path / "log", **settings) as server:
        with load(server.url) as outcomes:
            for round_number in (1, 2):
                [victim] = worker_pids(server, "engine").values()
                wait_for(lambda: outcomes[-1:] == [200])
                os.kill(victim, signal.SIGKILL)
                wait_for(lambda: not is_ready(server), 10)
                wait_for(lambda count=1 + round_number: len(messages(server, "engine started")) == count)
                wait_for(lambda: is_ready(server))
            settled = len(outcomes)
            wait_for(lambda: len(outcomes) > settled + 50)
        found = Counter(outcomes)
        assert set(found) <= {200, 503}, found
        assert set(outcomes[settled:]) == {200}
        assert len(messages(server, "engine died")) == 2
        assert server.metrics()['convoy_worker_exits_total{cause="died"}'] == 2
        pids = [*worker_pids(server).values(), *worker_pids(server, "engine").values()]
        assert len(pids) == 3
        assert server.stop() == 0
        assert not any(map(is_running, pids))


def test_with_two_engines_the_other_one_goes_on(models, tmp_path):
    settings = {"default_model": "colours", "workers": 1, "engines": 2, "probe_port": free_port(), "access_log": False}
    with convoy(models, tmp_path / "log", **settings) as server:
        with load(server.url) as outcomes:
            victim = max(worker_pids(server, "engine").values())
            os.kill(victim, signal.SIGKILL)
            ready = []
            while len(messages(server, "engine started")) < 3:
                ready.append(is_ready(server))
                time.sleep(0.01)
            settled = len(outcomes)
            wait_for(lambda: len(outcomes) > settled + 50)
        assert all(ready)
        assert Counter(outcomes)[503] <= 4  # one for each client at most: what the dead one had
        assert set(outcomes) <= {200, 503}


def test_an_engine_with_a_stuck_session_is_replaced(tmp_path):
    models = tmp_path / "models"
    make_stuck(models)
    make_bundle(models, "colours")
    settings = {"engines": 1, "sessions": 1, "stuck_s": 0.5, "default_model": "colours", "probe_port": free_port()}
    with convoy(models, tmp_path / "log", **settings) as server:
        lost = infer(server.client, FOR_EVER)
        assert (lost.status_code, lost.json()["code"]) == (503, "engine_lost")
        assert len(messages(server, "engine hangs: killing it")) == 1
        assert httpx.get(f"{probe_url(server)}/livez").status_code == 200
        wait_for(lambda: infer(server.client, 7).status_code == 200)  # ready is who has the default model again
        assert infer(server.client, 7).json()["outputs"][0]["data"] == [7]
        assert server.metrics()['convoy_worker_exits_total{cause="hung"}'] == 1


def test_what_waits_for_an_engine_that_stands_still_is_seen_to_wait(models, tmp_path):
    def age() -> float:
        return server.metrics()['convoy_queue_age_seconds{model="colours"}']

    with convoy(models, tmp_path / "log", default_model="colours", workers=2, engines=1) as server:
        [engine] = worker_pids(server, "engine").values()
        with ThreadPoolExecutor(1) as pool:
            os.kill(engine, signal.SIGSTOP)
            try:
                waiting = pool.submit(server.client.post, "/predict", content=RED, headers={"Timeout-Ms": "3000"})
                wait_for(lambda: age() > 1)
                assert waiting.result().status_code == 504
                wait_for(lambda: age() == 0)  # nobody waits any more
            finally:
                os.kill(engine, signal.SIGCONT)
        assert server.client.post("/predict", content=RED).status_code == 200
        assert age() == 0
        assert server.stop() == 0


def test_a_front_that_dies_leaves_nothing_behind_in_the_engine(models, tmp_path):
    settings = {"default_model": "colours", "workers": 2, "engines": 1, "probe_port": free_port(), "access_log": False}
    with convoy(models, tmp_path / "log", **settings) as server:
        [engine] = worker_pids(server, "engine").values()

        def held() -> tuple[int, int]:
            slabs = Path(f"/proc/{engine}/maps").read_text().count("convoy-slab")
            return sum(1 for _ in Path(f"/proc/{engine}/fd").iterdir()), slabs

        wait_for(lambda: held()[1] == 2)
        before = held()
        with load(server.url) as outcomes:
            for number in range(3):
                os.kill(max(worker_pids(server).values()), signal.SIGKILL)
                wait_for(lambda count=3 + number: len(messages(server, "worker started")) == count)
                wait_for(lambda: all(state == "ready" for state in readiness_of(server).values()))
            settled = len(outcomes)
            wait_for(lambda: len(outcomes) > settled + 50)
        wait_for(lambda: held() == before)
        assert set(outcomes[settled:]) == {200}
        assert [*worker_pids(server, "engine").values()] == [engine]


def readiness_of(server: ConvoyProcess) -> dict[str, str]:
    workers: dict[str, str] = httpx.get(f"{probe_url(server)}/readyz", timeout=5).json()["workers"]
    return workers if len(workers) == 2 else {"": "missing"}


def test_a_version_is_swapped_under_load_in_every_engine(tmp_path):
    models = tmp_path / "models"
    make_bundle(models, "colours")
    with convoy(models, tmp_path / "log", workers=2, engines=2, watch_s=0.1, access_log=False) as server:
        with load(server.url) as outcomes:
            for version in ("2", "3"):
                make_bundle(models, "colours", version)
                wait_for(lambda: server.client.post("/predict", content=RED).json()["version"] == version)  # noqa: B023
            settled = len(outcomes)
            wait_for(lambda: len(outcomes) > settled + 20)
        assert set(outcomes) == {200}
        wait_for(lambda: len([line for line in messages(server, "model closed") if line["version"] == "2"]) == 2)


def test_workers_and_engines_end_by_themselves_when_the_supervisor_is_killed(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours", workers=2, engines=1) as server:
        pids = [*worker_pids(server).values(), *worker_pids(server, "engine").values()]
        assert len(pids) == 3
        os.kill(server.process.pid, signal.SIGKILL)
        wait_for(lambda: not any(map(is_running, pids)))
