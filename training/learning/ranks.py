"""The processes of one training: who this one is among them, and what they do together.

`torchrun` starts the processes, on one machine or several, and tells each its place by the environment. Owns the
process group. Knows nothing of data or recipes: it is asked which part of a batch is this process's.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those that train together."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Place among the processes of this machine."""
    restarts: int = 0
    """How often torchrun has started this training again after a process was lost."""

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return this process's places in a batch of `count`: parts differ by at most one."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def wrap(self, network: nn.Module) -> nn.Module:
        """Let gradients be averaged over the processes, and all begin with the first one's weights."""
        if self.size == 1:
            return network
        if next(network.parameters()).is_cuda:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(network)

    def gradients(self, network: nn.Module, *, together: bool) -> AbstractContextManager[None]:
        """Average gradients with the other processes at the end of a pass, or keep them to add the next pass's."""
        if isinstance(network, DistributedDataParallel) and not together:
            return network.no_sync()
        return nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def share(self, value: Any) -> Any:
        """Return the first process's value in all of them: its disk may be the only one that holds it."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Let one process of each machine go before the others, which find done what it did."""
        if self.size > 1 and self.local:
            distributed.barrier()
        yield
        if self.size > 1 and not self.local:
            distributed.barrier()


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun has started; alone where it has not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives a restart, with the addresses of processes that are gone: gloo was seen to call
        # them. One that is made for each start has none, and need not: a node that was replaced counts from 0 again.
        store = PrefixStore(f"start-{restarts}", store)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what NCCL sends objects by is the current device, which is the first's else
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Ranks(rank=rank, size=size, local=int(os.environ["LOCAL_RANK"]), restarts=restarts)
    finally:
        distributed.destroy_process_group()
