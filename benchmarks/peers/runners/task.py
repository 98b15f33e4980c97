"""What a runner is told, through the environment: worker processes that are spawned anew still find it there."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PREFIX = "PEER_"
HOST = "127.0.0.1"
SHARED_PREFIX = "peers-"
"""Of shared memory, before the process id: Triton does not always remove it, the driver does."""
Decoder = Literal["plain", "convoy"]


@dataclass(frozen=True, slots=True)
class Task:
    bundle: Path
    """The bundle's directory, with `model.json` and `model.onnx`."""
    decoder: Decoder
    """`plain` is what a peer's own examples write; `convoy` is `app.images.decode`, the very function."""
    port: int
    workers: int
    """Processes that decode and infer."""
    batch: int
    wait_ms: float
    """How long a batch may wait to fill; what a peer cannot express is rounded up."""
    fronts: int
    """Processes (LitServe) or threads (Triton) that speak HTTP; 0 leaves it to the peer, and mosec has no such knob."""

    def environment(self) -> dict[str, str]:
        return {f"{PREFIX}{name.upper()}": str(getattr(self, name)) for name in self.__slots__}


def read_task() -> Task:
    told = {name: os.environ[f"{PREFIX}{name.upper()}"] for name in Task.__slots__}
    if told["decoder"] not in ("plain", "convoy"):
        raise SystemExit(f"{PREFIX}DECODER is {told['decoder']!r}: it should be plain or convoy.")
    return Task(
        bundle=Path(told["bundle"]),
        decoder="plain" if told["decoder"] == "plain" else "convoy",
        port=int(told["port"]),
        workers=int(told["workers"]),
        batch=int(told["batch"]),
        wait_ms=float(told["wait_ms"]),
        fronts=int(told["fronts"]),
    )
