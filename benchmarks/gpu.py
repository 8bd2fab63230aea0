"""All that a CUDA device is needed for, in one run: tests, times, memory; one JSON at the end.

    make gpu                                  # where there is a CUDA device; needs no network
    python benchmarks/gpu.py --json docs/results/gpu.json
    python benchmarks/gpu.py --skip tests --models resnet50 --rounds 10

1. tests/optim/test_device.py: Triton's kernels against the single-tensor step in float64, CUDA
   graphs, a GradScaler, steps that wait for nothing, FSDP2 on NCCL.
2. Steps of AdamP, SGDP, SGDW, `tangential` and `sphere` beside torch's fused and foreach optimizers
   and the official code, taking turns; `tangential` also without its kernels. In seconds of the
   host's clock around a synchronized step, and in the device's own time of a replayed CUDA graph,
   which has no launch gaps. Peak memory. The bytes that a step must move over its time, beside the
   best stream measured in the same run.
3. A Monitor's overhead. FSDP2 on one device beside the same step without it.

Needs PyTorch with CUDA, Triton and pytest; the official code (pip install adamp) if it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from optimizers import MODELS, parameters, peak_bytes, peers, seconds
from spheres import without_kernel
from torch import Tensor

import normwise

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]
# Of the reads and writes of float32: w, g and moments read; w and moments written.
TRAFFIC = {"Adam": 4 * 7, "SGD": 4 * 5}


def machine() -> Record:
    properties = torch.cuda.get_device_properties(0)
    # Where the figures are written says nothing of them.
    said = re.sub(r" --json[ =]\S+", "", " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]))
    return {
        "device": properties.name,
        "memory_GB": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__,
        "python": platform.python_version(),
        "command": said,
    }


def tests(workers: int) -> Record:
    """Run what only a device can test, in several processes that share Triton's cache."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=40", "-rfE", "--tb=short"]
    command += ["-p", "no:cacheprovider", "tests/optim/test_device.py"]
    command += ["tests/lab/running/test_graphs.py"]
    if workers > 1:
        command += ["-n", str(workers)]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    counts = {k: int(n) for n, k in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {**counts, "failures": failed, "seconds": round(time.monotonic() - begin, 1)}


def plainly(optimizer: Any) -> Any:
    """An optimizer around another one, stepped without the kernels for such."""
    optimizer.step = without_kernel(optimizer.step)
    return optimizer


def contestants(params: list[Tensor]) -> dict[str, dict[str, Callable[[], Any]]]:
    """The peers of the CPU's benchmark, `tangential` and `sphere` around torch's fused ones."""
    families = peers(params, True)
    adam, sgd = {"lr": 1e-7}, {"lr": 1e-7, "momentum": 0.9}
    decays = {"AdamW": 1e-2, "SGD": 1e-4}

    def inner(kind: str, decay: float) -> Any:
        options = adam if kind == "AdamW" else sgd
        return getattr(torch.optim, kind)(params, weight_decay=decay, fused=True, **options)

    for family, kind in (("Adam", "AdamW"), ("SGD", "SGD")):
        of_family = families[family]
        label = f"(torch {kind}, fused)"
        for view in ("channel", "layer"):
            views = {p: view for p in params if p.ndim > 1}
            of_family[f"tangential{label}, {view}"] = lambda kind=kind, views=views: (
                normwise.tangential(inner(kind, decays[kind]), views)
            )
            of_family[f"sphere{label}, {view}"] = lambda kind=kind, views=views: normwise.sphere(
                inner(kind, 0.0), views
            )
        views = {p: "channel" for p in params if p.ndim > 1}
        of_family[f"tangential{label}, plain"] = lambda kind=kind, views=views: plainly(
            normwise.tangential(inner(kind, decays[kind]), views)
        )
    families["Adam"]["AdamP, channel, foreach"] = lambda: normwise.AdamP(
        params, view="channel", foreach=True, weight_decay=1e-2, **adam
    )
    families["SGD"]["SGDP, channel, foreach"] = lambda: normwise.SGDP(
        params, view="channel", foreach=True, weight_decay=1e-4, **sgd
    )
    return families


def replayed(optimizer: Any, replays: int) -> float | None:
    """The device's seconds of a step in a CUDA graph, the median; None where it cannot be taken."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        for state in optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].cuda()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e-3 * begin.elapsed_time(end))
        return statistics.median(times)
    except Exception as error:  # peers that wait for the device cannot be captured
        print(f"    no CUDA graph of {type(optimizer).__name__}: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return None


def best_stream(entries: int) -> Record:
    """Bytes per second of the best of three streams: a copy, an addition in place, torch's AdamW
    on one tensor, which reads four and writes three."""
    a, b = torch.ones(entries, device="cuda"), torch.ones(entries, device="cuda")
    w = torch.ones(entries, device="cuda", requires_grad=True)
    w.grad = torch.ones(entries, device="cuda")
    adamw = torch.optim.AdamW([w], fused=True)
    streams = {
        "copy": (2, lambda: a.copy_(b)),
        "add in place": (3, lambda: a.add_(b)),
        "AdamW on one tensor": (7, adamw.step),
    }
    found = {}
    for name, (passes, step) in streams.items():
        for _ in range(3):
            step()
        taken = [seconds(step, "cuda") for _ in range(30)]
        found[name] = passes * 4 * entries / statistics.median(taken)
    return found


def speed(models: list[str], rounds: int) -> list[Record]:
    records = []
    for model in models:
        params = parameters(MODELS[model](), "cuda")
        entries = sum(p.numel() for p in params)
        for family, makers in contestants(params).items():
            optimizers = {name: make() for name, make in makers.items()}
            first = {name: seconds(o.step, "cuda") for name, o in optimizers.items()}
            for o in optimizers.values():
                seconds(o.step, "cuda")
            extra = {name: peak_bytes(o.step, "cuda") for name, o in optimizers.items()}
            times: dict[str, list[float]] = {name: [] for name in optimizers}
            host: dict[str, list[float]] = {name: [] for name in optimizers}
            for _ in range(rounds):
                for name, o in optimizers.items():
                    times[name].append(seconds(o.step, "cuda"))
                    begin = time.perf_counter()
                    o.step()
                    host[name].append(time.perf_counter() - begin)
                    torch.cuda.synchronize()
            graphs = {name: replayed(o, rounds) for name, o in optimizers.items()}
            base = next(iter(times))
            whole = statistics.median(times[base])
            for name, taken in times.items():
                low, median, high = statistics.quantiles(taken, n=4)
                graph = graphs[name]
                record = {
                    "model": model,
                    "entries": entries,
                    "tensors": len(params),
                    "family": family,
                    "peer": name,
                    "ms": 1e3 * median,
                    "ms_quartiles": [1e3 * low, 1e3 * high],
                    "ratio": median / whole,
                    "host_ms": 1e3 * statistics.median(host[name]),
                    "graph_ms": graph and 1e3 * graph,
                    "graph_ratio": graph and graphs[base] and graph / graphs[base],
                    "graph_GB_per_s": graph and TRAFFIC[family] * entries / graph / 1e9,
                    "first_ms": 1e3 * first[name],
                    "extra_MB": extra[name] / 1e6,
                }
                records.append(record)
                print(row(record), flush=True)
            del optimizers
        del params
        torch.cuda.empty_cache()
    return records


def row(r: Record) -> str:
    graph = "      –      –      –"
    if r["graph_ms"]:
        ratio = r["graph_ratio"] or float("nan")
        graph = f"{r['graph_ms']:7.3f}{ratio:7.2f}{r['graph_GB_per_s']:7.0f}"
    return (
        f"{r['model']:13}{r['peer']:38}{r['ms']:8.3f}{r['ratio']:7.2f}{r['host_ms']:8.3f}{graph}"
        f"{r['extra_MB']:9.1f}"
    )


HEADER = (
    f"{'':51}{'ms':>8}{'ratio':>7}{'host':>8}{'graph':>7}{'ratio':>7}{'GB/s':>7}{'extra, MB':>9}"
)


def monitors(rounds: int) -> list[Record]:
    """What a measured step costs, as share of training when every 100th step is measured."""
    import monitor as benchmark

    records = []
    for name in ("resnet50", "mlp"):
        found = benchmark.times(name, rounds, "cuda")
        middle = {kind: statistics.median(values) for kind, values in found.items()}
        cost = middle["measured"] - middle["plain"]
        records.append(
            {
                "model": name,
                "step_ms": 1e3 * middle["plain"],
                "measured_ms": 1e3 * middle["measured"],
                "share_at_every_100": cost / 100 / middle["plain"],
            }
        )
    return records


def sharded(rounds: int) -> list[Record]:
    """FSDP2 on one device with NCCL: the step of shards beside that of whole tensors."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    wholes = parameters(MODELS["resnet50"](), "cuda")
    module = torch.nn.ParameterList([torch.nn.Parameter(w.detach().clone()) for w in wholes])
    fully_shard(module)
    shards = list(module.parameters())
    for p, w in zip(shards, wholes, strict=True):
        p.grad = distribute_tensor(w.grad, p.device_mesh, p.placements)
    options = {"lr": 1e-7, "weight_decay": 1e-2}
    optimizers = {
        "torch AdamW, fused, shards": torch.optim.AdamW(shards, fused=True, **options),
        "AdamP, channel, shards": normwise.AdamP(shards, view="channel", **options),
        "AdamP, auto, shards": normwise.AdamP(shards, **options),
        "torch AdamW, fused, whole": torch.optim.AdamW(wholes, fused=True, **options),
        "AdamP, channel, whole": normwise.AdamP(wholes, view="channel", **options),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for optimizer in optimizers.values():
        for _ in range(3):
            seconds(optimizer.step, "cuda")
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step, "cuda"))
    return [{"peer": n, "ms": 1e3 * statistics.median(taken)} for n, taken in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parts = ("tests", "stream", "speed", "monitor", "sharded")
    parser.add_argument("--skip", nargs="+", choices=parts, default=[])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: torch.cuda.is_available() is False")
    found: Record = {"machine": machine()}
    print(found["machine"], flush=True)
    work: dict[str, Callable[[], Any]] = {
        "tests": lambda: tests(options.workers),
        "stream": lambda: best_stream(1 << 27),
        "speed": lambda: speed(options.models, options.rounds),
        "monitor": lambda: monitors(options.rounds),
        "sharded": lambda: sharded(options.rounds),
    }
    print(HEADER)
    for name, part in work.items():
        if name in options.skip:
            continue
        begin = time.monotonic()
        try:
            found[name] = part()
        except Exception:  # one part that fails leaves the others' figures
            found[name] = {"error": traceback.format_exc()}
            print(found[name]["error"], flush=True)
        if name != "speed":
            print(name, json.dumps(found[name]), flush=True)
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "speed"}))


if __name__ == "__main__":
    main()
