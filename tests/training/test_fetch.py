import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from training.data.fetch import ARCHIVES, Archive, fetch
from training.errors import FetchError

CONTENT = bytes(range(256)) * 4000


class Home(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/gone"):
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if self.path.startswith("/short") else CONTENT)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def home() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Home) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def archive(home: str, path: str = "archive.tar.gz", md5: str = hashlib.md5(CONTENT).hexdigest()) -> Archive:
    return Archive(f"{home}/{path}", md5)


def test_a_download_lies_under_its_name_when_it_is_whole(home: str, tmp_path: Path):
    path = fetch(archive(home), tmp_path / "data")
    assert path == tmp_path / "data" / "archive.tar.gz"
    assert path.read_bytes() == CONTENT


def test_what_is_there_is_not_fetched_again(tmp_path: Path):
    (tmp_path / "archive.tar.gz").write_bytes(CONTENT)
    assert fetch(archive("http://127.0.0.1:9"), tmp_path).read_bytes() == CONTENT


def test_a_damaged_file_that_is_there_is_named(home: str, tmp_path: Path):
    (tmp_path / "archive.tar.gz").write_bytes(b"half")
    with pytest.raises(FetchError, match=r"archive\.tar\.gz is not the published file .* delete it and fetch again"):
        fetch(archive(home), tmp_path)


@pytest.mark.parametrize(
    ("path", "md5", "sentence"),
    [
        ("archive.tar.gz", "0" * 32, "sent something else than the published file .* nothing was kept"),
        ("short.tar.gz", "0" * 32, "broke off after 1,000 of 1,024,000 bytes: fetch again"),
        ("gone.tar.gz", "0" * 32, "answers 503 Service Unavailable: try again later"),
    ],
)
def test_a_bad_download_leaves_nothing(home: str, tmp_path: Path, path: str, md5: str, sentence: str):
    with pytest.raises(FetchError, match=sentence):
        fetch(archive(home, path, md5), tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_network_is_one_sentence(tmp_path: Path):
    with pytest.raises(
        FetchError, match=r"cannot be reached .* check the network, or download it elsewhere and put it"
    ):
        fetch(archive("http://127.0.0.1:9"), tmp_path)


def test_the_published_archives_are_those_of_their_home():
    assert {one.file for one in ARCHIVES.values()} == {"cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"}
    assert all(one.url.startswith("https://www.cs.toronto.edu/~kriz/") for one in ARCHIVES.values())


def test_a_machine_that_forbids_md5_for_security_can_check_a_file_all_the_same(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted = archive(home)
    md5 = hashlib.md5

    def forbidding(data: bytes = b"", *, usedforsecurity: bool = True) -> object:
        assert not usedforsecurity
        return md5(data, usedforsecurity=False)

    monkeypatch.setattr(hashlib, "md5", forbidding)
    monkeypatch.setattr(hashlib, "new", None)
    for _ in ("download", "found there"):
        assert fetch(wanted, tmp_path).read_bytes() == CONTENT
