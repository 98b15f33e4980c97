"""Our .proto against the clients' own generated files: the same names, numbers and types wherever both have a field."""

import json
import subprocess
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from app.grpc import inference_pb2
from tests.clients.environments import python_with

DUMP = """
import base64, importlib, json, os, sys
sys.path.insert(0, os.path.join(os.path.dirname(importlib.util.find_spec(sys.argv[1]).origin), sys.argv[2]))
modules = [importlib.import_module(name) for name in sys.argv[3:]]
print(json.dumps([base64.b64encode(module.DESCRIPTOR.serialized_pb).decode() for module in modules]))
"""


def files_of(environment: str, *where: str) -> list[descriptor_pb2.FileDescriptorProto]:
    import base64

    command = [python_with(environment), "-c", f"import importlib.util\n{DUMP}", *where]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(file)) for file in json.loads(result.stdout)]


def fields_of(files: list[descriptor_pb2.FileDescriptorProto]) -> dict[str, tuple[object, ...]]:
    """Return every field, method and enum value by its full name, with what the wire knows of it."""
    found: dict[str, tuple[object, ...]] = {}

    def walk(message: descriptor_pb2.DescriptorProto, prefix: str) -> None:
        for field in message.field:
            found[f"{prefix}.{field.name}"] = (field.number, field.type, field.label, field.type_name)
        for nested in message.nested_type:
            walk(nested, f"{prefix}.{nested.name}")
        for enum in message.enum_type:
            found.update({f"{prefix}.{enum.name}.{value.name}": (value.number,) for value in enum.value})

    for file in files:
        for message in file.message_type:
            walk(message, message.name)
        for enum in file.enum_type:
            found.update({f"{enum.name}.{value.name}": (value.number,) for value in enum.value})
        for service in file.service:
            for method in service.method:
                kinds = (method.input_type, method.output_type, method.client_streaming, method.server_streaming)
                found[f"{service.name}.{method.name}"] = kinds
    return found


@pytest.fixture(scope="module")
def ours() -> dict[str, tuple[object, ...]]:
    file = descriptor_pb2.FileDescriptorProto()
    inference_pb2.DESCRIPTOR.CopyToProto(file)
    return fields_of([file])


def test_it_is_tritons(ours):
    theirs = fields_of(files_of("triton", "tritonclient", "grpc", "model_config_pb2", "service_pb2"))
    differing = {name: (fact, theirs.get(name)) for name, fact in ours.items() if theirs.get(name) != fact}
    kserves = {
        "RepositoryModelLoadResponse.model_name",
        "RepositoryModelLoadResponse.isLoaded",
        "RepositoryModelUnloadResponse.model_name",
        "RepositoryModelUnloadResponse.isUnloaded",
    }
    assert set(differing) == kserves
    assert {name for name in kserves if name in theirs} == set()
    missing = {
        name.partition(".")[2] for name in theirs if name.startswith("GRPCInferenceService.") and name not in ours
    }
    assert all("SharedMemory" in name or name in ("TraceSetting", "LogSettings") for name in missing)


def test_it_is_kserves(ours):
    where = Path("protocol") / "grpc"
    theirs = fields_of(files_of("kserve", "kserve", str(where), "grpc_predict_v2_pb2"))
    differing = {name for name, fact in theirs.items() if ours.get(name) != fact}
    # What takes their request: a name that stands alone in the first field is the model's.
    assert differing == {"RepositoryModelLoadRequest.model_name", "RepositoryModelUnloadRequest.model_name"}
    assert all(ours[name.replace("model_name", "repository_name")] == theirs[name] for name in differing)


def test_this_test_sees_a_wrong_number(ours):
    assert ours["ModelInferRequest.raw_input_contents"] == (7, 12, 3, "")
    assert ours["ModelConfig.dynamic_batching"][0] == 11
