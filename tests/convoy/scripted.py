"""A server that answers what a test tells it to, byte by byte; and both clients behind one face."""

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import convoy

RESET, CLOSE, SILENCE, DRIP = "reset", "close", "silence", "drip"


class cut(bytes):  # noqa: N801
    """Bytes after which the connection ends."""


def answer(status: int, content: object, **headers: object) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} whatever", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def fault(status: int, code: str = "a_code", sentence: str = "A sentence.", **headers: object) -> bytes:
    return answer(status, {"error": sentence, "code": code}, **headers)


def prediction(*labels: str) -> dict:
    results = [{"top": [{"label": label, "index": 0, "probability": 0.5}]} for label in labels]
    return {"model": "scripted", "version": "1", "results": results}


class ScriptedServer:
    """Gives the answers in turn, one a request, over as many connections as are opened; keeps what it was sent."""

    def __init__(self, *answers: bytes | str) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = 0
        self._answers = list(answers)
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def stop(self) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self._threads)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(0.05)
        with connection:
            received = b""
            while request := self._read(connection, received):
                received = b""
                self.requests.append(request)
                reply = self._answers.pop(0)
                if reply == RESET:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                if reply == CLOSE:
                    return
                if reply == SILENCE:
                    self._over.wait(10)
                    return
                if reply == DRIP:
                    self._drip(connection)
                    return
                connection.sendall(reply)
                if isinstance(reply, cut):
                    return

    def _read(self, connection: socket.socket, received: bytes) -> tuple[str, dict[str, str], bytes] | None:
        while True:
            head, end, body = received.partition(b"\r\n\r\n")
            if end:
                line, *fields = head.decode().split("\r\n")
                headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
                if len(body) == int(headers.get("content-length", 0)):
                    return line.rsplit(" ", 1)[0], headers, body
            try:
                data = connection.recv(1 << 20)
            except TimeoutError:
                if self._over.is_set():
                    return None
                continue
            except OSError:
                return None
            if not data:
                return None
            received += data

    def _drip(self, connection: socket.socket) -> None:
        """Send a byte every 10 ms, for 5 s at most."""
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
            for _ in range(500):
                connection.sendall(b" ")
                if self._over.wait(0.01):
                    return
        except OSError:
            return


@contextmanager
def scripted(*answers: bytes | str) -> Iterator[ScriptedServer]:
    server = ScriptedServer(*answers)
    try:
        yield server
    finally:
        server.stop()


class Threaded(convoy.Client):
    """The client of threads, which notes its pauses instead of taking them."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.slept = []
        self._sleep = self.slept.append


class Looped:
    """The client of asyncio, with each call run to its end on a loop of its own; pauses are noted, not taken."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self._runner = asyncio.Runner()
        self._client = convoy.AsyncClient(*arguments, **options)
        self.slept = []

        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)

        self._client._sleep = sleep

    def __getattr__(self, name: str):
        method = getattr(self._client, name)

        def run(*arguments: object, **options: object):
            return self._runner.run(method(*arguments, **options))

        return run

    def __enter__(self) -> "Looped":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._runner.close()
