"""AWP per tensor against AWP per slice: adversarial training on CIFAR-10 at small scale.

    NORMWISE_DATA=... python benchmarks/perturbation.py --out docs/results/awp_slices.jsonl

One line for each method and seed: accuracy on clean and on attacked test images at the end, and the
gap between attacked training and attacked test accuracy, which AWP is there to close. Perturbations
of both forms have one size, γ‖w‖ a tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw

RADIUS = 8 / 255
METHODS = [("none", 0.0), ("layer", 0.01), ("channel", 0.01), ("layer", 0.1), ("channel", 0.1)]


def images(name: str, count: int) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] and labels of the first records of a file of CIFAR-10's binary version."""
    path = Path(os.environ["NORMWISE_DATA"]) / "cifar-10-batches-bin" / name
    records = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(-1, 3073)
    return records[:count, 1:].view(-1, 3, 32, 32) / 255, records[:count, 0].long()


def network() -> nn.Sequential:
    """Three convolutions that feed a BatchNorm each, and a linear classifier."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((3, 16), (16, 32), (32, 64)):
        conv = nn.Conv2d(fan_in, fan_out, 3, stride=2 if layers else 1, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def attacked(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Images within 8/255 that projected gradient descent makes as wrong as it can."""
    was_training = model.training
    model.eval()
    delta = torch.empty_like(x).uniform_(-RADIUS, RADIUS)
    for _ in range(steps):
        at = (x + delta).requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(at), y), at)
        delta = (delta + 2.5 * RADIUS / steps * g.sign()).clamp(-RADIUS, RADIUS)
        delta = (x + delta).clamp(0, 1) - x
    model.train(was_training)
    return x + delta


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def run(kind: str, gamma: float, seed: int, epochs: int, count: int) -> dict[str, object]:
    torch.manual_seed(seed)
    x, y = images("data_batch_1.bin", count)
    test_x, test_y = images("test_batch.bin", 2000)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    batches = math.ceil(count / 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * batches)
    awp = nw.AWP(model, optimizer, gamma=gamma, views="layer" if kind == "none" else kind)
    if kind == "channel":
        awp = nw.AWP(model, optimizer, gamma=gamma, views=nw.analyze(model, x[:8]))
    start = time.perf_counter()
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(count).split(128):
            shifted = torch.where(torch.rand(len(index), 1, 1, 1) < 0.5, x[index], x[index].flip(3))
            hostile, labels = attacked(model, shifted, y[index], 3), y[index]

            def loss(hostile: Tensor = hostile, labels: Tensor = labels) -> Tensor:
                return F.cross_entropy(model(hostile), labels)

            with awp.perturbed(loss):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    robust = accuracy(model, attacked(model, test_x, test_y, 10), test_y)
    train = accuracy(model, attacked(model, x[:2000], y[:2000], 10), y[:2000])
    return {
        "views": kind,
        "gamma": gamma,
        "seed": seed,
        "epochs": epochs,
        "images": count,
        "accuracy": accuracy(model, test_x, test_y),
        "attacked_accuracy": robust,
        "attacked_gap": train - robust,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=4000)
    options = parser.parse_args()
    with options.out.open("a", encoding="utf-8") as file:
        for seed in range(options.seeds):
            for kind, gamma in METHODS:
                row = run(kind, gamma, seed, options.epochs, options.images)
                print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    main()
