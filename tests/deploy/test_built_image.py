"""The image, built and run: what is in it, that it answers as anybody on a root that cannot be written, that it drains.

Only where it is asked for, since a build takes minutes: `make image-check`. A container is stood in for by what one is
made of: mount and PID namespaces, the image's own root, environment and command, no privilege to gain.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

DIRECTORY = os.environ.get("CONVOY_IMAGE_CHECK", "")
NEEDED = ("buildah", "mmdebstrap", "container-structure-test", "syft", "unshare", "nsenter", "setpriv")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(not DIRECTORY, reason="an image is built only when CONVOY_IMAGE_CHECK names a directory for it"),
    pytest.mark.skipif(bool(DIRECTORY and MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and Debian's tools want root here"),
]
SOMEBODY = 54321
# Sizes of the image for the CPU, without its models: what a pull takes must not grow unnoticed.
LARGEST_MB = 330

CONTAINER = """
set -e
mount --bind "$ROOT" "$ROOT"
mount -t tmpfs -o size=64m,mode=1777 tmpfs "$ROOT/tmp"
mount --rbind /dev "$ROOT/dev"
mount -t proc proc "$ROOT/proc"
mount -o remount,bind,ro "$ROOT"
exec setpriv --no-new-privs env PATH="$INSIDE" /usr/sbin/chroot --userspec=$SOMEBODY:$SOMEBODY --groups= "$ROOT" "$@"
"""


@dataclass(frozen=True)
class Image:
    archive: Path
    root: Path
    config: dict

    @property
    def environment(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.config["Env"])


@pytest.fixture(scope="module")
def image(root) -> Image:
    """Build it as anybody would, and unpack it: its layers upon one another, as a container's root."""
    directory = Path(DIRECTORY).resolve()
    built = subprocess.run([root / "deploy/image/build.sh", directory], stdout=subprocess.PIPE, text=True)
    assert built.returncode == 0
    archive = directory / "convoy-cpu.tar"
    unpacked = directory / "root"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as whole:
        [manifest] = json.load(whole.extractfile("manifest.json"))
        config = json.load(whole.extractfile(manifest["Config"]))["config"]
        for layer in manifest["Layers"]:
            with tarfile.open(fileobj=whole.extractfile(layer)) as files:
                files.extractall(unpacked, filter="fully_trusted")
    # Where a container's runtime mounts what the kernel gives.
    for name in ("proc", "dev"):
        (unpacked / name).mkdir(exist_ok=True)
    return Image(archive, unpacked, config)


@dataclass
class Container:
    image: Image
    url: str
    log: Path
    process: subprocess.Popen
    environment: dict[str, str]

    @property
    def first(self) -> int:
        """Return the id, seen from here, of what is process 1 inside."""
        [child] = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    def inside(self, *command: str) -> subprocess.CompletedProcess:
        """Run a program in the container, as a health check is run."""
        enter = [shutil.which("nsenter"), f"--target={self.first}", "--mount", "--pid", "--root", "--wd"]
        user = [f"--setuid={SOMEBODY}", f"--setgid={SOMEBODY}", f"/opt/convoy/bin/{command[0]}"]
        return subprocess.run(
            [*enter, *user, *command[1:]], env=self.environment, capture_output=True, text=True, timeout=120
        )

    def stop(self) -> int:
        """Send SIGTERM to process 1; return the exit status."""
        os.kill(self.first, signal.SIGTERM)
        return self.process.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(image: Image, log: Path, **settings: object) -> Iterator[Container]:
    port = free_port()
    environment = image.environment | {
        "CONVOY_HOST": "127.0.0.1",
        "CONVOY_PORT": str(port),
        "CONVOY_LOG_FORMAT": "json",
    }
    environment |= {f"CONVOY_{name.upper()}": str(value) for name, value in settings.items()}
    command = [*image.config["Entrypoint"], *image.config["Cmd"]]
    command[0] = str(Path(image.environment["PATH"]) / command[0])
    script = f"ROOT={image.root}\nSOMEBODY={SOMEBODY}\nINSIDE=$PATH\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\n{CONTAINER}"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [shutil.which("unshare"), "--mount", "--pid", "--fork", "--kill-child",
             "/bin/sh", "-c", script, "sh", *command],
            env=environment, stderr=stderr, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    container = Container(image, f"http://127.0.0.1:{port}", log, process, environment)
    try:
        deadline = time.monotonic() + 240
        while not _ready(container.url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield container
    finally:
        process.kill()
        process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


class Client(threading.Thread):
    """Asks again and again, on one connection; keeps when each request was sent and what came of it."""

    def __init__(self, url: str, body: bytes) -> None:
        super().__init__()
        self.url, self.body = url, body
        self.answers: list[tuple[float, int | str]] = []

    def run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while True:
                sent = time.monotonic()
                try:
                    outcome = client.post(f"{self.url}/predict", content=self.body).status_code
                except httpx.TransportError as error:
                    self.answers.append((sent, type(error).__name__))
                    return
                self.answers.append((sent, outcome))
                time.sleep(0.02)


def test_structure(image, root):
    checked = subprocess.run(
        ["container-structure-test", "test", "--driver", "tar", "--image", image.archive,
         "--config", root / "tests/deploy/structure.yaml"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_no_program_but_python_and_what_convoy_brings(image):
    programs = {
        str(path.relative_to(image.root))
        for path in image.root.rglob("*")
        if path.is_file() and not path.is_symlink() and os.access(path, os.X_OK) and path.stat().st_mode & 0o111
        and ".so" not in path.name
    }  # fmt: skip
    outside = {name for name in programs if not name.startswith(("opt/convoy/", "usr/lib/python", "models/"))}
    assert all(Path(name).name.startswith("python") for name in outside), outside


def test_nobody_gains_a_right_and_nothing_is_for_all_to_write(image):
    files = [path for path in image.root.rglob("*") if not path.is_symlink()]
    assert [path for path in files if path.stat().st_mode & 0o6000] == []
    assert [path for path in files if path.stat().st_mode & 0o002] == [image.root / "tmp"]


def test_bill_of_materials_names_what_is_inside(image):
    bill = json.loads(image.archive.with_suffix("").with_suffix(".sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    names = {component["name"] for component in bill["components"]}
    assert {"onnxruntime", "fastapi", "numpy", "convoy-serve", "libc6", "libstdc++6"} <= names
    assert not {"pip", "setuptools", "bash", "perl-base", "apt", "torch"} & names


def test_size(image):
    models = sum(path.stat().st_size for path in (image.root / "models").rglob("*") if path.is_file())
    whole = image.archive.stat().st_size
    print(f"image {whole / 1e6:.0f} MB, of that models {models / 1e6:.0f} MB")
    assert (whole - models) / 1e6 < LARGEST_MB


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_as_anybody_on_a_read_only_root_and_loses_nothing_when_stopped(image, root, tmp_path, workers):
    photo = (root / "examples/photos/cat.jpg").read_bytes()
    with running(image, tmp_path / "log", workers=workers) as container:
        status = Path(f"/proc/{container.first}/status").read_text()
        assert f"Uid:\t{SOMEBODY}\t{SOMEBODY}\t{SOMEBODY}\t{SOMEBODY}" in status
        assert "CapEff:\t0000000000000000" in status
        assert "NSpid:" in status and status.split("NSpid:")[1].splitlines()[0].split()[-1] == "1"

        answer = httpx.post(f"{container.url}/predict", content=photo, timeout=60)
        assert answer.status_code == 200, answer.text
        print(answer.text[:300])
        written = container.inside("python", "-c", "open('/models/x', 'w')")
        assert "Read-only file system" in written.stderr
        health = container.inside("convoy", "health")
        assert (health.returncode, health.stdout) == (0, "ready\n"), health.stderr

        clients = [Client(container.url, photo) for _ in range(4)]
        for client in clients:
            client.start()
        while any(len(client.answers) < 10 for client in clients):
            assert container.process.poll() is None
            time.sleep(0.05)
        stopped = time.monotonic()
        code = container.stop()
        for client in clients:
            client.join(timeout=60)

    answers = [answer for client in clients for answer in client.answers]
    before = [outcome for sent, outcome in answers if sent < stopped]
    after = [outcome for sent, outcome in answers if sent >= stopped]
    print(f"{workers} workers: {len(before)} sent before SIGTERM, {len(after)} after: {sorted(map(str, after))}")
    assert code == 0, (tmp_path / "log").read_text()[-2000:]
    assert set(before) == {200}
    # What comes later is answered too, turned away in words, or finds the door shut; it is not cut off half-way.
    assert set(after) <= {200, 503, "ConnectError", "RemoteProtocolError", "ReadError"}
