"""API keys: the file, the scopes, the routes, the command; and that a running service takes what has changed."""

import hashlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import keys
from app.errors import ForbiddenError, SettingsError, UnauthorizedError
from app.http.auth import OPEN, access_of
from app.keys import Access, Keyring, make_key, presented_in, read_keys
from tests.app.test_connection import request, wire
from tests.app.watching import free_port, logged_with, messages, wait_for
from tests.bundles import plain_image
from tests.servers import ConvoyProcess, convoy

RED = plain_image("red")
DIGEST = "0" * 64


def add(file: Path, name: str, *scopes: str) -> str:
    key, line = make_key(name, frozenset(map(Access, scopes)))
    with file.open("a") as lines:
        lines.write(line + "\n")
    return key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


def test_the_file_holds_digests_and_never_a_key(file):
    key = add(file, "shop", "predict", "metrics")
    assert key not in file.read_text()
    [entry] = read_keys(file)
    assert entry.digest == hashlib.sha256(key.encode()).digest()
    assert (entry.name, entry.scopes) == ("shop", {Access.PREDICT, Access.METRICS})
    assert len(key) > 40 and key != make_key("shop", entry.scopes)[0]


def test_comments_and_empty_lines_are_passed_over(file):
    file.write_text(f"# who may ask\n\n  shop predict {DIGEST}   # until June\n")
    assert [key.name for key in read_keys(file)] == ["shop"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("shop predict", "line 1: a line is a name, scopes and a SHA-256"),
        (f"shop predict {DIGEST[:-1]}", "line 1: a line is"),
        (f"a/b predict {DIGEST}", "line 1: a line is"),
        (f"shop all {DIGEST}", "line 1: scopes are predict, admin, metrics"),
        (f"shop predict, {DIGEST}", "line 1: scopes are"),
        (f"shop predict {DIGEST}\nshop admin {'1' * 64}", "line 2: the name or the key of 'shop' is there twice"),
        (f"shop predict {DIGEST}\nmine admin {DIGEST}", "line 2: the name or the key of 'mine' is there twice"),
    ],
)
def test_a_wrong_line_is_named_and_not_shown(file, text, sentence):
    file.write_text(text)
    with pytest.raises(SettingsError, match=sentence) as fault:
        Keyring(str(file))
    assert DIGEST[:10] not in fault.value.message


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_told(file, content):
    if content:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"The key file .*keys\.txt (cannot be read|is not UTF-8)"):
        Keyring(str(file))


def test_scopes_do_not_include_each_other(file):
    held = {scope: add(file, scope, scope).encode() for scope in Access}
    ring = Keyring(str(file))
    for scope, key in held.items():
        for needed in Access:
            if needed is scope:
                assert ring.admit(key, needed) == scope
            else:
                with pytest.raises(ForbiddenError, match=f"'{scope}' is not for this: it lacks the scope {needed}"):
                    ring.admit(key, needed)
    assert ring.admit(None, None) == ""
    for wrong in (None, b"", held[Access.ADMIN][:-1], "schlüssel".encode()):
        with pytest.raises(UnauthorizedError):
            ring.admit(wrong, Access.PREDICT)


def test_without_a_file_only_administration_is_closed():
    ring = Keyring()
    assert ring.admit(None, Access.PREDICT) == ring.admit(b"whatever", Access.METRICS) == ""
    with pytest.raises(UnauthorizedError, match="start it with --keys"):
        ring.admit(b"whatever", Access.ADMIN)


def test_every_key_is_compared_whichever_it_is(file, monkeypatch):
    first, second = add(file, "first", "predict").encode(), add(file, "second", "predict").encode()
    ring = Keyring(str(file))
    compared = []
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda one, other: compared.append(other) or one == other)
    assert [ring.admit(key, Access.PREDICT) for key in (first, second)] == ["first", "second"]
    with pytest.raises(UnauthorizedError):
        ring.admit(b"neither", Access.PREDICT)
    assert len(compared) == 6


def test_a_changed_file_is_read_once_it_rests(file):
    old = add(file, "old", "predict").encode()
    ring = Keyring(str(file))
    file.write_text("")
    new = add(file, "new", "predict").encode()
    ring.refresh()  # it may still be written
    assert ring.admit(old, Access.PREDICT) == "old"
    ring.refresh()
    assert ring.admit(new, Access.PREDICT) == "new"
    with pytest.raises(UnauthorizedError):
        ring.admit(old, Access.PREDICT)


@pytest.mark.parametrize("damage", [lambda file: file.write_text("half a li"), lambda file: file.unlink()])
def test_a_broken_file_leaves_the_keys_as_they_are_and_is_told_once(file, damage, caplog):
    key = add(file, "shop", "predict").encode()
    ring = Keyring(str(file))
    damage(file)
    for _ in range(5):
        ring.refresh()
    assert ring.admit(key, Access.PREDICT) == "shop"
    assert [record.message for record in caplog.records] == ["the key file is broken: the keys before it stay valid"]
    file.write_text("")
    ring.refresh()
    ring.refresh()
    with pytest.raises(UnauthorizedError):  # whoever empties the file wants nobody in
        ring.admit(key, Access.PREDICT)


@pytest.mark.parametrize(
    ("headers", "presented"),
    [
        ([], None),
        ([(b"authorization", b"Bearer abc")], b"abc"),
        ([(b"authorization", b"bearer  abc ")], b"abc"),
        ([(b"x-api-key", b"abc")], b"abc"),
        ([(b"x-api-key", b"other"), (b"authorization", b"Bearer abc")], b"abc"),
        ([(b"authorization", b"Basic dXNlcjpwYXNz"), (b"x-api-key", b"abc")], b"abc"),
        ([(b"authorization", b"Basic dXNlcjpwYXNz")], None),
        ([(b"authorization", b"Bearer \xff")], b"\xff"),
    ],
)
def test_where_a_key_is_looked_for(headers, presented):
    assert presented_in([(b"host", b"x"), *headers]) == presented


@pytest.mark.parametrize(
    ("path", "access"),
    [
        ("/livez", None),
        ("/readyz", None),
        ("/ping", None),
        ("/v2/health/live", None),
        ("/v2/health/ready", None),
        ("/docs", None),
        ("/static-offline-docs/swagger-ui.css", None),
        ("/metrics", Access.METRICS),
        ("/predict", Access.PREDICT),
        ("/models", Access.PREDICT),
        ("/v2/repository/index", Access.PREDICT),
        ("/v2/repository/models/a/load", Access.ADMIN),
        ("/v2/repository/models/a/unload", Access.ADMIN),
        ("/v2/repository/index/", Access.ADMIN),
        ("/models/a/load\n", Access.ADMIN),
        ("/models/a/versions/1/unload\n", Access.ADMIN),
        ("/metrics\n", Access.METRICS),
        ("/livez/", Access.PREDICT),
        ("/what/nobody/has/thought/of", Access.PREDICT),
    ],
)
def test_what_a_path_asks_for(path, access):
    assert access_of(path) is access


class Guarded:
    """A service with a key for each scope."""

    def __init__(self, models: Path, folder: Path, workers: int) -> None:
        self.file = folder / "keys.txt"
        self.held = {scope: add(self.file, f"the-{scope}", scope) for scope in Access}
        self.models, self.log, self.workers = models, folder / "log", workers


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "workers"])
def guarded(request, models: Path, tmp_path_factory) -> Iterator[tuple[Guarded, ConvoyProcess]]:
    setup = Guarded(models, tmp_path_factory.mktemp("guarded"), request.param)
    options = {"default_model": "colours", "keys": setup.file, "probe_port": free_port(), "workers": setup.workers}
    with convoy(models, setup.log, **options) as server:
        yield setup, server


def test_a_prediction_needs_a_key_and_the_right_one(guarded):
    setup, server = guarded
    for headers in (bearer(setup.held["predict"]), {"X-API-Key": setup.held["predict"]}):
        answer = server.client.post("/predict", content=RED, headers=headers | {"X-Request-Id": "let-in"})
        assert answer.status_code == 200, answer.text
    wait_for(lambda: len(logged_with(server, "let-in")) == 2)
    assert {line["key"] for line in logged_with(server, "let-in")} == {"the-predict"}
    for headers, status in (({}, 401), (bearer("guess"), 401), (bearer(setup.held["metrics"]), 403)):
        answer = server.client.post("/models/other/predict", content=RED, headers=headers)
        assert answer.status_code == status
        assert set(answer.json()) == {"error", "code"} and answer.json()["code"] == "auth"
        assert answer.headers.get("www-authenticate") == ('Bearer realm="convoy"' if status == 401 else None)
        assert answer.headers["x-request-id"]


def test_metrics_need_their_own_scope_and_the_probe_port_none(guarded):
    setup, server = guarded
    assert server.client.get("/metrics").status_code == 401
    assert server.client.get("/metrics", headers=bearer(setup.held["predict"])).status_code == 403
    assert server.client.post("/predict", content=RED).status_code == 401
    text = server.client.get("/metrics", headers=bearer(setup.held["metrics"])).text
    refused = re.findall(r'^convoy_rejected_total\{model="",reason="auth"\} (\S+)', text, re.MULTILINE)
    assert refused and float(refused[0]) >= 2
    assert 'code="401",model="",route="/predict"' in text
    assert 'code="401",model="",route="/metrics"' in text


def test_health_is_open_and_the_rest_is_not(guarded):
    _, server = guarded
    statuses = {path: server.client.get(path).status_code for path in ("/livez", "/readyz", "/docs", "/openapi.json")}
    assert set(statuses.values()) == {200}
    for path in ("/models", "/models/colours", "/v2/repository/models/colours/load", "/nothing/here"):
        assert server.client.get(path).status_code == 401, path


def test_every_route_that_is_not_open_asks_for_a_key(guarded):
    setup, server = guarded
    document = server.client.get("/openapi.json").json()
    asked = 0
    for path, operations in document["paths"].items():
        real = re.sub(r"\{\w+\}", "1", path)
        for method, operation in operations.items():
            answer = server.client.request(method, real)
            assert (answer.status_code == 401) == (real not in OPEN) == ("security" in operation), (method, path)
            if answer.status_code == 401:
                asked += 1
                # Whoever has a key gets further, to whatever the route says.
                key = setup.held[access_of(real)]
                assert server.client.request(method, real, headers=bearer(key)).status_code not in (401, 403)
    assert asked > 20
    assert document["components"]["securitySchemes"].keys() == {"bearer", "key"}


@pytest.mark.parametrize(
    "target",
    [
        "/v2/repository/models/colours/load",
        "/v2/repository%2Fmodels/colours/load",
        "/v2/%72epository/models/colours/load",
        "/v2/repository/models/predict/predict",
        "http://x/v2/repository/models/colours/load",
        "/v2/repository/models/colours/load?x=/livez",
        "/livez/../v2/repository/models/colours/load",
        "//v2/repository/models/colours/load",
        "/v2/repository/models/colours/load%0A",
        "/models/colours/load%0A",
        "/models/colours/versions/1/unload%0a",
        "/models/colours/versions/1/un%6Coad%0A?x",
    ],
)
def test_no_spelling_of_a_path_gets_past_the_key(guarded, target):
    setup, server = guarded
    for headers, refused in (("", b" 401 "), (f"X-API-Key: {setup.held['predict']}\r\n", b" 403 ")):
        with socket.create_connection((server.client.base_url.host, server.client.base_url.port), 10) as connection:
            head = f"POST {target} HTTP/1.1\r\nHost: /livez\r\nContent-Length: 2\r\n{headers}\r\n"
            connection.sendall(head.encode() + b"{}")
            status = connection.recv(65536).partition(b"\r\n")[0]
        # What the router does not know as a path of the repository is nobody's: 404 for whoever may predict.
        assert refused in status or (headers and b" 404 " in status), status


def test_a_refused_body_is_not_read(guarded):
    _, server = guarded
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection((server.client.base_url.host, server.client.base_url.port), 10) as connection:
        connection.sendall(head)
        answer = b""
        while data := connection.recv(65536):  # until it is closed: nothing of the body was sent
            answer += data
    assert answer.startswith(b"HTTP/1.1 401 ") and b"100 Continue" not in answer
    assert b"connection: close" in answer


def test_the_same_connection_goes_on_after_a_refusal(guarded):
    setup, server = guarded
    for body in (RED, RED * 3000):
        assert server.client.post("/predict", content=body).status_code == 401
        assert server.client.post("/predict", content=RED, headers=bearer(setup.held["predict"])).status_code == 200


def test_a_new_key_is_taken_and_a_withdrawn_one_refused_while_it_serves(guarded):
    setup, server = guarded
    before = setup.file.read_text()
    key = add(setup.file, "late", "predict")

    def status() -> int:
        return server.client.post("/predict", content=RED, headers=bearer(key) | {"Connection": "close"}).status_code

    wait_for(lambda: status() == 200)
    wait_for(lambda: len(messages(server, "keys read")) == setup.workers)
    assert status() == 200
    setup.file.write_text(before)
    wait_for(lambda: len(messages(server, "keys read")) == 2 * setup.workers)
    assert status() == 401
    setup.file.write_text(before + "half a li")
    wait_for(lambda: messages(server, "the key file is broken: the keys before it stay valid"))
    assert server.client.get("/models", headers=bearer(setup.held["predict"])).status_code == 200
    setup.file.write_text(before)
    assert not any(held in setup.log.read_text() for held in (*setup.held.values(), key))


def test_a_request_that_comes_whole_is_asked_for_its_key_each_time(guarded):
    """Its head is read once; whether its key still opens the door is asked for every request."""
    setup, server = guarded
    before = setup.file.read_text()
    key = add(setup.file, "whole", "predict")
    with wire(server) as client:

        def status(*headers: str) -> int:
            client.send(request(RED, "/predict", *headers))
            return client.answer().status

        wait_for(lambda: status(f"X-API-Key: {key}") == 200)
        for _ in range(3):
            assert status(f"X-API-Key: {key}", "X-Request-Id: keyed-whole") == 200
            assert (status(), status("X-API-Key: wrong"), status(f"Authorization: {key}")) == (401, 401, 401)
        setup.file.write_text(before)
        wait_for(lambda: status(f"X-API-Key: {key}") == 401)
    assert {line["key"] for line in logged_with(server, "keyed-whole")} == {"whole"}


@pytest.mark.parametrize("path", ["/v2/repository/models/colours/load", "/models/colours/unload"])
@pytest.mark.parametrize("end", ["", "%0A"])
def test_without_keys_load_is_refused_all_the_same(server, path, end):
    answer = server.client.post(path + end, headers=bearer("anything"))
    assert answer.status_code == 401 and "--keys" in answer.json()["error"]
    assert not messages(server, "whoever reaches this address may ask: no keys are set")


def test_listening_for_everybody_without_keys_is_told_once(models, tmp_path):
    with convoy(models, tmp_path / "log", host="0.0.0.0", default_model="colours", loaded=False) as server:
        assert server.client.post("/predict", content=RED).status_code in (200, 503)
        [line] = messages(server, "whoever reaches this address may ask: no keys are set")
        assert line["level"] == "warning"


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *map(str, words)], capture_output=True, text=True, timeout=60
    )


def test_the_command_makes_a_key_that_the_file_knows(file):
    for name, scopes in (("shop", "predict"), ("ops", "metrics,admin")):
        made = command("key", name, "--scopes", scopes, "--keys", file)
        assert made.returncode == 0, made.stderr
        key = made.stdout.strip()
        assert key.startswith("convoy_") and key not in made.stderr + file.read_text()
        assert Keyring(str(file)).admit(key.encode(), Access(scopes.split(",")[0])) == name
    assert file.stat().st_mode & 0o077 == 0
    again = command("key", "shop", "--keys", file)
    assert (again.returncode, again.stdout) == (2, "")
    assert "has a key of 'shop' already" in again.stderr


def test_the_command_shows_the_line_where_there_is_no_file(file):
    made = command("key", "shop")
    line = next(line for line in made.stderr.splitlines() if line.startswith("shop "))
    file.write_text(line)
    assert Keyring(str(file)).admit(made.stdout.strip().encode(), Access.PREDICT) == "shop"


def test_bench_sends_the_key_of_its_variable(guarded, tmp_path):
    setup, server = guarded
    image = tmp_path / "red.png"
    image.write_bytes(RED)
    bench = [sys.executable, "-m", "app.cli", "bench", server.url, image, "--seconds", "0.3", "--warm-up", "0"]
    for key, status, said in (
        (setup.held["predict"], 0, "requests"),
        (setup.held["metrics"], 2, "lacks the scope predict"),
        ("grün", 2, "The key in CONVOY_API_KEY is none"),
    ):
        done = subprocess.run(
            bench, capture_output=True, text=True, timeout=60, env=os.environ | {"CONVOY_API_KEY": key}
        )
        assert done.returncode == status, done.stderr
        assert said in done.stdout + done.stderr and key not in done.stdout + done.stderr


@pytest.mark.parametrize("words", [("a b",), ("shop", "--scopes", "root")])
def test_the_command_tells_what_is_wrong(words):
    made = command("key", *words)
    assert (made.returncode, made.stdout) == (2, "")
    assert made.stderr.startswith("convoy: ")


def test_a_broken_file_at_the_start_is_one_sentence(models, file):
    file.write_text("shop\n")
    for workers in (1, 2):
        started = command("serve", "--models", models, "--port", 0, "--keys", file, "--workers", workers)
        assert started.returncode == 2
        assert started.stderr.splitlines()[-1].startswith(f"convoy: {file} line 1: a line is a name")
