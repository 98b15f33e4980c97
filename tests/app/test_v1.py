"""The interface of TensorFlow Serving and KServe's V1, on a running server."""

import base64
import gzip
import json
import socket
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest

from app.http.v1_messages import version_status
from tests.app.watching import logged_with, wait_for
from tests.bundles import COLOURS, make_bundle, noise_image, plain_image
from tests.servers import convoy
from tests.v2 import make_echo, make_fixed, make_pair

SCRIPT = Path(__file__).parents[1] / "scripts/tensorflow_serving.sh"
PREDICT = "/v1/models/colours:predict"
RED, BLUE = plain_image("red"), plain_image("blue", "JPEG", (40, 30))


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    root = tmp_path_factory.mktemp("v1")
    make_bundle(root / "models")
    make_echo(root / "models", "strings", ("BYTES",))
    make_echo(root / "models", "numbers", ("FP32",))
    make_pair(root / "models")
    make_fixed(root / "models")
    (root / "models/broken/1").mkdir(parents=True)
    (root / "models/broken/1/model.onnx").write_bytes(b"no graph")
    with convoy(root / "models", root / "log", default_model="colours", max_images_per_request=8) as process:
        yield process


def b64(content: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(content).decode()}


def best(answer: httpx.Response, key: str = "predictions") -> list[str]:
    assert answer.status_code == 200, answer.text
    assert answer.json().keys() == {key}
    return [list(COLOURS)[int(np.argmax(row))] for row in answer.json()[key]]


@pytest.mark.parametrize(
    ("body", "key"),
    [
        pytest.param({"instances": [b64(RED), b64(BLUE)]}, "predictions", id="row"),
        pytest.param({"instances": [{"image_bytes": b64(RED)}, {"image_bytes": b64(BLUE)}]}, "predictions", id="named"),
        pytest.param({"signature_name": "serving_default", "inputs": [b64(RED), b64(BLUE)]}, "outputs", id="column"),
        pytest.param({"inputs": {"image": [b64(RED), b64(BLUE)]}}, "outputs", id="named-column"),
        pytest.param({"instances": [b64(RED), b64(BLUE)], "parameters": {"x": 1}}, "predictions", id="more"),
    ],
)
def test_images_in_every_form(v1, body, key):
    assert best(v1.client.post(PREDICT, json=body), key) == ["red", "blue"]


def test_probabilities_are_those_of_predict(v1):
    images = [noise_image(seed, "JPEG", (50, 40)) for seed in range(5)]
    rows = v1.client.post(PREDICT, json={"instances": list(map(b64, images))}).json()["predictions"]
    for image, row in zip(images, rows, strict=True):
        top = v1.client.post("/predict?top_k=6", content=image).json()["results"][0]["top"]
        assert [row[entry["index"]] for entry in top] == pytest.approx(
            [entry["probability"] for entry in top], abs=2e-6
        )


@pytest.mark.parametrize("key", ["instances", "inputs"])
def test_pixels_as_nested_numbers(v1, key):
    pixels = np.broadcast_to(np.array(COLOURS["green"], np.uint8), (3, 16, 16, 3)).tolist()
    for values in (pixels, [{"image": image} for image in pixels] if key == "instances" else {"image": pixels}):
        answer = v1.client.post(PREDICT, json={key: values})
        assert best(answer, "predictions" if key == "instances" else "outputs") == ["green"] * 3


def test_several_inputs_and_outputs(v1):
    rows = [{"a": [1, 2, 3, 4], "b": [0, 0.5, 0, 1]}, {"a": [1, 1, 1, 1], "b": [1, 1, 1, 1]}]
    answer = v1.client.post("/v1/models/pair:predict", json={"instances": rows}).json()["predictions"]
    assert [row["sum"] for row in answer] == [[1, 2.5, 3, 5], [2, 2, 2, 2]]
    assert answer[1]["log"] == pytest.approx([np.log(2)] * 4)
    columns = {name: [row[name] for row in rows] for name in ("a", "b")}
    answer = v1.client.post("/v1/models/pair/versions/1:predict", json={"inputs": columns}).json()["outputs"]
    assert answer["sum"] == [[1, 2.5, 3, 5], [2, 2, 2, 2]] and answer["log"][1] == pytest.approx([np.log(2)] * 4)


def test_scalars_and_strings(v1):
    numbers = v1.client.post("/v1/models/numbers:predict", json={"instances": [[1.5, 2], [3, 4]]})
    assert numbers.json() == {"predictions": [[1.5, 2.0], [3.0, 4.0]]}
    fixed = v1.client.post("/v1/models/fixed:predict", json={"instances": [1, 2, 3]})
    assert fixed.json() == {"predictions": [2, 4, 6]}
    texts = v1.client.post("/v1/models/strings:predict", json={"instances": [["a", "grün"], [b64(b"b"), ""]]})
    assert texts.json() == {"predictions": [["a", "grün"], ["b", ""]]}


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain", None])
def test_whatever_the_content_type(v1, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    assert best(v1.client.post(PREDICT, content=json.dumps({"instances": [b64(RED)]}), headers=headers)) == ["red"]


def test_compressed_both_ways(v1):
    body = gzip.compress(json.dumps({"instances": [[0.123456789 * n for n in range(500)]]}).encode())
    headers = {"Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
    answer = v1.client.post("/v1/models/numbers:predict", content=body, headers=headers)
    assert answer.headers["content-encoding"] == "gzip"
    assert len(answer.json()["predictions"][0]) == 500


def test_a_large_request_and_a_large_answer(v1):
    values = np.arange(120_000, dtype=np.float32).reshape(8, 15_000)
    answer = v1.client.post("/v1/models/numbers:predict", json={"instances": values.tolist()})
    assert np.array_equal(np.array(answer.json()["predictions"], np.float32), values)


def test_an_answer_is_traced_like_any_other(v1):
    headers = {"X-Request-Id": "v1-traced", "Timeout-Ms": "10000", "Priority": "u=1"}
    answer = v1.client.post(PREDICT, json={"instances": [b64(RED)] * 3}, headers=headers)
    assert answer.headers["x-request-id"] == "v1-traced"
    assert answer.headers["server-timing"].startswith("decode;dur=") and answer.headers["x-provider"] == "cpu"
    wait_for(lambda: logged_with(v1, "v1-traced"))
    [line] = logged_with(v1, "v1-traced")
    assert (line["model"], line["images"], line["status"]) == ("colours", 3, 200)
    key = 'convoy_requests_total{code="200",model="colours",route="/v1/models/{model}:predict",version="1"}'
    assert v1.metrics()[key] >= 1


def test_status_for_the_clients_of_both(v1):
    assert v1.client.get("/v1/models").json() == {
        "models": ["broken", "colours", "fixed", "numbers", "pair", "strings"]
    }
    for path in ("/v1/models/colours", "/v1/models/colours/versions/1"):
        assert v1.client.get(path).json() == {
            "name": "colours",
            "ready": True,
            "model_version_status": [
                {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
            ],
        }
    broken = v1.client.get("/v1/models/broken")
    assert broken.status_code == 503
    assert (broken.json()["ready"], broken.json()["code"]) == (False, "unavailable")
    [status] = broken.json()["model_version_status"]
    assert (status["state"], status["status"]["error_code"]) == ("END", "INTERNAL")
    assert status["status"]["error_message"] and broken.json()["error"]


@pytest.mark.parametrize(
    ("state", "told"), [("LOADING", "LOADING"), ("UNLOADING", "UNLOADING"), ("UNAVAILABLE", "END"), ("?", "UNKNOWN")]
)
def test_states_have_the_names_of_tensorflow_serving(state, told):
    status = version_status({"version": "3", "state": state, "reason": ""})
    assert (status["version"], status["state"], status["status"]["error_code"]) == ("3", told, "OK")


def test_metadata_as_tensorflow_serving_tells_it(v1):
    answer = v1.client.get("/v1/models/colours/metadata").json()
    assert answer["model_spec"] == {"name": "colours", "signature_name": "", "version": "1"}
    signature = answer["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["inputs"]["image"]["dtype"] == "DT_UINT8"
    assert [dim["size"] for dim in signature["inputs"]["image"]["tensor_shape"]["dim"]] == ["-1", "16", "16", "3"]
    assert signature["outputs"]["probabilities"]["dtype"] == "DT_FLOAT"
    strings = v1.client.get("/v1/models/strings/versions/1/metadata").json()["metadata"]
    assert strings["signature_def"]["signature_def"]["serving_default"]["inputs"]["in_BYTES"]["dtype"] == "DT_STRING"


DEEP = "[" * 500 + "1" + "]" * 500
WRONG = [
    ("colours", b"", 400, "not JSON"),
    ("colours", b"{", 400, "not JSON"),
    ("colours", b"[1]", 400, 'either "instances" or "inputs"'),
    ("colours", b"{}", 400, 'either "instances" or "inputs"'),
    ("colours", b'{"instances": [1], "inputs": [1]}', 400, 'either "instances" or "inputs"'),
    ("colours", b'{"instances": []}', 400, "at least one"),
    ("colours", b'{"instances": {"b64": "AAAA"}}', 400, "must be a list"),
    ("colours", b'{"instances": [1], "signature_name": 3}', 400, "signature_name must be a string"),
    ("colours", b'{"instances": [{"b64": "?"}]}', 400, "Image 0 is not base64"),
    ("colours", b'{"instances": [{"b64": 7}]}', 400, "Image 0: b64 must be a string"),
    ("colours", b'{"instances": ["/9j/4AAQ"]}', 400, 'Image 0 must be {"b64"'),
    ("colours", b'{"instances": [{"b64": "AAAA"}, 5]}', 400, "Image 1 must be"),
    ("colours", b'{"instances": [{"b64": "AAAA"}]}', 422, "not a JPEG"),
    ("colours", b'{"instances": [[1, 2], [3, 4]]}', 400, "has shape [2,2]"),
    ("colours", b'{"instances": [{"picture": [1]}]}', 400, "names the input 'picture'"),
    ("colours", b'{"instances": [{}]}', 400, "Input 'image' is missing"),
    ("colours", b'{"instances": [' + b",".join([b'{"b64": "AAAA"}'] * 9) + b"]}", 413, "more than 8"),
    ("colours", b'{"inputs": [' + b",".join([b'{"b64": "?"}'] * 50_000) + b"]}", 413, "more than 8"),
    ("numbers", b'{"instances": [[1, 2], [3]]}', 400, "nested otherwise"),
    ("numbers", b'{"instances": [[1, "x"]]}', 400, "has a string in it"),
    ("numbers", b'{"instances": [[1, null]]}', 400, "has null in it"),
    ("numbers", b'{"instances": [[NaN]]}', 400, "not JSON"),
    ("numbers", b'{"instances": [[1e39]]}', 400, "beyond the range"),
    ("numbers", f'{{"instances": {DEEP}}}'.encode(), 400, ""),
    ("numbers", b'{"instances": [' + b"[" * 40 + b"1" + b"]" * 40 + b"]}", 400, "has shape"),
    ("numbers", b'{"inputs": 5}', 400, "has shape [1]"),
    ("numbers", b'{"inputs": {}}', 400, "is missing"),
    ("pair", b'{"instances": [[1, 2, 3, 4]]}', 400, "every instance must be an object"),
    ("pair", b'{"instances": [{"a": [1, 2, 3, 4]}]}', 400, "Input 'b' is missing"),
    ("pair", b'{"instances": [{"a": [1], "b": [1]}, {"a": [1]}]}', 400, "instances[1] has not the inputs"),
    ("pair", b'{"instances": [{"a": [1], "b": [1]}, 3]}', 400, "instances[1] has not the inputs"),
    ("pair", b'{"inputs": [1, 2, 3, 4]}', 400, "several inputs"),
    ("pair", b'{"inputs": {"a": [[1, 2, 3, 4]], "b": [[1, 2, 3, 4], [1, 2, 3, 4]]}}', 400, "different numbers of rows"),
    ("pair", b'{"inputs": {"a": [[-1, 0, 0, 0]], "b": [[0, 0, 0, 0]]}}', 400, "NaN or infinity"),
    ("strings", b'{"instances": [[{"b64": "/w=="}]]}', 400, "no UTF-8"),
    ("strings", b'{"instances": [[{"x": "y"}]]}', 400, "has an object in it"),
    ("fixed", b'{"instances": [1, 2]}', 400, "has shape [2]"),
    ("nothing", b'{"instances": [1]}', 404, "There is no model 'nothing'"),
    ("colours/versions/7", b'{"instances": [1]}', 404, "no version '7'"),
    ("broken", b'{"instances": [1]}', 503, "failed to load"),
]


@pytest.mark.parametrize(("model", "body", "status", "sentence"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_told_in_a_sentence(v1, model, body, status, sentence):
    answer = v1.client.post(f"/v1/models/{model}:predict", content=body)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error", "code"}
    assert sentence in answer.json()["error"] and answer.json()["error"].endswith(".")
    assert v1.client.post(PREDICT, json={"instances": [b64(RED)]}).status_code == 200


def test_a_body_that_is_too_large(models, tmp_path):
    with convoy(models, tmp_path / "log", default_model="colours", max_body_bytes=2000) as server:
        answer = server.client.post(PREDICT, content=b'{"instances": [' + b"1," * 3000)
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
        bomb = gzip.compress(b'{"instances": [' + b"1," * 3000)
        answer = server.client.post(PREDICT, content=bomb, headers={"Content-Encoding": "gzip"})
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def dropped(server, stage: str, reason: str) -> float:
    return server.metrics().get(f'convoy_dropped_total{{model="slow",reason="{reason}",stage="{stage}"}}', 0)


def test_deadlines_and_clients_that_leave(tmp_path):
    make_bundle(tmp_path / "models", "slow", slow=True)
    content = json.dumps({"instances": [b64(RED)] * 8}).encode()
    with convoy(tmp_path / "models", tmp_path / "log", sessions=1, max_batch=1) as server:
        for path, body in (("/v1/models/slow:predict", content), ("/predictions/slow", RED)):
            late = server.client.post(path, content=body, headers={"Timeout-Ms": "1"})
            assert late.status_code in (429, 504), late.text  # known at the door, or only inside
        address = server.client.base_url.host, server.client.base_url.port
        with socket.create_connection(address, 10) as connection:
            head = b"POST /v1/models/slow:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content)
            connection.sendall(head + content)
            inflight = 'convoy_inflight_requests{model="slow"}'
            wait_for(lambda: server.metrics()[inflight] == 1)
        wait_for(lambda: server.metrics()[inflight] == 0)
        assert dropped(server, "queue", "disconnected") + dropped(server, "infer", "disconnected") == 1
        assert server.metrics()["convoy_inflight_images"] == 0
        assert server.metrics()["convoy_inflight_bytes"] == 0


@pytest.mark.parametrize("verb", ["explain", "classify", "regress"])
def test_what_is_not_offered_says_so(v1, verb):
    for path in ("colours", "colours/versions/1", "colours/labels/stable"):
        answer = v1.client.post(f"/v1/models/{path}:{verb}", json={"instances": [1]})
        assert (answer.status_code, answer.json()["code"]) == (501, "not_offered")


def test_an_unknown_model_or_version(v1):
    for path in (
        "nothing",
        "colours/versions/9",
        "colours/labels/gone",
        "nothing/metadata",
        "colours/versions/9/metadata",
    ):
        answer = v1.client.get(f"/v1/models/{path}")
        assert answer.status_code == 404 and answer.json().keys() == {"error", "code"}


def test_the_script_of_a_team_that_uses_tensorflow_serving(v1, tmp_path):
    (tmp_path / "image.jpg").write_bytes(BLUE)
    address = f"{v1.client.base_url.host}:{v1.client.base_url.port}"
    done = subprocess.run(
        [SCRIPT, address, "colours", tmp_path / "image.jpg"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    decoder, answers, text = json.JSONDecoder(), [], done.stdout.strip()
    while text.startswith("{"):
        answer, end = decoder.raw_decode(text)
        answers.append(answer)
        text = text[end:].lstrip()
    status, version, described, row, named, column, nothing = answers
    assert status["model_version_status"] == version["model_version_status"]
    assert "signature_def" in described["metadata"]
    assert row == named == {"predictions": column["outputs"]}
    assert list(COLOURS)[int(np.argmax(row["predictions"][0]))] == "blue"
    assert "no model 'nothing'" in nothing["error"] and text == "404"
