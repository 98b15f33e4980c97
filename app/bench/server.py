"""A `convoy serve` of one's own on a free loopback port, for as long as a measurement runs."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.errors import SettingsError
from app.settings import flag_of, variable_of

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
NOT_MEASURED = frozenset(
    map(variable_of, ("keys", "tls_certificate", "tls_key", "tls_key_password_file", "tls_client_ca"))
)
"""Variables of the service that is in use; the one that is measured is reached by nobody else, and does without."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running service, all its models loaded."""

    url: str
    pid: int


@contextmanager
def serving(models: Path, settings: Mapping[str, object] | None = None) -> Iterator[Server]:
    """Serve `models` until the block ends; it is ready when the block begins.

    Args:
        models: directory of bundles.
        settings: setting name → value, beside what the environment says.

    Raises:
        SettingsError: it did not become ready; the sentence is what it said.
    """
    command = [sys.executable, "-m", "app.cli", "serve"]
    fixed = {"models": models.resolve(), "host": "127.0.0.1", "port": 0, "log_format": "json"}
    for name, value in (dict(settings or {}) | fixed).items():
        command += _words(name, value)
    # A pipe that nobody reads would fill with the access log, and stop the service.
    with tempfile.NamedTemporaryFile(prefix="convoy-log-") as log:
        # In a session of its own, so that Ctrl-C ends the measurement first, and the measurement ends the service.
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name not in NOT_MEASURED},
        )
        try:
            yield Server(_url_when_ready(process, Path(log.name)), process.pid)
        finally:
            _stop(process)


def _words(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [flag_of(name) if value else f"--no-{flag_of(name).removeprefix('--')}"]
    return [flag_of(name), str(value)]


def _url_when_ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        said = {}
        for line in log.read_text().splitlines(keepends=True):
            if line.startswith("{") and line.endswith("\n"):
                entry = json.loads(line)
                said[entry["message"]] = entry
        if "ready" in said:
            url: str = said["listening"]["url"]
            return url
        if "not ready" in said:
            raise SettingsError(f"The service did not become ready: {said['not ready']['reason']}")
        if ended:
            raise SettingsError(f"The service did not start: {log.read_text().strip().removeprefix('convoy: ')}")
        time.sleep(0.05)
    raise SettingsError(f"The service was not ready after {START_TIMEOUT_S:.0f} s.")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.kill(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
