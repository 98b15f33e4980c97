"""Arrays over the Open Inference Protocol: every type both ways, and answers that are none."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

import convoy
from app.tensors import DATATYPES
from app.v2.tensors import to_array, to_objects, to_strings
from convoy.tensors import pack, unpack
from tests.bundles import COLOURS
from tests.convoy.scripted import Looped, Threaded, answer, scripted

NUMBERS = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32",
           "float64")  # fmt: skip


def tensors(body: bytes, json_length: int) -> dict[str, np.ndarray]:
    """Read a request as the service does."""
    found, at = {}, json_length
    for entry in json.loads(body[:json_length])["inputs"]:
        size = entry["parameters"]["binary_data_size"]
        name, shape, data = entry["name"], tuple(entry["shape"]), body[at : at + size]
        if entry["datatype"] == "BYTES":
            found[name] = to_objects(to_strings(name, shape, data)).reshape(shape)
        else:
            found[name] = to_array(name, entry["datatype"], shape, data)
        at += size
    assert at == len(body)
    return found


def echoed(body: bytes, json_length: int) -> tuple[bytes, int]:
    """Make an answer whose outputs are the inputs."""
    head = json.dumps({"model_name": "echo", "outputs": json.loads(body[:json_length])["inputs"]}).encode()
    return head + body[json_length:], len(head)


shapes = numpy_strategies.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
numbers = st.sampled_from([np.dtype(name).newbyteorder(order) for name in NUMBERS for order in "<>"]).flatmap(
    lambda dtype: numpy_strategies.arrays(dtype, shapes)
)
strings = st.lists(st.binary(max_size=9) | st.text(max_size=9), max_size=6).map(
    lambda some: np.array([*some, None])[:-1]
)


@given(st.dictionaries(st.text(max_size=5), numbers | strings, min_size=1, max_size=4))
def test_what_is_sent_is_what_the_service_reads_and_what_comes_back(inputs):
    body, json_length = pack(inputs)
    read = tensors(body, json_length)
    back = unpack(*echoed(body, json_length))
    assert list(read) == list(back) == list(inputs)
    for name, array in inputs.items():
        if array.dtype == object:
            array = np.array([*(one.encode() if isinstance(one, str) else one for one in array), None])[:-1]
        for one in (read[name], back[name]):
            assert one.shape == array.shape and one.dtype == array.dtype.newbyteorder("=")
            same = one == array if array.dtype == object else np.array_equal(one, array, equal_nan=True)
            assert np.all(same)
        assert back[name].flags.writeable


def test_every_datatype_of_the_service_is_known():
    names = {
        "BYTES": "object",
        **{datatype: dtype.name for datatype, dtype in DATATYPES.items() if datatype != "BYTES"},
    }
    assert {name for datatype, name in names.items() if datatype != "BYTES"} == set(NUMBERS)
    for datatype, name in names.items():
        array = np.array([b"x"], object) if name == "object" else np.ones(2, name)
        body, json_length = pack({"x": array})
        assert json.loads(body[:json_length])["inputs"][0]["datatype"] == datatype


def test_arrays_of_text_are_strings():
    (found,) = tensors(*pack({"x": np.array([["grün", "b"]])})).values()
    assert found.tolist() == [["grün".encode(), b"b"]]


@pytest.mark.parametrize(
    ("inputs", "kind", "sentence"),
    [
        ({}, ValueError, "at least one input"),
        ({"x": [1, 2]}, TypeError, "Input 'x' is of type list"),
        ({"x": np.zeros(2, complex)}, TypeError, "Input 'x' is an array of complex128"),
        ({"x": np.array([1, None])}, TypeError, "Input 'x' holds a int"),
    ],
)
def test_what_the_protocol_cannot_carry_is_told_before_anything_is_sent(inputs, kind, sentence):
    with convoy.Client("http://127.0.0.1:1") as client, pytest.raises(kind, match=sentence):
        client.infer("m", inputs)


def test_an_answer_in_json_is_read_too():
    outputs = [
        {"name": "a", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4.5]},
        {"name": "b", "datatype": "BYTES", "shape": [1, 2], "data": [["x", "ü"]]},
    ]
    body = json.dumps({"outputs": outputs}).encode()
    found = unpack(body, len(body))
    assert found["a"].dtype == np.float32 and found["a"].tolist() == [[1, 2], [3, 4.5]]
    assert found["b"].tolist() == [[b"x", "ü".encode()]]


def test_a_model_answers_arrays(server):
    pixels = np.stack([np.broadcast_to(np.array(COLOURS[name], np.uint8), (16, 16, 3)) for name in ("red", "blue")])
    for make in (Threaded, Looped):
        with make(server.url) as client:
            found = client.infer("colours", {"image": pixels}, deadline_s=20, priority=2)
            assert list(found) == ["probabilities"] and found["probabilities"].shape == (2, len(COLOURS))
            assert found["probabilities"].argmax(axis=1).tolist() == [0, 2]
            with pytest.raises(convoy.RequestError) as caught:
                client.infer("colours", {"image": pixels.astype(np.float32)})
            assert caught.value.status == 400 and "image" in caught.value.sentence
            with pytest.raises(convoy.UnknownModelError):
                client.infer("nobody", {"image": pixels}, "3")


def fp32(count: int, size: int | None = None, **others: object) -> dict[str, object]:
    size = 4 * count if size is None else size
    return {"name": "x", "datatype": "FP32", "shape": [count], "parameters": {"binary_data_size": size}} | others


@pytest.mark.parametrize(
    ("outputs", "tail"),
    [
        ([fp32(2)], b"\0" * 4),
        ([fp32(2)], b"\0" * 12),
        ([fp32(2, -8)], b"\0" * 8),
        ([fp32(3, 8)], b"\0" * 8),
        ([fp32(2, datatype="FP8")], b"\0" * 8),
        ([fp32(2, datatype="BYTES")], b"\xff\xff\xff\xff\0\0\0\0"),
        ([fp32(2, datatype="BYTES")], b"\0" * 4 + b"\1\0\0"),
        ([fp32(2, shape=[-1])], b"\0" * 8 + b"x"),
        ([fp32(2, shape="2")], b"\0" * 8 + b"x"),
        ([{"name": "x", "datatype": "UINT8", "shape": [1], "data": [1e99]}], b""),
        ([{"name": "x", "datatype": "FP32", "shape": [2], "data": [[1], [2, 3]]}], b""),
        ([7], b""),
        (None, b""),
    ],
)
def test_an_answer_that_is_none_is_told_as_that(outputs, tail):
    head = json.dumps({"outputs": outputs}).encode()
    reply = answer(200, head + tail, Inference_Header_Content_Length=len(head))
    with scripted(reply) as server, Threaded(server.url) as client, pytest.raises(convoy.BadAnswerError):
        client.infer("m", {"x": np.zeros(2, np.float32)})


@pytest.mark.parametrize("length", ["9" * 30, "-1", "x", "1"])
def test_a_length_of_the_json_that_cannot_be_is_told_as_that(length):
    reply = answer(200, {"outputs": []}, Inference_Header_Content_Length=length)
    with scripted(reply) as server, Threaded(server.url) as client, pytest.raises(convoy.BadAnswerError):
        client.infer("m", {"x": np.zeros(2, np.float32)})


def test_a_full_service_is_asked_again_for_tensors_too():
    head = json.dumps({"outputs": [fp32(2)]}).encode()
    good = answer(200, head + np.array([1, math.pi], "<f4").tobytes(), Inference_Header_Content_Length=len(head))
    with scripted(answer(503, {"error": "Later.", "code": "x"}), good) as server, Threaded(server.url) as client:
        found = client.infer("a b", {"x": np.zeros(2, np.float32)}, version="3")
        assert found["x"].tolist() == [1, pytest.approx(math.pi)]
        (line, headers, body), _ = server.requests
        assert line == "POST /v2/models/a%20b/versions/3/infer" and len(client.slept) == 1
        assert len(body) == int(headers["inference-header-content-length"]) + 8
