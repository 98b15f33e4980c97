"""HTTPS with certificates of one's own: served, renewed, refused. Real processes and real handshakes."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app.errors import SettingsError
from app.settings import Settings
from app.tls import Certificate, certificate_of
from tests.app.watching import free_port, messages, pages_of, probe_url, wait_for
from tests.bundles import plain_image
from tests.certificates import Pair, make_pair
from tests.servers import ConvoyProcess, convoy

RED = plain_image("red")


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("other"), "other")


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "workers"])
def secure(request, models: Path, pair: Pair, tmp_path_factory):
    """A service with a certificate that may be changed, and a port for probes."""
    folder = tmp_path_factory.mktemp("secure")
    own = Pair(folder / "server.pem", folder / "server.key")
    copy(pair, own)
    options = {"tls_certificate": own.certificate, "tls_key": own.key, "workers": request.param}
    options |= {"default_model": "colours", "probe_port": free_port()}
    with convoy(models, folder / "log", verify=pair.trusting(), **options) as server:
        yield server, own


def copy(source: Pair, target: Pair) -> None:
    shutil.copy(source.certificate, target.certificate)
    shutil.copy(source.key, target.key)


def test_predictions_small_and_large_over_https(secure):
    server, _ = secure
    assert server.url.startswith("https://127.0.0.1:")
    for body in (RED, plain_image("red", size=(900, 900), compress_level=0)):
        answer = server.client.post("/predict", content=body)
        assert answer.json()["results"][0]["top"][0]["label"] == "red"
    assert server.client.get("/models").status_code == 200


def test_pipelined_requests_over_https(secure, pair):
    server, _ = secure
    request = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(RED), RED)
    with connect(server, pair.trusting()) as connection:
        connection.sendall(request * 5)
        answers = b""
        while answers.count(b'"results"') < 5:
            answers += connection.recv(65536)
    assert answers.count(b"HTTP/1.1 200 ") == 5


def connect(server: ConvoyProcess, context: ssl.SSLContext) -> ssl.SSLSocket:
    address = server.client.base_url.host, server.client.base_url.port
    return context.wrap_socket(socket.create_connection(address, 10), server_hostname=address[0])


def test_what_is_agreed_on(secure, pair):
    server, _ = secure
    context = pair.trusting()
    context.set_alpn_protocols(["h2", "http/1.1"])
    with connect(server, context) as connection:
        assert connection.version() == "TLSv1.3"
        assert connection.selected_alpn_protocol() == "http/1.1"


def test_plain_http_on_the_secure_port_gets_nothing_and_harms_nobody(secure, pair):
    server, _ = secure
    address = server.client.base_url.host, server.client.base_url.port
    for _ in range(5):
        with socket.create_connection(address, 10) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP" not in connection.recv(1000)
    with socket.create_connection(address, 10):  # comes, and leaves in the middle of the handshake
        pass
    assert server.client.get("/livez").status_code == 200
    assert not [line for line in server.lines() if line["level"] == "error"]
    server.client.close()
    server.client = httpx.Client(base_url=server.url, timeout=30, verify=pair.trusting())
    if "workers" in server.client.get("/readyz").json():  # of connections that came to nothing none is counted
        wait_for(lambda: sum(page.connections for page in pages_of(server)) == 1)


def test_the_probe_port_stays_plain(secure):
    server, _ = secure
    assert httpx.get(f"{probe_url(server)}/readyz").json()["ready"] is True
    assert "convoy_requests_total" in httpx.get(f"{probe_url(server)}/metrics").text


@pytest.mark.parametrize("by_probe_port", [False, True])
def test_the_health_command_asks_over_https(secure, by_probe_port):
    server, own = secure
    words = ["--port", server.client.base_url.port, "--tls-certificate", own.certificate]
    if by_probe_port:
        words += ["--probe-port", probe_url(server).rpartition(":")[2]]
    asked = command("health", *words)
    assert (asked.returncode, asked.stdout) == (0, "ready\n"), asked.stderr


def test_a_renewed_certificate_is_shown_to_new_connections(secure, pair, other):
    server, own = secure
    workers = len(server.client.get("/readyz").json().get("workers", {"1": ""}))
    with connect(server, pair.trusting()) as old:
        shutil.copy(other.certificate, own.certificate)  # half of a renewal
        wait_for(lambda: len(messages(server, "the certificate cannot be renewed: the one before it stays")) == workers)
        with connect(server, pair.trusting()):
            pass
        copy(other, own)
        wait_for(lambda: len(messages(server, "certificate read")) == workers)
        for _ in range(4):
            with connect(server, other.trusting()):
                pass
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(server, pair.trusting())
        old.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert old.recv(1000).startswith(b"HTTP/1.1 200")
    copy(pair, own)
    wait_for(lambda: len(messages(server, "certificate read")) == 2 * workers)


def test_sighup_brings_workers_with_the_new_certificate(models, pair, other, tmp_path):
    own = Pair(tmp_path / "server.pem", tmp_path / "server.key")
    copy(pair, own)
    options = {"tls_certificate": own.certificate, "tls_key": own.key, "workers": 2, "default_model": "colours"}
    with convoy(models, tmp_path / "log", verify=pair.trusting(), **options) as server:
        copy(other, own)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: messages(server, "reloaded"))
        for _ in range(4):
            with connect(server, other.trusting()):
                pass
        assert server.stop() == 0


def test_only_clients_with_a_certificate_where_that_is_asked(models, pair, other, tmp_path):
    options = {"tls_certificate": pair.certificate, "tls_key": pair.key, "tls_client_ca": other.certificate}
    context = pair.trusting()
    context.load_cert_chain(other.certificate, other.key)
    with convoy(models, tmp_path / "log", verify=context, default_model="colours", **options) as server:
        assert server.client.post("/predict", content=RED).status_code == 200
        answer = b""
        with contextlib.suppress(OSError), connect(server, pair.trusting()) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = connection.recv(1000)  # in TLS 1.3 the client learns it with the first answer
        assert answer == b""
        port = server.client.base_url.port
        asked = command("health", "--port", port, "--tls-certificate", "x", "--tls-client-ca", other.certificate)
        assert asked.returncode == 2 and "set --probe-port" in asked.stderr
        assert server.stop() == 0


def test_a_drain_over_https_answers_what_is_inside(models, pair, tmp_path):
    options = {"tls_certificate": pair.certificate, "tls_key": pair.key, "default_model": "colours"}
    with convoy(models, tmp_path / "log", verify=pair.trusting(), **options) as server:
        with connect(server, pair.trusting()) as connection:
            half = len(RED) // 2
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(RED))
            connection.sendall(RED[:half])
            server.process.send_signal(signal.SIGTERM)
            connection.sendall(RED[half:])
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert server.stop() == 0


def test_an_encrypted_key_and_a_key_in_the_same_file(tmp_path, pair):
    locked = make_pair(tmp_path, "locked", password="open sesame")
    (tmp_path / "password").write_text("open sesame\n")
    Certificate(str(locked.certificate), str(locked.key), str(tmp_path / "password"))
    both = tmp_path / "both.pem"
    both.write_text(pair.certificate.read_text() + pair.key.read_text())
    Certificate(str(both))
    with pytest.raises(SettingsError, match=r"locked\.key is encrypted, and its password is needed: set --tls"):
        Certificate(str(locked.certificate), str(locked.key))
    (tmp_path / "password").write_text("close sesame")
    with pytest.raises(SettingsError, match=r"password is not its password"):
        Certificate(str(locked.certificate), str(locked.key), str(tmp_path / "password"))


def test_what_does_not_fit_together_is_one_sentence(tmp_path, pair, other):
    nothing, text, binary = tmp_path / "nothing", tmp_path / "text", tmp_path / "binary"
    text.write_text("hello")
    binary.write_bytes(b"\xff" * 100)
    cases = [
        ((nothing, pair.key), "The certificate .*nothing cannot be read: No such file"),
        ((text, pair.key), "The certificate .*text cannot be used: no PEM certificate is in it"),
        ((binary, pair.key), "The certificate .*binary is not text: give it as PEM"),
        ((pair.certificate, nothing), "The certificate's key .*nothing cannot be read"),
        ((pair.certificate, text), "The key .*text cannot be used: no PEM key is in it; set --tls-key"),
        ((pair.certificate, ""), r"The key .*server\.pem cannot be used: no PEM key is in it; set --tls-key"),
        ((pair.certificate, other.key), r"The key .*other\.key is not the key of the certificate .*server\.pem"),
        ((pair.certificate, pair.key, nothing), "The password file .*nothing cannot be read"),
        ((pair.certificate, pair.key, "", text), "The client authority .*text cannot be used: no PEM certificate"),
    ]
    for files, sentence in cases:
        with pytest.raises(SettingsError, match=sentence) as fault:
            Certificate(*map(str, files))
        assert fault.value.message.endswith(".") and "\n" not in fault.value.message
    with pytest.raises(SettingsError, match="tls_key is set, but no tls_certificate"):
        certificate_of(Settings(tls_key="x"))
    assert certificate_of(Settings()) is None


def test_half_a_renewal_leaves_the_context_as_it_is(tmp_path, pair, other, caplog):
    caplog.set_level(logging.INFO)
    own = Pair(tmp_path / "server.pem", tmp_path / "server.key")
    copy(pair, own)
    certificate = Certificate(str(own.certificate), str(own.key))
    for damage in (lambda: own.key.unlink(), lambda: shutil.copy(other.key, own.key)):
        damage()
        for _ in range(4):
            certificate.refresh()
        assert shown_by(certificate, pair.trusting())
    shutil.copy(other.certificate, own.certificate)
    certificate.refresh()
    assert shown_by(certificate, pair.trusting())  # it may still be written
    certificate.refresh()
    assert shown_by(certificate, other.trusting())
    failed = "the certificate cannot be renewed: the one before it stays"
    assert [record.message for record in caplog.records] == [failed, failed, "certificate read"]


def shown_by(certificate: Certificate, context: ssl.SSLContext) -> bool:
    """Shake hands in memory; raises where the client does not trust what it is shown."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = certificate.context.wrap_bio(to_server, to_client, server_side=True)
    client = context.wrap_bio(to_client, to_server, server_hostname="127.0.0.1")
    for end in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return client.version() is not None


def command(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CONVOY_")}
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *map(str, words)], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_start_with_a_broken_certificate_is_one_sentence(models, pair, other, workers):
    words = ["--models", models, "--port", 0, "--workers", workers]
    started = command("serve", *words, "--tls-certificate", pair.certificate, "--tls-key", other.key)
    assert started.returncode == 2
    assert started.stderr.splitlines()[-1].startswith(f"convoy: The key {other.key} is not the key of the certificate")
