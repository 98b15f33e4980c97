"""HTTP on the wire: raw bytes to a real process, however they arrive, and every request gets its own answer."""

import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.bundles import plain_image

RED, GREEN, BLUE = (plain_image(colour) for colour in ("red", "green", "blue"))


def request(
    body: bytes = b"", path: str = "/predict", *headers: str, method: str = "POST", version: str = "1.1"
) -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: convoy", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(body: bytes, trailers: bytes = b"", headers: bytes = b"") -> bytes:
    head = b"POST /predict HTTP/1.1\r\nHost: convoy\r\nTransfer-Encoding: chunked\r\n" + headers + b"\r\n"
    half = len(body) // 2
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (body[:half], body[half:]) if piece)
    return head + pieces + b"0\r\n" + trailers + b"\r\n"


class Answer:
    """One answer, as read from the wire."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def id(self) -> str:
        return self.headers["x-request-id"]

    @property
    def best(self) -> str:
        """Its model and first label; of an error its code; of a probe its body."""
        told = json.loads(self.body)
        if "results" in told:
            return f"{told['model']}: {told['results'][0]['top'][0]['label']}"
        return told.get("code", self.body.decode())


class Wire:
    """A client's end of a connection."""

    def __init__(self, url: str, timeout_s: float = 10) -> None:
        host, port = re.fullmatch(r"http://([^:]+):(\d+)", url).groups()
        self.socket = socket.create_connection((host, int(port)), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self.socket.makefile("rb")

    def send(self, *pieces: bytes, pause_s: float = 0.005) -> None:
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(pause_s)
            self.socket.sendall(piece)

    def answer(self) -> Answer:
        """Read the next answer; its end is where Content-Length says, so a byte too many spoils the next one."""
        first = self._file.readline()
        assert first, "the connection is closed"
        status = int(re.fullmatch(rb"HTTP/1\.1 (\d{3}) [\w -]+\r\n", first)[1])
        headers: dict[str, str] = {}
        while line := self._file.readline().strip():
            name, value = line.decode().split(": ", 1)
            assert headers.setdefault(name.lower(), value) == value, "a header twice"
        return Answer(status, headers, self._file.read(int(headers.get("content-length", 0))))

    def ended(self) -> bool:
        """Tell, once the server has closed, whether nothing is left to read."""
        return self._file.read() == b""

    def reset(self) -> None:
        """Leave without a word."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@contextmanager
def wire(server) -> Iterator[Wire]:
    end = Wire(server.url)
    try:
        yield end
    finally:
        end.close()


def test_pipelined_requests_keep_their_own_path_headers_and_body(server):
    sent = [
        (request(RED, "/predict", "X-Request-Id: 1"), "1", "colours: red"),
        (request(GREEN, "/models/other/predict", "X-Request-Id: 2"), "2", "other: grün"),
        (request(b"", "/livez", "X-Request-Id: 3", method="GET"), "3", '{"live":true}'),
        (request(b"no image", "/predict", "X-Request-Id: 4"), "4", "bad_image"),
        (request(BLUE, "/models/nobody/predict", "X-Request-Id: 5"), "5", "unknown_model"),
        (request(BLUE, "/predict?top_k=0", "X-Request-Id: 6"), "6", "bad_request"),
        (request(BLUE, "/predict", "X-Request-Id: 7"), "7", "colours: blue"),
    ]
    for first in range(len(sent)):  # whichever comes first may be taken whole
        order = sent[first:] + sent[:first]
        with wire(server) as client:
            client.send(b"".join(data for data, _, _ in order))
            for _, id_, best in order:
                answer = client.answer()
                assert (answer.id, answer.best) == (id_, best)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("trailer", ["Timeout-Ms: never", "X-Request-Id: late", "Content-Type: text/html"])
def test_what_comes_after_the_body_is_no_header(server, trailer, split):
    data = chunked(RED, trailer.encode() + b"\r\n", b"X-Request-Id: early\r\n")
    with wire(server) as client:
        client.send(data[:-30], data[-30:]) if split else client.send(data)
        answer = client.answer()
        assert (answer.id, answer.best) == ("early", "colours: red")
