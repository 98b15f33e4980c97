"""A real Convoy process for a test, on a free port, ended by its process id."""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

START_TIMEOUT_S = 30
ENGINES = {"engines": number} if (number := os.environ.get("TEST_WITH_ENGINES")) else {}
"""Settings of every service that does not say otherwise: the tests of one way to run models are those of the other."""
alone = pytest.mark.skipif(bool(ENGINES), reason="looks into a process that has its sessions itself")


class ConvoyProcess:
    """`convoy serve` in a process of its own; its log lines are kept."""

    def __init__(self, models: Path, log: Path, *, verify: ssl.SSLContext | bool = True, **settings: object) -> None:
        self._log = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CONVOY_")}
        environment |= {f"CONVOY_{name.upper()}": str(value) for name, value in (ENGINES | settings).items()}
        command = [sys.executable, "-m", "app.cli", "serve", "--models", str(models), "--port", "0"]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, "--log-format", "json"], env=environment, stderr=stderr, stdout=subprocess.DEVNULL
            )
        self.url = self._wait_for("listening")["url"]
        self.client = httpx.Client(base_url=self.url, timeout=30, verify=verify)

    def lines(self) -> list[dict]:
        text = self._log.read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_until_loaded(self) -> None:
        """Wait until every model is ready or failed, in every worker."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._loaded():
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)

    def _loaded(self) -> bool:
        answer = self.client.get("/readyz").json()
        waiting = [reason for reason in answer.get("workers", {}).values() if reason.startswith(("Start", "Load"))]
        return not waiting and "loading" not in answer["models"].values()

    def metrics(self) -> dict[str, float]:
        """Return every sample, keyed as in the text format: `name{label="value"}`."""
        samples = {}
        for line in self.client.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                key, value = line.rsplit(" ", 1)
                samples[key] = float(value)
        return samples

    def stop(self, *, signal_number: int = signal.SIGTERM, timeout_s: float = 15) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(timeout_s)

    def _wait_for(self, message: str) -> dict:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self.lines():
                if line["message"] == message:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"no '{message}' in the log:\n{self._log.read_text()}")


@contextmanager
def convoy(models: Path, log: Path, *, loaded: bool = True, **settings: object) -> Iterator[ConvoyProcess]:
    """Run a server for the `with` block; by default it has loaded its models."""
    server = ConvoyProcess(models, log, **settings)
    try:
        if loaded:
            server.wait_until_loaded()
        yield server
    finally:
        server.client.close()
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(10)
