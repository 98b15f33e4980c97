"""The init container's script, run as the pod would run it: the right archive arrives whole, any other not at all."""

import hashlib
import http.server
import io
import os
import socketserver
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.deploy.kustomize import K8S, ON_CPU, pods, render

SCRIPT = K8S / "components/model-fetch/fetch.py"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory, and the address at which it is served."""
    directory = tmp_path / "store"
    directory.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=directory)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield directory, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def archive(directory: Path, *files: str) -> str:
    """Write `models.tar.gz` with files that hold their own names; returns its SHA-256."""
    path = directory / "models.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(url: str, sha256: str, into: Path) -> subprocess.CompletedProcess[str]:
    [container] = pods(render((*ON_CPU, "model-fetch")))["Deployment/convoy"]["initContainers"]
    assert container["command"] == ["python", "/fetch/fetch.py", "/models"]
    return subprocess.run(
        [sys.executable, "-I", SCRIPT, into],
        env={**os.environ, "MODELS_URL": url, "MODELS_SHA256": sha256, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def files_in(directory: Path) -> list[str]:
    return sorted(f"{path.relative_to(directory)}" for path in directory.rglob("*") if path.is_file())


def test_the_right_archive_arrives_whole_and_once(store, tmp_path):
    directory, url = store
    sha256 = archive(directory, "pets/1/model.json", "pets/1/model.onnx", "birds/2/model.onnx")
    into = tmp_path / "models"
    into.mkdir()
    done = fetch(f"{url}/models.tar.gz", sha256.upper(), into)
    assert (done.returncode, done.stdout) == (0, f"Fetched birds, pets from {url}/models.tar.gz.\n")
    assert files_in(into) == [f".{sha256}", "birds/2/model.onnx", "pets/1/model.json", "pets/1/model.onnx"]
    (directory / "models.tar.gz").unlink()
    again = fetch(f"{url}/models.tar.gz", sha256, into)
    assert (again.returncode, again.stdout) == (0, f"{into} holds the models already.\n")


@pytest.mark.parametrize("sha256", ["", "/", "0" * 63, "sha256:" + "0" * 64])
def test_no_digest_is_no_proof(store, tmp_path, sha256):
    directory, url = store
    archive(directory, "pets/1/model.json")
    into = tmp_path / "models"
    into.mkdir()
    failed = fetch(f"{url}/models.tar.gz", sha256, into)
    assert failed.returncode == 1
    assert failed.stderr == f"MODELS_SHA256 is '{sha256}', and no SHA-256: 64 digits of 0-9 and a-f.\n"
    assert list(into.iterdir()) == []


@pytest.mark.parametrize("digest", ["right", "wrong"])
def test_what_an_address_is_signed_with_is_not_told(store, tmp_path, digest):
    directory, url = store
    sha256 = archive(directory, "pets/1/model.json")
    into = tmp_path / "models"
    into.mkdir()
    done = fetch(f"{url}/models.tar.gz?signature=secret", sha256 if digest == "right" else "0" * 64, into)
    assert done.returncode == (digest == "wrong")
    assert "models.tar.gz" in done.stdout + done.stderr
    assert "secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("fault", ["altered", "absent", "no archive", "a way out", "cut off", "empty", "without names"])
def test_of_any_other_nothing_is_left(store, tmp_path, fault):
    directory, url = store
    outside = "../outside" if fault == "a way out" else "pets/1/model.onnx"
    files = {"empty": [], "without names": ["model.json", "model.onnx"]}.get(fault, ["pets/1/model.json", outside])
    sha256 = archive(directory, *files)
    path = directory / "models.tar.gz"
    if fault == "altered":
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    elif fault == "absent":
        path.unlink()
    elif fault == "no archive":
        path.write_bytes(b"<html>")
        sha256 = hashlib.sha256(b"<html>").hexdigest()
    elif fault == "cut off":
        path.write_bytes(path.read_bytes()[:-20])
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    into = tmp_path / "models"
    into.mkdir()
    failed = fetch(f"{url}/models.tar.gz", sha256, into)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1, failed.stderr
    assert list(into.iterdir()) == []
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    "said", [b"no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\nab"]
)
def test_a_store_that_speaks_no_http_is_told_in_one_line(tmp_path, said):
    class Broken(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(said)

    into = tmp_path / "models"
    into.mkdir()
    with socketserver.TCPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        failed = fetch(f"http://127.0.0.1:{server.server_address[1]}/models.tar.gz", "0" * 64, into)
        thread.join()
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1, failed.stderr
    assert list(into.iterdir()) == []


@pytest.mark.parametrize("url", ["example.com/m.tar?sig=SECRET", "http://127.0.0.1/m.tar?sig=SECRET x"])
def test_an_address_that_cannot_be_asked_is_told_without_its_signature(tmp_path, url):
    failed = fetch(url, "0" * 64, tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1 and "m.tar" in failed.stderr
    assert "SECRET" not in failed.stderr
