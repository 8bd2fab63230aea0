# pip install normwise
"""FSDP2: the same step as on one process. Start it with

    torchrun --nproc-per-node 2 examples/fsdp2.py

It runs on CPUs over gloo; on GPUs choose "nccl" and move the model to the rank's device.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import normwise as nw


def network() -> nn.Sequential:
    torch.manual_seed(0)  # the same weights on every rank
    return nn.Sequential(
        nn.Linear(16, 64, bias=False),
        nn.LayerNorm(64),
        nn.ReLU(),
        nn.Linear(64, 64, bias=False),
        nn.LayerNorm(64),
        nn.ReLU(),
        nn.Linear(64, 4),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    model = network()
    # Analyzed whole, before sharding puts other parameters in place of these; names stay.
    views = nw.analyze(model, torch.randn(4, 16)).views()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)

    projected = {name: p for name, p in model.named_parameters() if name in views and p.ndim > 1}
    others = [p for name, p in model.named_parameters() if name not in projected]
    optimizer = nw.AdamP(
        [{"params": [p], "view": views[name]} for name, p in projected.items()]
        + [{"params": others, "view": None, "weight_decay": 0.0}],
        lr=1e-2,
        weight_decay=1e-2,
    )
    teacher = torch.randn(16, 4)
    torch.manual_seed(rank)  # other data on every rank
    for step in range(1, arguments.steps + 1):
        x = torch.randn(32, 16)
        loss = F.cross_entropy(model(x), (x @ teacher).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 20 == 0 or step == arguments.steps):
            print(f"step {step}: loss {loss.item():.3f}")

    for name, p in projected.items():
        norm = p.full_tensor().norm().item()  # of the whole weight, wherever its pieces live
        if rank == 0:
            print(f"{name}: view {views[name]}, norm {norm:.3f}")
    dist.destroy_process_group()
