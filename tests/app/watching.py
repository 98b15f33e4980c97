"""What tests of several workers see from outside: their processes, their log, and load on them."""

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from app.pages import Page, open_shared
from tests.bundles import plain_image
from tests.servers import ConvoyProcess

RED = plain_image("red")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def probe_url(server: ConvoyProcess) -> str:
    environment = Path(f"/proc/{server.process.pid}/environ").read_bytes().split(b"\0")
    [port] = [text.partition(b"=")[2] for text in environment if text.startswith(b"CONVOY_PROBE_PORT=")]
    return f"http://127.0.0.1:{port.decode()}"


def worker_pids(server: ConvoyProcess, kind: str = "worker") -> dict[int, int]:
    """Return the process id of each running worker, or engine."""
    started = {line[kind]: line["pid"] for line in server.lines() if line["message"] == f"{kind} started"}
    return {number: pid for number, pid in started.items() if is_running(pid)}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pages_of(server: ConvoyProcess) -> Sequence[Page]:
    """Return the pages of a service with several workers, as they are in its memory."""
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        if "convoy-pages" in str(link.readlink()):
            descriptor = os.open(link, os.O_RDWR)
            pages = open_shared(descriptor)
            os.close(descriptor)
            return pages
    raise AssertionError("the supervisor has no pages")


def wait_for(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.02)


def messages(server: ConvoyProcess, message: str) -> list[dict]:
    return [line for line in server.lines() if line["message"] == message]


def logged_with(server: ConvoyProcess, request_id: str) -> list[dict]:
    return [line for line in server.lines() if line.get("request_id") == request_id]


@contextmanager
def load(url: str, clients: int = 4) -> Iterator[list[object]]:
    """Send requests on keep-alive connections for as long as the `with` block runs; yields the outcomes so far."""
    outcomes: list[object] = []
    stop = threading.Event()

    def send() -> None:
        with httpx.Client(base_url=url, timeout=20) as client:
            while not stop.is_set():
                try:
                    outcomes.append(client.post("/predict", content=RED).status_code)
                except httpx.TransportError as error:
                    outcomes.append(error)

    threads = [threading.Thread(target=send) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        stop.set()
        for thread in threads:
            thread.join()
