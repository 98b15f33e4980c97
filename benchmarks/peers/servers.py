"""A server of either kind, for one measurement: started, checked to answer rightly, ended with all that it started."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.manifest import Bundle
from benchmarks.peers.runners.task import HOST, SHARED_PREFIX, Decoder, Task
from benchmarks.peers.scenarios import ROOT, Setting

RUNNERS = Path(__file__).parent / "runners"
SHARED_MEMORY = Path("/dev/shm")
PATHS = {"litserve": "/predict", "mosec": "/inference", "triton": "/v2/models/classifier/infer"}
SETTLE_S = 3.0
"""A server of several processes answers when the first of them is there; the others must not start into the load."""
START_S = 90.0
STOP_S = 6.0
"""Triton needs 4 s; LitServe does not end at a SIGTERM to its first process, however long one waits."""
ANSWER_S = 30.0


class PeerError(Exception):
    """A server that cannot be measured; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a server is started: the command may hold `{port}`."""

    command: tuple[str, ...]
    environment: dict[str, str]
    path: str


def convoy(bundle: Bundle, flags: Sequence[str]) -> Launch:
    models = bundle.directory.parent.parent
    command = (sys.executable, "-m", "app.cli", "serve", "--host", HOST, "--port", "{port}", "--models", str(models))
    return Launch((*command, "--no-access-log", *flags), {}, f"/models/{bundle.manifest.name}/predict")


def peer(name: str, python: Path, bundle: Bundle, setting: Setting, decoder: Decoder) -> Launch:
    task = Task(bundle.directory, decoder, 0, setting.workers, setting.batch, setting.wait_ms, setting.fronts)
    return Launch((str(python), str(RUNNERS / f"serve_{name}.py")), task.environment(), PATHS[name])


@contextmanager
def serving(launch: Launch, checks: Sequence[tuple[bytes, str]]) -> Iterator[str]:
    """Run a server until the block ends, and give its URL once it has named the right label for every image.

    Args:
        launch: how it is started.
        checks: encoded images and the labels that they must get.

    Raises:
        PeerError: it ended, did not get ready in time, or answered wrongly.
    """
    port = free_port()
    # Whatever a server writes on the way goes with the folder.
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        log = Path(scratch) / "log"
        environment = {"PYTHONPATH": str(ROOT), "TMPDIR": scratch, "ORT_DISABLE_TELEMETRY": "1", "PEER_PORT": str(port)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [part.format(port=port) for part in launch.command],
                cwd=ROOT,
                env=os.environ | launch.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            url = f"http://{HOST}:{port}{launch.path}"
            await_first_answer(process, url, checks[0][0], log)
            time.sleep(SETTLE_S)
            for image, label in checks:
                if (found := answer(url, image)) != label:
                    raise PeerError(f"it answers '{found}' where '{label}' is right")
            yield url
        finally:
            end(process)


def end_servers_when_ended() -> None:
    """Let SIGTERM unwind as Ctrl-C does: the server that is up has a process group of its own and would stay."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def await_first_answer(process: subprocess.Popen[bytes], url: str, image: bytes, log: Path) -> None:
    stop = time.monotonic() + START_S
    while True:
        reason = "no answer"
        try:
            answer(url, image)
            return
        except PeerError as error:
            reason = str(error)
        if process.poll() is not None:
            raise PeerError(f"it ended with {process.returncode} before it answered: {last_line(log)}")
        if time.monotonic() > stop:
            raise PeerError(f"it did not answer within {START_S:.0f} s: {reason}; {last_line(log)}")
        time.sleep(0.2)


def answer(url: str, image: bytes) -> str:
    """Post an image and return the first label of the answer.

    Raises:
        PeerError: there is no answer, or none with a label.
    """
    headers = {"Content-Type": "image/jpeg", "Inference-Header-Content-Length": "0"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, image, headers), timeout=ANSWER_S) as response:
            body = response.read()
    except urllib.error.HTTPError as error:
        raise PeerError(f"it answers {error.code}: {error.read()[:200].decode(errors='replace')}") from None
    except OSError as error:
        raise PeerError(f"it cannot be reached: {error}") from None
    return first_label(body)


def first_label(body: bytes) -> str:
    """Read the label out of an answer; Triton's has a header of its own before the JSON that the model wrote."""
    at = body.find(b'{"results"')
    if at < 0:
        # The service's own order of fields.
        at = 0
    try:
        label = json.loads(body[at:])["results"][0]["top"][0]["label"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise PeerError(f"its answer has no label: {body[:200]!r}") from None
    return str(label)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then kill whatever is left of its process group, which holds all that it started."""
    process.terminate()
    if not gone_within(STOP_S, process):
        os.killpg(process.pid, signal.SIGKILL)
        gone_within(STOP_S, process)
    process.wait()
    for left in SHARED_MEMORY.glob(f"{SHARED_PREFIX}{process.pid}-*"):
        left.unlink(missing_ok=True)


def gone_within(seconds: float, process: subprocess.Popen[bytes]) -> bool:
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        # Reaped here, or its zombie would keep the group alive.
        process.poll()
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it wrote nothing"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
