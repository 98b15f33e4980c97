"""What clients of TorchServe ask, on a running server."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.app.watching import logged_with, wait_for
from tests.bundles import COLOURS, noise_image, plain_image
from tests.servers import convoy
from tests.v2 import make_pair

SCRIPT = Path(__file__).parents[1] / "scripts/torchserve.sh"
RED = plain_image("red")
FORM = {"files": {"data": ("image.png", RED)}}


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("path", ["/predictions/colours", "/predictions/colours/1"])
@pytest.mark.parametrize("body", [{"content": RED}, FORM], ids=["raw", "form"])
def test_the_five_best_labels_with_their_probabilities(server, method, path, body):
    answer = server.client.request(method, path, **body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert len(found) == 5 and next(iter(found)) == "red" and set(found) < set(COLOURS)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_probabilities_are_those_of_predict(server):
    image = noise_image(3, "JPEG", (50, 40))
    top = server.client.post("/models/other/predict", content=image).json()["results"][0]["top"]
    assert server.client.post("/predictions/other", content=image).json() == {
        entry["label"]: entry["probability"] for entry in top
    }


def test_an_answer_is_traced_like_any_other(server):
    answer = server.client.post("/predictions/colours", content=RED, headers={"X-Request-Id": "torchserve-traced"})
    assert answer.headers["x-request-id"] == "torchserve-traced" and "infer;dur=" in answer.headers["server-timing"]
    wait_for(lambda: logged_with(server, "torchserve-traced"))
    [line] = logged_with(server, "torchserve-traced")
    assert (line["model"], line["images"], line["status"]) == ("colours", 1, 200)
    key = 'convoy_requests_total{code="200",model="colours",route="/predictions/{model}",version="1"}'
    assert server.metrics()[key] >= 1


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("/predictions/colours", {"content": b""}, 400, "The body is empty"),
        ("/predictions/colours", {"content": b"no image"}, 422, "not a JPEG"),
        ("/predictions/colours", {"files": [("a", RED), ("b", RED)]}, 400, "has 2 images"),
        ("/predictions/colours", {"content": RED, "headers": {"Timeout-Ms": "soon"}}, 400, "Timeout-Ms"),
        ("/predictions/colours", {"content": RED, "headers": {"Content-Type": "text/html"}}, 415, "text/html"),
        ("/predictions/colours", {"content": bytes(2_000_001)}, 413, "too large"),
        ("/predictions/nothing", {"content": RED}, 404, "no model 'nothing'"),
        ("/predictions/colours/7", {"content": RED}, 404, "no version '7'"),
        ("/explanations/colours", {"content": RED}, 501, "not offered yet"),
        ("/explanations/colours/1", {"content": RED}, 501, "not offered yet"),
        ("/predictions", {"content": RED}, 404, "nothing at /predictions"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(server, path, body, status, sentence):
    answer = server.client.post(path, **body)
    assert (answer.status_code, answer.json().keys()) == (status, {"error", "code"}), answer.text
    assert sentence in answer.json()["error"]


def test_the_management_interface_is_not_there(server):
    for method, path in (("POST", "/models?url=https://example.org/model.mar"), ("DELETE", "/models/colours")):
        assert server.client.request(method, path).status_code == 405


def test_ping_while_the_model_loads_and_when_it_failed(tmp_path):
    make_pair(tmp_path / "models")
    (tmp_path / "models/broken/1").mkdir(parents=True)
    with convoy(tmp_path / "models", tmp_path / "log", default_model="broken") as server:
        answer = server.client.get("/ping")
        assert (answer.status_code, answer.json()["status"]) == (503, "Unhealthy")
        assert "'broken' failed to load" in answer.json()["error"]
        tensors = server.client.post("/predictions/pair", content=RED)
        assert tensors.status_code == 400 and "takes tensors, not images" in tensors.json()["error"]


def test_ping_when_all_is_well(server):
    assert server.client.get("/ping").json() == {"status": "Healthy"}


def test_the_script_of_a_team_that_uses_torchserve(server, tmp_path):
    image = tmp_path / "image.jpg"
    image.write_bytes(noise_image(5, "JPEG", (1500, 1200), quality=98))  # curl asks before it sends so much
    address = f"{server.client.base_url.host}:{server.client.base_url.port}"
    done = subprocess.run([SCRIPT, address, "colours", image], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    decoder, answers, text = json.JSONDecoder(), [], done.stdout
    statuses = []
    while text.strip():
        answer, end = decoder.raw_decode(text := text.lstrip())
        (answers if isinstance(answer, dict) else statuses).append(answer)
        text = text[end:]
    ping, *predictions, unknown, unexplained = answers
    assert ping == {"status": "Healthy"}
    assert len(predictions) == 4 and all(found == predictions[0] for found in predictions)
    assert len(predictions[0]) == 5
    assert "no model 'nothing'" in unknown["error"] and "not offered" in unexplained["error"]
    assert statuses == [404, 501]
