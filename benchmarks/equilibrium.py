"""Measured against predicted equilibrium of a ResNet with batch norm on CIFAR images.

Trains a ResNet-8 at a constant learning rate under SGD with momentum, SGDP, AdamW or AdamP, with a
``normwise.Monitor``. After the time that the theory gives for the norms to settle, it compares
each convolution's norms and angles with the closed forms, and prints a table.

    python benchmarks/equilibrium.py DATA --optimizer sgd
    python benchmarks/equilibrium.py DATA --optimizer adamp --json adamp.json --plot adamp.png
    python benchmarks/equilibrium.py DATA --optimizer adamp --wd-ratio 0.1

DATA is the folder of CIFAR-100's binary version (``train.bin``).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import normwise
from normwise.monitor import Measurement, Monitor
from normwise.theory import equilibrium_of, time_to_equilibrium
from normwise.updates import rule_of

MOMENTUM = 0.9
# η and λ
SETTINGS = {"sgd": (0.1, 2e-3), "sgdp": (0.1, 2e-3), "adamw": (2e-3, 0.5), "adamp": (2e-3, 1.0)}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


def resnet8(classes: int) -> nn.Module:
    """A stem of stride 2 and three blocks of 16, 32 and 64 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def images(folder: Path) -> tuple[Tensor, Tensor]:
    raw = np.fromfile(folder / "train.bin", dtype=np.uint8).reshape(-1, 3074)
    pixels = torch.from_numpy(raw[:, 2:].reshape(-1, 3, 32, 32).copy()).float() / 255
    pixels = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
    return pixels, torch.from_numpy(raw[:, 1].astype(np.int64))


class Means:
    """Means of each slice from a step on: a writer of one's own."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def __call__(self, m: Measurement) -> None:
        found = {
            "norm^4": m.of_slices("norm") ** 4,
            "norm^2": m.of_slices("norm") ** 2,
            "angle^2": m.of_slices("angular_update") ** 2,
            "gradient^2": m.of_slices("scaled_gradient") ** 2,
        }
        self.count += 1
        for key, value in found.items():
            self.sums[key] = self.sums.get(key, torch.zeros_like(value)) + value

    def __getitem__(self, key: str) -> Tensor:
        return self.sums[key] / self.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--optimizer", choices=SETTINGS, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--wd-ratio", type=float, default=1.0, help="of SGDP and AdamP")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lr, decay = SETTINGS[args.optimizer]

    pixels, labels = images(args.data)
    torch.manual_seed(args.seed)
    model = resnet8(100)
    report = normwise.analyze(model, pixels[:16], joint=False)
    groups = report.param_groups(weight_decay=decay, lr=lr)
    optimizer: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD(groups, momentum=MOMENTUM),
        "sgdp": lambda: normwise.SGDP(groups, momentum=MOMENTUM, wd_ratio=args.wd_ratio),
        "adamw": lambda: torch.optim.AdamW(groups),
        "adamp": lambda: normwise.AdamP(groups, wd_ratio=args.wd_ratio),
    }[args.optimizer]()

    generator = torch.Generator().manual_seed(args.seed)
    losses = []

    def train(monitor: Monitor, steps: int) -> None:
        for _ in range(steps):
            chosen = torch.randint(len(labels), (args.batch,), generator=generator)
            x = pixels[chosen]
            flip = torch.rand(args.batch, generator=generator) < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels[chosen])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))

    means = Means()
    settle = args.steps // 2
    kept: list[Measurement] = []
    with Monitor(
        model,
        optimizer,
        report,
        every=10,
        writers=[kept.append, lambda m: means(m) if m.step > settle else None],
    ) as monitor:
        train(monitor, args.steps)
    if args.plot:
        monitor.plot(args.plot)

    rows = []
    for layer in kept[0].layers:
        s = layer.slices
        start = float(kept[0].of_slices("norm", layer.name).double().log().mean().exp())
        rule = rule_of(
            optimizer, optimizer.param_groups[layer.group], model.get_parameter(layer.name)
        )
        of_slices = [
            equilibrium_of(rule, gradient_square=float(g), entries=layer.entries)
            for g in means["gradient^2"][s]
        ]
        power = 2 * rule.update.exponent
        norms = means[f"norm^{power}"][s] ** (1 / power)
        predicted = torch.tensor([e.norm for e in of_slices])
        norm_ratio = float((norms / predicted).log().mean().exp())
        angle = float(means["angle^2"][s].mean().sqrt())
        end = float(predicted.log().mean().exp())
        time = time_to_equilibrium(rule, start / end)
        rows.append(
            {
                "layer": layer.name,
                "slices": len(layer),
                "norm at start": start,
                "predicted norm": end,
                "norm, measured/predicted": norm_ratio,
                "angle, measured/predicted": angle / of_slices[0].angle,
                "predicted angle": of_slices[0].angle,
                "steps to equilibrium": time,
            }
        )
    late = [row for row in rows if row["steps to equilibrium"] > settle]
    print(
        f"{args.optimizer}, lr {lr}, weight decay {decay}, wd_ratio {rule.wd_ratio:g}, "
        f"batch {args.batch}, seed {args.seed}, "
        f"{args.steps} steps; means over the steps after {settle}; torch {torch.__version__}"
    )
    print(
        f"loss, first and last 100 steps: {np.mean(losses[:100]):.3f} {np.mean(losses[-100:]):.3f}"
    )
    print(f"not settled by then, by the prediction: {[row['layer'] for row in late]}")
    for row in rows:
        print(
            f"{row['layer']:24} {row['slices']:3}  norm {row['norm at start']:.3f} → "
            f"{row['predicted norm']:.3f}  in {row['steps to equilibrium']:4.0f} steps  "
            f"norm ×{row['norm, measured/predicted']:.3f}  angle ×"
            f"{row['angle, measured/predicted']:.3f}"
        )
    for name in ("norm", "angle"):
        ratios = [row[f"{name}, measured/predicted"] for row in rows]
        near = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
        print(f"{name}: {near} of {len(ratios)} layers within 10%")
    print("alarms:", *(monitor.raised or ["none"]), sep="\n  ")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "losses": losses, "lr": lr}))
    if not all(math.isfinite(loss) for loss in losses):
        raise SystemExit("the loss was not finite")


if __name__ == "__main__":
    main()
