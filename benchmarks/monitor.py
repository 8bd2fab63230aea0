"""What a monitor costs: a measured step, a check of finiteness, and a default interval's share.

Plain, measured and checked training steps of one model take turns in one process, so that other
load on the machine falls on all of them; on the CPU, time is that of the process, which other load
does not lengthen. A measured step costs the difference of the medians; at an interval of n steps
its share of training is that over n plain steps. Quartiles tell the noise.

    python benchmarks/monitor.py
    python benchmarks/monitor.py --device cuda --models resnet50 mlp --rounds 100
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor, nn

from normwise.monitor import Monitor, Trigger

INTERVAL = 100


class Turns(Trigger):
    """True at the steps that the benchmark says."""

    def __init__(self) -> None:
        self.now = False

    def __call__(self, step: int) -> bool:
        return self.now


def bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 4 * width, 1, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(),
    )


def resnet50() -> nn.Module:
    """ResNet-50's convolutions, without its shortcuts, for images of 32 pixels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 100))


def convnet() -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for width, stride in ((32, 1), (64, 2), (128, 2), (128, 1)):
        layers += [nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 100))


def mlp() -> nn.Module:
    """Large weights and little arithmetic on each: the worst case."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3072, 1024),
        nn.LayerNorm(1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
        nn.LayerNorm(1024),
        nn.ReLU(),
        nn.Linear(1024, 100),
    )


MODELS = {"resnet50": (resnet50, 32), "convnet": (convnet, 64), "mlp": (mlp, 64)}


def batch(size: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 32, 32, generator=generator)
    return x.to(device), torch.randint(100, (size,), generator=generator).to(device)


def times(name: str, rounds: int, device: str) -> dict[str, list[float]]:
    make, size = MODELS[name]
    torch.manual_seed(0)
    model = make().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    x, y = batch(size, device)
    measure, check = Turns(), Turns()
    monitor = Monitor(model, optimizer, every=measure, check_finite=check)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    clock = time.perf_counter if device == "cuda" else time.process_time

    def step() -> float:
        wait()
        begin = clock()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        wait()
        return clock() - begin

    for measure.now in (False, True, True, True, True):
        step()
    found: dict[str, list[float]] = {"plain": [], "measured": [], "checked": []}
    for _ in range(rounds):
        for kind, (measure.now, check.now) in (
            ("plain", (False, False)),
            ("measured", (True, False)),
            ("checked", (False, True)),
        ):
            found[kind].append(step())
    monitor.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    print(f"torch {torch.__version__}, {args.device} {device}, {args.threads} threads")
    for name in args.models:
        found = times(name, args.rounds, args.device)
        middle = {kind: statistics.median(values) for kind, values in found.items()}
        low, _, high = statistics.quantiles(found["plain"], n=4)
        cost = middle["measured"] - middle["plain"]
        least = min(found["measured"]) - min(found["plain"])
        check = middle["checked"] - middle["plain"]
        print(
            f"{name:9} batch {MODELS[name][1]:3}: step {1e3 * middle['plain']:7.1f} ms (quartiles "
            f"{1e3 * low:.1f} to {1e3 * high:.1f}); a measured step {1e3 * cost:+6.1f} ms (least "
            f"against least {1e3 * least:+6.1f}); every {INTERVAL} steps that is "
            f"{cost / INTERVAL / middle['plain']:.2%} of training (least "
            f"{least / INTERVAL / min(found['plain']):.2%}); a check of finiteness at every step "
            f"{check / middle['plain']:.1%}"
        )


if __name__ == "__main__":
    main()
