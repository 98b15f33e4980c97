"""An engine in the test's own process and loop, so that a test sees both ends."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.batcher import Batcher
from app.cluster.engine import EngineProcess
from app.cluster.front import Links
from app.loading import LoadedModel
from app.metrics import Metrics
from app.tensors import TensorSpec

INPUTS = (TensorSpec("image", "UINT8", (-1, 2, 2, 3)),)


_SOCKETS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def no_socket_is_left() -> Iterator[None]:
    """Close what fronts and engines of a test were connected by: their loop has ended before they have."""
    yield
    while _SOCKETS:
        _SOCKETS.pop().close()


def connected() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _SOCKETS.extend(ends)
    return ends


class EngineHere:
    """One engine with one model of tensors over a given batcher, and fronts that are connected with it."""

    def __init__(
        self,
        directory: Path,
        batcher: Batcher | None,
        max_batch: int = 4,
        fault: Exception | None = None,
        outputs: int = 2,
    ) -> None:
        self.directory = directory
        (directory / "model.onnx").touch()
        self.metrics = Metrics()
        self.loads = 0
        self.batcher, self._max_batch, self._fault = batcher, max_batch, fault
        self._outputs = (TensorSpec("scores", "FP32", (-1, outputs)),)
        self.engine = EngineProcess(self.metrics, self._load)

    def _load(self, name: str, version: str, directory: Path) -> tuple[LoadedModel, float | None]:
        self.loads += 1
        if self._fault is not None:
            raise self._fault
        metrics = self.metrics.for_model(name, version)
        model = LoadedModel(
            name,
            version,
            "digest",
            "cpu",
            INPUTS,
            self._outputs,
            self._max_batch,
            "",
            None,
            None,
            self.batcher,
            metrics,
        )
        return model, None

    def front(self, links: Links | None = None) -> Links:
        """Connect a front, or one that is there."""
        links = links or Links(Metrics())
        ours, theirs = connected()
        self.engine.meet(1, theirs)
        links.meet(1, ours)
        return links

    async def opened(self, links: Links | None = None) -> LoadedModel:
        """Return the model as a front has it."""
        links = links or self.front()
        loop = asyncio.get_running_loop()
        model, _ = await asyncio.to_thread(links.load, "m", "1", self.directory, loop)
        return model
