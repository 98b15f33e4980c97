"""open-inference-openapi: the client generated from the protocol's own OpenAPI document, synchronous and not."""

import sys

from checks import COLOURS, LEVELS, main, raises
from open_inference.openapi.client import AsyncOpenInferenceClient, InferenceRequest, OpenInferenceClient
from open_inference.openapi.core.api_error import ApiError


def request_of(*colours, datatype="UINT8", id=None):
    pixels = [[[list(LEVELS[colour])] * 16] * 16 for colour in colours]
    tensor = {"name": "image", "shape": [len(colours), 16, 16, 3], "datatype": datatype, "data": pixels}
    return InferenceRequest(id=id, inputs=[tensor]) if id else InferenceRequest(inputs=[tensor])


def best(answer):
    [output] = answer.outputs
    rows, values = output.shape[0], output.data.__root__
    assert output.name == "probabilities" and output.shape[1] == len(values) // rows == len(COLOURS)
    rows = [values[start : start + len(COLOURS)] for start in range(0, len(values), len(COLOURS))]
    return [COLOURS[row.index(max(row))] for row in rows]


def check_health(server):
    """check_server_liveness, check_server_readiness, check_model_readiness, check_model_version_readiness"""
    client = OpenInferenceClient(base_url=server.url)
    client.check_server_liveness()
    client.check_server_readiness()
    client.check_model_readiness("colours")
    client.check_model_version_readiness("colours", "1")
    with raises(ApiError, "404"):
        client.check_model_readiness("nobody")


def check_metadata(server):
    """read_server_metadata, read_model_metadata, read_model_version_metadata"""
    client = OpenInferenceClient(base_url=server.url)
    assert client.read_server_metadata().name == "convoy"
    for answer in (client.read_model_metadata("colours"), client.read_model_version_metadata("colours", "1")):
        assert answer.name == "colours" and answer.inputs[0].name == "image"
        assert answer.outputs[0].shape == [-1, 6]


def check_infer(server):
    """model_infer, model_version_infer; it sends whole numbers as 220.0"""
    client = OpenInferenceClient(base_url=server.url)
    answer = client.model_infer("colours", request=request_of("red", "blue", id="seven"))
    assert best(answer) == ["red", "blue"]
    assert (answer.id, answer.model_name, answer.model_version) == ("seven", "colours", "1")
    answer = client.model_version_infer("colours", "1", request=request_of("green"))
    assert best(answer) == ["green"]


def check_errors(server):
    """errors, with their status and sentence"""
    client = OpenInferenceClient(base_url=server.url)
    with raises(ApiError, "404", "nobody"):
        client.model_infer("nobody", request=request_of("red"))
    with raises(ApiError, "400", "image"):
        client.model_infer("colours", request=request_of("red", datatype="FP32"))


async def check_asyncio(server):
    """asyncio: all of them"""
    client = AsyncOpenInferenceClient(base_url=server.url)
    await client.check_server_liveness()
    await client.check_server_readiness()
    await client.check_model_readiness("colours")
    assert (await client.read_server_metadata()).name == "convoy"
    assert (await client.read_model_metadata("colours")).name == "colours"
    assert best(await client.model_infer("colours", request=request_of("blue"))) == ["blue"]


def check_with_a_key_infer(server):
    """model_infer where keys are asked for, by an httpx client with the header"""
    import httpx

    with httpx.Client(headers={"X-API-Key": server.key}) as carrier:
        client = OpenInferenceClient(base_url=server.url, httpx_client=carrier)
        assert best(client.model_infer("colours", request=request_of("red"))) == ["red"]


if __name__ == "__main__":
    main(sys.modules["__main__"])
