"""Runs a client script's checks and tells their outcomes as JSON. Standard library only: no environment has our code.

A check is a function `check_…(server)`, plain or async; its docstring is its row in docs/clients.md. What it raises is
its failure. Those that begin with `check_with_a_key` get the server `guarded`, which asks for keys, the others `open`:
`python SCRIPT '{"open": {"url": "http://HOST:PORT", "http": "HOST:PORT", "grpc": "HOST:PORT", "images": "DIR"}}'` runs
them by hand, against any server, all or those named behind it; without one of the two servers its checks are left out.
"""

import asyncio
import inspect
import json
import sys
import traceback
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

# Taken away before a client is imported: kserve reads the command line of whoever imports it, and ends the process.
ARGUMENTS, sys.argv[1:] = sys.argv[1:], []

COLOURS = ("red", "green", "blue", "white", "black", "gray")
"""Classes of the model `colours`: uint8 images of 16×16 pixels in, six probabilities out."""
LEVELS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


@contextmanager
def raises(kind: type[BaseException], *parts: str):
    """Expect an error whose text holds all of `parts`."""
    try:
        yield
    except kind as error:
        text = str(error)
        missing = [part for part in parts if part not in text]
        assert not missing, f"{missing} is not in: {text}"
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


def plain(*colours: str):
    """Return images of one colour each: uint8 `[n, 16, 16, 3]`."""
    import numpy as np

    levels = np.array([LEVELS[colour] for colour in colours], np.uint8)
    return np.ascontiguousarray(np.broadcast_to(levels[:, None, None, :], (len(colours), 16, 16, 3)))


def every_kind():
    """Return an array `[1, 2]` of each datatype, with what is hardest to carry: the inputs of the model `kinds`."""
    import numpy as np

    return {
        "BOOL": np.array([[True, False]]),
        "UINT8": np.array([[0, 255]], np.uint8),
        "UINT16": np.array([[0, 65535]], np.uint16),
        "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
        "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
        "INT8": np.array([[-128, 127]], np.int8),
        "INT16": np.array([[-32768, 32767]], np.int16),
        "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
        "INT64": np.array([[-(2**63), 2**63 - 1]], np.int64),
        "FP16": np.array([[0.5, -2]], np.float16),
        "FP32": np.array([[1.5, -3e38]], np.float32),
        "FP64": np.array([[1.5, -1e300]], np.float64),
        "BYTES": np.array([[b"", "grün".encode()]], np.object_),
    }


def best(probabilities) -> list[str]:
    """Return the class of each row."""
    return [COLOURS[index] for index in probabilities.argmax(1)]


def main(script: ModuleType) -> None:
    servers = {name: SimpleNamespace(**facts) for name, facts in json.loads(ARGUMENTS[0]).items()}
    outcomes = {}
    for name, check in vars(script).items():
        server = servers.get("guarded" if name.startswith("check_with_a_key") else "open")
        if name.startswith("check_") and server and (name in ARGUMENTS[1:] or not ARGUMENTS[1:]):
            outcomes[name] = outcome(check, server)
    json.dump(outcomes, sys.stdout, indent=1)


def outcome(check, server) -> str:
    """Run one check; an empty text: it passed."""
    try:
        result = check(server)
        if inspect.iscoroutine(result):
            asyncio.run(result)
    except Exception:
        return traceback.format_exc()
    return ""
