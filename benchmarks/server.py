"""A service over the shipped models, for as long as a measurement runs."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Server:
    url: str
    pid: int

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """Run `convoy serve` on a free port until the block ends; it is ready when the block begins."""
    command = [sys.executable, "-m", "app.cli", "serve", "--models", "models", "--port", "0"]
    quiet = ["--log-format", "json", "--no-access-log"]
    with subprocess.Popen([*command, *quiet, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = ""
            for line in process.stderr:
                entry = json.loads(line)
                url = entry.get("url", url)
                if entry["message"] == "ready":
                    break
            else:
                raise SystemExit("the service did not become ready")
            yield Server(url, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
