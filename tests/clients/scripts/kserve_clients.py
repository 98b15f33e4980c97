"""KServe's InferenceRESTClient, with the protocols v1 and v2, and its InferenceGRPCClient."""

import base64
import sys
from pathlib import Path

import grpc
import httpx
import numpy as np
from checks import best, main, plain, raises
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from kserve.protocol.infer_type import RequestedOutput


def rest(protocol):
    return InferenceRESTClient(RESTConfig(protocol=protocol))


def request_of(*colours, binary, outputs=None, **more):
    pixels = plain(*colours)
    tensor = InferInput("image", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    return InferRequest("colours", [tensor], request_outputs=outputs, **more)


def floats_of(binary):
    tensors = []
    for name, value in (("a", 7), ("b", 5)):
        tensor = InferInput(name, [2, 3], "FP32")
        tensor.set_data_from_numpy(np.full((2, 3), value, np.float32), binary_data=binary)
        tensors.append(tensor)
    return InferRequest("pair", tensors)


async def check_v2_health(server):
    """REST v2: is_server_live, is_server_ready, is_model_ready"""
    async with rest("v2") as client:
        assert await client.is_server_live(server.url) is True
        assert await client.is_server_ready(server.url) is True
        assert await client.is_model_ready(server.url, "colours") is True
        assert await client.is_model_ready(server.url, "nobody") is False


async def check_v2_infer(server):
    """REST v2: infer, JSON and binary, with an id"""
    async with rest("v2") as client:
        for binary in (True, False):
            request = request_of("red", "blue", binary=binary, request_id="seven")
            answer = await client.infer(server.url, request, "colours")
            assert (answer.id, answer.model_name) == ("seven", "colours")  # it drops the version
            assert best(answer.get_output_by_name("probabilities").as_numpy()) == ["red", "blue"]


async def check_v2_binary_output(server):
    """REST v2: infer, binary outputs, asked for by output and by request"""
    async with rest("v2") as client:
        asked = [RequestedOutput("probabilities", parameters={"binary_data": True})]
        for more in ({"outputs": asked}, {"parameters": {"binary_data_output": True}}):
            headers = {}
            answer = await client.infer(
                server.url, request_of("green", binary=True, **more), "colours", response_headers=headers
            )
            assert "inference-header-content-length" in headers
            assert best(answer.get_output_by_name("probabilities").as_numpy()) == ["green"]


async def check_v2_dict(server):
    """REST v2: infer with a dictionary, encoded images and classification in it"""
    async with rest("v2") as client:
        tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 16, 16, 3], "data": plain("red").tolist()}
        output = {"name": "probabilities", "parameters": {"classification": 1}}
        answer = await client.infer(server.url, {"inputs": [tensor], "outputs": [output]}, "colours")
        [text] = answer.get_output_by_name("probabilities").data
        assert text.endswith(":0:red")


async def check_v2_errors(server):
    """REST v2: errors, with the service's own sentence"""
    async with rest("v2") as client:
        with raises(httpx.HTTPStatusError, "404", "nobody"):
            await client.infer(server.url, request_of("red", binary=True), "nobody")
        with raises(httpx.HTTPStatusError, "400", "input"):
            await client.infer(server.url, {"inputs": []}, "colours")


async def check_v1_health(server):
    """REST v1: is_server_live, is_model_ready"""
    async with rest("v1") as client:
        assert await client.is_server_live(server.url) is True
        assert await client.is_model_ready(server.url, "colours") is True


async def check_v1_predict(server):
    """REST v1: infer, instances as base64 of encoded images and as numbers"""
    async with rest("v1") as client:
        files = [(Path(server.images) / name).read_bytes() for name in ("red.jpg", "blue.png")]
        encoded = [{"b64": base64.b64encode(file).decode()} for file in files]
        for instances in (encoded, plain("red", "blue").tolist()):
            answer = await client.infer(server.url, {"instances": instances}, "colours")
            assert len(answer["predictions"]) == 2


async def check_v1_errors(server):
    """REST v1: errors, and explain, which is not offered yet"""
    async with rest("v1") as client:
        with raises(httpx.HTTPStatusError, "404", "nobody"):
            await client.infer(server.url, {"instances": [1]}, "nobody")
        with raises(httpx.HTTPStatusError, "501"):
            await client.explain(server.url, "colours", {"instances": plain("red").tolist()})


async def check_grpc_health(server):
    """gRPC: is_server_live, is_server_ready, is_model_ready"""
    async with InferenceGRPCClient(server.grpc) as client:
        assert await client.is_server_live() is True
        assert await client.is_server_ready() is True
        assert await client.is_model_ready("colours") is True
        assert await client.is_model_ready("nobody") is False


async def check_grpc_infer(server):
    """gRPC: infer, raw and typed contents, with an id"""
    async with InferenceGRPCClient(server.grpc) as client:
        for binary in (True, False):
            answer = await client.infer(request_of("red", "blue", binary=binary, request_id="seven"))
            assert (answer.id, answer.model_name, answer.model_version) == ("seven", "colours", "1")
            assert best(answer.get_output_by_name("probabilities").as_numpy()) == ["red", "blue"]
            answer = await client.infer(floats_of(binary))
            np.testing.assert_array_equal(
                answer.get_output_by_name("sum").as_numpy().reshape(2, 3), np.full((2, 3), 12, np.float32)
            )


async def check_grpc_errors(server):
    """gRPC: errors: status and sentence"""
    async with InferenceGRPCClient(server.grpc) as client:
        request = request_of("red", binary=True)
        request.model_name = "nobody"
        with raises(grpc.RpcError, "NOT_FOUND", "nobody"):
            await client.infer(request)
        with raises(grpc.RpcError, "DEADLINE_EXCEEDED"):
            request.model_name = "slow"
            await client.infer(request, timeout=0.02)


async def check_with_a_key_infer(server):
    """REST and gRPC: infer where keys are asked for"""
    async with rest("v2") as client:
        answer = await client.infer(
            server.url, request_of("red", binary=True), "colours", headers={"Authorization": f"Bearer {server.key}"}
        )
        assert best(answer.get_output_by_name("probabilities").as_numpy()) == ["red"]
    async with InferenceGRPCClient(server.grpc) as client:
        answer = await client.infer(request_of("red", binary=True), headers=(("x-api-key", server.key),))
        assert best(answer.get_output_by_name("probabilities").as_numpy()) == ["red"]


def check_grpc_load_without_a_key(server):
    """gRPC: RepositoryModelLoad and -Unload in KServe's own form, without a key: UNAUTHENTICATED"""
    with grpc.insecure_channel(server.grpc) as channel:
        stub = GRPCInferenceServiceStub(channel)
        with raises(grpc.RpcError, "UNAUTHENTICATED"):
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="other"))


def check_with_a_key_grpc_load(server):
    """gRPC: RepositoryModelLoad and -Unload in KServe's own form, with a key"""
    metadata = (("authorization", f"Bearer {server.key}"),)
    with grpc.insecure_channel(server.grpc) as channel:
        stub = GRPCInferenceServiceStub(channel)
        answer = stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="other"), metadata=metadata)
        assert answer.model_name == "other" and answer.isUnloaded
        answer = stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="other"), metadata=metadata)
        assert answer.model_name == "other" and answer.isLoaded


if __name__ == "__main__":
    main(sys.modules["__main__"])
