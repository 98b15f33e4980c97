"""Who of several accepts: acceptors of one loop take turns, so that no scheduler has a say in it."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from app import accept, pages
from app.accept import Acceptor, Connections
from app.pages import Page, WriterState, private_page


class Held(asyncio.Protocol):
    """A connection that stays until it is closed from the other side."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)


class Neighbours:
    """Pages of some workers, and acceptors for those that take part, on one listening socket."""

    def __init__(self, states: list[WriterState], taking_part: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.listeners = [self.listener]
        self.pages = [private_page() for _ in states]
        for page, state in zip(self.pages, states, strict=True):
            page.tell(state, {})
            page.beat()
        self.acceptors = [self._acceptor(page) for page in self.pages[:taking_part]]
        self.clients: list[socket.socket] = []

    def _acceptor(self, page: Page) -> Acceptor:
        connections = Connections(page)
        # One loop watches a descriptor once, so each has its own, as processes have.
        self.listeners.append(self.listener.dup())
        acceptor = Acceptor(self.listeners[-1], lambda: Held(connections), page, self.pages)
        acceptor.start()
        return acceptor

    def connect(self, count: int) -> None:
        for _ in range(count):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(self.listener.getsockname())
            self.clients.append(client)

    def held(self) -> list[int]:
        return [page.connections for page in self.pages]

    async def until_held(self, total: int) -> list[int]:
        async with asyncio.timeout(20):
            while sum(self.held()) != total:
                for page in self.pages[: len(self.acceptors)]:
                    page.beat()
                await asyncio.sleep(0.001)
        return self.held()

    def close(self) -> None:
        for acceptor in self.acceptors:
            acceptor.close()
        for connection in (*self.clients, *self.listeners):
            connection.close()


def among(
    states: list[WriterState], scene: Callable[[Neighbours], Awaitable[None]], taking_part: int | None = None
) -> None:
    """Play a scene among workers in the given states."""

    async def play() -> None:
        neighbours = Neighbours(states, len(states) if taking_part is None else taking_part)
        try:
            await scene(neighbours)
        finally:
            neighbours.close()
            await asyncio.sleep(0.01)

    asyncio.run(play())


READY, LOADING = WriterState.READY, WriterState.LOADING


@pytest.mark.parametrize("workers", [2, 3])
def test_what_comes_at_once_is_shared_out(workers):
    async def scene(neighbours: Neighbours) -> None:
        neighbours.connect(32)
        held = await neighbours.until_held(32)
        assert max(held) - min(held) <= 3, held

    among([READY] * workers, scene)


def test_whoever_has_lost_connections_is_filled_up_first():
    async def scene(neighbours: Neighbours) -> None:
        neighbours.pages[0].connections = 20
        neighbours.connect(10)
        assert await neighbours.until_held(30) == [20, 10]

    among([READY, READY], scene)


def test_connections_are_counted_down_as_they_close():
    async def scene(neighbours: Neighbours) -> None:
        neighbours.connect(6)
        await neighbours.until_held(6)
        for client in neighbours.clients[:4]:
            client.close()
        await neighbours.until_held(2)

    among([READY, READY], scene)


def test_who_is_loading_leaves_connections_to_who_is_ready():
    async def scene(neighbours: Neighbours) -> None:
        neighbours.connect(8)
        assert await neighbours.until_held(8) == [0, 8]

    among([LOADING, READY], scene)


def test_while_nobody_is_ready_all_accept():
    async def scene(neighbours: Neighbours) -> None:
        neighbours.connect(8)
        await neighbours.until_held(8)

    among([LOADING, LOADING], scene)


def test_a_neighbour_that_does_not_accept_costs_some_patience_only():
    async def scene(neighbours: Neighbours) -> None:
        neighbours.connect(8)
        assert await neighbours.until_held(8) == [8, 0]

    among([READY, READY], scene, taking_part=1)


def test_a_neighbour_that_is_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(accept, "PATIENCE_S", 1e9)

    async def scene(neighbours: Neighbours) -> None:
        neighbours.pages[1].slots[pages._HEARTBEAT] -= 100
        neighbours.connect(8)
        assert await neighbours.until_held(8) == [8, 0]

    among([READY, READY], scene, taking_part=1)


def test_at_the_end_what_waits_is_taken_along():
    async def scene(neighbours: Neighbours) -> None:
        neighbours.pages[0].connections = 100  # so it stands back
        neighbours.connect(5)
        neighbours.acceptors[0].close()
        assert neighbours.held() == [105, 0]
        assert neighbours.acceptors[0].greeting == 5
        neighbours.connect(1)
        await asyncio.sleep(0.02)
        assert neighbours.held() == [105, 0]

    among([READY, READY], scene, taking_part=1)
