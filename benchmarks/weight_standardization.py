"""What weight standardization costs on ResNet-50, beside the bound of memory and the usual ways.

Run from the repository's root::

    python benchmarks/weight_standardization.py                    # the weights alone
    python benchmarks/weight_standardization.py --step --rounds 5  # whole training steps

The weights alone: forward and backward of all 53 convolutions. The bound moves the bytes that any
implementation must (read W and write W'; read W and the gradient, write the gradient): a copy, and
an addition, of the same tensors. All variants run in turn in one process, so that other load on
the machine falls on all of them; the table gives medians and their ratios, and the time of the
processor and page faults beside them. To keep the C library (glibc) from returning memory to the
operating system between calls, which costs more than the arithmetic::

    MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_MMAP_THRESHOLD_=33554432 \\
        python benchmarks/weight_standardization.py
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwise import View
from normwise.reparam import weight_standardize
from normwise.reparam.functional import weight_standardization


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def timms_way(w: Tensor) -> Tensor:
    """A single F.batch_norm, as timm's StdConv2d."""
    flat = w.reshape(1, w.shape[0], -1)
    return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(w)


def usual_ways(w: Tensor) -> Tensor:
    """Mean, std, subtract, divide, as in the code of the weight-standardization paper."""
    mean = w.mean((1, 2, 3), keepdim=True)
    return (w - mean) / (w.std((1, 2, 3), keepdim=True, correction=0) + 1e-5)


class UsualWays(nn.Module):
    """The same as a parametrization, for whole steps."""

    def forward(self, w: Tensor) -> Tensor:
        return usual_ways(w)


@dataclass(frozen=True)
class Cost:
    """What one call took.

    Attributes:
        wall: seconds.
        cpu: seconds of all threads together, the operating system's included.
        faults: pages of memory that the operating system handed over anew during it. Where they are
            many they take longer than the arithmetic, and they fall on whichever variant comes
            next after the C library has returned memory.
    """

    wall: float
    cpu: float
    faults: int


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[Cost]]:
    """The costs of every variant in every round, after one round of warming up."""
    costs: dict[str, list[Cost]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name, run in variants.items():
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start, cpu = time.perf_counter(), time.process_time()
            result = run()
            cost = Cost(
                time.perf_counter() - start,
                time.process_time() - cpu,
                resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
            )
            if index:
                costs[name].append(cost)
            del result
    return costs


def show(costs: dict[str, list[Cost]], title: str) -> None:
    base = statistics.median(c.wall for c in next(iter(costs.values())))
    width = max(map(len, costs))
    print(
        f"{title:<{width}}  median ms   least ms   ratio  median CPU ms  least CPU ms  page faults"
    )
    for name, values in costs.items():
        wall, cpu = sorted(c.wall for c in values), sorted(c.cpu for c in values)
        median = statistics.median(wall)
        print(
            f"{name:<{width}}  {1e3 * median:9.1f}  {1e3 * wall[0]:9.1f}  {median / base:6.3f}"
            f"  {1e3 * statistics.median(cpu):13.1f}  {1e3 * cpu[0]:12.1f}"
            f"  {statistics.median(c.faults for c in values):11.0f}"
        )


def weights_alone(rounds: int) -> None:
    convolutions = [m for m in resnet50().modules() if isinstance(m, nn.Conv2d)]
    weights = [m.weight.detach().requires_grad_() for m in convolutions]
    gradients = [torch.randn_like(w) for w in weights]
    gains = [torch.ones(w.shape[0], requires_grad=True) for w in weights]
    entries = sum(w.numel() for w in weights)
    print(f"{len(weights)} weights, {entries} entries, {entries * 4 / 1e6:.0f} MB in float32")

    @torch.no_grad()
    def bound() -> object:
        forward = [torch.empty_like(w).copy_(w) for w in weights]
        return forward, [w + g for w, g in zip(weights, gradients, strict=True)]

    def both_ways(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad([function(w) for w in weights], weights, gradients)

    def with_gain() -> object:
        out = [
            weight_standardization(w, View.channel(), g)
            for w, g in zip(weights, gains, strict=True)
        ]
        return torch.autograd.grad(out, weights + gains, gradients)

    variants = {
        "bound: copy, then add": bound,
        "normwise": both_ways(lambda w: weight_standardization(w, View.channel())),
        "normwise, with a gain": with_gain,
        "timm: one batch_norm": both_ways(timms_way),
        "mean, std, subtract, divide": both_ways(usual_ways),
    }
    show(interleaved(variants, rounds), "weights alone")


def training_steps(rounds: int, batch: int, size: int) -> None:
    x, y = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))

    def step_of(model: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        return step

    plain, ours, usual = resnet50(), resnet50(), resnet50()
    weight_standardize(ours)
    for module in list(usual.modules()):
        if isinstance(module, nn.Conv2d):
            nn.utils.parametrize.register_parametrization(module, "weight", UsualWays())
    variants = {
        "plain": step_of(plain),
        "normwise": step_of(ours),
        "mean, std, subtract, divide": step_of(usual),
    }
    show(interleaved(variants, rounds), f"step, batch {batch}, {size}×{size}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", action="store_true", help="time whole training steps")
    parser.add_argument("--rounds", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds")
    if arguments.step:
        training_steps(arguments.rounds, arguments.batch, arguments.size)
    else:
        weights_alone(arguments.rounds)


if __name__ == "__main__":
    main()
