"""Running schemathesis, in an environment of its own, against a service with one model of each kind."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.bundles import make_bundle
from tests.clients.environments import python_with
from tests.contract import documents
from tests.servers import ConvoyProcess, convoy
from tests.v2 import make_echo, make_fixed, make_pair

EVERYWHERE = ("not_a_server_error", "response_schema_conformance")
TIMEOUT_S = 600
OURS = (*EVERYWHERE, "status_code_conformance", "content_type_conformance")


class Outcome(NamedTuple):
    """What came of a run: how many requests, how many answers that are not as documented, and what was printed."""

    cases: int
    failed: int
    report: str


@contextmanager
def service(folder: Path) -> Iterator[ConvoyProcess]:
    make_bundle(folder / "models")
    make_pair(folder / "models")
    make_fixed(folder / "models")
    make_echo(folder / "models", "text", ("BYTES",))
    with convoy(folder / "models", folder / "log", default_model="colours", access_log=False) as server:
        yield server


def check(
    python: Path, server: ConvoyProcess, name: str, model: str, folder: Path, examples: int, seed: int
) -> Outcome:
    """Make requests for one model from a document (`ours` or `protocol`), at most `examples` an operation and phase."""
    document = documents.protocol() if name == "protocol" else server.client.get("/openapi.json").json()
    path = folder / f"{name}.json"
    path.write_text(json.dumps(documents.narrowed(document, model)))
    checks = EVERYWHERE if name == "protocol" else OURS
    return _schemathesis(
        python,
        ["run", str(path), "--url", server.url, "--checks", ",".join(checks), "--max-examples", str(examples)],
        ["--seed", str(seed), "--phases", "coverage,fuzzing", "--generation-database", "none", "--no-color"],
        folder,
    )


def _schemathesis(python: Path, arguments: list[str], options: list[str], folder: Path) -> Outcome:
    environment: dict[str, Any] = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    command = [str(python), "-m", "schemathesis.cli", *arguments, *options]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    report = result.stdout + result.stderr
    made = re.search(r"([\d,]+) generated", report)
    assert made and result.returncode in (0, 1), report
    failed = re.search(r"([\d,]+) found [\d,]+ unique failures?", report)
    found = int(failed[1].replace(",", "")) if failed else 0
    assert bool(found) == bool(result.returncode), report
    return Outcome(int(made[1].replace(",", "")), found, report)


def installed() -> Path:
    """Return schemathesis's interpreter; where it cannot be installed, the test is skipped."""
    return python_with("schemathesis")
