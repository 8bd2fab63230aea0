"""What a decay policy adds to the step of torch's fused optimizers.

Optimizers with and without a policy take turns in one process, in an order that is drawn anew each
round. What is timed is the thread's own CPU time, so that other load on the machine counts little,
and reported the time of a policy's step over that of the plain step of the same round: the median
over the rounds, its quartiles, and the ratio of the lower quartiles. The plain step is the mean of
two equal optimizers, which show the noise. Last comes the time of the policy's hooks by themselves,
over the plain step::

    python benchmarks/decay_overhead.py --models resnet50 mobilenet_v2 --rounds 60
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from optimizers import mobilenet_v2, resnet50, transformer

from normwise.decay import L2, Cautious, Corrected, Cosine, DecayScheduler, Decoupled, Policy

MODELS = {
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "transformer": lambda: transformer(256, 6),
}
POLICIES: dict[str, Policy | None] = {
    "plain": None,
    "plain again": None,
    "L2": L2(1e-4),
    "per lr": Decoupled(1e-4),
    "per schedule": Decoupled(1e-4, per="schedule"),
    "per step": Decoupled(1e-4, per="step"),
    "corrected": Corrected(1e-4),
    "cautious": Cautious(1e-4),
}


def optimizer_of(
    kind: str, shapes: list[tuple[int, ...]], policy: Policy | None
) -> torch.optim.Optimizer:
    """An optimizer with weights and gradients of its own."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    decay = 1e-4 if policy is None else 0.0
    optimizer: torch.optim.Optimizer
    if kind == "SGD":
        optimizer = torch.optim.SGD(params, lr=1e-6, momentum=0.9, weight_decay=decay, fused=True)
    else:
        optimizer = torch.optim.AdamW(params, lr=1e-6, weight_decay=decay, fused=True)
    if policy is not None:
        policy.attach(optimizer, on=params)
    return optimizer


def scheduled(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    scheduler = DecayScheduler(optimizer, Cosine(10**6))

    def step() -> None:
        optimizer.step()
        scheduler.step()

    return step


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for step in steps.values():
        step()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = time.thread_time()
            steps[name]()
            times[name].append(time.thread_time() - start)
    return times


def hooks(optimizer: torch.optim.Optimizer, rounds: int) -> float:
    """The lower quartile of the time of what is called around a step, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        for hook in optimizer._optimizer_step_pre_hooks.values():
            hook(optimizer, (optimizer,), {})
        for hook in optimizer._optimizer_step_post_hooks.values():
            hook(optimizer, (optimizer,), {})
        times.append(time.thread_time() - start)
    return statistics.quantiles(times, n=4)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["resnet50"])
    parser.add_argument("--rounds", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    random.seed(0)
    print(f"torch {torch.__version__}, {arguments.threads} thread, {arguments.rounds} rounds\n")
    print("| model | optimizer | policy | median (quartiles) | lower quartiles | hooks alone |")
    print("|---|---|---|---|---|---|")
    for model in arguments.models:
        shapes = list(MODELS[model]())
        for kind in ("SGD", "AdamW"):
            optimizers = {name: optimizer_of(kind, shapes, p) for name, p in POLICIES.items()}
            steps: dict[str, Callable[[], object]] = {n: o.step for n, o in optimizers.items()}
            last = "per lr, scheduled"
            steps[last] = scheduled(optimizer_of(kind, shapes, Decoupled(1e-4)))
            times = measure(steps, arguments.rounds)
            plain = [sum(t) / 2 for t in zip(times["plain"], times["plain again"], strict=True)]
            base = statistics.quantiles(plain, n=4)[0]
            for name in steps:
                ratios = [t / p for t, p in zip(times[name], plain, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                row = f"| {model}, {1e3 * base:.1f} ms | {kind} | {name} "
                row += f"| {middle:.3f} ({low:.3f}–{high:.3f}) "
                row += f"| {statistics.quantiles(times[name], n=4)[0] / base:.3f} "
                cell = "not timed"
                if name in optimizers:
                    alone = hooks(optimizers[name], arguments.rounds)
                    cell = f"{1e6 * alone:.0f} µs, {100 * alone / base:.2f}%"
                print(row + f"| {cell} |", flush=True)


if __name__ == "__main__":
    main()
