"""What a step of tangential and sphere costs, beside the fused AdamW that they wrap.

All share one AdamW and take turns in one process, so that whatever else the machine does falls on
all of them; what is reported is the median over the rounds, the quartiles, and the ratio of medians
to AdamW alone. ``plain`` is the same without the fused kernel.

    python benchmarks/spheres.py
    python benchmarks/spheres.py --threads 1 --clock cpu  # on a machine that does other things too
    python benchmarks/spheres.py --models vit_b_16 --rounds 50 --json spheres.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from optimizers import MODELS, parameters, seconds

import normwise
from normwise.optim import displaced

Step = Callable[[], object]


def without_kernel(step: Step) -> Step:
    """The step as it is where Numba is not installed."""

    def run() -> object:
        fused = displaced.Displacements._fused
        displaced.Displacements._fused = lambda *_: []
        try:
            return step()
        finally:
            displaced.Displacements._fused = fused

    return run


def peers(shapes: str, device: str) -> dict[str, Step]:
    params = parameters(MODELS[shapes](), device)
    adamw = torch.optim.AdamW(params, lr=1e-7, weight_decay=0.0, fused=True)
    steps: dict[str, Step] = {"torch AdamW, fused": adamw.step}
    for view in ("channel", "layer"):
        steps[f"tangential, {view}"] = normwise.tangential(adamw, view).step
        steps[f"sphere, {view}"] = normwise.sphere(adamw, view).step
    steps["tangential, channel, plain"] = without_kernel(normwise.tangential(adamw, "channel").step)
    steps["sphere, channel, plain"] = without_kernel(normwise.sphere(adamw, "channel").step)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet50", "vit_b_16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of a thread")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        parser.error("--clock cpu is of one thread: give --threads 1 and no --device")
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {platform.processor()}")
    figures = []
    for model in args.models:
        steps = peers(model, args.device)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step()
        for _ in range(args.rounds):
            for name, step in steps.items():
                if args.clock == "cpu":
                    start = time.thread_time()
                    step()
                    times[name].append(time.thread_time() - start)
                else:
                    times[name].append(seconds(step, args.device))
        base = statistics.median(times["torch AdamW, fused"])
        for name, found in times.items():
            low, median, high = statistics.quantiles(found, n=4)
            row = {"model": model, "step": name, "median": median, "low": low, "high": high}
            figures.append({**row, "least": min(found), "ratio": median / base})
            print(
                f"{model:12} {name:28} {1e3 * median:8.1f} ms ({1e3 * low:.1f} to "
                f"{1e3 * high:.1f}, least {1e3 * min(found):.1f})  {median / base:5.2f}×"
            )
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
