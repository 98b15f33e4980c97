"""A hundred messages that mean harm, or none: each gets a sentence, little memory, and disturbs nobody."""

import gzip
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest

from app.v2.tensors import MAX_STRINGS
from tests.bundles import make_bundle, plain_image
from tests.servers import ConvoyProcess, convoy
from tests.v2 import image_input, make_echo, make_pair, message, strings

IMAGE, PAIR, TEXT = "/v2/models/colours/infer", "/v2/models/pair/infer", "/v2/models/text/infer"
SIDE = [1, 16, 16, 3]
PIXELS = bytes(16 * 16 * 3)
MEMORY_BYTES = 150_000_000
"""How much one of them may raise the process's peak: 94 MB were measured, for 2.4 million fractions in JSON."""


class Hostile(NamedTuple):
    body: bytes
    headers: dict[str, str] = {}  # noqa: RUF012 - nobody changes it
    path: str = IMAGE
    status: int = 400


def sent(document: object, **more) -> Hostile:
    return Hostile(json.dumps(document).encode(), **more)


def image(**changes) -> dict:
    """The input of a good request, with changes; a value of None takes the field out."""
    described = {"name": "image", "shape": SIDE, "datatype": "UINT8", "data": list(PIXELS)} | changes
    return {name: value for name, value in described.items() if value is not None}


def one(**changes) -> Hostile:
    return sent({"inputs": [image(**changes)]})


def pair(a: dict, b: dict, **more) -> Hostile:
    good = {"shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    return sent({"inputs": [{"name": "a"} | good | a, {"name": "b"} | good | b], **more}, path=PAIR)


def asked(*outputs: object, **more) -> Hostile:
    return sent({"inputs": [image()], "outputs": list(outputs), **more})


def binary(document: dict, *tails: bytes, length: str | None = None, **more) -> Hostile:
    body, headers = message(document, *tails)
    if length is not None:
        headers = {"Inference-Header-Content-Length": length}
    return Hostile(body, headers, **more)


def sized(size: object, tail: bytes = PIXELS, **changes) -> Hostile:
    described = image(data=None, parameters={"binary_data_size": size}) | changes
    return binary({"inputs": [described]}, tail)


def texts(data: bytes, shape: list[int], **more) -> Hostile:
    described = {"name": "in_BYTES", "datatype": "BYTES", "shape": shape}
    described["parameters"] = {"binary_data_size": len(data)}
    return binary({"inputs": [described]}, data, path=TEXT, **more)


def encoded(pack: Callable[[bytes], bytes], body: bytes, encoding: str = "gzip", **more) -> Hostile:
    return Hostile(pack(body), {"Content-Encoding": encoding}, **more)


def images(*found: bytes, **changes) -> Hostile:
    described, data = image_input(*found)
    status = changes.pop("status", 400)
    return binary({"inputs": [described | changes]}, data, status=status)


def data_in_json(text: bytes, datatype: str = "UINT8", **more) -> Hostile:
    start = b'{"inputs":[{"name":"image","shape":[1,16,16,3],"datatype":"%s","data":[' % datatype.encode()
    return Hostile(start + text + b"]}]}", **more)


def png_of(width: int, height: int) -> bytes:
    """A PNG file that says it has so many pixels, and has few."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


GOOD = json.dumps({"inputs": [image()]}).encode()
RED = plain_image("red")
BIG = 2**63 - 1

MESSAGES: dict[str, Hostile] = {
    # What is no request at all
    "nothing": Hostile(b""),
    "not json": Hostile(b"image"),
    "an image where json is due": Hostile(plain_image("red")),
    "a number": sent(1),
    "a list": sent([image()]),
    "null": sent(None),
    "a string": sent("inputs"),
    "json cut short": Hostile(GOOD[:-2]),
    "json and more": Hostile(GOOD + b"{}"),
    "invalid utf-8": Hostile(b'{"inputs": "\xff\xfe"}'),
    "half a surrogate pair": Hostile(GOOD.replace(b'"UINT8"', b'"\\ud800"')),
    "a byte order mark": Hostile(b"\xef\xbb\xbf" + GOOD),
    "utf-16": Hostile(GOOD.decode().encode("utf-16")),
    "NaN": Hostile(b'{"inputs": NaN}'),
    "deep lists": Hostile(b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": Hostile(b'{"inputs":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    "deep data": data_in_json(b"[" * 150 + b"]" * 150),
    # Inputs
    "no inputs": sent({}),
    "inputs empty": sent({"inputs": []}),
    "inputs an object": sent({"inputs": image()}),
    "inputs of numbers": sent({"inputs": [1, 2]}),
    "inputs null": sent({"inputs": [None]}),
    "an input twice": sent({"inputs": [image(), image()]}),
    "an input twice, another missing": pair({}, {"name": "a"}),
    "an input missing": sent({"inputs": [image(name="a")]}, path=PAIR),
    "an unknown input": one(name="picture"),
    "a name of a megabyte": one(name="x" * 1_000_000),
    "no name": one(name=None),
    "a name that is a number": one(name=7),
    "a million inputs": Hostile(b'{"inputs":[' + b"{}," * 999_999 + b"{}]}", status=413),
    "ten thousand inputs": sent({"inputs": [image(data=[1])] * 10_000}),
    "parameters a list": one(parameters=[1]),
    # Datatypes
    "no datatype": one(datatype=None),
    "an unknown datatype": one(datatype="UINT7"),
    "a datatype in small letters": one(datatype="uint8"),
    "a datatype that is a number": one(datatype=8),
    "another datatype": one(datatype="FP32"),
    "text where pixels are due": one(datatype="BYTES", data=["red"]),
    # Shapes
    "no shape": one(shape=None),
    "a shape that is a number": one(shape=768),
    "a shape of strings": one(shape=["1", "16", "16", "3"]),
    "a shape of fractions": one(shape=[1.0, 16, 16, 3]),
    "a shape of bools": one(shape=[True, 16, 16, 3]),
    "a shape of nulls": one(shape=[None, 16, 16, 3]),
    "an empty shape": one(shape=[]),
    "a negative dimension": one(shape=[-1, 16, 16, 3]),
    "two negative dimensions": one(shape=[-1, -16, 16, 3]),
    "no rows": one(shape=[0, 16, 16, 3], data=[]),
    "another height": one(shape=[1, 8, 32, 3]),
    "too many dimensions": one(shape=[1, 1, 16, 16, 3]),
    "ten thousand dimensions": one(shape=[1] * 10_000),
    "a shape beyond int64": one(shape=[2**63, 16, 16, 3]),
    "a dimension of a thousand digits": Hostile(GOOD.replace(b'"shape": [1', b'"shape": [1' + b"0" * 1000)),
    "a shape whose product overflows": Hostile(one(shape=[BIG, 16, 16, 3]).body, status=413),
    "a shape that would fill the memory": Hostile(one(shape=[10**9, 16, 16, 3]).body, status=413),
    "rows that disagree": pair({}, {"shape": [2, 4], "data": [1] * 8}),
    # Data in JSON
    "no data": one(data=None),
    "data an object": one(data={"0": 1}),
    "data a string": one(data="0" * 768),
    "data null": Hostile(GOOD.replace(b'"data": [', b'"data": null, "not": [')),
    "too little data": one(data=[0] * 767),
    "too much data": one(data=[0] * 769),
    "empty data": one(data=[]),
    "empty lists": one(data=[[[[]]]]),
    "nested otherwise": one(data=[[0] * 768]),
    "nested and ragged": one(data=[[[[0, 0, 0]] * 16] * 15 + [[[0, 0, 0]] * 15 + [[0, 0, 0, 0]]]]),
    "lists and numbers": one(data=[[0] * 767, 0]),
    "numbers beyond the range": one(data=[256] + [0] * 767),
    "negative numbers": one(data=[-1] + [0] * 767),
    "fractions": one(data=[0.5] + [0] * 767),
    "bools": one(data=[True] + [0] * 767),
    "strings": one(data=["0"] + [0] * 767),
    "a string that would widen all": one(data=["x" * 1_000_000] + [0] * 767),
    "nulls": one(data=[None] + [0] * 767),
    "objects": one(data=[{}] + [0] * 767),
    "a number of a thousand digits": one(data=[10**1000] + [0] * 767),
    "NaN in data": Hostile(GOOD.replace(b'"data": [0', b'"data": [NaN')),
    "infinity in data": Hostile(pair({}, {}).body.replace(b"[1, 2, 3, 4]", b"[Infinity, 2, 3, 4]"), path=PAIR),
    "1e999 in data": Hostile(pair({}, {}).body.replace(b"[1, 2, 3, 4]", b"[1e999, 2, 3, 4]"), path=PAIR),
    "beyond FP32": pair({"data": [1e39, 0, 0, 0]}, {}),
    "ten million numbers": data_in_json(b"0," * 10_000_000 + b"0", status=413),
    "as many numbers as are taken": data_in_json(b"255," * 2_400_000 + b"0"),
    "as many fractions as are taken": data_in_json(b"0.5," * 2_400_000 + b"0"),
    "two million lists": data_in_json(b"[]," * 2_000_000 + b"[]", status=413),
    # Binary data
    "a header length beyond the body": binary({"inputs": [image()]}, length="999999"),
    "a header length that is no number": binary({"inputs": [image()]}, length="many"),
    "a negative header length": binary({"inputs": [image()]}, length="-1"),
    "a header length of many digits": binary({"inputs": [image()]}, length="9" * 60),
    "a header length within the json": binary({"inputs": [image()]}, length="20"),
    "a header length and no body": Hostile(b"", {"Inference-Header-Content-Length": "0"}, status=422),
    "sizes without the header": sent({"inputs": [image(data=None, parameters={"binary_data_size": 768})]}),
    "a size beyond the body": sized(769),
    "a size below the tensor": sized(767, PIXELS[:767]),
    "a negative size": sized(-1),
    "a size that is a string": sized("768"),
    "a size that is a fraction": sized(768.0),
    "a size beyond int64": sized(2**70),
    "data and a size": sized(768, data=[0] * 768),
    "bytes of no input": binary({"inputs": [image()]}, b"more"),
    "sizes that overlap": binary(
        {
            "inputs": [
                {"name": name, "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
                for name in "ab"
            ]
        },
        bytes(20),
        path=PAIR,
    ),
    "a size of a thousand digits": sized(10**1000),
    "a raw body of no pixels and no image": Hostile(b"x" * 100, {"Inference-Header-Content-Length": "0"}, status=422),
    "a raw body for two inputs": Hostile(bytes(16), {"Inference-Header-Content-Length": "0"}, path=PAIR),
    "a length past the end": texts(struct.pack("<I", 100) + b"short", [1, 1]),
    "a length of four gigabytes": texts(struct.pack("<I", 2**32 - 1) + b"x", [1, 1]),
    "half a length": texts(strings(b"a") + b"\x01\x00", [1, 2]),
    "elements that end early": texts(strings(b"a", b"b"), [1, 1]),
    "text that is no utf-8": texts(strings(b"\xff\xfe"), [1, 1]),
    "a billion empty strings": texts(bytes(400), [1, 10**9]),
    "one empty string too many": texts(bytes(4 * MAX_STRINGS + 4), [1, MAX_STRINGS + 1]),
    "as many strings as are taken, the last no utf-8": texts(
        strings(*[b"ab"] * (MAX_STRINGS - 1), b"\xff"), [1, MAX_STRINGS]
    ),
    "strings whose number overflows": texts(bytes(8), [1, BIG]),
    "images past the end": sized(8, bytes(3) + b"\xff" * 5, datatype="BYTES", shape=[2]),
    "images in three dimensions": images(RED, shape=[1, 1, 1]),
    "images in two columns": images(RED, RED, shape=[1, 2]),
    "a thousand images": images(*[b"x"] * 1000, status=413),
    "an image that is none": images(b"\xff\xd8\xff\xe0", status=422),
    "an empty image": images(b"", status=422),
    "an image bomb": images(png_of(30_000, 30_000), status=413),
    # Outputs and parameters
    "outputs an object": sent({"inputs": [image()], "outputs": {}}),
    "outputs of strings": asked("probabilities"),
    "an unknown output": asked({"name": "logits"}),
    "an output twice": asked({"name": "probabilities"}, {"name": "probabilities"}),
    "an output without a name": asked({}),
    "a million outputs": Hostile(GOOD[:-1] + b',"outputs":[' + b"{}," * 999_999 + b"{}]}", status=413),
    "a huge classification": asked({"name": "probabilities", "parameters": {"classification": 2**63}}),
    "a negative classification": asked({"name": "probabilities", "parameters": {"classification": -1}}),
    "a classification in words": asked({"name": "probabilities", "parameters": {"classification": "all"}}),
    "a classification of text": sent(
        {
            "inputs": [{"name": "in_BYTES", "datatype": "BYTES", "shape": [1, 1], "data": ["a"]}],
            "outputs": [{"name": "out_BYTES", "parameters": {"classification": 1}}],
        },
        path=TEXT,
    ),
    "binary_data in words": asked({"name": "probabilities", "parameters": {"binary_data": "yes"}}),
    "an output in shared memory": asked({"name": "probabilities", "parameters": {"shared_memory_region": "r"}}),
    "an input in shared memory": one(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 768}),
    "a request in shared memory": asked(parameters={"shared_memory_region": "r"}),
    "an id that is a number": asked(id=7),
    "parameters a string": asked(parameters="timeout"),
    "a parameter that is a list": asked(parameters={"colours": [1]}),
    "a parameter that is reserved": asked(parameters={"triton_final_response": True}),
    "a negative timeout": asked(parameters={"timeout": -1}),
    "a timeout in words": asked(parameters={"timeout": "soon"}),
    "a timeout of ages": asked(parameters={"timeout": 2**80}),
    "a timeout that is true": asked(parameters={"timeout": True}),
    "a negative priority": asked(parameters={"priority": -1}),
    "a priority of fractions": asked(parameters={"priority": 1.5}),
    # Compression
    "a gzip bomb": encoded(gzip.compress, bytes(200_000_000), status=413),
    "a deflate bomb": encoded(zlib.compress, bytes(200_000_000), "deflate", status=413),
    "a bomb of json": encoded(gzip.compress, b'{"inputs":[' + b"[]," * 8_000_000 + b"[]]}", status=413),
    "gzip that is none": encoded(bytes, GOOD),
    "gzip cut short": encoded(lambda body: gzip.compress(body)[:-9], GOOD),
    "gzip and more": encoded(lambda body: gzip.compress(body) + b"more", GOOD),
    "gzip damaged": encoded(lambda body: gzip.compress(body)[:-8] + bytes(8), GOOD),
    "an unknown encoding": encoded(bytes, GOOD, "br", status=415),
    "two encodings": encoded(gzip.compress, GOOD, "gzip, gzip", status=415),
}  # fmt: skip
assert len(MESSAGES) >= 100


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Iterator[ConvoyProcess]:
    root = tmp_path_factory.mktemp("hostile")
    make_bundle(root / "models")
    make_pair(root / "models")
    make_echo(root / "models", "text", ("BYTES",))
    with convoy(root / "models", root / "log", default_model="colours") as process:
        for path, body, headers in GOOD_ONES:  # what a first request costs is not the hostile ones' doing
            assert process.client.post(path, content=body, headers=headers).status_code == 200
        Path(f"/proc/{process.process.pid}/clear_refs").write_text("5")  # the peak starts anew
        yield process


GOOD_ONES = [
    (IMAGE, GOOD, {}),
    (PAIR, pair({}, {}).body, {}),
    (TEXT, *texts(strings(b"a", b"b"), [1, 2])[:2]),
    ("/predict", plain_image("green"), {}),
]


def memory_of(server: ConvoyProcess, field: str) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def test_what_the_hostile_ones_are_made_of_is_good(target):
    for path, body, headers in GOOD_ONES:
        assert target.client.post(path, content=body, headers=headers).status_code == 200


@pytest.mark.parametrize("name", MESSAGES)
def test_a_hostile_message_gets_a_sentence_and_disturbs_nobody(target, name):
    hostile = MESSAGES[name]
    before = memory_of(target, "VmRSS")
    with httpx.Client(base_url=target.url, timeout=30) as client:
        answer = client.post(hostile.path, content=hostile.body, headers=hostile.headers)
    assert answer.status_code == hostile.status, answer.text
    found = answer.json()
    assert set(found) == {"error", "code"}
    assert 10 < len(found["error"]) < 500
    assert found["error"].rstrip().endswith("."), found["error"]
    neighbour = target.client.post("/predict", content=plain_image("green"))
    assert neighbour.json()["results"][0]["top"][0]["label"] == "green"
    assert memory_of(target, "VmHWM") - before < MEMORY_BYTES
    Path(f"/proc/{target.process.pid}/clear_refs").write_text("5")


def test_nothing_broke_inside(target):
    errors = [line for line in target.lines() if line["level"] in ("error", "critical")]
    assert errors == []
    assert np.isclose(target.metrics()["convoy_inflight_bytes"], 0)
