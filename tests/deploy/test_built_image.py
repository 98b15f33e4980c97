"""The image, built and run: what is in it, that it answers as anybody on a root that cannot be written, that it drains.
The one that trains: that it trains so, alone and as two processes.

Only where it is asked for, since a build takes minutes: `make image-check`. A container is stood in for by what one is
made of: mount and PID namespaces, the image's own root, environment and command, no privilege to gain.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx
import pytest

from app import __version__
from tests.collector import collecting
from tests.deploy.run_training_job import draw_images

DIRECTORY = os.environ.get("CONVOY_IMAGE_CHECK", "")
NEEDED = ("buildah", "mmdebstrap", "container-structure-test", "syft", "unshare", "nsenter", "setpriv")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(not DIRECTORY, reason="an image is built only when CONVOY_IMAGE_CHECK names a directory for it"),
    pytest.mark.skipif(bool(DIRECTORY and MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and Debian's tools want root here"),
]
TARGET = os.environ.get("CONVOY_IMAGE_TARGET", "cpu")
SERVES = pytest.mark.skipif(TARGET == "train", reason="the image that trains serves nothing, and keeps Debian's system")
TRAINS = pytest.mark.skipif(TARGET != "train", reason="only the image for training trains")
SOMEBODY = 54321
# The images without their models: what a pull takes must not grow unnoticed.
WHITEOUT = ".wh."
LARGEST_MB = {"cpu": 330, "gpu": 3000, "train": 6000}
FOR_ALL_TO_WRITE = {"cpu": {"tmp"}, "gpu": {"tmp"}, "train": {"tmp", "run/lock", "var/tmp"}}
SHELLS = {"sh", "ash", "bash", "busybox", "csh", "dash", "fish", "ksh", "mksh", "rbash", "tcsh", "toybox", "zsh"}

# As a container's runtime does it: only these devices, Docker's 64 MB of shared memory, a root that nobody writes to.
CONTAINER = """
set -e
mount --bind "$ROOT" "$ROOT"
mount -t tmpfs -o size=64m,mode=1777 tmpfs "$ROOT/tmp"
mount -t proc proc "$ROOT/proc"
mount -t tmpfs -o mode=755 tmpfs "$ROOT/dev"
for device in full null random urandom zero; do
    : >"$ROOT/dev/$device"
    mount --bind "/dev/$device" "$ROOT/dev/$device"
done
mkdir "$ROOT/dev/shm"
mount -t tmpfs -o size=64m,mode=1777 tmpfs "$ROOT/dev/shm"
mount -o remount,bind,ro "$ROOT/dev"
printf '%s' "$VOLUMES" | while read -r mode place volume; do
    mkdir -p "$ROOT$place"
    mount --bind "$volume" "$ROOT$place"
    mount -o "remount,bind,$mode" "$ROOT$place"
done
mount -o remount,bind,ro "$ROOT"
exec setpriv --no-new-privs env PATH="$INSIDE" /usr/sbin/chroot --userspec=$SOMEBODY:$SOMEBODY --groups= "$ROOT" "$@"
"""


@dataclass(frozen=True)
class Image:
    archive: Path
    root: Path
    config: dict
    attributes: set[str]
    """Names of extended attributes that files have in the layers; a capability of a file would be one."""

    @property
    def environment(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.config["Env"])


def remove(path: Path) -> None:
    """Take away what a layer says is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def image(root) -> Image:
    """Build it as anybody would, and unpack it: its layers upon one another, as a container's root."""
    directory = Path(DIRECTORY).resolve()
    built = subprocess.run([root / "deploy/image/build.sh", directory, TARGET], stdout=subprocess.PIPE, text=True)
    assert built.returncode == 0, built.stdout[-2000:]
    archive = directory / f"convoy-{TARGET}.tar"
    unpacked = directory / "root"
    shutil.rmtree(unpacked, ignore_errors=True)
    attributes: set[str] = set()
    with tarfile.open(archive) as whole:
        [manifest] = json.load(whole.extractfile("manifest.json"))
        config = json.load(whole.extractfile(manifest["Config"]))["config"]
        for layer in manifest["Layers"]:
            with tarfile.open(fileobj=whole.extractfile(layer)) as files:
                attributes.update(name for file in files for name in file.pax_headers if "xattr" in name)
                whiteouts = [Path(file.name) for file in files if Path(file.name).name.startswith(WHITEOUT)]
                for gone in whiteouts:
                    remove(unpacked / gone.parent / gone.name.removeprefix(WHITEOUT))
                kept = [file for file in files if Path(file.name) not in whiteouts]
                files.extractall(unpacked, kept, filter="fully_trusted")
    return Image(archive, unpacked, config, attributes)


@pytest.fixture(scope="module")
def starts() -> Iterator[dict[str, float]]:
    """Take how long starts lasted, in seconds; benchmarks/image.py reads them."""
    taken: dict[str, float] = {}
    yield taken
    kept = Path(DIRECTORY) / "starts.json"
    kept.write_text(json.dumps((json.loads(kept.read_text()) if kept.exists() else {}) | {TARGET: taken}))


@dataclass
class Container:
    image: Image
    url: str
    log: Path
    process: subprocess.Popen
    environment: dict[str, str]
    start_s: float = 0.0

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


def contained(
    image: Image, *command: str, volumes: Mapping[str, Path] = MappingProxyType({}), writable: tuple[str, ...] = ()
) -> list[str]:
    """Return what runs a program of the image as a container's runtime would; volumes by their place inside."""
    mounts = "".join(f"{'rw' if place in writable else 'ro'} {place} {volume}\n" for place, volume in volumes.items())
    path = [image.root / folder.lstrip("/") / command[0] for folder in image.environment["PATH"].split(":")]
    program = next(f"/{found.relative_to(image.root)}" for found in path if found.exists())
    known = f"ROOT={image.root}\nVOLUMES='{mounts}'\nSOMEBODY={SOMEBODY}"
    script = f"{known}\nINSIDE=$PATH\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\n{CONTAINER}"
    separate = [shutil.which("unshare"), "--mount", "--pid", "--fork", "--kill-child"]
    return [*separate, "/bin/sh", "-c", script, "sh", program, *command[1:]]


@contextmanager
def running(image: Image, log: Path, volume: Path | None = None, **settings: object) -> Iterator[Container]:
    """Run the image until the block ends, from when it is ready; a volume is mounted over its models."""
    port = free_port()
    environment = image.environment | {
        "CONVOY_HOST": "127.0.0.1",
        "CONVOY_PORT": str(port),
        "CONVOY_LOG_FORMAT": "json",
    }
    if TARGET == "gpu":
        environment["CONVOY_DEVICE"] = "cpu"  # here is no driver; what is proved is that all else is there
    environment |= {f"CONVOY_{name.upper()}": str(value) for name, value in settings.items()}
    volumes = {"/models": volume} if volume else {}
    command = contained(image, *image.config["Entrypoint"], *image.config["Cmd"], volumes=volumes)
    started = time.monotonic()
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, env=environment, stderr=stderr, stdout=subprocess.DEVNULL)
    container = Container(image, f"http://127.0.0.1:{port}", log, process, environment)
    try:
        deadline = time.monotonic() + 240
        while not _ready(container.url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        container.start_s = time.monotonic() - started
        yield container
    finally:
        # The kernel forgets unshare's --kill-child when the user changes: the container would go on.
        with suppress(ValueError, FileNotFoundError, ProcessLookupError):
            os.kill(container.first, signal.SIGKILL)
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
         "--config", root / f"tests/deploy/structure{'-train' if TARGET == 'train' else ''}.yaml"],
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_labels_tell_what_it_is_made_of(image, root):
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in image.config["Labels"].items()}
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert labels["version"] == __version__
    assert labels["revision"] == revision.strip()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["created"])
    assert labels["base.name"].startswith("localhost/python-base:")


@SERVES
def test_health_check_is_kept(image):
    """container-structure-test has no word for it."""
    assert image.config["Healthcheck"]["Test"] == ["CMD", "convoy", "health"]
    assert image.config["Healthcheck"]["StartPeriod"] == 120 * 10**9


@SERVES
def test_no_shell_under_any_path(image):
    assert [path for path in image.root.rglob("*") if path.name in SHELLS] == []


@SERVES
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
    assert [path for path in files if path.is_file() and path.stat().st_mode & 0o6000] == []
    for_all = {str(path.relative_to(image.root)) for path in files if path.stat().st_mode & 0o002}
    assert {name for name in for_all if not name.startswith("dev/")} == FOR_ALL_TO_WRITE[TARGET]
    # The image's user owns nothing either: even on a root that is writable nobody changes what runs next.
    ours = [path for path in files if TARGET != "train" or path.is_relative_to(image.root / "opt")]
    assert [path for path in ours if (path.lstat().st_uid, path.lstat().st_gid) != (0, 0)] == []
    assert [path for path in files if 10001 in (path.lstat().st_uid, path.lstat().st_gid)] == []
    assert {name for name in image.attributes if "capability" in name} == set()


def test_anybody_reads_everything(image):
    """Clusters choose the user's number themselves, with no group in common."""
    # Debian's system has secrets of root's own, such as /etc/shadow.
    places = ["."] if TARGET != "train" else ["opt", "models", "usr/lib", "usr/bin"]
    for path in (path for place in places for path in (image.root / place).rglob("*")):
        mode = path.lstat().st_mode
        assert path.is_symlink() or mode & (0o005 if path.is_dir() else 0o004) in (0o004, 0o005), path


def test_bill_of_materials_names_what_is_inside(image):
    bill = json.loads(image.archive.with_suffix("").with_suffix(".sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    names = {component["name"] for component in bill["components"]}
    assert {"numpy", "convoy-serve", "libc6", "libstdc++6"} <= names
    if TARGET == "train":
        assert {"onnxruntime", "onnx", "torch", "triton", "nvidia-nccl-cu13"} <= names
        assert "pip" not in names
    else:
        assert {{"cpu": "onnxruntime", "gpu": "onnxruntime-gpu"}[TARGET], "fastapi", "opentelemetry-sdk"} <= names
        assert not {"pip", "setuptools", "bash", "perl-base", "apt", "torch"} & names


def test_size(image):
    models = sum(path.stat().st_size for path in (image.root / "models").rglob("*") if path.is_file())
    whole = image.archive.stat().st_size
    print(f"image {whole / 1e6:.0f} MB, of that models {models / 1e6:.0f} MB")
    assert (whole - models) / 1e6 < LARGEST_MB[TARGET]


@SERVES
def test_driver_of_the_host_is_found_where_it_is_mounted(image, tmp_path):
    """As NVIDIA's toolkit makes it so: the host's ldconfig, in the image's root, after a list of the driver's folders.

    A library that setpriv has and the image has not stands in for the driver, in a folder that Debian's loader does not
    search by itself.
    """
    assert (image.root / "etc/debian_version").is_file(), "by it the toolkit decides where libraries go"
    root = tmp_path / "root"
    shutil.copytree(image.root, root, symlinks=True, copy_function=os.link)
    shutil.copy2(next(Path("/usr/lib").rglob("libcap-ng.so.0")), root / "usr/lib64/libcap-ng.so.0")
    (root / "etc/ld.so.conf.d/00-nvcr-1.conf").write_text("/usr/lib64\n")
    load = ["chroot", root, "/opt/convoy/bin/python", "-c", "import ctypes; ctypes.CDLL('libcap-ng.so.0')"]
    assert b"cannot open shared object file" in subprocess.run(load, capture_output=True).stderr
    subprocess.run(["ldconfig", "-r", root, "-f", "/etc/ld.so.conf", "-C", "/etc/ld.so.cache"], check=True)
    assert subprocess.run(load, capture_output=True).stderr == b""


@pytest.mark.skipif(TARGET != "gpu", reason="the image for CPUs has no CUDA")
def test_cuda_is_whole_but_for_the_driver(image):
    """Every library of the wheels is found and loaded; the one that is missing is the host's."""
    program = (
        "import ctypes, pathlib, onnxruntime\n"
        "onnxruntime.preload_dlls()\n"
        "place = pathlib.Path(onnxruntime.__file__).parent / 'capi'\n"
        "ctypes.CDLL(str(place / 'libonnxruntime_providers_shared.so'), mode=ctypes.RTLD_GLOBAL)\n"
        "ctypes.CDLL(str(place / 'libonnxruntime_providers_cuda.so'))\n"
    )
    loaded = subprocess.run(["chroot", image.root, "/opt/convoy/bin/python", "-c", program], capture_output=True)
    assert loaded.stderr.splitlines()[-1].startswith(b"OSError: libcuda.so.1: cannot open shared object file")


@pytest.mark.skipif(TARGET != "gpu", reason="only the image for GPUs asks for one")
def test_without_a_driver_it_ends_and_does_not_serve_slowly(image):
    """As it comes, CONVOY_DEVICE=cuda and all, on a machine without a GPU."""
    ended = subprocess.run(
        contained(image, *image.config["Entrypoint"], *image.config["Cmd"]),
        env=image.environment | {"CONVOY_HOST": "127.0.0.1", "CONVOY_PORT": str(free_port())},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "device is cuda, but" in ended.stderr, ended.stderr
    assert "NVIDIA's driver (libcuda.so.1) is not found here" in ended.stderr, ended.stderr


@pytest.mark.skipif(TARGET != "gpu", reason="only the image for GPUs can fall back")
def test_a_fall_back_to_the_processor_is_told_as_it_is(image, tmp_path):
    with running(image, tmp_path / "log", device="auto") as container:
        listed = httpx.get(f"{container.url}/models").json()["models"]
        metrics = httpx.get(f"{container.url}/metrics").text
    assert {model["provider"] for model in listed} == {"cpu"}
    assert 'convoy_wanted_device_info{device="cuda"} 1' in metrics, "else the alert has nothing to compare with"


@SERVES
def test_models_that_are_mounted_hide_those_inside(image, tmp_path):
    volume = tmp_path / "models"
    shutil.copytree(image.root / "models/cifar10", volume / "cifar10")
    with running(image, tmp_path / "log", volume) as container:
        listed = httpx.get(f"{container.url}/models").json()["models"]
        assert [model["name"] for model in listed] == ["cifar10"]


@SERVES
def test_traces_reach_a_collector(image, root, tmp_path):
    photo = (root / "examples/photos/coffee.jpg").read_bytes()
    with (
        collecting() as collector,
        running(image, tmp_path / "log", trace_endpoint=collector.url, trace_ratio=1) as container,
    ):
        assert httpx.post(f"{container.url}/predict", content=photo, timeout=60).status_code == 200
        assert container.stop() == 0
    assert any(span.kind == 2 for span in collector.spans), "no span of a server has come"
    assert {span.resource["service.name"] for span in collector.spans} == {"convoy"}


@SERVES
@pytest.mark.parametrize("workers", [1, 2])
def test_answers_as_anybody_on_a_read_only_root_and_loses_nothing_when_stopped(image, root, tmp_path, starts, workers):
    photo = (root / "examples/photos/coffee.jpg").read_bytes()
    with running(image, tmp_path / "log", workers=workers) as container:
        starts[f"{workers} worker" + "s" * (workers > 1)] = round(container.start_s, 2)
        command = Path(f"/proc/{container.first}/cmdline").read_text().split("\0")
        assert [Path(word).name for word in command[1:3]] == ["convoy", "serve"], command
        status = Path(f"/proc/{container.first}/status").read_text()
        assert f"Uid:\t{SOMEBODY}\t{SOMEBODY}\t{SOMEBODY}\t{SOMEBODY}" in status
        assert "CapEff:\t0000000000000000" in status
        assert "NSpid:" in status and status.split("NSpid:")[1].splitlines()[0].split()[-1] == "1"

        answer = httpx.post(f"{container.url}/predict", content=photo, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["results"][0]["top"][0]["label"] == "espresso"
        print(f"ready after {container.start_s:.1f} s; {answer.text[:200]}")
        for place in ("/", "/models", "/opt/convoy", "/dev", "/etc"):
            written = container.inside("python", "-c", f"open('{place}/x', 'w')")
            assert "Read-only file system" in written.stderr or "Permission denied" in written.stderr, place
        assert container.inside("python", "-c", "open('/tmp/x', 'w')").returncode == 0
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


@dataclass
class Bench:
    """Two volumes: a few drawn images, and where runs and bundles are left."""

    image: Image
    data: Path
    out: Path

    def does(self, *command: str) -> subprocess.CompletedProcess:
        inside = contained(self.image, *command, volumes={"/data": self.data, "/out": self.out}, writable=("/out",))
        environment = self.image.environment | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.run(inside, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture
def bench(image, tmp_path) -> Bench:
    out = tmp_path / "out"
    out.mkdir()
    os.chown(out, SOMEBODY, SOMEBODY)
    return Bench(image, draw_images(tmp_path / "data"), out)


@TRAINS
def test_training_image_says_what_it_can(image, bench):
    said = bench.does(*image.config["Entrypoint"], *image.config["Cmd"])
    assert said.returncode == 0, said.stderr
    assert "train a network by a recipe" in said.stdout


@TRAINS
def test_trains_and_exports_as_anybody_on_a_read_only_root(bench):
    """Two epochs of drawn images, on a processor, which it says; then a bundle that has proved itself."""
    small = ["--data=/data", "--name=drawn", "--runs-dir=/out/runs", "--epochs=2", "--batch-size=8"]
    trained = bench.does("convoy-train", "train", *small)
    print(trained.stdout)
    assert trained.returncode == 0, trained.stderr
    assert "epoch 2/2" in trained.stdout
    assert "CPU core" in trained.stdout
    exported = bench.does("convoy-train", "export", "/out/runs/drawn", "--models-dir=/out/models")
    print(exported.stdout)
    assert exported.returncode == 0, exported.stderr
    assert (bench.out / "models/drawn/1").is_dir()
    assert {path.stat().st_uid for path in bench.out.rglob("*")} == {SOMEBODY}


@TRAINS
def test_no_training_on_a_gpu_that_is_not_there(bench):
    asked = bench.does("convoy-train", "train", "--data=/data", "--runs-dir=/out/runs", "--device=cuda")
    assert asked.returncode != 0
    assert "PyTorch finds no CUDA device here" in asked.stderr


@TRAINS
def test_two_processes_train_together(bench):
    """By torchrun, as the Job of k8s/components/training has it."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    # A runtime would write the host's name into /etc/hosts; here it may resolve to nothing.
    torchrun = ["torchrun", "--nproc-per-node=2", "--local-addr=127.0.0.1", *meeting]
    trained = bench.does(
        *torchrun, "-m", "training.cli", "train", "--data=/data", "--name=drawn", "--runs-dir=/out/runs",
        "--cache-dir=/tmp/cache", "--epochs=1", "--batch-size=8",
    )  # fmt: skip
    print(trained.stdout)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("2 processes") == 1
    assert (bench.out / "runs/drawn").is_dir()
