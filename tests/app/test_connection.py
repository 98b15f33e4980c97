"""HTTP on the wire: raw bytes to a real process, however they arrive, and every request gets its own answer."""

import asyncio
import gc
import json
import os
import re
import signal
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from app.http.bodies import SWALLOW_PAUSE_S
from app.http.connection import (
    MAX_FRUITLESS_BYTES,
    MAX_HEADS,
    MAX_WAITING,
    Connection,
    Heads,
    RequestHead,
    _Flow,
    connection_of,
)
from tests.app.watching import worker_pids
from tests.bundles import make_bundle, plain_image
from tests.servers import ConvoyProcess, convoy

READ_BYTES = 262_144
"""uvloop reads no more at once."""
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


def infer(image: bytes, *headers: str) -> bytes:
    asked = [{"name": "probabilities", "parameters": {"classification": 1}}]
    document = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES"}], "outputs": asked}
    head = json.dumps(document).encode()
    length = f"Inference-Header-Content-Length: {len(head)}"
    return request(head + image, "/v2/models/colours/infer", length, *headers)


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
        if "outputs" in told:
            return f"{told['model_name']}: {told['outputs'][0]['data'][0].rpartition(':')[2]}"
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


def test_wherever_a_request_is_cut_its_answer_is_the_same(server):
    data = request(RED, "/predict?top_k=1", "X-Request-Id: cut")
    with wire(server) as client:
        client.send(data)
        whole = client.answer()
        for at in range(1, len(data)):
            client.send(data[:at], data[at:], pause_s=0.001)
            answer = client.answer()
            assert (answer.status, answer.id, answer.body) == (200, "cut", whole.body), at
        client.send(*(data[at : at + 1] for at in range(len(data))), pause_s=0)
        assert client.answer().body == whole.body


CLOSES = "Connection: close"
UPGRADE = "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA"
FORMS = {
    "chunked": (chunked(RED), "colours: red", False),
    "absolute": (request(RED, "http://convoy/predict"), "colours: red", False),
    "percent": (request(RED, "/%70redict"), "colours: red", False),
    "hash": (request(RED, "/predict?top_k=1#top"), "colours: red", False),
    "empty-query": (request(RED, "/predict?"), "colours: red", False),
    "elsewhere": (request(RED, "/a/b/predict"), "not_found", False),
    "two-slashes": (request(RED, "//predict"), "not_found", False),
    "put": (request(RED, method="PUT"), "method_not_allowed", False),
    "empty": (request(b""), "bad_request", False),
    "not-an-image": (request(b"no image"), "bad_image", False),
    "timeout-ms": (request(RED, "/predict", "Timeout-Ms: soon"), "bad_request", False),
    "broken-form": (request(RED, "/predict", "Content-Type: multipart/form-data; boundary=b"), "bad_request", False),
    "infer": (infer(RED), "colours: red", False),
    "infer-no-image": (infer(b"no image"), "bad_image", False),
    "infer-and-close": (infer(RED, CLOSES), "colours: red", True),
    "http-1.0": (request(RED, version="1.0"), "colours: red", True),
    "close": (request(RED, "/predict", CLOSES), "colours: red", True),
    "refused-and-close": (request(b"no image", "/predict", CLOSES), "bad_image", True),
    "upgrade": (request(RED, "/predict", *UPGRADE), "colours: red", False),
    "upgrade-empty": (request(b"", "/predict", *UPGRADE), "bad_request", False),
    "upgrade-chunked": (
        chunked(RED, b"X-Late: 1\r\n", b"Connection: upgrade\r\nupgrade: h2c\r\n"),
        "colours: red",
        False,
    ),
    "upgrade-infer": (infer(RED, *UPGRADE), "colours: red", False),
    "upgrade-and-close": (request(RED, "/predict", "Connection: close, Upgrade", "Upgrade: h2c"), "colours: red", True),
    "upgrade-1.0": (request(RED, "/predict", *UPGRADE, version="1.0"), "colours: red", True),
    "upgrade-elsewhere": (request(RED, "/a/b/predict", *UPGRADE), "not_found", False),
    "websocket": (
        request(RED, "/predict", "Connection: keep-alive, Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
        "colours: red",
        False,
    ),
}


@pytest.mark.parametrize(("data", "best", "closes"), FORMS.values(), ids=FORMS)
def test_whole_split_and_after_another_a_request_gets_the_same_answer(server, data, best, closes):
    for pieces, before in (((data,), 0), ((data[:-8], data[-8:]), 0), ((request(GREEN) + data,), 1)):
        with wire(server) as client:
            client.send(*pieces)
            for _ in range(before):
                assert client.answer().best == "colours: green"
            answer = client.answer()
            assert (answer.best, answer.headers.get("connection") == "close") == (best, closes)
            if closes:
                assert client.ended()
            else:  # whatever was wrong, the next request is understood
                client.send(request(BLUE))
                assert client.answer().best == "colours: blue"
    assert not troubles(server)


def test_a_whole_request_before_half_of_the_next(server):
    for at in (1, 30, len(request(GREEN)) - 1):
        with wire(server) as client:
            client.send(request(RED) + request(GREEN)[:at], request(GREEN)[at:] + request(BLUE), pause_s=0.02)
            assert [client.answer().best for _ in range(3)] == ["colours: red", "colours: green", "colours: blue"]


BEFORE = {
    "nothing": (b"", []),
    "whole": (request(RED), ["colours: red"]),
    "refused": (request(RED, "/models/nobody/predict"), ["unknown_model"]),
    "several": (request(RED) + chunked(GREEN) + infer(BLUE), ["colours: red", "colours: green", "colours: blue"]),
    "half": (b"POST /predict HTTP/1.1\r\nHost: convoy\r\nTransfer-Encoding: chunked\r\n\r\n", []),
}


@pytest.mark.parametrize(("before", "answers"), BEFORE.values(), ids=BEFORE)
def test_what_is_no_http_is_told_after_the_answers_to_what_was_and_ends_the_connection(server, before, answers):
    with wire(server) as client:
        client.send(before + b"no http at all\r\n\r\n")
        assert [client.answer().best for _ in answers] == answers
        answer = client.answer()
        assert (answer.status, answer.headers["content-type"], answer.best) == (400, "application/json", "bad_request")
        assert client.ended()
    assert not troubles(server)


@pytest.mark.parametrize(
    ("start", "answered"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: convoy\r\nX-Long: ", True),
        (b"GET /", True),
        (chunked(RED).removesuffix(b"\r\n") + b"X-Long: ", False),
        (chunked(RED).removesuffix(b"0\r\n\r\n") + b"1;", False),
    ],
    ids=["header", "path", "trailer", "chunk extension"],
)
def test_what_is_neither_body_nor_a_whole_head_is_not_taken_for_ever(server, start, answered):
    with wire(server) as client:
        # Whoever is cut off while sending meets a reset.
        with suppress(ConnectionError):
            # What is read together with something that is complete, at most READ_BYTES, does not count.
            client.send(start, *[b"x" * 10_000] * ((MAX_FRUITLESS_BYTES + READ_BYTES) // 10_000 + 1))
        if answered:
            answer = client.answer()
            assert (answer.status, answer.best) == (431, "head_too_large")
        with suppress(ConnectionError):
            assert client.ended()
    with wire(server) as client:  # and half of that is nothing special, piece by piece
        long = f"X-Long: {'x' * (MAX_FRUITLESS_BYTES // 2)}"
        data = request(RED, "/predict", long)
        client.send(*(data[at : at + 10_000] for at in range(0, len(data), 10_000)))
        assert client.answer().best == "colours: red"
    assert not troubles(server)


def test_a_wish_for_another_protocol_is_passed_over_wherever_it_is_cut(server):
    before = len(server.lines())
    data = request(RED, "/predict?top_k=1", *UPGRADE, "X-Request-Id: cut") + request(GREEN, "/predict", *UPGRADE)
    with wire(server) as client:
        for at in range(1, len(data)):
            client.send(data[:at], data[at:], pause_s=0.001)
            answer = client.answer()
            assert (answer.status, answer.id, answer.best) == (200, "cut", "colours: red"), at
            assert client.answer().best == "colours: green"
        client.send(*(data[at : at + 1] for at in range(len(data))), pause_s=0)
        assert [client.answer().best for _ in range(2)] == ["colours: red", "colours: green"]
        client.send(request(b"", "/livez", *UPGRADE, method="GET") * 3 + request(BLUE, "/predict", *UPGRADE))
        assert [client.answer().status for _ in range(4)] == [200] * 4
    told = {line["message"] for line in server.lines()[before:]}
    assert told <= {"request"}


def test_who_asks_first_and_for_another_protocol_is_asked_for_the_body(server):
    data = request(RED, "/predict", *UPGRADE, "Expect: 100-continue")
    with wire(server) as client:
        client.send(data[: -len(RED)])
        assert client.answer().status == 100
        client.send(RED)
        assert client.answer().best == "colours: red"


def test_many_wishes_for_another_protocol_at_once_are_as_many_requests():
    """Two thousand of them in one read, as many reads long: none is lost, and the stack is not theirs to fill."""

    async def app(scope, receive, send) -> None:
        await connection_of(scope).answer(200, b"", b"done")

    async def connect() -> None:
        connection = Connection(config, ServerState(), {}, asyncio.get_running_loop())
        transport = Transport()
        connection.connection_made(transport)
        connection.data_received(request(b"", "/", *UPGRADE) * 2000)
        while transport.written.count(b"HTTP/1.1 200 OK") < 2000:
            await asyncio.sleep(0)
        connection.connection_lost(None)

    config = Config(app, http=Connection, log_config=None)
    config.load()
    asyncio.run(asyncio.wait_for(connect(), 30))


@pytest.mark.parametrize("target", ["/predict", "convoy:80"])
def test_no_tunnel_is_opened(server, target):
    with wire(server) as client:
        client.send(b"CONNECT %s HTTP/1.1\r\nHost: convoy\r\n\r\nfor another" % target.encode())
        answer = client.answer()
        assert answer.status in (400, 405) and answer.best in ("bad_request", "method_not_allowed")


LONG_HEADS = {
    "one header": request(RED, "/predict", "X-Long: " + "x" * 70_000),
    "many headers": request(RED, "/predict", *["X-Many: of them"] * 5_000),
    "longer than a read": request(RED, "/predict", "X-Long: " + "x" * 300_000),
    "address": request(RED, "/predict?" + "x" * 66_000),
    "address of a GET": request(path="/" + "x" * MAX_FRUITLESS_BYTES, method="GET"),
    "second": request(method="GET", path="/livez") + request(RED, "/predict", "X-Long: " + "x" * 70_000),
}


@pytest.mark.parametrize("data", LONG_HEADS.values(), ids=LONG_HEADS)
def test_a_head_is_too_long_however_it_arrives(server, data):
    for size in (10_000, MAX_FRUITLESS_BYTES, len(data)):
        with wire(server) as client:
            with suppress(ConnectionError):
                client.send(*(data[at : at + size] for at in range(0, len(data), size)), pause_s=0.001)
            if data.startswith(b"GET /livez"):
                # Its answer may be on its way when the next head turns out to be too long: then there is no other.
                with suppress(AssertionError, ConnectionError):
                    assert client.answer().status == 200
            else:
                answer = client.answer()
                assert (answer.status, answer.best) == (431, "head_too_large")
            with suppress(ConnectionError):
                assert b"HTTP/1.1 200" not in client._file.read()
    assert not troubles(server)


@pytest.mark.parametrize("path", ["/predict", "/models/nobody/predict"], ids=["whole", "refused"])
def test_a_long_body_makes_no_long_head(server, path):
    head_of = "X-Long: " + "x" * (MAX_FRUITLESS_BYTES - 1000)
    data = request(RED + bytes(150_000), path, head_of)
    for size in (MAX_FRUITLESS_BYTES - 10, MAX_FRUITLESS_BYTES + 10, len(data)):
        with wire(server) as client:
            client.send(*(data[at : at + size] for at in range(0, len(data), size)))
            assert client.answer().best == ("colours: red" if path == "/predict" else "unknown_model")
            client.send(request(GREEN))
            assert client.answer().best == "colours: green"


@pytest.mark.parametrize(("data", "best", "closes"), FORMS.values(), ids=FORMS)
def test_a_head_that_came_before_means_the_same_again(server, data, best, closes):
    for _ in range(3):
        with wire(server) as client:
            for _ in range(1 if closes else 3):
                client.send(data)
                answer = client.answer()
                assert (answer.best, answer.headers.get("connection") == "close") == (best, closes)
                if not closes:  # between two of them: what the parser has to read on from
                    client.send(request(GREEN) + request(BLUE))
                    assert [client.answer().best for _ in range(2)] == ["colours: green", "colours: blue"]
    assert not troubles(server)


def test_a_body_that_looks_like_a_known_request_is_a_body(server):
    known = request(RED, "/predict", "X-Request-Id: inner")
    with wire(server) as client:
        for _ in range(2):
            client.send(known)
            assert (answer := client.answer()).id == "inner" and answer.best == "colours: red"
        for pieces in ((b"", known), (known[:5], known), (known, known), (known, known[:7])):
            outer = request(b"".join(pieces), "/predict", "X-Request-Id: outer")
            head = outer[: len(outer) - len(b"".join(pieces))]
            for start in range(0, len(head), 40):  # however much of the outer head came before
                client.send(head[:start], head[start:] + pieces[0], pieces[1])
                assert (answer := client.answer()).id == "outer" and answer.best == "bad_image"
        client.send(known)
        assert client.answer().id == "inner"


def test_what_is_learned_starts_where_a_request_does(server):
    tail = b"the rest of a body "
    together = tail + request(RED, "/predict", "X-Request-Id: learned")
    with wire(server) as client:
        for _ in range(3):
            outer = request(b"begins, " + tail)
            client.send(outer[: -len(tail)], together)
            assert client.answer().best == "bad_image"
            assert client.answer().id == "learned"
        client.send(together)  # where a request should start, that is no HTTP
        assert client.answer().status == 400
        assert client.ended()


def test_only_a_head_with_nothing_but_its_body_is_learned_and_not_too_many():
    heads = Heads()
    learned = RequestHead("/predict", b"", [], len(RED))
    for data in (
        request(RED) + b"P",
        chunked(RED),
        request(RED, "/predict", "X: " + "x" * 4096),
    ):
        heads.learn(data, learned)
        assert heads.split(data) is None
    for number in range(3 * MAX_HEADS):
        heads.learn(request(RED, f"/{number}/predict"), learned)
        assert heads.split(request(RED, f"/{number}/predict")) == (learned, RED)
    assert heads.split(request(RED, "/1/predict")) is None
    assert heads.split(request(RED, f"/{number}/predict")[:-1]) is None
    assert heads.split(request(RED, f"/{number}/predict") + b"x") is None


def troubles(server) -> list[dict]:
    """Return what the log complains about."""
    return [
        line for line in server.lines() if line["level"] == "error" or line["logger"].startswith("python_multipart")
    ]


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Iterator[ConvoyProcess]:
    """A service with one slow session, and room for two images."""
    root = tmp_path_factory.mktemp("slow")
    make_bundle(root / "models", "slow", slow=True)
    with convoy(root / "models", root / "log", sessions=1, max_inflight_images=2, max_batch=1) as process:
        yield process


def wait_until_nothing_is_inside(server) -> None:
    deadline = time.monotonic() + 10
    while True:
        samples = server.metrics()
        if not any(
            value for key, value in samples.items() if key.startswith("convoy_inflight_") and "_limit{" not in key
        ):
            return
        assert time.monotonic() < deadline, samples
        time.sleep(0.02)


@pytest.mark.parametrize("answers", [0, 1], ids=["the-first", "the-second"])
def test_who_leaves_with_requests_waiting_leaves_nothing_inside_and_is_no_error(slow, answers):
    with wire(slow) as client:
        client.send(request(RED) * 4)
        for _ in range(answers):
            client.answer()
        while not slow.metrics().get('convoy_inflight_requests{model="slow"}'):
            time.sleep(0.005)
        client.reset()
    wait_until_nothing_is_inside(slow)
    assert not troubles(slow)


def test_who_ends_its_side_of_the_connection_has_left(slow):
    """TCP tells a half-closed connection from a closed one only when something is written to it, which is too late."""
    gone = 'convoy_requests_total{code="499",model="slow",route="/predict",version="1"}'
    before = slow.metrics().get(gone, 0)
    with wire(slow) as client:
        client.send(request(RED))
        client.socket.shutdown(socket.SHUT_WR)
        assert client.ended()
    wait_until_nothing_is_inside(slow)
    assert slow.metrics()[gone] == before + 1
    assert not troubles(slow)


def test_after_a_deadline_the_next_request_on_the_connection_has_its_own(slow):
    with wire(slow) as client:
        for split in (False, True):
            data = request(RED, "/predict", "Timeout-Ms: 1", "X-Request-Id: late")
            client.send(data[:-1], data[-1:]) if split else client.send(data)
            answer = client.answer()
            assert (answer.status, answer.id, answer.best) == (504, "late", "deadline")
            client.send(request(GREEN, "/predict", "X-Request-Id: next"))
            answer = client.answer()
            assert (answer.id, answer.best) == ("next", "slow: green")
    wait_until_nothing_is_inside(slow)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_drain_answers_who_has_connected_and_was_not_accepted_yet(models, tmp_path, workers):
    """The service stands still while clients connect, send and go on; then the signal is the first that it hears of."""
    with convoy(models, tmp_path / "log", workers=workers, default_model="colours") as draining:
        stopped = [draining.process.pid, *([*worker_pids(draining).values()] if workers > 1 else [])]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        clients = [Wire(draining.url) for _ in range(40)]
        for client in clients:
            client.send(request(RED))
        draining.process.send_signal(signal.SIGTERM)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        assert {client.answer().best for client in clients} == {"colours: red"}
        assert draining.stop() == 0
        for client in clients:
            client.close()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", [0, 300_000], ids=["whole", "in-pieces"])
def test_a_drain_answers_what_was_pipelined_before_it(tmp_path, size, workers):
    """The connection is closed with the last answer, whatever kind of request it is to, and not before."""
    make_bundle(tmp_path / "models", "slow", slow=True)
    behind = [request(GREEN), request(method="GET", path="/livez"), request(b"broken"), request(BLUE)]
    settings = {"workers": workers, "sessions": 1, "max_batch": 1}
    with convoy(tmp_path / "models", tmp_path / "log", **settings) as draining, wire(draining) as client:
        client.send(request(RED + bytes(size)) + b"".join(behind))
        while not draining.metrics()["convoy_inflight_images"]:
            time.sleep(0.002)
        time.sleep(0.05)  # what is behind has been read too
        draining.process.send_signal(signal.SIGTERM)
        answers = [client.answer() for _ in range(1 + len(behind))]
        assert [answer.best for answer in answers[:2]] == ["slow: red", "slow: green"]
        assert [answer.status for answer in answers[2:]] == [200, 422, 200]
        assert answers[-1].best == "slow: blue"
        assert [answer.headers.get("connection") for answer in answers] == [None, None, None, None, "close"]
        assert client.ended()
        assert draining.stop() == 0


def test_a_refused_request_says_when_to_come_back_and_its_connection_goes_on(slow):
    large = request(RED + bytes(300_000))
    with wire(slow) as one, wire(slow) as two, wire(slow) as third:
        one.send(request(RED))
        two.send(request(RED))
        while slow.metrics()["convoy_inflight_images"] < 2:
            time.sleep(0.002)
        third.send(request(GREEN) + large)
        refusal = third.answer()
        assert (refusal.status, refusal.best) == (429, "queue_full")
        assert 1 <= int(refusal.headers["retry-after"]) <= 30
        third.answer()  # to the large one: what was left of its body is read and thrown away
        assert (one.answer().best, two.answer().best) == ("slow: red", "slow: red")
        third.send(request(BLUE))
        assert third.answer().best == "slow: blue"
    wait_until_nothing_is_inside(slow)


class Transport(asyncio.Transport):
    """What a connection writes to, without a socket."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False
        self.reading = True

    def write(self, data: bytes) -> None:
        assert not self.closing
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def test_no_more_is_read_while_many_requests_wait():
    transport, waiting = Transport(), deque(range(MAX_WAITING + 2))
    flow = _Flow(transport, waiting)
    flow.pause_reading()
    while not transport.reading:
        waiting.pop()
        flow.resume_reading()
    assert len(waiting) == MAX_WAITING


@pytest.mark.parametrize(
    "pieces",
    [
        (request(RED),),
        (request(RED)[:-1], RED[-1:]),
        (request(RED) * 3,),
        (request(RED, "/predict", "Connection: upgrade", "Upgrade: h2c"),),
        (request(RED)[:-1],),
        (),
    ],
    ids=["whole", "split", "pipelined", "upgrade", "half", "nothing"],
)
@pytest.mark.parametrize("early", [False, True], ids=["stays", "leaves-early"])
def test_nothing_of_a_connection_is_left_to_the_garbage_collector(pieces, early):
    async def app(scope, receive, send) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        await connection_of(scope).answer(200, b"", b"done")

    async def connect() -> weakref.ref:
        connection = Connection(config, ServerState(), {}, asyncio.get_running_loop())
        transport = Transport()
        connection.connection_made(transport)
        for piece in pieces:
            connection.data_received(piece)
            for _ in range(0 if early else 20):
                await asyncio.sleep(0)
        if not early and len(pieces[-1:]) and pieces[-1] != request(RED)[:-1]:
            assert transport.written.count(b"HTTP/1.1 200 OK") == max(1, len(pieces[0]) // len(request(RED)))
        connection.connection_lost(None)
        for _ in range(20):
            await asyncio.sleep(0)
        return weakref.ref(connection)

    config = Config(app, http=Connection, log_config=None)
    config.load()
    gc.disable()
    try:
        assert asyncio.run(connect())() is None
    finally:
        gc.enable()


def test_who_asked_before_sending_and_is_refused_is_not_waited_for(server):
    with wire(server) as client:
        client.send(request(RED, "/models/nobody/predict", "Expect: 100-continue")[: -len(RED)])
        answer = client.answer()
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        assert client.ended()


TOO_LARGE = {
    "announced": b"Content-Length: 99999999\r\n\r\n",
    "begun": b"Content-Length: 99999999\r\n\r\nonly this",
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n1e8481\r\n" + bytes(2_000_001) + b"\r\n",
}


@pytest.mark.parametrize(
    ("path", "kind", "timeout_ms"),
    [
        ("/predict", "announced", 60_000),
        ("/predict", "begun", 1_000),
        ("/predict", "chunked", 60_000),
        ("/v2/models/colours/infer", "chunked", 1_500),
        ("/v1/models/colours:predict", "announced", 1_000),
    ],
)
def test_a_too_large_body_of_which_nothing_comes_is_told_so(server, path, kind, timeout_ms):
    rest = TOO_LARGE[kind]
    head = f"POST {path} HTTP/1.1\r\nHost: convoy\r\nTimeout-Ms: {timeout_ms}\r\n"
    with wire(server) as client:
        started = time.monotonic()
        client.send(head.encode() + rest)
        answer = client.answer()
        assert (answer.status, answer.best, answer.headers["connection"]) == (413, "body_too_large", "close")
        assert time.monotonic() - started >= min(timeout_ms / 1000, SWALLOW_PAUSE_S)
        assert client.ended()
    wait_until_nothing_is_inside(server)
    assert not troubles(server)


def test_a_too_large_body_that_goes_on_is_told_so_at_the_deadline(server):
    with wire(server) as client:
        client.send(request(b"", "/predict", "Timeout-Ms: 500").replace(b"Length: 0", b"Length: 99999999"))
        with suppress(ConnectionError):  # who is cut off while sending may meet a reset
            client.send(*[b"x"] * 100)
        assert client.answer().best == "body_too_large"


@pytest.mark.parametrize("start", [b"", b"POST /predict HTTP/1.1\r\nHost: conv", request(RED) + b"POST /pre"])
def test_a_connection_without_a_whole_head_ends_after_the_idle_time(tmp_path, start):
    make_bundle(tmp_path / "models")
    with convoy(tmp_path / "models", tmp_path / "log", keep_alive_s=1) as brief, wire(brief) as client:
        client.send(start)
        if start.startswith(request(RED)):
            assert client.answer().status == 200
        assert client.ended()
