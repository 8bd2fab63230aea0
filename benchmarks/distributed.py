"""Time optimizer steps under FSDP2: ours beside torch's fused AdamW, on the same shards.

Processes of one gloo group on this machine, one thread each. Peers take turns step by step, so that
whatever else the machine does falls on all of them; a step is timed from a barrier to the end of
the slowest rank. Reported are the median over the rounds, the quartiles, the ratio of the medians
to torch's fused AdamW, and how many collectives a step makes.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --model gpt2 --processes 4 --rounds 30 --json distributed.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from optimizers import MODELS, parameters
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import normwise


def peers(params: list[Tensor]) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """Constructors; the first is what the others are compared with."""
    options: dict[str, Any] = {"lr": 1e-7, "weight_decay": 1e-2}
    return {
        "torch AdamW, fused": lambda: torch.optim.AdamW(params, fused=True, **options),
        "torch AdamW, foreach": lambda: torch.optim.AdamW(params, foreach=True, **options),
        "AdamP, no view": lambda: normwise.AdamP(params, view=None, fused=True, **options),
        "AdamP, channel": lambda: normwise.AdamP(params, view="channel", fused=True, **options),
        "AdamP, layer": lambda: normwise.AdamP(params, view="layer", fused=True, **options),
        "AdamP, auto": lambda: normwise.AdamP(params, fused=True, **options),
    }


def measure(rank: int, processes: int, store: str, model: str, rounds: int, out: str) -> None:
    """On one rank; the first writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    wholes = parameters(MODELS[model](), "cpu")
    module = nn.ParameterList([nn.Parameter(w.detach()) for w in wholes])
    fully_shard(module, mesh=mesh)
    params = list(module.parameters())
    for p, w in zip(params, wholes, strict=True):
        assert w.grad is not None
        p.grad = distribute_tensor(w.grad, mesh, p.placements, src_data_rank=None)
    del wholes
    optimizers = {name: make() for name, make in peers(params).items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    collectives = {}
    for name, optimizer in optimizers.items():
        optimizer.step()
        with CommDebugMode() as communication:
            optimizer.step()
        collectives[name] = communication.get_total_counts()
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            dist.barrier()
            begin = time.perf_counter()
            optimizer.step()
            took = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            times[name].append(float(took))
    if rank == 0:
        results = {}
        for name, of_peer in times.items():
            low, median, high = statistics.quantiles(of_peer, n=4)
            results[name] = {"low": low, "median": median, "high": high, "least": min(of_peer)}
            results[name]["collectives"] = collectives[name]
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.json or Path(folder) / "results.json"
        torch.multiprocessing.spawn(
            measure,
            (
                arguments.processes,
                f"file://{folder}/store",
                arguments.model,
                arguments.rounds,
                str(out),
            ),
            nprocs=arguments.processes,
        )
        results = json.loads(out.read_text())
    first = next(iter(results.values()))
    print(f"{arguments.model}, FSDP2 over {arguments.processes} processes, ms per step")
    print(f"{'':22}{'median':>8}{'quartiles':>16}{'least':>8}{'ratio':>7}{'collectives':>13}")
    for name, r in results.items():
        quartiles = f"{1e3 * r['low']:.1f}–{1e3 * r['high']:.1f}"
        print(
            f"{name:22}{1e3 * r['median']:8.1f}{quartiles:>16}{1e3 * r['least']:8.1f}"
            f"{r['median'] / first['median']:7.2f}{r['collectives']:13d}"
        )


if __name__ == "__main__":
    main()
