"""The two OpenAPI documents: Convoy's own, and the Open Inference Protocol's.

Both are narrowed to one model, and every other body to what that model nearly takes: a random request never gets beyond
the first check. Deadlines that nobody could meet are left out: a 504 is the right answer to them.
"""

import copy
from typing import Any

_NUMBERS = {"type": "array", "items": {"type": "number", "minimum": -1e6, "maximum": 1e6}, "minItems": 3, "maxItems": 5}
_WHOLE = {
    "type": "array",
    "items": {"type": "integer", "minimum": -(2**40), "maximum": 2**40},
    "minItems": 2,
    "maxItems": 4,
}
_TEXTS = {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 1, "maxItems": 3}


def _near(
    datatype: str, inputs: dict[str, list[Any]], shape: list[int], data: dict[str, Any], outputs: list[str]
) -> dict[str, Any]:
    """Return the schema of requests that a model may take: `inputs` are exactly right, others of `data` nearly."""
    right = [{"name": name, "shape": shape, "datatype": datatype, "data": values} for name, values in inputs.items()]
    names = list(inputs)
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "name": {"enum": names},
            "shape": {"enum": [shape, [1, *shape]]},
            "datatype": {"enum": [datatype]},
            "data": data,
        },
    }
    parameters = {
        "type": "object",
        "properties": {
            "classification": {"type": "integer", "minimum": -1, "maximum": 9},
            "binary_data": {"type": "boolean"},
        },
    }
    asked = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"enum": outputs}, "parameters": parameters},
    }
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "inputs": {
                "anyOf": [
                    {"enum": [right, right[::-1]]},
                    {"type": "array", "items": tensor, "minItems": len(names), "maxItems": len(names)},
                ]
            },
            "outputs": {"type": "array", "items": asked, "maxItems": 2},
            "id": {"type": "string"},
            "parameters": {
                "type": "object",
                "properties": {
                    "timeout": {"type": "integer", "minimum": 10**7, "maximum": 10**8},
                    "priority": {"type": "integer", "minimum": 0, "maximum": 9},
                    "binary_data_output": {"type": "boolean"},
                },
            },
        },
    }


GOOD_REQUESTS = {
    "fixed": _near("INT64", {"x": [1, -2, 3]}, [3], _WHOLE, ["twice"]),
    "pair": _near("FP32", {"a": [1, 2, 3, 4], "b": [0.5, 0, 9, 1]}, [1, 4], _NUMBERS, ["sum", "log"]),
    "text": _near("BYTES", {"in_BYTES": ["a", ""]}, [1, 2], _TEXTS, ["out_BYTES"]),
    "colours": _near("UINT8", {"image": [128] * 768}, [1, 16, 16, 3], _WHOLE, ["probabilities"]),
}


def narrowed(document: dict[str, Any], model: str) -> dict[str, Any]:
    """Return a document whose paths mostly name a model that exists, and whose inference requests are nearly good."""
    document = copy.deepcopy(document)
    pinned = {
        "model": {"enum": [model, "none"]},
        "version": {"enum": ["1", "2"]},
        "Timeout-Ms": {"type": "integer", "minimum": 10_000},
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in pinned:
                    parameter["schema"] = pinned[parameter["name"]]
            if path.endswith("/infer"):
                kinds = operation["requestBody"]["content"]
                kinds["application/json"]["schema"] = {
                    "anyOf": [GOOD_REQUESTS[model], kinds["application/json"]["schema"]]
                }
    return document


def protocol() -> dict[str, Any]:
    """Return what the protocol's own document (version 2) demands of a server's routes and answers."""
    path_names = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in ("model", "version")
    ]
    error = _object(error="string")
    tensor = _object(name="string", datatype="string", shape={"type": "array", "items": {"type": "integer"}})
    given = copy.deepcopy(tensor)
    given["properties"]["data"] = {"type": "array"}
    asked = _object(name="string")
    for described in (given, asked):
        described["properties"]["parameters"] = {"type": "object"}
    request = _object(inputs={"type": "array", "items": given | {"required": ["name", "shape", "datatype", "data"]}})
    request["properties"] |= {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "outputs": {"type": "array", "items": asked},
    }
    model = _object(name="string", platform="string")
    model["properties"] |= {
        "versions": {"type": "array", "items": {"type": "string"}},
        "inputs": {"type": "array", "items": tensor},
        "outputs": {"type": "array", "items": tensor},
    }
    # The binary tensor extension is not in that document: `data` is required of an output only where it is in JSON.
    answer = _object(model_name="string", outputs={"type": "array", "items": given})
    answer["properties"] |= {"model_version": {"type": "string"}, "id": {"type": "string"}}
    server = _object(name="string", version="string", extensions={"type": "array", "items": {"type": "string"}})
    version = "/v2/models/{model}/versions/{version}"
    return {
        "openapi": "3.0.0",
        "info": {"title": "Open Inference Protocol", "version": "2.0"},
        "paths": {
            "/v2/health/live": {"get": _answers({"200": None})},
            "/v2/health/ready": {"get": _answers({"200": None})},
            "/v2/": {"get": _answers({"200": server, "400": error})},
            version: {"get": _answers({"200": model}, path_names)},
            f"{version}/ready": {"get": _answers({"200": None}, path_names)},
            f"{version}/infer": {
                "post": _answers({"200": answer, "400": error}, path_names)
                | {"requestBody": {"required": True, "content": {"application/json": {"schema": request}}}}
            },
        },
    }


def _object(**fields: Any) -> dict[str, Any]:
    """Return the schema of an object that has these fields; a field is a type's name, or a schema."""
    properties = {name: {"type": field} if isinstance(field, str) else field for name, field in fields.items()}
    return {"type": "object", "required": list(fields), "properties": properties}


def _answers(
    schemas: dict[str, dict[str, Any] | None], parameters: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, schema in schemas.items():
        responses[status] = {"description": status}
        if schema is not None:
            responses[status]["content"] = {"application/json": {"schema": schema}}
    return {"parameters": parameters or [], "responses": responses}
