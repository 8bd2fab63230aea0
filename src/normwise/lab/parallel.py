"""Training one network on the processes that ``torchrun`` has started."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.lab.errors import UsageError
from normwise.sharding import is_sharded

__all__ = ["ALONE", "KINDS", "Processes", "processes", "whole"]

KINDS = ("ddp", "fsdp")
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that train one network together.

    Args:
        kind: ``"ddp"``, ``"fsdp"`` (``fully_shard``), or None for one process.
        rank: which of them this is.
        size: how many there are.
        device: the type of device on which they compute (default: ``"cpu"``).
    """

    kind: str | None = None
    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def distribute(self, model: nn.Module) -> nn.Module:
        """The model to train: wrapped, or with its parameters sharded in place.

        Buffers, such as BatchNorm's running statistics, are the first process's in every forward.
        """
        if self.kind == "ddp":
            # Without the flag DDP groups the gradients anew after its first step. Of three or more
            # processes, sums would be rounded in another order then, and after resuming again.
            return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        if self.kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device, (self.size,))
            for block in _blocks(model):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            model.register_forward_pre_hook(_first_buffers)
        return model

    def share(self, batch: Any) -> Any:
        """This process's part of a batch: of a tensor, or of each tensor of a tuple or a dict."""
        if self.size == 1:
            return batch
        if isinstance(batch, tuple):
            return tuple(map(self.share, batch))
        if isinstance(batch, dict):
            return {key: self.share(value) for key, value in batch.items()}
        return batch.chunk(self.size)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, in float64."""
        total = value.to(torch.float64, copy=True)
        if self.kind is not None:
            dist.all_reduce(total)
            total /= self.size
        return total

    def first(self, action: Callable[[], T]) -> T:
        """What ``action`` returns or raises on the first process, which alone does it, on all."""
        if self.kind is None:
            return action()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The state of a distributed model, unsharded; empty on all processes but the first."""
        if self.kind is None:
            return model.state_dict()
        from torch.distributed.checkpoint import state_dict as states

        return states.get_model_state_dict(model, options=_whole_states())

    def state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """What :meth:`restore` takes, whatever the number of processes; whole on the first only."""
        if self.kind is None:
            return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        from torch.distributed.checkpoint import state_dict as states
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                # A forward pass without a backward pass leaves the weights gathered, and those are
                # not the optimizer's.
                module.reshard()
        moments = states.get_optimizer_state_dict(model, optimizer, options=_whole_states())
        return {"model": self.weights(model), "optimizer": moments}

    def restore(self, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load what :meth:`state` returned; every process has the whole of it."""
        if self.kind is None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return
        from torch.distributed.checkpoint import state_dict as states

        states.set_model_state_dict(model, state["model"], options=_whole_states())
        states.set_optimizer_state_dict(
            model, optimizer, state["optimizer"], options=_whole_states()
        )


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists and sequences, each needed only while it runs itself.

    A block with a weight that is used elsewhere too, as tied embeddings are, is left to the model.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    blocks = []
    pending = [model]
    while pending:
        module = pending.pop(0)
        # No subclass: the parametrizations of a weight are a ModuleList too.
        if type(module) not in (nn.Sequential, nn.ModuleList):
            pending += module.children()
            continue
        for member in module.children():
            own = Counter(id(p) for _, p in member.named_parameters(remove_duplicate=False))
            if type(member) in (nn.ModuleList, nn.ModuleDict):  # has no forward of its own
                pending.append(member)
            elif own and all(uses[p] == count for p, count in own.items()):
                blocks.append(member)
    return blocks


def _whole_states() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


@torch.no_grad()
def _first_buffers(model: nn.Module, args: Any) -> None:
    """Give all processes the first one's buffers, as DDP does before every forward."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


ALONE = Processes()


@contextmanager
def processes(
    kind: str | None,
    command: str,
    batch_sizes: Iterable[int],
    setting: str = "batch_size",
    device: str = "cpu",
) -> Iterator[Processes]:
    """Join the others of this run.

    Args:
        kind: ``"ddp"``, ``"fsdp"``, or None for one process.
        command: what follows ``normwise``, for errors.
        batch_sizes: of all that is to be trained.
        setting: what the user calls a batch size (default: ``"batch_size"``).
        device: ``"cpu"`` (default), or ``"cuda"``, of which each process of a machine takes one.

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
            f"torchrun --nproc-per-node 2 -m normwise {command} --parallel {kind}"
        )
    size = int(os.environ["WORLD_SIZE"])
    for batch_size in batch_sizes:
        if batch_size % size:
            raise UsageError(
                f"{setting} {batch_size} is not allowed: must be a multiple of the {size} processes"
            )
    if device not in ("cpu", "cuda"):
        raise UsageError(
            f"--device {device} is not allowed with --parallel: must be cpu, or cuda, of which "
            "each process of a machine takes one"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        with warnings.catch_warnings():
            # Why it is specified stands in distribute().
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            yield Processes(kind, dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def whole(t: Tensor) -> Tensor:
    """A tensor that can be measured: gathered and detached if it is sharded, or else itself."""
    if not is_sharded(t):
        return t
    gathered: Tensor = t.full_tensor().detach()
    return gathered
