"""Clients that may misbehave: one connection each, written byte by byte where it must be, left whenever they like."""

import asyncio
import json
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.survival.rows import Exchange
from benchmarks.survival.service import address_of

ANSWER_TIMEOUT_S = 20.0
PAUSE_S = 0.02
"""Before a client that was refused, or cut off, comes again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer."""

    status: int
    body: bytes
    closes: bool

    def tops(self) -> list[tuple[str, float]]:
        """Return label and probability of the best class of each image."""
        results: list[dict[str, Any]] = json.loads(self.body)["results"]
        return [(result["top"][0]["label"], result["top"][0]["probability"]) for result in results]


class Wire:
    """One connection to the service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.port = int(writer.get_extra_info("sockname")[1])

    @classmethod
    async def open(cls, url: str) -> "Wire":
        """Connect.

        Raises:
            OSError: nobody accepts.
        """
        host, port = address_of(url)
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 5)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What is sent counts as sent only when the system has it.
        writer.transport.set_write_buffer_limits(0)
        return cls(reader, writer)

    async def send(self, data: bytes) -> None:
        """Hand data to the system, all of it."""
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self) -> Answer:
        """Read one answer.

        Raises:
            OSError, EOFError: the connection ended before it was whole; TimeoutError is an OSError.
        """
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
            body = await self._reader.readexactly(length)
        return Answer(int(head[9:12]), body, b"connection: close" in lines)

    def leave(self, *, at_once: bool = True) -> None:
        """Go: with a reset, or with an orderly end."""
        if at_once:
            self._writer.transport.abort()
        else:
            self._writer.close()


async def caller(
    url: str,
    requests: Sequence[bytes],
    until: Callable[[], bool],
    seen: list[Exchange],
    *,
    fresh: bool = False,
    start: int = 0,
) -> None:
    """Send requests in turn, each when the one before is answered, and note what became of each.

    Args:
        url: the service.
        requests: taken in turn, from `start` on.
        until: tells when to send nothing more.
        seen: where exchanges go.
        fresh: each over a connection of its own.
        start: which request is the first.
    """
    wire: Wire | None = None
    count = start
    while not until():
        try:
            wire = wire or await Wire.open(url)
        except OSError:
            await asyncio.sleep(PAUSE_S)
            continue
        sent = float("inf")
        try:
            await wire.send(requests[count % len(requests)])
            sent = time.monotonic()
            answer = await wire.answer()
        except (OSError, EOFError):
            seen.append(Exchange(sent, time.monotonic(), 0, wire.port, fresh))
            wire.leave()
            wire = None
            await asyncio.sleep(PAUSE_S)
            continue
        count += 1
        seen.append(Exchange(sent, time.monotonic(), answer.status, wire.port, fresh))
        if fresh or answer.closes:
            wire.leave(at_once=False)
            wire = None
        if answer.status == 429:
            await asyncio.sleep(PAUSE_S)
    if wire is not None:
        wire.leave(at_once=False)


async def leaver(url: str, requests: Sequence[bytes], until: Callable[[], bool], within_s: float, seed: int) -> int:
    """Connect, send a request or a part of it, and be gone after a random time; again and again.

    Returns:
        How often it left before it had its answer.
    """
    dice = random.Random(seed)
    left = 0
    while not until():
        try:
            wire = await Wire.open(url)
        except OSError:
            await asyncio.sleep(PAUSE_S)
            continue
        request = dice.choice(requests)
        part = request if dice.random() < 0.8 else request[: dice.randrange(1, len(request))]
        try:
            await wire.send(part)
            await asyncio.wait_for(wire.answer(), dice.random() * within_s)
        except TimeoutError:
            left += 1
        except (OSError, EOFError):
            pass
        wire.leave(at_once=dice.random() < 0.5)
    return left
