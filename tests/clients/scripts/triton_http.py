"""tritonclient over HTTP: the synchronous client, on gevent, and the asyncio one, on aiohttp."""

import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio as aio
from checks import best, every_kind, main, plain, raises
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

EVERY_KIND = every_kind()


def client_of(server, **options):
    return triton.InferenceServerClient(server.http, **options)


def image_input(*colours, binary=True):
    pixels = plain(*colours)
    tensor = triton.InferInput("image", pixels.shape, "UINT8")
    return [tensor.set_data_from_numpy(pixels, binary_data=binary)]


def encoded_input(server, *names):
    files = np.array([(Path(server.images) / name).read_bytes() for name in names], np.object_)
    tensor = triton.InferInput("image", files.shape, "BYTES")
    return [tensor.set_data_from_numpy(files)]


def every_input(binary=True):
    """One input of each kind; JSON carries all but FP16."""
    tensors = []
    for name, array in EVERY_KIND.items():
        tensor = triton.InferInput(name, array.shape, name)
        assert name in ("BYTES", np_to_triton_dtype(array.dtype))
        tensors.append(tensor.set_data_from_numpy(array, binary_data=binary or name == "FP16"))
    return tensors


def assert_every_kind(result):
    for name, array in EVERY_KIND.items():
        found = result.as_numpy(f"{name}_out")
        if name == "BYTES":  # over JSON they come as text
            found = np.array([[item if isinstance(item, bytes) else item.encode() for item in found[0]]], np.object_)
        np.testing.assert_array_equal(found, array, err_msg=name)


def check_health(server):
    """is_server_live, is_server_ready, is_model_ready"""
    client = client_of(server)
    assert client.is_server_live() is True
    assert client.is_server_ready() is True
    assert client.is_model_ready("colours") is True
    assert client.is_model_ready("colours", "1") is True
    assert client.is_model_ready("nobody") is False
    assert client.is_model_ready("colours", "77") is False


def check_server_metadata(server):
    """get_server_metadata"""
    answer = client_of(server).get_server_metadata()
    assert answer["name"] and answer["version"]
    assert {"binary_tensor_data", "classification", "model_configuration", "statistics"} <= set(answer["extensions"])


def check_model_metadata(server):
    """get_model_metadata"""
    for version in ("", "1"):
        answer = client_of(server).get_model_metadata("colours", version)
        assert answer["name"] == "colours" and "1" in answer["versions"] and answer["platform"]
        assert answer["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}]
        assert answer["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 6]}]


def check_model_config(server):
    """get_model_config"""
    answer = client_of(server).get_model_config("colours")
    assert answer["name"] == "colours" and answer["max_batch_size"] > 0
    [tensor] = answer["input"]
    assert (tensor["name"], tensor["data_type"], tensor["dims"]) == ("image", "TYPE_UINT8", [16, 16, 3])
    assert answer["output"][0]["data_type"] == "TYPE_FP32"


def check_repository_index(server):
    """get_model_repository_index"""
    index = {entry["name"]: entry for entry in client_of(server).get_model_repository_index()}
    assert index["colours"]["state"] == "READY" and index["colours"]["version"] == "1"


def check_statistics(server):
    """get_inference_statistics, of one model and of all"""
    client = client_of(server)
    client.infer("colours", image_input("red"))
    before = client.get_inference_statistics("colours")["model_stats"][0]
    client.infer("colours", image_input("red", "blue"))
    after = client.get_inference_statistics("colours", "1")["model_stats"][0]
    assert after["inference_count"] == before["inference_count"] + 2
    assert after["execution_count"] > before["execution_count"]
    for phase in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert after["inference_stats"][phase]["ns"] >= before["inference_stats"][phase]["ns"] >= 0
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert {entry["name"] for entry in client.get_inference_statistics()["model_stats"]} >= {"colours", "kinds"}


def check_infer_binary(server):
    """infer, binary tensors both ways (the default)"""
    result = client_of(server).infer("colours", image_input("red", "green", "blue"), request_id="seven")
    probabilities = result.as_numpy("probabilities")
    assert probabilities.dtype == np.float32 and probabilities.shape == (3, 6)
    assert best(probabilities) == ["red", "green", "blue"]
    answer = result.get_response()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("seven", "colours", "1")
    assert "binary_data_size" in result.get_output("probabilities")["parameters"]
    assert result.get_output("nothing") is None


def check_infer_json(server):
    """infer, JSON both ways"""
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=False)]
    result = client_of(server).infer("colours", image_input("blue", "red", binary=False), outputs=outputs)
    assert best(result.as_numpy("probabilities")) == ["blue", "red"]
    assert len(result.get_output("probabilities")["data"]) == 12


def check_infer_mixed(server):
    """infer, binary in and JSON out, and the other way round"""
    client = client_of(server)
    for sent, wanted in ((True, False), (False, True)):
        outputs = [triton.InferRequestedOutput("probabilities", binary_data=wanted)]
        result = client.infer("colours", image_input("green", binary=sent), outputs=outputs)
        assert best(result.as_numpy("probabilities")) == ["green"]


def check_infer_version(server):
    """infer, a version by its number"""
    result = client_of(server).infer("colours", image_input("red"), model_version="1")
    assert result.get_response()["model_version"] == "1"


def check_infer_compressed(server):
    """infer, request and response compressed, gzip and deflate"""
    client = client_of(server)
    for request in (None, "gzip", "deflate"):
        for response in (None, "gzip", "deflate"):
            for binary in (True, False):
                result = client.infer(
                    "colours",
                    image_input("red", "blue", binary=binary),
                    outputs=[triton.InferRequestedOutput("probabilities", binary_data=binary)],
                    request_compression_algorithm=request,
                    response_compression_algorithm=response,
                )
                assert best(result.as_numpy("probabilities")) == ["red", "blue"], (request, response, binary)


def check_every_datatype_binary(server):
    """infer, all 13 datatypes, binary (FP16 and BYTES among them)"""
    assert_every_kind(client_of(server).infer("kinds", every_input()))


def check_every_datatype_json(server):
    """infer, the 12 datatypes that JSON carries, beside FP16 in binary"""
    outputs = [triton.InferRequestedOutput(f"{name}_out", binary_data=name == "FP16") for name in EVERY_KIND]
    assert_every_kind(client_of(server).infer("kinds", every_input(binary=False), outputs=outputs))


def check_two_inputs(server):
    """infer, several inputs and outputs in any order, some of them asked for"""
    tensors = []
    for name, value in (("b", 5), ("a", 7)):
        array = np.full((2, 3), value, np.float32)
        tensors.append(triton.InferInput(name, array.shape, "FP32").set_data_from_numpy(array))
    client = client_of(server)
    result = client.infer("pair", tensors)
    np.testing.assert_array_equal(result.as_numpy("sum"), np.full((2, 3), 12, np.float32))
    np.testing.assert_array_equal(result.as_numpy("difference"), np.full((2, 3), 2, np.float32))
    result = client.infer("pair", tensors, outputs=[triton.InferRequestedOutput("difference")])
    assert result.as_numpy("sum") is None and result.as_numpy("difference").shape == (2, 3)


def check_encoded_images(server):
    """infer, JPEG and PNG files of different sizes as BYTES"""
    result = client_of(server).infer("colours", encoded_input(server, "red.jpg", "blue.png", "green.jpg"))
    assert best(result.as_numpy("probabilities")) == ["red", "blue", "green"]


def check_classification(server):
    """infer, class_count: `score:index:label`, of tensors and of encoded images, binary and JSON"""
    client = client_of(server)
    for tensors in (image_input("red", "blue"), encoded_input(server, "red.jpg", "blue.png")):
        for binary in (True, False):
            outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)]
            classes = client.infer("colours", tensors, outputs=outputs).as_numpy("probabilities")
            assert classes.shape == (2, 2)
            texts = [item.decode() if isinstance(item, bytes) else item for item in classes[:, 0]]
            assert [text.split(":")[1:] for text in texts] == [["0", "red"], ["2", "blue"]]
            assert float(texts[0].split(":")[0]) > 0.5


def check_parameters(server):
    """infer, timeout, priority and parameters of one's own"""
    result = client_of(server).infer(
        "colours", image_input("red"), timeout=10_000_000, priority=1, parameters={"mine": "x", "n": 1, "f": 0.5}
    )
    assert best(result.as_numpy("probabilities")) == ["red"]


def check_deadline(server):
    """infer, a timeout that cannot be met: an error, not an answer"""
    with raises(InferenceServerException, "deadline"):
        client_of(server).infer("slow", image_input("red", "blue"), timeout=2000)


def check_headers(server):
    """infer, headers and query parameters of one's own"""
    result = client_of(server).infer(
        "colours", image_input("red"), headers={"X-Request-Id": "mine"}, query_params={"tenant": "a"}
    )
    assert best(result.as_numpy("probabilities")) == ["red"]


def check_async_infer(server):
    """async_infer, 20 requests over 4 connections"""
    client = client_of(server, concurrency=4)
    colours = ["red", "green", "blue", "red", "green"] * 4
    waiting = [
        client.async_infer("colours", image_input(colour), request_id=str(n)) for n, colour in enumerate(colours)
    ]
    for n, (request, colour) in enumerate(zip(waiting, colours, strict=True)):
        result = request.get_result()
        assert result.get_response()["id"] == str(n)
        assert best(result.as_numpy("probabilities")) == [colour]


def check_bodies_by_hand(server):
    """generate_request_body, parse_response_body"""
    import urllib.request

    body, length = triton.InferenceServerClient.generate_request_body(image_input("blue"))
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(length)}
    request = urllib.request.Request(f"{server.url}/v2/models/colours/infer", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        length = answer.headers.get("Inference-Header-Content-Length")
        result = triton.InferenceServerClient.parse_response_body(
            answer.read(), header_length=int(length) if length else None
        )
    assert best(result.as_numpy("probabilities")) == ["blue"]


def check_errors(server):
    """errors: unknown model, version, input and output; wrong datatype, shape and size; none of it an empty message"""
    client = client_of(server)
    with raises(InferenceServerException, "nobody"):
        client.infer("nobody", image_input("red"))
    with raises(InferenceServerException, "77"):
        client.infer("colours", image_input("red"), model_version="77")
    with raises(InferenceServerException, "nobody"):
        client.get_model_metadata("nobody")
    pixels = plain("red")
    with raises(InferenceServerException, "other"):
        client.infer("colours", [triton.InferInput("other", pixels.shape, "UINT8").set_data_from_numpy(pixels)])
    floats = pixels.astype(np.float32)
    with raises(InferenceServerException, "image"):
        client.infer("colours", [triton.InferInput("image", floats.shape, "FP32").set_data_from_numpy(floats)])
    small = np.ascontiguousarray(pixels[:, :8])
    with raises(InferenceServerException, "image"):
        client.infer("colours", [triton.InferInput("image", small.shape, "UINT8").set_data_from_numpy(small)])
    with raises(InferenceServerException, "other"):
        client.infer("colours", image_input("red"), outputs=[triton.InferRequestedOutput("other")])
    wrong = image_input("red")
    wrong[0].set_shape([2, 16, 16, 3])
    with raises(InferenceServerException, "image"):
        client.infer("colours", wrong)
    with raises(InferenceServerException):
        client.infer("colours", [])
    # The connection still serves.
    assert best(client.infer("colours", image_input("red")).as_numpy("probabilities")) == ["red"]


def check_not_offered(server):
    """shared memory, trace and log settings: refused with a sentence"""
    client = client_of(server)
    for call in (
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.unregister_system_shared_memory,
        client.get_trace_settings,
        client.get_log_settings,
        lambda: client.register_system_shared_memory("a", "/a", 16),
        lambda: client.update_trace_settings(settings={"trace_level": ["OFF"]}),
        lambda: client.update_log_settings({"log_info": True}),
    ):
        with raises(InferenceServerException, "not offered"):
            call()
    assert client.is_server_live()


def check_load_without_a_key(server):
    """load_model, unload_model without a key: refused with a sentence"""
    client = client_of(server)
    for call in (client.load_model, client.unload_model):
        with raises(InferenceServerException, "key"):
            call("colours")
    assert client.is_model_ready("colours")


def check_with_a_key_infer(server):
    """infer where keys are asked for: with one, and refused without"""
    client, headers = client_of(server), {"Authorization": f"Bearer {server.key}"}
    result = client.infer("colours", image_input("red"), headers=headers)
    assert best(result.as_numpy("probabilities")) == ["red"]
    with raises(InferenceServerException, "401", "key"):
        client.infer("colours", image_input("red"))
    assert client.is_server_live() and client.is_server_ready()


def check_with_a_key_load(server):
    """load_model, unload_model with a key"""
    client, headers = client_of(server), {"Authorization": f"Bearer {server.key}"}
    assert client.is_model_ready("other", headers=headers)
    client.unload_model("other", headers=headers)
    assert not client.is_model_ready("other", headers=headers)
    with raises(InferenceServerException, "other"):
        client.infer("other", image_input("red"), headers=headers)
    client.load_model("other", headers=headers)
    assert client.is_model_ready("other", headers=headers)
    with raises(InferenceServerException, "nobody"):
        client.load_model("nobody", headers=headers)
    with raises(InferenceServerException, "models directory"):
        client.load_model("other", headers=headers, config='{"max_batch_size": 8}')
    files = {"file:1/model.onnx": b"not ours"}
    with raises(InferenceServerException, "models directory"):
        client.load_model("other", headers=headers, config="{}", files=files)
    assert best(client.infer("other", image_input("red"), headers=headers).as_numpy("probabilities")) == ["red"]


async def check_aio_health_and_metadata(server):
    """asyncio: health, metadata, configuration, statistics, repository index"""
    async with aio.InferenceServerClient(server.http) as client:
        assert await client.is_server_live() and await client.is_server_ready()
        assert await client.is_model_ready("colours") and not await client.is_model_ready("nobody")
        assert (await client.get_server_metadata())["name"]
        assert (await client.get_model_metadata("colours"))["inputs"][0]["name"] == "image"
        assert (await client.get_model_config("colours"))["input"][0]["dims"] == [16, 16, 3]
        assert (await client.get_inference_statistics("colours"))["model_stats"][0]["name"] == "colours"
        assert "colours" in {entry["name"] for entry in await client.get_model_repository_index()}


async def check_aio_infer(server):
    """asyncio: infer, binary and JSON, compressed and not, with classification, many at once"""
    import asyncio

    async with aio.InferenceServerClient(server.http) as client:

        async def ask(colour, binary, request, response):
            outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary)]
            result = await client.infer(
                "colours",
                image_input(colour, binary=binary),
                outputs=outputs,
                request_compression_algorithm=request,
                response_compression_algorithm=response,
            )
            assert best(result.as_numpy("probabilities")) == [colour], (colour, binary, request, response)

        ways = (None, "gzip", "deflate")
        await asyncio.gather(
            *(
                ask(colour, binary, request, response)
                for colour in ("red", "blue")
                for binary in (True, False)
                for request in ways
                for response in ways
            )
        )
        outputs = [triton.InferRequestedOutput("probabilities", class_count=1)]
        result = await client.infer("colours", image_input("green"), outputs=outputs)
        assert result.as_numpy("probabilities")[0][0].endswith(b":1:green")


async def check_aio_every_datatype(server):
    """asyncio: infer, all 13 datatypes"""
    async with aio.InferenceServerClient(server.http) as client:
        assert_every_kind(await client.infer("kinds", every_input()))


async def check_aio_errors(server):
    """asyncio: errors"""
    async with aio.InferenceServerClient(server.http) as client:
        with raises(InferenceServerException, "nobody"):
            await client.infer("nobody", image_input("red"))
        with raises(InferenceServerException, "not offered"):
            await client.get_system_shared_memory_status()
        assert await client.is_server_live()


if __name__ == "__main__":
    main(sys.modules["__main__"])
