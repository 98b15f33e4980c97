"""gRPC against real processes: wire, statuses, deadlines, leaving, keys, TLS, health, reflection, workers, drain."""

import logging
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import DecodeError
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_tools import protoc

from app.errors import SettingsError, TooLargeError
from app.grpc import inference_pb2 as pb
from app.grpc import messages as messages_module
from app.grpc.entry import access_of, credentials_of
from app.grpc.methods import SERVICE
from app.grpc.server import _is_news
from app.keys import Access, make_key
from tests.app.watching import free_port, logged_with, messages, wait_for
from tests.bundles import COLOURS, make_bundle, plain_image
from tests.certificates import Pair, make_pair
from tests.servers import ConvoyProcess, alone, convoy

ROOT = Path(__file__).parents[2]
RED, BLUE = plain_image("red"), plain_image("blue")


class Caller:
    """One connection to a server's gRPC port."""

    def __init__(self, port: int, credentials: grpc.ChannelCredentials | None = None) -> None:
        # A pool of its own: channels to one address would share a connection.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        address = f"localhost:{port}"
        self.channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def method(self, name: str, response: type, stream: bool = False):
        kind = self.channel.stream_stream if stream else self.channel.unary_unary
        return kind(f"/{SERVICE}/{name}", lambda message: message.SerializeToString(), response.FromString)

    def infer(self, request: pb.ModelInferRequest, **options) -> pb.ModelInferResponse:
        return self.method("ModelInfer", pb.ModelInferResponse)(request, timeout=options.pop("timeout", 20), **options)

    def refusal(self, request: pb.ModelInferRequest, **options) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            self.infer(request, **options)
        return caught.value


def images(*files: bytes, model: str = "colours", shape: list[int] | None = None) -> pb.ModelInferRequest:
    """Return a request of encoded images."""
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="image", datatype="BYTES", shape=shape or [len(files)])
    request.raw_input_contents.append(b"".join(len(file).to_bytes(4, "little") + file for file in files))
    return request


def classes(response: pb.ModelInferResponse) -> list[str]:
    probabilities = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(response.outputs[0].shape)
    return [list(COLOURS)[index] for index in probabilities.argmax(1)]


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def served(tmp_path_factory, port: int) -> Iterator[ConvoyProcess]:
    folder = tmp_path_factory.mktemp("grpc")
    make_bundle(folder / "models", "colours")
    make_bundle(folder / "models", "slow", slow=True)
    settings = {"grpc_port": port, "max_batch": 2, "sessions": 1, "max_body_bytes": 1_000_000}
    with convoy(folder / "models", folder / "log", default_model="colours", **settings) as server:
        yield server


@pytest.fixture
def caller(served, port) -> Iterator[Caller]:
    with Caller(port) as caller:
        yield caller


def test_the_generated_files_are_what_the_proto_says(tmp_path):
    compiled = tmp_path / "compiled"
    arguments = ["protoc", f"-I{ROOT}", f"--descriptor_set_out={compiled}", "app/grpc/inference.proto"]
    assert protoc.main(arguments) == 0
    [file] = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file
    generated = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(generated)
    assert without_json_names(file) == without_json_names(generated)


def without_json_names(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    """Leave out what protoc adds for JSON, which is in the set and not in the generated files."""

    def strip(message: descriptor_pb2.DescriptorProto) -> None:
        for field in message.field:
            field.ClearField("json_name")
        for nested in message.nested_type:
            strip(nested)

    for message in file.message_type:
        strip(message)
    return file


def test_images_in_probabilities_out(caller):
    response, call = caller.method("ModelInfer", pb.ModelInferResponse).with_call(
        images(RED, BLUE), metadata=(("x-request-id", "mine"),)
    )
    assert classes(response) == ["red", "blue"]
    assert (response.model_name, response.model_version) == ("colours", "1")
    assert ("x-request-id", "mine") in [tuple(item) for item in call.trailing_metadata()]


def test_without_a_name_the_default_model_answers(caller):
    assert caller.infer(images(RED, model="")).model_name == "colours"


def test_typed_contents_are_taken_as_well(caller):
    request = pb.ModelInferRequest(model_name="colours")
    tensor = request.inputs.add(name="image", datatype="UINT8", shape=[1, 16, 16, 3])
    tensor.contents.uint_contents.extend([220, 30, 30] * 256)
    assert classes(caller.infer(request)) == ["red"]
    request = pb.ModelInferRequest(model_name="colours")
    request.inputs.add(name="image", datatype="BYTES", shape=[2, 1]).contents.bytes_contents.extend([RED, BLUE])
    assert classes(caller.infer(request)) == ["red", "blue"]


def broken(change) -> pb.ModelInferRequest:
    request = images(RED)
    change(request)
    return request


def in_wrong_list(request: pb.ModelInferRequest) -> None:
    request.ClearField("raw_input_contents")
    request.inputs[0].datatype = "UINT8"
    request.inputs[0].contents.fp32_contents.extend([1.0] * 768)


def fp16_in_contents(request: pb.ModelInferRequest) -> None:
    in_wrong_list(request)
    request.inputs[0].datatype = "FP16"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda request: request.raw_input_contents.append(b""), "1 inputs, but 2 raw_input_contents"),
        (lambda request: request.ClearField("raw_input_contents"), "Input 'image' has 0 values"),
        (lambda request: request.inputs[0].contents.bytes_contents.append(RED), "contents beside"),
        (in_wrong_list, "elements in fp32_contents; those of UINT8 belong in uint_contents"),
        (fp16_in_contents, "for which contents has no list"),
        (lambda request: request.inputs.add(name="image"), "2 inputs, but 1 raw_input_contents"),
        (lambda request: request.inputs.extend([request.inputs[0]] * 2000), "2,001 inputs; at most 1,000"),
        (lambda request: request.inputs[0].shape.__setitem__(0, -1), "shape"),
        (lambda request: request.inputs[0].shape.__setitem__(0, 2**62), "rows"),
        (lambda request: request.raw_input_contents.__setitem__(0, b"\xff\xff\xff\x7f"), "would end beyond"),
        (lambda request: request.parameters["timeout"].MergeFrom(pb.InferParameter(int64_param=-1)), "'timeout'"),
        (lambda request: request.outputs.add(name="other"), "'other'"),
    ],
)
def test_a_malformed_request_is_told_what_is_wrong(caller, change, sentence):
    refusal = caller.refusal(broken(change))
    assert refusal.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in refusal.details()
    assert classes(caller.infer(images(RED))) == ["red"]


def test_bytes_that_are_no_message_are_the_callers_mistake(caller, served):
    raw = caller.channel.unary_unary(f"/{SERVICE}/ModelInfer", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        raw(b"\xff" * 100)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "not what this method takes" in caught.value.details()
    assert not [line for line in served.lines() if line["level"] == "error"]


PARTS = {
    "inputs": lambda: pb.ModelInferRequest(inputs=[pb.ModelInferRequest.InferInputTensor(name="image")] * 40_000),
    "raws": lambda: pb.ModelInferRequest(raw_input_contents=[b"123456"] * 60_000),
    "strings": lambda: with_contents(bytes_contents=[b"123456"] * 60_000),
    "numbers": lambda: with_contents(uint_contents=[1] * 500_000),
}


def with_contents(**lists: object) -> pb.ModelInferRequest:
    contents = pb.InferTensorContents(**lists)
    tensor = pb.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=[1], contents=contents)
    return pb.ModelInferRequest(model_name="colours", inputs=[tensor])


@pytest.mark.parametrize("kind", PARTS)
def test_a_large_message_of_too_many_parts_is_never_parsed(monkeypatch, kind):
    monkeypatch.setattr(messages_module, "_CONTENTS", {**messages_module._CONTENTS})
    monkeypatch.setitem(messages_module._INPUT, 5, {**messages_module._CONTENTS, 4: 400_000})
    data = PARTS[kind]().SerializeToString()
    assert len(data) > messages_module.SMALL_MESSAGE
    with pytest.raises(TooLargeError, match="raw_input_contents"):
        messages_module.parse_inference(data)


def test_a_large_message_of_few_parts_is_parsed():
    for request in (
        pb.ModelInferRequest(model_name="a", raw_input_contents=[bytes(1_000_000)] * 3),
        with_contents(uint_contents=[300] * 400_000),
        with_contents(fp64_contents=[0.5] * 400_000),
        with_contents(bytes_contents=[bytes(100)] * 15_000),
    ):
        assert messages_module.parse_inference(request.SerializeToString()) == request


@pytest.mark.parametrize("cut", [1, 2, 300_000, 300_020])
def test_a_large_message_that_is_cut_off_is_told(cut):
    data = with_contents(uint_contents=[300] * 400_000).SerializeToString()
    with pytest.raises(DecodeError):
        messages_module.parse_inference(data[:-cut])


@alone
def test_a_refused_request_is_freed_with_its_answer(tmp_path):
    """Exceptions hold frames, and they the request: a ring would stay until the garbage collector comes."""
    make_bundle(tmp_path / "models")
    port = free_port()
    big = broken(lambda request: request.raw_input_contents.append(bytes(8_000_000)))
    with convoy(tmp_path / "models", tmp_path / "log", grpc_port=port) as server, Caller(port) as caller:
        caller.refusal(big)
        before = server.metrics()["process_resident_memory_bytes"]
        for _ in range(40):
            assert "raw_input_contents" in caller.refusal(big).details()
        assert server.metrics()["process_resident_memory_bytes"] - before < 160_000_000  # of 320 that came


def test_a_message_beyond_the_limit_is_refused_unpacked_or_not(caller):
    method = caller.method("ModelInfer", pb.ModelInferResponse)
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        with pytest.raises(grpc.RpcError) as caught:
            method(images(b"\0" * 3_000_000), compression=compression)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in caught.value.details()


def test_statuses_say_what_http_says(caller, served):
    assert caller.refusal(images(RED, model="nobody")).code() is grpc.StatusCode.NOT_FOUND
    refusal = caller.refusal(images(b"no image"))
    assert refusal.code() is grpc.StatusCode.INVALID_ARGUMENT
    over_http = served.client.post("/predict", content=b"no image", headers={"Content-Type": "image/png"}).json()
    assert refusal.details() == over_http["error"]
    assert dict(refusal.trailing_metadata())["code"] == over_http["code"]
    with pytest.raises(grpc.RpcError) as caught:
        caller.channel.unary_unary(f"/{SERVICE}/TraceSetting", None, None)(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED and "not offered" in caught.value.details()
    with pytest.raises(grpc.RpcError) as caught:
        caller.channel.unary_unary(f"/{SERVICE}/Nothing", None, None)(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_full_service_says_when_to_come_back(tmp_path):
    make_bundle(tmp_path / "models")
    port = free_port()
    with (
        convoy(tmp_path / "models", tmp_path / "log", grpc_port=port, model_limits="colours=1"),
        Caller(port) as caller,
    ):
        refusal = caller.refusal(images(RED, BLUE))
        assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "is full" in refusal.details()
        assert dict(refusal.trailing_metadata())["retry-after"] == "1"


def test_deadline_and_leaving_reach_the_batcher_and_are_counted_apart(caller, served):
    def dropped(reason: str) -> float:
        return sum(
            value
            for key, value in served.metrics().items()
            if key.startswith("convoy_dropped_total") and 'model="slow"' in key and f'reason="{reason}"' in key
        )

    before = {reason: dropped(reason) for reason in ("deadline", "disconnected", "draining")}
    late = broken(lambda request: request.parameters["timeout"].MergeFrom(pb.InferParameter(int64_param=3000)))
    late.model_name = "slow"
    refusal = caller.refusal(late)
    assert refusal.code() is grpc.StatusCode.DEADLINE_EXCEEDED and "stage" in refusal.details()
    # The client's own clock may tell first, and then it is a client that left.
    many = images(*[RED] * 16, model="slow")
    assert caller.refusal(many, timeout=0.3).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: dropped("deadline") + dropped("disconnected") == before["deadline"] + before["disconnected"] + 2)
    assert dropped("deadline") > before["deadline"]
    before["disconnected"] = dropped("disconnected")
    call = caller.method("ModelInfer", pb.ModelInferResponse).future(images(RED, BLUE, model="slow"))
    wait_for(lambda: served.metrics()['convoy_inflight_requests{model="slow"}'] == 1)
    call.cancel()
    wait_for(lambda: dropped("disconnected") == before["disconnected"] + 1)
    wait_for(lambda: served.metrics()['convoy_inflight_requests{model="slow"}'] == 0)
    assert dropped("draining") == before["draining"]
    assert classes(caller.infer(images(BLUE, model="slow"))) == ["blue"]


def test_a_call_that_is_over_before_its_answer_is_no_error_of_the_core():
    def record(error: type[Exception] | None) -> logging.LogRecord:
        told = None if error is None else (error, error(), None)
        return logging.LogRecord("grpc._cython.cygrpc", logging.ERROR, "", 0, "raised in core", None, told)

    assert not _is_news(record(cygrpc.ExecuteBatchError))
    assert _is_news(record(ValueError))
    assert _is_news(record(None))


def test_calls_are_counted_and_logged_like_requests(caller, served):
    route = f"/{SERVICE}/ModelInfer"
    good = f'convoy_requests_total{{code="200",model="colours",route="{route}",version="1"}}'
    bad = f'convoy_requests_total{{code="404",model="",route="{route}",version=""}}'
    before = served.metrics()
    caller.infer(images(RED, BLUE), metadata=(("x-request-id", "counted"),))
    caller.refusal(images(RED, model="nobody"))
    after = served.metrics()
    assert after[good] == before.get(good, 0) + 1
    assert after[bad] == before.get(bad, 0) + 1
    [line] = logged_with(served, "counted")
    assert (line["path"], line["status"], line["model"], line["images"]) == (route, 200, "colours", 2)


def test_a_stream_answers_in_order_and_outlives_a_fault(caller):
    wanted = ["slow", "colours", "nobody", "colours"]
    requests = [images(RED if n % 2 else BLUE, model=model) for n, model in enumerate(wanted)]
    for n, request in enumerate(requests):
        request.id = str(n)
    answers = list(caller.method("ModelStreamInfer", pb.ModelStreamInferResponse, stream=True)(iter(requests)))
    assert [answer.infer_response.id for answer in answers] == ["0", "1", "2", "3"]
    assert ["nobody" in answer.error_message for answer in answers] == [False, False, True, False]
    assert classes(answers[0].infer_response) == ["blue"] and classes(answers[3].infer_response) == ["red"]


def test_many_requests_of_one_stream_run_together(caller, served):
    def runs() -> float:
        return served.metrics()['convoy_batch_size_count{model="slow"}']

    before = runs()
    answers = caller.method("ModelStreamInfer", pb.ModelStreamInferResponse, stream=True)(
        images(RED, model="slow") for _ in range(6)
    )
    assert [classes(answer.infer_response) for answer in answers] == [["red"]] * 6
    assert runs() - before < 6  # batches of two: the second request did not wait for the first one's answer


def test_health_and_reflection(caller):
    health = health_pb2_grpc.HealthStub(caller.channel)
    for name in ("", SERVICE):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(caller.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    services, file = reflection.ServerReflectionInfo(iter(asked))
    assert SERVICE in {service.name for service in services.list_services_response.service}
    [described] = file.file_descriptor_response.file_descriptor_proto
    assert descriptor_pb2.FileDescriptorProto.FromString(described).package == "inference"


def test_keys_guard_methods_as_they_guard_routes(tmp_path):
    make_bundle(tmp_path / "models")
    keys = tmp_path / "keys"
    key, line = make_key("shop", frozenset({Access.PREDICT}))
    keys.write_text(line + "\n")
    port = free_port()
    with convoy(tmp_path / "models", tmp_path / "log", grpc_port=port, keys=keys) as server, Caller(port) as caller:
        assert caller.refusal(images(RED)).code() is grpc.StatusCode.UNAUTHENTICATED
        for metadata in ((("authorization", f"Bearer {key}"),), (("x-api-key", key),)):
            assert classes(caller.infer(images(RED), metadata=metadata)) == ["red"]
        wait_for(lambda: [line for line in server.lines() if line.get("key") == "shop"])
        load = caller.method("RepositoryModelLoad", pb.RepositoryModelLoadResponse)
        with pytest.raises(grpc.RpcError) as caught:
            load(pb.RepositoryModelLoadRequest(model_name="colours"), metadata=(("x-api-key", key),))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED and "admin" in caught.value.details()
        assert caller.method("ServerLive", pb.ServerLiveResponse)(pb.ServerLiveRequest()).live
        stream = caller.method("ModelStreamInfer", pb.ModelStreamInferResponse, stream=True)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream(iter([images(RED)])))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_tls_shows_the_certificate_of_https_and_a_renewed_one(tmp_path):
    make_bundle(tmp_path / "models")
    first, second = make_pair(tmp_path, "first"), make_pair(tmp_path, "second")
    own = Pair(tmp_path / "server.pem", tmp_path / "server.key")
    port = free_port()

    def show(pair: Pair) -> None:
        shutil.copy(pair.key, own.key)
        shutil.copy(pair.certificate, own.certificate)

    def trusting(pair: Pair) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(pair.certificate.read_bytes())

    show(first)
    settings = {"grpc_port": port, "tls_certificate": own.certificate, "tls_key": own.key}
    with convoy(tmp_path / "models", tmp_path / "log", verify=first.trusting(), **settings) as server:
        with Caller(port, trusting(first)) as caller:
            assert classes(caller.infer(images(RED))) == ["red"]
        with Caller(port) as plain:
            assert plain.refusal(images(RED)).code() is grpc.StatusCode.UNAVAILABLE
        show(second)
        wait_for(lambda: messages(server, "certificate read"))
        with Caller(port, trusting(second)) as caller:
            assert classes(caller.infer(images(RED))) == ["red"]
        with Caller(port, trusting(first)) as caller:
            assert caller.refusal(images(RED)).code() is grpc.StatusCode.UNAVAILABLE


def test_tls_asks_for_clients_certificates_where_https_does(tmp_path):
    make_bundle(tmp_path / "models")
    own, client = make_pair(tmp_path, "own"), make_pair(tmp_path, "client")
    context = own.trusting()
    context.load_cert_chain(client.certificate, client.key)
    port = free_port()
    settings = {"tls_certificate": own.certificate, "tls_key": own.key, "tls_client_ca": client.certificate}
    authority, certificate, key = (path.read_bytes() for path in (own.certificate, client.certificate, client.key))
    with convoy(tmp_path / "models", tmp_path / "log", verify=context, grpc_port=port, **settings):
        with Caller(port, grpc.ssl_channel_credentials(authority, key, certificate)) as known:
            assert classes(known.infer(images(RED))) == ["red"]
        with Caller(port, grpc.ssl_channel_credentials(authority)) as unknown:
            assert unknown.refusal(images(RED)).code() is grpc.StatusCode.UNAVAILABLE


def test_an_encrypted_key_is_one_sentence(tmp_path):
    certificate = SimpleNamespace(pem=(b"-----BEGIN ENCRYPTED PRIVATE KEY-----", b""))
    with pytest.raises(SettingsError, match="no encrypted key"):
        credentials_of(certificate, None)


def test_every_method_that_is_not_named_needs_a_key():
    needed = {method: access_of(f"/{SERVICE}/{method}") for method in ("ServerLive", "ModelReady", "ModelInfer", "New")}
    assert needed == {"ServerLive": None, "ModelReady": "predict", "ModelInfer": "predict", "New": "predict"}


@pytest.fixture
def pair_of_workers(tmp_path) -> Iterator[tuple[ConvoyProcess, int]]:
    make_bundle(tmp_path / "models", "colours")
    port = free_port()
    settings = {"grpc_port": port, "workers": 2, "sessions": 1}
    with convoy(tmp_path / "models", tmp_path / "log", **settings) as server:
        wait_for(lambda: len(messages(server, "listening for gRPC")) == 2)
        yield server, port


def test_workers_share_the_port_and_a_reload_loses_no_call(pair_of_workers):
    server, port = pair_of_workers
    for n in range(40):  # the kernel chooses by a hash of the address: 40 on one side would be a wonder
        with Caller(port) as caller:
            caller.infer(images(RED), metadata=(("x-request-id", f"shared-{n}"),))
    lines = [line for line in server.lines() if line.get("request_id", "").startswith("shared-")]
    assert {line["worker"] for line in lines} == {1, 2}
    faults, stop = [], threading.Event()

    def keep_calling() -> None:
        with Caller(port) as caller:
            while not stop.is_set():
                try:
                    caller.infer(images(RED), wait_for_ready=True)
                except grpc.RpcError as fault:
                    faults.append(fault)

    threads = [threading.Thread(target=keep_calling) for _ in range(4)]
    for thread in threads:
        thread.start()
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: messages(server, "reloaded"))
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults


def test_a_drain_answers_what_is_inside_and_waits_for_no_watcher(tmp_path):
    make_bundle(tmp_path / "models", "slow", slow=True)
    port = free_port()
    settings = {"grpc_port": port, "sessions": 1, "max_batch": 2, "drain_timeout_s": 600}
    with convoy(tmp_path / "models", tmp_path / "log", **settings) as server, Caller(port) as caller:
        watch = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        asked = threading.Event()
        stream = caller.method("ModelStreamInfer", pb.ModelStreamInferResponse, stream=True)(idle_after(RED, asked))
        assert classes(next(stream).infer_response) == ["red"]
        running = [
            caller.method("ModelInfer", pb.ModelInferResponse).future(images(RED, BLUE, model="slow")) for _ in range(3)
        ]
        wait_for(lambda: server.metrics()['convoy_inflight_requests{model="slow"}'] == 3)
        assert server.stop(timeout_s=60) == 0  # and not the 600 s for which watcher and stream would have stayed
        assert [classes(call.result()) for call in running] == [["red", "blue"]] * 3
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and "stopping" in caught.value.details()
        asked.set()


def test_a_second_signal_cuts_off_what_still_runs(tmp_path):
    make_bundle(tmp_path / "models", "slow", slow=True)
    port = free_port()
    settings = {"grpc_port": port, "sessions": 1, "max_batch": 1, "drain_timeout_s": 600}
    with convoy(tmp_path / "models", tmp_path / "log", **settings) as server, Caller(port) as caller:
        wait_for(lambda: messages(server, "listening for gRPC"))
        # Far more than the test waits for: 8 calls of 32 images, 0.1 s each, one at a time.
        calls = [
            caller.method("ModelInfer", pb.ModelInferResponse).future(images(*[RED] * 32, model="slow"))
            for _ in range(8)
        ]
        wait_for(lambda: server.metrics()['convoy_inflight_requests{model="slow"}'] == 8)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(2)
        assert server.stop(signal_number=signal.SIGINT, timeout_s=15) == 0
        assert {call.code() for call in calls} <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert grpc.StatusCode.UNAVAILABLE in {call.code() for call in calls}
        assert [line["status"] for line in server.lines() if line.get("code") == "draining"] != []


def test_what_outlasts_the_drain_is_cut_off_and_counted_so(tmp_path):
    make_bundle(tmp_path / "models", "slow", slow=True)
    port = free_port()
    settings = {"grpc_port": port, "sessions": 1, "max_batch": 1, "drain_timeout_s": 1}
    with convoy(tmp_path / "models", tmp_path / "log", **settings) as server, Caller(port) as caller:
        wait_for(lambda: messages(server, "listening for gRPC"))
        call = caller.method("ModelInfer", pb.ModelInferResponse).future(images(*[RED] * 64, model="slow"))
        wait_for(lambda: server.metrics()['convoy_inflight_requests{model="slow"}'] == 1)
        assert server.stop(timeout_s=60) == 0
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        assert [line["status"] for line in server.lines() if line.get("code") == "draining"] == [503]


def idle_after(file: bytes, done: threading.Event) -> Iterator[pb.ModelInferRequest]:
    yield images(file, model="slow")
    done.wait(20)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_in_use_is_one_sentence(served, port, tmp_path, workers):
    make_bundle(tmp_path / "models")
    command = [sys.executable, "-m", "app.cli", "serve", "--models", str(tmp_path / "models"), "--port", "0"]
    result = subprocess.run(
        [*command, "--grpc-port", str(port), "--workers", workers], capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 2
    assert f"port {port}" in result.stderr and "--grpc-port" in result.stderr


def test_without_the_extra_it_says_what_to_install(tmp_path):
    make_bundle(tmp_path / "models")
    hidden = "import sys; sys.modules['grpc'] = None; from app.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["serve", "--models", str(tmp_path / "models"), "--port", "0", "--grpc-port", str(free_port())]
    result = subprocess.run([sys.executable, "-c", hidden, *arguments], capture_output=True, text=True, timeout=30)
    assert result.returncode != 0
    assert "pip install 'convoy-serve[grpc]'" in result.stderr
