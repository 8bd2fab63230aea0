"""Training one network on the processes that ``torchrun`` has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normwise.lab.errors import UsageError
from normwise.lab.models import InvariantWeight
from normwise.sharding import is_sharded

__all__ = ["ALONE", "KINDS", "Processes", "gathered", "processes"]

KINDS = ("ddp", "fsdp")


@dataclass(frozen=True)
class Processes:
    """The processes that train one network together.

    Args:
        kind: ``"ddp"``, ``"fsdp"`` (``fully_shard``), or None for one process.
        rank: which of them this is.
        size: how many there are.
    """

    kind: str | None = None
    rank: int = 0
    size: int = 1

    def distribute(self, model: nn.Module) -> nn.Module:
        """The model to train: wrapped, or with its parameters sharded in place."""
        if self.kind == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        if self.kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (self.size,)))
        return model

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch."""
        return batch.chunk(self.size)[self.rank]

    def mean(self, value: float) -> float:
        """The mean over the processes."""
        if self.kind is None:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self.size


ALONE = Processes()


@contextmanager
def processes(kind: str | None, batch_size: int) -> Iterator[Processes]:
    """Join the others of this run.

    Raises:
        UsageError: if they were not started by ``torchrun``, or cannot share a batch evenly.
    """
    if kind is None:
        yield ALONE
        return
    if kind not in KINDS:
        raise UsageError(f"--parallel {kind!r} is not allowed: must be one of {', '.join(KINDS)}")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UsageError(
            f"--parallel {kind} needs processes to share the work: start it as "
            f"torchrun --nproc-per-node 2 -m normwise compare --parallel {kind}"
        )
    size = int(os.environ["WORLD_SIZE"])
    if batch_size % size:
        raise UsageError(
            f"--batch-size {batch_size} is not allowed: must be a multiple of the {size} processes"
        )
    dist.init_process_group("gloo")
    try:
        yield Processes(kind, dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def gathered(weight: InvariantWeight) -> InvariantWeight:
    """A weight that can be measured: gathered, if it is sharded."""
    if not is_sharded(weight.weight):
        return weight
    return replace(weight, weight=weight.weight.full_tensor().detach())
