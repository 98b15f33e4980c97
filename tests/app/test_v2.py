"""The Open Inference Protocol over REST, on a running server."""

import gzip
import json
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from app.keys import Access, make_key
from app.v2.inference import urgency_of
from tests.bundles import COLOURS, make_bundle, noise_image, plain_image
from tests.servers import convoy
from tests.v2 import (
    binary_input,
    image_input,
    make_echo,
    make_fixed,
    make_pair,
    message,
    outputs_of,
)

INFER = "/v2/models/colours/infer"
RED = np.broadcast_to(np.array(COLOURS["red"], np.uint8), (2, 16, 16, 3))
ARRAYS = {
    "BOOL": np.array([[True, False], [False, True]]),
    "UINT8": np.array([[0, 255], [1, 2]], np.uint8),
    "UINT16": np.array([[0, 65535], [1, 2]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1], [1, 2]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1], [1, 2]], np.uint64),
    "INT8": np.array([[-128, 127], [1, 2]], np.int8),
    "INT16": np.array([[-(2**15), 2**15 - 1], [1, 2]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1], [1, 2]], np.int32),
    "INT64": np.array([[-(2**63), 2**63 - 1], [1, 2]], np.int64),
    "FP16": np.array([[0.5, -65504], [1, 2]], np.float16),
    "FP32": np.array([[0.1, -3e38], [1, 2]], np.float32),
    "FP64": np.array([[0.1, -1e308], [1, 2]], np.float64),
    "BYTES": np.array([[b"a", b""], ["grün".encode(), b"\x00{[,"]], object),
}


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    root = tmp_path_factory.mktemp("v2")
    make_bundle(root / "models")
    make_echo(root / "models")
    make_pair(root / "models")
    make_fixed(root / "models")
    with convoy(root / "models", root / "log", default_model="colours", max_images_per_request=8) as process:
        yield process


def pixels_request(**more) -> dict:
    given = {"name": "image", "shape": [2, 16, 16, 3], "datatype": "UINT8", "data": RED.tolist()}
    return {"inputs": [given], **more}


def error_of(response) -> tuple[int, str]:
    assert set(response.json()) == {"error", "code"}, response.text
    return response.status_code, response.json()["error"]


def test_server_and_its_health(v2):
    server = v2.client.get("/v2").json()
    assert server["name"] == "convoy"
    assert {"binary_tensor_data", "classification", "statistics", "model_configuration"} <= set(server["extensions"])
    assert not {"trace", "logging", "system_shared_memory", "cuda_shared_memory", "sequence"} & set(
        server["extensions"]
    )
    assert v2.client.get("/v2/health/live").json() == {"live": True}
    assert v2.client.get("/v2/health/ready").json() == {"ready": True}
    assert sorted(v2.client.get("/v2/models").json()["models"]) == ["colours", "echo", "fixed", "pair"]


@pytest.mark.parametrize("path", ["/v2/models/colours", "/v2/models/colours/versions/1"])
def test_a_model_and_its_version(v2, path):
    assert v2.client.get(path).json() == {
        "name": "colours",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 6]}],
    }
    assert v2.client.get(f"{path}/ready").json() == {"name": "colours", "ready": True}
    config = v2.client.get(f"{path}/config").json()
    assert config["max_batch_size"] == 16
    assert config["input"] == [
        {"name": "image", "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": [16, 16, 3]}
    ]
    assert config["output"][0]["dims"] == [6]
    assert "JPEG" in config["parameters"]["encoded_images"]["string_value"]
    levels = config["dynamic_batching"]
    assert urgency_of(levels["default_priority_level"]) == urgency_of(0)
    assert urgency_of(levels["priority_levels"]) == 7
    assert outputs_of(v2.client.post(f"{path}/infer", json=pixels_request()))["probabilities"].shape == (2, 6)


def test_a_model_that_runs_requests_alone_says_why(v2):
    config = v2.client.get("/v2/models/fixed/config").json()
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (0, [3])
    assert "fixed at 3" in config["parameters"]["unbatched_why"]["string_value"]
    answer = v2.client.post(
        "/v2/models/fixed/infer",
        json={"inputs": [{"name": "x", "shape": [3], "datatype": "INT64", "data": [1, 2, -3]}]},
    )
    assert answer.json()["outputs"] == [{"name": "twice", "datatype": "INT64", "shape": [3], "data": [2, 4, -6]}]


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v2/models/none", 404), ("/v2/models/none/ready", 404), ("/v2/models/colours/versions/9", 404),
     ("/v2/models/none/stats", 404), ("/v2/models/colours/versions/9/config", 404), ("/v2/nothing", 404),
     ("/v2/models/colours/infer", 405), ("/v2/logging", 501), ("/v2/trace/setting", 501),
     ("/v2/systemsharedmemory/status", 501), ("/v2/cudasharedmemory/region/x/register", 501)],
)  # fmt: skip
def test_what_is_not_there_is_told_in_the_shape_of_every_error(v2, path, status):
    assert error_of(v2.client.get(path))[0] == status


def test_the_index_of_the_repository(v2):
    index = v2.client.post("/v2/repository/index").json()
    assert {"name": "colours", "version": "1", "state": "READY", "reason": ""} in index
    assert len(index) == 4
    assert v2.client.post("/v2/repository/index", json={"ready": True}).json() == index


@pytest.mark.parametrize(
    "body", [b"[]", b"{", b'{"ready": 1}', b'{"ready": "yes"}', b'{"a":' * 9000, b" " * 70_000 + b"{}"]
)
def test_an_index_is_asked_for_in_json(v2, body):
    status, _ = error_of(v2.client.post("/v2/repository/index", content=body))
    assert status == (413 if len(body) > 65_536 else 400)


def test_an_index_may_come_with_any_content_type(v2):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert len(v2.client.post("/v2/repository/index", content=b'{"ready": true}', headers=headers).json()) == 4


def test_load_and_unload_with_an_administrators_key(tmp_path):
    make_bundle(tmp_path / "models", "colours")
    make_bundle(tmp_path / "models", "other")
    key, line = make_key("operator", frozenset(Access))
    (tmp_path / "keys.txt").write_text(f"{line}\n")
    with convoy(tmp_path / "models", tmp_path / "log", loaded=False, keys=tmp_path / "keys.txt") as server:
        load, unload = (f"/v2/repository/models/other/{verb}" for verb in ("load", "unload"))
        assert error_of(server.client.post(unload))[0] == 401
        server.client.headers["X-API-Key"] = key
        server.wait_until_loaded()
        assert server.client.post(unload, json={"parameters": {"unload_dependents": False}}).json() == {
            "name": "other",
            "unload": True,
        }
        assert error_of(server.client.get("/v2/models/other"))[0] == 503

        def index() -> dict[str, str]:
            return {entry["name"]: entry["state"] for entry in server.client.post("/v2/repository/index").json()}

        deadline = time.monotonic() + 20
        while index()["other"] == "UNLOADING" and time.monotonic() < deadline:
            time.sleep(0.02)  # the version that is leaving waits for nobody here, but its memory is freed beside
        assert index() == {"colours": "READY", "other": "UNAVAILABLE"}
        for foreign in ({"config": "{}"}, {"file:1/model.onnx": "AAAA"}):
            status, sentence = error_of(server.client.post(load, json={"parameters": foreign}))
            assert (status, "models directory alone" in sentence) == (400, True)
        make_bundle(tmp_path / "models", "other", "2")
        assert server.client.post(load).json() == {"name": "other", "load": True}
        versions = server.client.get("/v2/models/other").json()["versions"]
        assert "2" in versions
        assert server.client.get("/v2/models/other/versions/2/ready").json()["ready"] is True
        found = server.client.get("/v2/models/other/stats").json()["model_stats"]
        assert [entry["version"] for entry in found] == versions
        status, _ = error_of(server.client.post("/v2/repository/models/none/load"))
        assert status == 404


def test_a_model_that_failed_is_in_the_index_and_not_ready(tmp_path):
    make_bundle(tmp_path / "models", "colours")
    (tmp_path / "models/broken/1").mkdir(parents=True)
    with convoy(tmp_path / "models", tmp_path / "log", default_model="colours") as server:
        ready = server.client.get("/v2/models/broken/ready")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert server.client.get("/v2/health/ready").status_code == 200
        index = {entry["name"]: entry for entry in server.client.post("/v2/repository/index").json()}
        assert index["broken"]["state"] == "UNAVAILABLE"
        assert "missing" in index["broken"]["reason"]
        only_ready = server.client.post("/v2/repository/index", json={"ready": True}).json()
        assert [entry["name"] for entry in only_ready] == ["colours"]


def test_every_datatype_comes_back_in_binary_form(v2):
    described, tails = zip(*[binary_input(f"in_{kind}", array, kind) for kind, array in ARRAYS.items()], strict=True)
    document = {"inputs": list(described), "parameters": {"binary_data_output": True}}
    body, headers = message(document, *tails)
    answer = v2.client.post("/v2/models/echo/infer", content=body, headers=headers)
    assert answer.headers["content-type"] == "application/octet-stream"
    found = outputs_of(answer)
    for kind, array in ARRAYS.items():
        assert found[f"out_{kind}"].tolist() == array.tolist(), kind


@pytest.mark.parametrize("nested", [True, False])
def test_every_datatype_comes_back_in_json_but_fp16(v2, nested):
    inputs, tail = [], b""
    for kind, array in ARRAYS.items():
        if kind == "FP16":
            described, tail = binary_input("in_FP16", array, kind)
            inputs.append(described)
            continue
        values = [[value.decode() if kind == "BYTES" else value for value in row] for row in array.tolist()]
        data = values if nested else [value for row in values for value in row]
        inputs.append({"name": f"in_{kind}", "shape": [2, 2], "datatype": kind, "data": data})
    asked = [{"name": f"out_{kind}"} for kind in ARRAYS if kind != "FP16"]
    body, headers = message({"inputs": inputs, "outputs": asked}, tail)
    answer = v2.client.post("/v2/models/echo/infer", content=body, headers=headers)
    assert "inference-header-content-length" not in answer.headers, "nothing in it is binary"
    found = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    for kind, array in ARRAYS.items():
        if kind == "BYTES":
            assert found["out_BYTES"] == ["a", "", "grün", "\x00{[,"]
        elif kind != "FP16":
            assert np.array(found[f"out_{kind}"], array.dtype).tolist() == array.ravel().tolist(), kind
    body, headers = message({"inputs": inputs}, tail)
    status, sentence = error_of(v2.client.post("/v2/models/echo/infer", content=body, headers=headers))
    assert (status, "FP16" in sentence) == (400, True)


def test_outputs_come_as_asked_for_each_in_its_form(v2):
    ones = {"shape": [1, 4], "datatype": "FP32", "data": [1, 1.5, 2, 3]}
    request = {
        "inputs": [{"name": "b", **ones}, {"name": "a", **ones}],
        "outputs": [{"name": "log"}, {"name": "sum", "parameters": {"binary_data": True}}],
        "id": "a/ü",
    }
    answer = v2.client.post("/v2/models/pair/infer", json=request)
    length = int(answer.headers["inference-header-content-length"])
    document = json.loads(answer.content[:length])
    assert (document["id"], document["model_name"], document["model_version"]) == ("a/ü", "pair", "1")
    assert [output["name"] for output in document["outputs"]] == ["log", "sum"]
    assert outputs_of(answer)["sum"].tolist() == [[2, 3, 4, 6]]
    request["parameters"] = {"binary_data_output": True}
    request["outputs"] = [{"name": "sum", "parameters": {"binary_data": False}}]
    answer = v2.client.post("/v2/models/pair/infer", json=request)
    assert answer.json()["outputs"] == [{"name": "sum", "datatype": "FP32", "shape": [1, 4], "data": [2, 3, 4, 6]}]


def test_numbers_that_json_lacks_go_out_in_binary_form_only(v2):
    minus = {"shape": [1, 4], "datatype": "FP32", "data": [-1, 0, 0, 1]}
    request = {"inputs": [{"name": name, **minus} for name in "ab"]}
    status, sentence = error_of(v2.client.post("/v2/models/pair/infer", json=request))
    assert (status, "binary_data" in sentence) == (400, True)
    answer = outputs_of(
        v2.client.post("/v2/models/pair/infer", json=request | {"parameters": {"binary_data_output": True}})
    )
    assert np.isnan(answer["log"][0, 0])
    assert answer["log"][0, 1] == -np.inf


def test_pixels_are_classified_as_the_image_that_they_are(v2):
    described, data = binary_input("image", RED, "UINT8")
    body, headers = message({"inputs": [described], "parameters": {"binary_data_output": True}}, data)
    answer = v2.client.post(INFER, content=body, headers=headers)
    predicted = v2.client.post("/predict?top_k=6", content=plain_image("red")).json()["results"][0]["top"]
    row = outputs_of(answer)["probabilities"][1]
    assert {entry["index"]: entry["probability"] for entry in predicted} == pytest.approx(
        dict(enumerate(row)), abs=1e-6
    )
    assert answer.headers["x-provider"] == "cpu"
    assert "infer;dur=" in answer.headers["server-timing"]


@pytest.mark.parametrize("column", [False, True])
def test_encoded_images_of_many_sizes_get_the_labels_of_predict(v2, column):
    images = [noise_image(seed, "JPEG", (20 + 37 * seed, 300 - 31 * seed)) for seed in range(7)]
    images.append(plain_image("green", "WEBP", (400, 30)))
    described, data = image_input(*images, shape=[8, 1] if column else None)
    asked = [{"name": "probabilities", "parameters": {"classification": 3}}]
    body, headers = message({"inputs": [described], "outputs": asked}, data)
    found = outputs_of(v2.client.post(INFER, content=body, headers=headers))["probabilities"]
    assert found.shape == (8, 3)
    for image, row in zip(images, found, strict=True):
        top = v2.client.post("/predict?top_k=3", content=image).json()["results"][0]["top"]
        for entry, text in zip(top, row, strict=True):
            score, index, label = text.split(":")
            assert (int(index), label) == (entry["index"], entry["label"])
            assert float(score) == pytest.approx(entry["probability"], abs=2e-6)


def test_classification_without_labels_and_of_more_classes_than_there_are(v2):
    numbers = {"shape": [2, 4], "datatype": "FP32", "data": [0, 3, 1, 2, 5, 5, 5, 5]}
    request = {
        "inputs": [{"name": name, **numbers} for name in "ab"],
        "outputs": [{"name": "sum", "parameters": {"classification": 99}}],
    }
    output = v2.client.post("/v2/models/pair/infer", json=request).json()["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 4])
    assert output["data"] == [
        "6.000000:1", "4.000000:3", "2.000000:2", "0.000000:0",
        "10.000000:0", "10.000000:1", "10.000000:2", "10.000000:3",
    ]  # fmt: skip
    one = {"inputs": [{"name": "x", "shape": [3], "datatype": "INT64", "data": [1, -2, 7]}]}
    one["outputs"] = [{"name": "twice", "parameters": {"classification": 1, "binary_data": True}}]
    assert outputs_of(v2.client.post("/v2/models/fixed/infer", json=one))["twice"].tolist() == [b"14:2"]


def test_an_image_that_is_none_is_named(v2):
    described, data = image_input(plain_image("red"), b"no image")
    body, headers = message({"inputs": [described]}, data)
    status, sentence = error_of(v2.client.post(INFER, content=body, headers=headers))
    assert status == 422
    assert sentence.startswith("images[1]")


def test_a_single_image_may_come_without_sizes(v2):
    document = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES"}]}
    document["outputs"] = [{"name": "probabilities", "parameters": {"classification": 1}}]
    body, headers = message(document, plain_image("blue", "JPEG"))
    assert outputs_of(v2.client.post(INFER, content=body, headers=headers))["probabilities"][0, 0].endswith(":2:blue")


@pytest.mark.parametrize("body", [RED.tobytes(), plain_image("red"), plain_image("red", "JPEG", (99, 77))])
def test_a_raw_body_is_one_tensor(v2, body):
    found = outputs_of(v2.client.post(INFER, content=body, headers={"Inference-Header-Content-Length": "0"}))
    assert set(found["probabilities"].argmax(axis=1)) == {0}
    assert len(found["probabilities"]) == (2 if body == RED.tobytes() else 1)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_both_ways(v2, encoding):
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    described, data = binary_input("image", RED, "UINT8")
    # An answer that is worth compressing: the identifier comes back.
    document = {"inputs": [described], "id": "x" * 3000, "parameters": {"binary_data_output": True}}
    body, headers = message(document, data)
    headers |= {"Content-Encoding": encoding, "Accept-Encoding": encoding}
    with v2.client.stream("POST", INFER, content=pack(body), headers=headers) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == encoding
    assert len(raw) < 1000
    plain = zlib.decompress(raw, 47)
    length = int(answer.headers["inference-header-content-length"])
    assert json.loads(plain[:length])["id"] == "x" * 3000
    assert len(plain) == length + 2 * 6 * 4


def test_a_small_answer_stays_as_it_is(v2):
    answer = v2.client.post(INFER, json=pixels_request(), headers={"Accept-Encoding": "gzip;q=0, deflate"})
    assert "content-encoding" not in answer.headers


def test_timeout_in_microseconds_is_a_deadline(v2):
    assert v2.client.post(INFER, json=pixels_request(parameters={"timeout": 10_000_000})).status_code == 200
    assert v2.client.post(INFER, json=pixels_request(parameters={"timeout": 0})).status_code == 200
    status, sentence = error_of(v2.client.post(INFER, json=pixels_request(parameters={"timeout": 1})))
    assert (status, "deadline" in sentence) == (504, True)


def test_priorities_and_parameters_that_nobody_knows(v2):
    for priority in (0, 1, 4, 8, 100):
        parameters = {"priority": priority, "sequence_id": 0, "colour": "red", "weight": 0.5}
        assert v2.client.post(INFER, json=pixels_request(parameters=parameters)).status_code == 200
    assert [urgency_of(priority) for priority in (0, 1, 4, 8, 100)] == [3, 0, 3, 7, 7]


def test_too_many_rows(v2):
    request = {"inputs": [{"name": "image", "shape": [9, 16, 16, 3], "datatype": "UINT8", "data": [0]}]}
    status, sentence = error_of(v2.client.post(INFER, json=request))
    assert (status, "more than 8" in sentence) == (413, True)


@pytest.mark.parametrize("workers", [1, 2])
def test_statistics_agree_with_the_metrics(tmp_path, workers):
    make_bundle(tmp_path / "models")
    with convoy(tmp_path / "models", tmp_path / "log", workers=workers) as server:

        def ask(number: int) -> None:
            if number % 3 == 0:
                server.client.post("/predict", content=plain_image("red"))
            elif number % 3 == 1:
                described, data = image_input(plain_image("blue"), noise_image(number, "JPEG"))
                body, headers = message({"inputs": [described]}, data)
                server.client.post(INFER, content=body, headers=headers)
            else:
                server.client.post(INFER, json=pixels_request())

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(ask, range(60)))
        assert server.client.post(INFER, json={"inputs": []}).status_code == 400
        server.client.get("/v2/models/colours")
        (found,) = server.client.get("/v2/models/stats").json()["model_stats"]
        of_model = server.client.get("/v2/models/colours/versions/1/stats").json()["model_stats"]
        shown = server.metrics()
    assert [found] == of_model
    assert (found["name"], found["version"], found["inference_count"]) == ("colours", "1", 20 + 2 * 20 + 2 * 20)
    assert found["inference_count"] == shown['convoy_images_total{model="colours",version="1"}']
    assert found["execution_count"] == shown['convoy_batch_size_count{model="colours"}']
    stats = found["inference_stats"]
    assert all(type(stats[phase][field]) is int for phase in stats for field in ("count", "ns"))
    answered = {
        code: sum(
            value
            for key, value in shown.items()
            if key.startswith(f'convoy_requests_total{{code="{code}",model="colours"')
        )
        for code in (200, 400)
    }
    assert (stats["success"]["count"], stats["fail"]["count"]) == (answered[200], answered[400]) == (60, 1)
    total_s = sum(value for key, value in shown.items() if 'request_duration_seconds_sum{model="colours"' in key)
    assert stats["success"]["ns"] + stats["fail"]["ns"] == pytest.approx(total_s * 1e9, abs=2)
    for phase, stage in {
        "queue": "queue",
        "compute_input": "decode",
        "compute_infer": "infer",
        "compute_output": "post",
    }.items():
        labels = f'{{model="colours",stage="{stage}"}}'
        assert stats[phase]["count"] == shown[f"convoy_stage_duration_seconds_count{labels}"] == 60
        assert stats[phase]["ns"] == pytest.approx(shown[f"convoy_stage_duration_seconds_sum{labels}"] * 1e9, abs=1)
    assert {stats[phase]["count"] for phase in ("cache_hit", "cache_miss")} == {0}
    runs = {entry["batch_size"]: entry["compute_infer"] for entry in found["batch_stats"]}
    assert sum(size * run["count"] for size, run in runs.items()) == found["inference_count"]
    assert sum(run["count"] for run in runs.values()) == found["execution_count"]
    busy_s = sum(value for key, value in shown.items() if key.startswith("convoy_session_busy_seconds_total"))
    assert sum(run["ns"] for run in runs.values()) == pytest.approx(busy_s * 1e9, abs=50)
    assert found["last_inference"] == pytest.approx(
        shown['convoy_last_inference_timestamp_seconds{model="colours",version="1"}'] * 1000, abs=1
    )
