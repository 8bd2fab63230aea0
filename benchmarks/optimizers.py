"""Time optimizer steps side by side: ours, torch's fused and foreach, and other packages.

All peers take turns in one process, so that whatever else the machine does falls on all of them;
what is reported is the median over the rounds, the quartiles, the ratio to torch's fused optimizer
of the same family, and how many bytes per second are moved of those that a step must read and
write, beside the best of some streams that take their turns too. Gradients are as a network with
normalization gives them: orthogonal to each output channel of weights of four dimensions, anything
for the others.

    python benchmarks/optimizers.py
    python benchmarks/optimizers.py --models resnet50 gpt2 --rounds 50 --json speed.json
    python benchmarks/optimizers.py --models small --rounds 300
    python benchmarks/optimizers.py --stock      # ours as they are without Numba
    python benchmarks/optimizers.py --scaling --plot scaling.png
    python benchmarks/optimizers.py --device cuda

Needs rich for the table and matplotlib for the plot: pip install ".[lab]".
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import normwise
from normwise.figures import Axis, Chart, Dots, Figure, Line, Lines, Series, Spacing, marks, save
from normwise.optim import kernels as optim_kernels

Shape = tuple[int, ...]
Step = Callable[[], object]


def resnet50() -> Iterator[Shape]:
    def conv(out: int, inputs: int, kernel: int) -> Iterator[Shape]:
        yield from [(out, inputs, kernel, kernel), (out,), (out,)]

    yield from conv(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from conv(width, inputs, 1)
            yield from conv(width, width, 3)
            yield from conv(4 * width, width, 1)
            if block == 0:
                yield from conv(4 * width, inputs, 1)
            inputs = 4 * width
    yield from [(1000, 2048), (1000,)]


def mobilenet_v2() -> Iterator[Shape]:
    def conv(out: int, inputs: int, kernel: int) -> Iterator[Shape]:
        yield from [(out, inputs, kernel, kernel), (out,), (out,)]

    yield from conv(32, 3, 3)
    inputs = 32
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, out, blocks in stages:
        for _ in range(blocks):
            hidden = inputs * expansion
            if expansion != 1:
                yield from conv(hidden, inputs, 1)
            yield from conv(hidden, 1, 3)
            yield from conv(out, hidden, 1)
            inputs = out
    yield from conv(1280, 320, 1)
    yield from [(1000, 1280), (1000,)]


def transformer(width: int, layers: int) -> Iterator[Shape]:
    for _ in range(layers):
        for out, inputs in ((3 * width, width), (width, width), (4 * width, width)):
            yield from [(out, inputs), (out,)]
        yield from [(width, 4 * width), (width,)]
        yield from [(width,)] * 4


def vit_b_16() -> Iterator[Shape]:
    yield from [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)]
    yield from transformer(768, 12)
    yield from [(768,), (768,), (1000, 768), (1000,)]


def gpt2() -> Iterator[Shape]:
    """GPT-2 small, its output layer tied to the embedding."""
    yield from [(50257, 768), (1024, 768)]
    yield from transformer(768, 12)
    yield from [(768,), (768,)]


def small() -> Iterator[Shape]:
    """A toy of nine tensors, which is stepped in two groups: all of a step is overhead."""
    yield from [(8, 3, 3, 3), (8,), (8,), (16, 8, 3, 3), (16,), (16,)]
    yield from [(32, 16), (10, 256), (10,)]


# Other packages that have AdamP, and what they are called here.
PACKAGES = {"adamp": "official", "pytorch_optimizer": "pytorch_optimizer"}

MODELS = {
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "vit_b_16": vit_b_16,
    "gpt2": gpt2,
    "small": small,
}


@dataclass
class Result:
    """Seconds a step, and bytes beyond weights, gradients and state while it runs."""

    model: str
    family: str
    peer: str
    median: float
    low: float
    high: float
    ratio: float  # of the median to torch's fused
    first: float
    extra_bytes: int
    bytes_per_second: float  # of what a step must read and write
    best_stream: float  # likewise, of what moves the most in the same run


def parameters(shapes: Iterator[Shape], device: str) -> list[Tensor]:
    """Weights with gradients; those of convolutions feed a normalization."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        w = torch.randn(shape, generator=generator) * 0.05
        g = torch.randn(shape, generator=generator) * 0.01
        if len(shape) == 4:
            g = normwise.geometry.tangential(g, w, normwise.View.channel())
        w = w.to(device).requires_grad_()
        w.grad = g.to(device)
        params.append(w)
    return params


def groups_of(model: str, params: list[Tensor]) -> list[Tensor] | list[dict[str, object]]:
    """What optimizers are made of: the toy's vectors are a group of their own, without decay."""
    if model != "small":
        return params
    vectors = [p for p in params if p.ndim < 2]
    return [{"params": [p for p in params if p.ndim > 1]}, {"params": vectors, "weight_decay": 0.0}]


def peers(params: object, kernels: bool) -> dict[str, dict[str, Callable[[], object]]]:
    """Constructors by family; the first of each is what the others are compared with."""
    adam = {"lr": 1e-7, "weight_decay": 1e-2}
    sgd = {"lr": 1e-7, "momentum": 0.9, "weight_decay": 1e-4}
    how = {"fused": True} if kernels else {"foreach": True}
    name = "fused" if kernels else "foreach"
    families: dict[str, dict[str, Callable[[], object]]] = {
        "Adam": {
            "torch AdamW, fused": lambda: torch.optim.AdamW(params, fused=True, **adam),
            "torch AdamW, foreach": lambda: torch.optim.AdamW(params, foreach=True, **adam),
            f"AdamP, channel, {name}": lambda: normwise.AdamP(
                params, view="channel", **how, **adam
            ),
            f"AdamP, auto, {name}": lambda: normwise.AdamP(params, **how, **adam),
            f"AdamP, no view, {name}": lambda: normwise.AdamP(params, view=None, **how, **adam),
        },
        "SGD": {
            "torch SGD, fused": lambda: torch.optim.SGD(params, fused=True, **sgd),
            "torch SGD, foreach": lambda: torch.optim.SGD(params, foreach=True, **sgd),
            f"SGDP, channel, {name}": lambda: normwise.SGDP(params, view="channel", **how, **sgd),
            f"SGDP, auto, {name}": lambda: normwise.SGDP(params, **how, **sgd),
            f"SGDW, {name}": lambda: normwise.SGDW(params, **how, **sgd),
        },
    }
    for module, label in PACKAGES.items():
        try:
            package = importlib.import_module(module)
        except ImportError:
            continue
        families["Adam"][f"{label} AdamP"] = lambda package=package: package.AdamP(params, **adam)
        if hasattr(package, "SGDP"):
            families["SGD"][f"{label} SGDP"] = lambda package=package: package.SGDP(params, **sgd)
    return families


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# What a step is timed by.
clock = time.perf_counter


def seconds(step: Step, device: str) -> float:
    wait(device)
    start = clock()
    step()
    wait(device)
    return clock() - start


def peak_bytes(step: Step, device: str) -> int:
    """How much more memory the process has in use at the worst moment of a step than before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds(step, device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    in_use = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    return peak


def measure(
    model: str, shapes: Iterator[Shape], rounds: int, device: str, kernels: bool
) -> list[Result]:
    params = parameters(shapes, device)
    entries = sum(p.numel() for p in params)
    streams = streams_of(max(1 << 24, entries), device)
    results = []
    for family, makers in peers(groups_of(model, params), kernels).items():
        optimizers = {peer: make() for peer, make in makers.items()}
        steps: dict[str, Step] = {peer: o.step for peer, o in optimizers.items()}
        first = {peer: seconds(step, device) for peer, step in steps.items()}
        for step in steps.values():
            step()
        extra = {peer: peak_bytes(step, device) for peer, step in steps.items()}
        times: dict[str, list[float]] = {peer: [] for peer in [*steps, *streams]}
        turns = dict(steps)
        if entries > IN_CACHE:
            turns |= {name: stream for name, (stream, _) in streams.items()}
        else:  # a stream would drive out of the cache what steps find there
            for name, (stream, _) in streams.items():
                times[name] = [seconds(stream, device) for _ in range(10)]
        for _ in range(rounds):
            for name, turn in turns.items():
                if entries <= IN_CACHE:  # after its own step, not another's
                    turn()
                times[name].append(seconds(turn, device))
        best = max(moved / statistics.median(times[n]) for n, (_, moved) in streams.items())
        fused = statistics.median(times[next(iter(times))])
        # Read w, g and the moments, write w and the moments.
        traffic = 4 * entries * (7 if family == "Adam" else 5)
        for peer in steps:
            low, median, high = statistics.quantiles(times[peer], n=4)
            results.append(
                Result(
                    model,
                    family,
                    peer,
                    median,
                    low,
                    high,
                    median / fused,
                    first[peer],
                    extra[peer],
                    traffic / median,
                    best,
                )
            )
    return results


# Weights, gradients and moments of so many entries, or less, are in cache.
IN_CACHE = 1 << 20


def streams_of(entries: int, device: str) -> dict[str, tuple[Step, int]]:
    """What memory can do, and the bytes that each moves.

    An addition in place reads what it writes, as a step does; a copy would bring in its target
    unasked, which no count of bytes shows. torch's AdamW of one long weight has nothing but its
    seven streams.
    """
    source = torch.ones(entries, device=device)
    target = torch.zeros_like(source, requires_grad=True)
    target.grad = torch.zeros_like(source)
    adamw = torch.optim.AdamW([target], lr=1e-7, fused=True)
    plain = target.detach()
    return {
        "addition": (lambda: plain.add_(source), 3 * source.nbytes),
        "AdamW of one weight": (adamw.step, 7 * source.nbytes),
    }


def scaling(rounds: int, device: str, kernels: bool) -> list[Result]:
    """Steps of 1e5 to 1e8 parameters, in weights of at most 1000 rows of 1000."""
    results = []
    for exponent in range(10, 17):
        entries = round(10 ** (exponent / 2))
        count = math.ceil(entries / 1_000_000)
        rows = round(entries / count / 1000)
        results += measure(str(entries), iter([(rows, 1000)] * count), rounds, device, kernels)
    return results


HEADER = ("", "ms", "quartiles", "÷ fused", "first, ms", "extra, MB", "GB/s", "of best")


def row(r: Result) -> tuple[str, ...]:
    return (
        r.peer,
        f"{1e3 * r.median:.2f}",
        f"{1e3 * r.low:.2f} … {1e3 * r.high:.2f}",
        f"{r.ratio:.2f}",
        f"{1e3 * r.first:.0f}",
        f"{r.extra_bytes / 1e6:.1f}",
        f"{r.bytes_per_second / 1e9:.1f}",
        f"{100 * r.bytes_per_second / r.best_stream:.0f}%",
    )


def show(results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    for model, family in dict.fromkeys((r.model, r.family) for r in results):
        table = Table(title=f"{model}, {family}", title_justify="left", title_style="bold")
        for i, title in enumerate(HEADER):
            table.add_column(title, justify="right" if i else "left", no_wrap=True)
        for r in results:
            if (r.model, r.family) == (model, family):
                ours = not r.peer.startswith(("torch", *PACKAGES.values()))
                table.add_row(*row(r), style="green" if ours else None)
        # A table in a file is not squeezed into a terminal's width.
        Console(width=None if sys.stdout.isatty() else 120).print(table)


def line(results: list[Result]) -> tuple[float, float]:
    """Seconds a step and seconds a parameter: the straight line with the least relative errors."""
    counts = torch.tensor([float(r.model) for r in results], dtype=torch.float64)
    medians = torch.tensor([r.median for r in results], dtype=torch.float64)
    terms = torch.stack([torch.ones_like(counts), counts], 1) / medians[:, None]
    constant, slope = torch.linalg.lstsq(
        terms, torch.ones_like(medians)[:, None]
    ).solution.flatten()
    return constant.item(), slope.item()


def show_lines(results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    headings = ("", "µs per step", "ns per parameter")
    table = Table(*headings, title="straight lines", title_justify="left")
    for family, peer in dict.fromkeys((r.family, r.peer) for r in results):
        constant, slope = line([r for r in results if (r.family, r.peer) == (family, peer)])
        table.add_row(f"{family}: {peer}", f"{1e6 * constant:.0f}", f"{1e9 * slope:.3f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def plot(results: list[Result], path: Path) -> None:
    charts: list[Chart] = []
    for family in dict.fromkeys(r.family for r in results):
        own = [r for r in results if r.family == family]
        peers, models = (list(dict.fromkeys(getattr(r, k) for r in own)) for k in ("peer", "model"))
        # torch's are dashed, as whatever others are compared with.
        drawn = marks(peers, {peer for peer in peers if peer.startswith("torch")})
        if all(model.isdigit() for model in models):
            lines = []
            for peer, (colour, dash) in drawn.items():
                points = [(float(r.model), 1e3 * r.median) for r in own if r.peer == peer]
                counts, times = zip(*points, strict=True)
                lines.append(Line(peer, peer, counts, times, colour=colour, dash=dash))
            x, y = Axis("parameters", Spacing.LOG), Axis("ms per step, log scale", Spacing.LOG)
            charts.append(Lines(family, "", x, y, tuple(lines)))
        else:
            ratios = {(r.peer, r.model): r.ratio for r in own}
            rows = [(peer, model) for model in models for peer in peers if (peer, model) in ratios]
            values = tuple(ratios[row] for row in rows)
            colours = tuple(drawn[peer][0] for peer, _ in rows)
            names = tuple(f"{peer}, {model}" for peer, model in rows)
            axis = Axis("time ÷ torch's fused, log scale", Spacing.LOG)
            series = (Series("", values, colours=colours),)
            charts.append(Dots(family, "", axis, names, series, reference=1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    save(Figure("", tuple(charts), width=620 * len(charts)), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=30, help="steps of each peer (default: 30)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one thread: where others use the machine too"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--stock", action="store_true", help="ours as without a compiler")
    parser.add_argument("--scaling", action="store_true", help="1e5 to 1e8 parameters instead")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock, options.threads = time.thread_time, 1
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.stock:
        optim_kernels._BACKENDS.update(optim_kernels._STOCK)
    compiler = "triton" if options.device == "cuda" else "numba"
    kernels = options.stock or importlib.util.find_spec(compiler) is not None
    if not kernels:
        print(f"no {compiler} here: ours take the multi-tensor step")
    machine = {
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name() if options.device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "clock": clock.__name__,
    }
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    results: list[Result] = []
    if options.scaling:
        results = scaling(options.rounds, options.device, kernels)
        show(results)
        show_lines(results)
    else:
        for model in options.models:
            measured = measure(model, MODELS[model](), options.rounds, options.device, kernels)
            show(measured)
            results += measured
    if options.json:
        data = {"machine": machine, "results": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(data, indent=1))
    if options.plot:
        plot(results, options.plot)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
