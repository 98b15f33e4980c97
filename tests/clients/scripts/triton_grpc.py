"""tritonclient over gRPC: the synchronous client, its stream, and the asyncio one."""

import asyncio
import queue
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from checks import best, every_kind, main, plain, raises
from tritonclient.utils import InferenceServerException

EVERY_KIND = every_kind()


def client_of(server, **options):
    return triton.InferenceServerClient(server.grpc, **options)


def image_input(*colours):
    pixels = plain(*colours)
    return [triton.InferInput("image", pixels.shape, "UINT8").set_data_from_numpy(pixels)]


def encoded_input(server, *names):
    files = np.array([(Path(server.images) / name).read_bytes() for name in names], np.object_)
    return [triton.InferInput("image", files.shape, "BYTES").set_data_from_numpy(files)]


def every_input():
    return [triton.InferInput(name, array.shape, name).set_data_from_numpy(array) for name, array in EVERY_KIND.items()]


def assert_every_kind(result):
    for name, array in EVERY_KIND.items():
        np.testing.assert_array_equal(result.as_numpy(f"{name}_out"), array, err_msg=name)


def status_of(call) -> str:
    try:
        call()
    except InferenceServerException as error:
        return error.status().removeprefix("StatusCode.")
    return "OK"


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
    """get_server_metadata, as a message and as JSON"""
    client = client_of(server)
    answer = client.get_server_metadata()
    assert answer.name and answer.version and "classification" in answer.extensions
    assert client.get_server_metadata(as_json=True)["name"] == answer.name


def check_model_metadata(server):
    """get_model_metadata"""
    for version in ("", "1"):
        answer = client_of(server).get_model_metadata("colours", version)
        assert answer.name == "colours" and "1" in answer.versions and answer.platform
        [tensor], [output] = answer.inputs, answer.outputs
        assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("image", "UINT8", [-1, 16, 16, 3])
        assert (output.name, output.datatype, list(output.shape)) == ("probabilities", "FP32", [-1, 6])


def check_model_config(server):
    """get_model_config"""
    config = client_of(server).get_model_config("colours").config
    assert config.name == "colours" and config.max_batch_size > 0
    [tensor] = config.input
    assert (tensor.name, list(tensor.dims)) == ("image", [16, 16, 3])
    as_json = client_of(server).get_model_config("colours", as_json=True)["config"]
    assert as_json["input"][0]["data_type"] == "TYPE_UINT8"
    assert as_json["output"][0]["data_type"] == "TYPE_FP32"


def check_repository_index(server):
    """get_model_repository_index"""
    index = {model.name: model for model in client_of(server).get_model_repository_index().models}
    assert index["colours"].state == "READY" and index["colours"].version == "1"


def check_statistics(server):
    """get_inference_statistics, of one model and of all"""
    client = client_of(server)
    client.infer("colours", image_input("red"))
    [before] = client.get_inference_statistics("colours").model_stats
    client.infer("colours", image_input("red", "blue"))
    [after] = client.get_inference_statistics("colours", "1").model_stats
    assert after.inference_count == before.inference_count + 2
    assert after.execution_count > before.execution_count
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert after.batch_stats and after.last_inference
    assert {model.name for model in client.get_inference_statistics().model_stats} >= {"colours", "kinds"}


def check_infer(server):
    """infer"""
    result = client_of(server).infer("colours", image_input("red", "green", "blue"), request_id="seven")
    probabilities = result.as_numpy("probabilities")
    assert probabilities.dtype == np.float32 and probabilities.shape == (3, 6)
    assert best(probabilities) == ["red", "green", "blue"]
    answer = result.get_response()
    assert (answer.id, answer.model_name, answer.model_version) == ("seven", "colours", "1")
    assert result.get_response(as_json=True)["model_name"] == "colours"
    assert result.get_output("nothing") is None


def check_infer_version(server):
    """infer, a version by its number"""
    result = client_of(server).infer("colours", image_input("red"), model_version="1")
    assert result.get_response().model_version == "1"


def check_infer_compressed(server):
    """infer, compressed, gzip and deflate"""
    for algorithm in ("gzip", "deflate"):
        result = client_of(server).infer("colours", image_input("red", "blue"), compression_algorithm=algorithm)
        assert best(result.as_numpy("probabilities")) == ["red", "blue"]


def check_every_datatype(server):
    """infer, all 13 datatypes"""
    assert_every_kind(client_of(server).infer("kinds", every_input()))


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
    """infer, class_count: `score:index:label`, of tensors and of encoded images"""
    for tensors in (image_input("red", "blue"), encoded_input(server, "red.jpg", "blue.png")):
        outputs = [triton.InferRequestedOutput("probabilities", class_count=2)]
        classes = client_of(server).infer("colours", tensors, outputs=outputs).as_numpy("probabilities")
        assert classes.shape == (2, 2)
        assert [item.decode().split(":")[1:] for item in classes[:, 0]] == [["0", "red"], ["2", "blue"]]


def check_parameters(server):
    """infer, timeout, priority and parameters of one's own"""
    result = client_of(server).infer(
        "colours", image_input("red"), timeout=10_000_000, priority=1, parameters={"mine": "x", "n": 1, "f": 0.5}
    )
    assert best(result.as_numpy("probabilities")) == ["red"]


def check_deadline(server):
    """infer, a deadline that cannot be met: DEADLINE_EXCEEDED, by `timeout` and by `client_timeout`"""
    client = client_of(server)
    tensors = image_input("red", "blue")
    assert status_of(lambda: client.infer("slow", tensors, timeout=2000)) == "DEADLINE_EXCEEDED"
    assert status_of(lambda: client.infer("slow", tensors, client_timeout=0.02)) == "DEADLINE_EXCEEDED"


def check_headers(server):
    """infer, headers of one's own"""
    result = client_of(server).infer("colours", image_input("red"), headers={"x-request-id": "mine"})
    assert best(result.as_numpy("probabilities")) == ["red"]


def check_keep_alive(server):
    """KeepAliveOptions: pings oftener than gRPC's own servers allow"""
    options = triton.KeepAliveOptions(
        keepalive_time_ms=10_000, keepalive_timeout_ms=5000, keepalive_permit_without_calls=True
    )
    client = client_of(server, keepalive_options=options)
    assert best(client.infer("colours", image_input("red")).as_numpy("probabilities")) == ["red"]


def check_async_infer(server):
    """async_infer: callbacks, 20 requests at once, and a call that is cancelled"""
    client, answers = client_of(server), queue.Queue()
    colours = ["red", "green", "blue", "red", "green"] * 4
    for n, colour in enumerate(colours):
        client.async_infer(
            "colours", image_input(colour), lambda result, error: answers.put((result, error)), request_id=str(n)
        )
    for _ in colours:
        result, error = answers.get(timeout=10)
        assert error is None
        colour = colours[int(result.get_response().id)]
        assert best(result.as_numpy("probabilities")) == [colour]
    call = client.async_infer("slow", image_input("red"), lambda result, error: answers.put((result, error)))
    call.cancel()
    result, error = answers.get(timeout=10)
    assert result is None and error.status() == "StatusCode.CANCELLED"


def check_stream(server):
    """start_stream, async_stream_infer: 30 requests, answered in their order"""
    client, answers = client_of(server), queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    colours = ["red", "green", "blue"] * 10
    for n, colour in enumerate(colours):
        # A slow one first: those behind it wait for it.
        client.async_stream_infer("slow" if n == 0 else "colours", image_input(colour), request_id=str(n))
    for n, colour in enumerate(colours):
        result, error = answers.get(timeout=10)
        assert error is None and result.get_response().id == str(n)
        assert best(result.as_numpy("probabilities")) == [colour]
    client.stop_stream()


def check_stream_errors(server):
    """stream: a request that fails is answered with its sentence, and the stream goes on"""
    client, answers = client_of(server), queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for model in ("colours", "nobody", "colours"):
        client.async_stream_infer(model, image_input("red"), enable_empty_final_response=True)
    (first, none), (nothing, error), (last, no_error) = (answers.get(timeout=10) for _ in range(3))
    assert none is None and no_error is None and nothing is None and "nobody" in error.message()
    for result in (first, last):
        assert result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()


def check_stream_strict(server):
    """stream with `triton_grpc_error`: a request that fails ends the stream with its status"""
    client, answers = client_of(server), queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), headers={"triton_grpc_error": "true"})
    client.async_stream_infer("nobody", image_input("red"))
    result, error = answers.get(timeout=10)
    assert result is None and error.status() == "StatusCode.NOT_FOUND" and "nobody" in error.message()
    client.stop_stream()


def check_stream_cancelled(server):
    """stop_stream(cancel_requests=True): what waits is given up"""
    client, answers = client_of(server), queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for _ in range(5):
        client.async_stream_infer("slow", image_input("red", "blue"))
    time.sleep(0.1)
    client.stop_stream(cancel_requests=True)
    assert best(client.infer("colours", image_input("red")).as_numpy("probabilities")) == ["red"]


def check_errors(server):
    """errors: their status codes and sentences"""
    client = client_of(server)
    with raises(InferenceServerException, "NOT_FOUND", "nobody"):
        client.infer("nobody", image_input("red"))
    with raises(InferenceServerException, "NOT_FOUND", "77"):
        client.infer("colours", image_input("red"), model_version="77")
    with raises(InferenceServerException, "NOT_FOUND", "nobody"):
        client.get_model_metadata("nobody")
    pixels = plain("red")
    invalid = [
        [triton.InferInput("other", pixels.shape, "UINT8").set_data_from_numpy(pixels)],
        [triton.InferInput("image", pixels.shape, "FP32").set_data_from_numpy(pixels.astype(np.float32))],
        [triton.InferInput("image", (1, 8, 16, 3), "UINT8").set_data_from_numpy(pixels[:, :8].copy())],
        [image_input("red")[0].set_shape([2, 16, 16, 3])],
        [],
    ]
    for tensors in invalid:
        with raises(InferenceServerException, "INVALID_ARGUMENT", "image"):
            client.infer("colours", tensors)
    with raises(InferenceServerException, "INVALID_ARGUMENT", "other"):
        client.infer("colours", image_input("red"), outputs=[triton.InferRequestedOutput("other")])
    assert best(client.infer("colours", image_input("red")).as_numpy("probabilities")) == ["red"]


def check_not_offered(server):
    """shared memory, trace and log settings: UNIMPLEMENTED, with a sentence"""
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
        with raises(InferenceServerException, "UNIMPLEMENTED", "not offered"):
            call()


def check_load_without_a_key(server):
    """load_model, unload_model without a key: UNAUTHENTICATED"""
    client = client_of(server)
    for call in (client.load_model, client.unload_model):
        with raises(InferenceServerException, "UNAUTHENTICATED", "key"):
            call("colours")
    assert client.is_model_ready("colours")


def check_with_a_key_infer(server):
    """infer where keys are asked for: with one, and refused without"""
    client, headers = client_of(server), {"x-api-key": server.key}
    result = client.infer("colours", image_input("red"), headers=headers)
    assert best(result.as_numpy("probabilities")) == ["red"]
    with raises(InferenceServerException, "UNAUTHENTICATED", "key"):
        client.infer("colours", image_input("red"))
    assert client.is_server_live() and client.is_server_ready()


def check_with_a_key_load(server):
    """load_model, unload_model with a key"""
    client, headers = client_of(server), {"x-api-key": server.key}
    assert client.is_model_ready("other", headers=headers)
    client.unload_model("other", headers=headers)
    assert not client.is_model_ready("other", headers=headers)
    with raises(InferenceServerException, "other"):
        client.infer("other", image_input("red"), headers=headers)
    client.load_model("other", headers=headers)
    assert client.is_model_ready("other", headers=headers)
    with raises(InferenceServerException, "NOT_FOUND", "nobody"):
        client.load_model("nobody", headers=headers)
    with raises(InferenceServerException, "models directory"):
        client.load_model("other", headers=headers, config='{"max_batch_size": 8}')
    files = {"file:1/model.onnx": b"not ours"}
    with raises(InferenceServerException, "models directory"):
        client.load_model("other", headers=headers, config="{}", files=files)
    assert best(client.infer("other", image_input("red"), headers=headers).as_numpy("probabilities")) == ["red"]


async def check_aio_health_and_metadata(server):
    """asyncio: health, metadata, configuration, statistics, repository index"""
    async with aio.InferenceServerClient(server.grpc) as client:
        assert await client.is_server_live() and await client.is_server_ready()
        assert await client.is_model_ready("colours") and not await client.is_model_ready("nobody")
        assert (await client.get_server_metadata()).name
        assert (await client.get_model_metadata("colours")).inputs[0].name == "image"
        assert (await client.get_model_config("colours")).config.max_batch_size > 0
        assert (await client.get_inference_statistics("colours")).model_stats[0].name == "colours"
        assert "colours" in {model.name for model in (await client.get_model_repository_index()).models}


async def check_aio_infer(server):
    """asyncio: infer, compressed and not, with classification, many at once"""
    async with aio.InferenceServerClient(server.grpc) as client:

        async def ask(colour, algorithm):
            result = await client.infer("colours", image_input(colour), compression_algorithm=algorithm)
            assert best(result.as_numpy("probabilities")) == [colour]

        await asyncio.gather(
            *(ask(colour, way) for colour in ("red", "green", "blue") * 5 for way in (None, "gzip", "deflate"))
        )
        outputs = [triton.InferRequestedOutput("probabilities", class_count=1)]
        result = await client.infer("colours", image_input("green"), outputs=outputs)
        assert result.as_numpy("probabilities")[0][0].endswith(b":1:green")
        assert_every_kind(await client.infer("kinds", every_input()))


async def check_aio_stream(server):
    """asyncio: stream_infer, answers in order, a fault among them"""
    async with aio.InferenceServerClient(server.grpc) as client:

        async def requests():
            for n, colour in enumerate(("red", "nothing", "blue")):
                model = "nobody" if colour == "nothing" else "colours"
                inputs = image_input("red" if colour == "nothing" else colour)
                yield {"model_name": model, "inputs": inputs, "request_id": str(n)}

        answers = [answer async for answer in client.stream_infer(requests())]
        assert [error is None for _, error in answers] == [True, False, True]
        assert [result.get_response().id for result, error in answers if error is None] == ["0", "2"]
        assert best(answers[2][0].as_numpy("probabilities")) == ["blue"]


async def check_aio_errors(server):
    """asyncio: errors and deadlines"""
    async with aio.InferenceServerClient(server.grpc) as client:
        with raises(InferenceServerException, "NOT_FOUND", "nobody"):
            await client.infer("nobody", image_input("red"))
        with raises(InferenceServerException, "DEADLINE_EXCEEDED"):
            await client.infer("slow", image_input("red", "blue"), client_timeout=0.02)
        assert await client.is_server_live()


def check_raw_stub(server):
    """the generated stub itself: typed contents instead of raw ones, and the id in the trailing metadata"""
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="pair")
        for name, values in (("a", [1, 2, 3]), ("b", [4, 5, 6])):
            tensor = request.inputs.add(name=name, datatype="FP32", shape=[1, 3])
            tensor.contents.fp32_contents.extend(values)
        answer, call = stub.ModelInfer.with_call(request, metadata=(("x-request-id", "mine"),))
        assert ("x-request-id", "mine") in [tuple(item) for item in call.trailing_metadata()]
        place = [output.name for output in answer.outputs].index("sum")
        np.testing.assert_array_equal(np.frombuffer(answer.raw_output_contents[place], np.float32), [5, 7, 9])


if __name__ == "__main__":
    main(sys.modules["__main__"])
