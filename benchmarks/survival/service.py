"""The service under observation: a real `convoy serve`, what it logs, counts and holds, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 45.0
# On SIGUSR1 the main process says how many tasks its event loop has, which no metric does.
_TELLING = """
import asyncio, os, signal, sys
def tell(*_):
    os.write(2, b'{"message": "tasks", "tasks": %d}\\n' % len(asyncio.all_tasks()))
signal.signal(signal.SIGUSR1, tell)
sys.argv[0] = "convoy"
from app.cli import main
sys.exit(main())
"""


class Service:
    """One running service; `pid` is its main process."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process = process
        self._log = log
        self.pid = process.pid
        self.url = ""

    def lines(self, message: str) -> list[dict[str, Any]]:
        """Return the log lines with that message."""
        entries = [
            json.loads(line)
            for line in self._log.read_text().splitlines(keepends=True)
            if line.startswith("{") and line.endswith("\n")
        ]
        return [entry for entry in entries if entry["message"] == message]

    def text(self) -> str:
        """Return all that it logged."""
        return self._log.read_text()

    def pids(self) -> list[int]:
        """Return the processes of the service: the main one, and its workers."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [self.pid, *map(int, children.split())]

    def rss_bytes(self) -> int:
        """Return the resident memory of all its processes."""
        return sum(rss_bytes(pid) for pid in self.pids())

    def foreign_cpu_s(self) -> float:
        """Return the processor time that this machine has spent on neither the service nor this process, seconds."""
        busy = sum(map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])) / os.sysconf("SC_CLK_TCK")
        return busy - sum(map(cpu_s, (*self.pids(), os.getpid())))

    def descriptors(self) -> int:
        """Return the open file descriptors of all its processes."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids())

    def tasks(self) -> int:
        """Return the tasks of the main process's event loop."""
        before = len(self.lines("tasks"))
        os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if len(told := self.lines("tasks")) > before:
                return int(told[-1]["tasks"])
            time.sleep(0.01)
        raise TimeoutError("The service does not tell its tasks.")

    def metrics(self) -> dict[str, float]:
        """Return every sample of /metrics, keyed as in the text: `name{label="value"}`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            return samples_of(answer.read().decode())

    def ready(self) -> dict[str, Any]:
        """Return what /readyz says, whatever its status."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self._process.wait(STOP_TIMEOUT_S)

    def ended(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._process.poll()

    def wait_until_ready(self, patience_s: float = START_TIMEOUT_S) -> None:
        """Wait until every worker serves the default model and every other model.

        Raises:
            RuntimeError: it ended, a model failed, or it takes longer; the message has all that it logged.
        """
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and self._process.poll() is None:
            if not self.url and (listening := self.lines("listening")):
                self.url = listening[0]["url"]
            with suppress(OSError):  # it loads, and others may have the machine; or it ends, and has said why
                ready = self.ready() if self.url else {"models": {}}
                if _whole(ready):
                    return
                if "failed" in ready["models"].values():
                    break
            time.sleep(0.05)
        raise RuntimeError(f"The service did not become ready:\n{self.text()}")


def _whole(ready: dict[str, Any]) -> bool:
    return set(ready["models"].values()) == {"ready"} and set(ready.get("workers", {}).values()) <= {"ready"}


@contextmanager
def serving(*, group: Path | None = None, patience_s: float = START_TIMEOUT_S, **settings: object) -> Iterator[Service]:
    """Serve the shipped models with defaults and such settings until the block ends; ready when it begins.

    Args:
        group: a control group of version 1 that the service starts in.
        patience_s: how long it may take to become ready.
        settings: beside the defaults.
    """
    command: Sequence[str] = [sys.executable, "-c", _TELLING, "serve"]
    fixed = {"models": ROOT / "models", "host": "127.0.0.1", "port": 0, "log_format": "json", "access_log": "false"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CONVOY_")}
    environment |= {f"CONVOY_{name.upper()}": str(value) for name, value in (fixed | settings).items()}
    if group is not None:
        command = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
    with tempfile.NamedTemporaryFile(prefix="convoy-log-") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=log, env=environment, cwd=ROOT, start_new_session=True
        )
        service = Service(process, Path(log.name))
        try:
            service.wait_until_ready(patience_s)
            yield service
        finally:
            with suppress(subprocess.TimeoutExpired):
                service.end()
            process.kill()
            process.wait()


def samples_of(text: str) -> dict[str, float]:
    """Return the samples of a text in Prometheus' format."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {series: float(value) for series, value in pairs}


def rss_bytes(pid: int) -> int:
    """Return a process's resident memory; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has taken, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peers_of(pid: int, url: str) -> set[int]:
    """Return the ports of the clients whose connections a process holds."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            target = str(descriptor.readlink())
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    port = urlsplit(url).port
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[9] in inodes and int(fields[1].split(":")[1], 16) == port:
            found.add(int(fields[2].split(":")[1], 16))
    return found - {0}


def address_of(url: str) -> tuple[str, int]:
    """Return host and port of a URL."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    return parts.hostname, parts.port
