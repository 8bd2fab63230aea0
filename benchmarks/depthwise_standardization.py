"""Table IX of the ε-shift paper (arXiv 1911.05920), small: WS on the depthwise convolutions.

A small MobileNetV2 on CIFAR-100, as it is, with weight standardization on all but its depthwise
convolutions (what ``weight_standardize`` does of itself), and on those too::

    NORMWISE_DATA=... python benchmarks/depthwise_standardization.py results.jsonl

SGD at 0.05 with momentum 0.9, a cosine without restarts, weight decay 4e-5 on all weights but those
of depthwise convolutions, biases and norms, as in the paper; batch 64, random flips.
``NORMWISE_DATA`` is as for ``epsilon_shift_tables.py``. Finished runs of the file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from epsilon_shift_tables import accuracy, as_input, read
from torch import Tensor, nn

import normwise as nw

VARIANTS = ("plain", "WS, depthwise left alone", "WS, depthwise too")


class InvertedResidual(nn.Module):
    """Expand 4 times, a depthwise 3×3 convolution, and back (arXiv 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def network() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)]
    inputs = 16
    for outputs, stride in ((24, 1), (24, 1), (40, 2), (40, 1), (80, 2), (80, 1)):
        layers.append(InvertedResidual(inputs, outputs, stride))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, 100))


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def train(variant: str, seed: int, steps: int, batch: int = 64) -> dict[str, object]:
    torch.manual_seed(seed)
    model = network()
    if variant == "WS, depthwise left alone":
        nw.weight_standardize(model)
    elif variant == "WS, depthwise too":
        nw.weight_standardize(model, only=[m for m in model.modules() if isinstance(m, nn.Conv2d)])
    undecayed = {p for m in model.modules() if is_depthwise(m) for p in m.parameters()}
    undecayed |= {p for p in model.parameters() if p.ndim == 1}
    groups = [
        {"params": [p for p in model.parameters() if p not in undecayed], "weight_decay": 4e-5},
        {"params": [p for p in model.parameters() if p in undecayed]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images, labels = read("train")
    generator = torch.Generator().manual_seed(seed)
    losses = []
    start = time.perf_counter()
    for _ in range(steps):
        index = torch.randint(len(images), (batch,), generator=generator)
        x = as_input(images[index])
        flip = torch.rand(batch, generator=generator) < 0.5
        loss = F.cross_entropy(
            model(torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)), labels[index]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "accuracy": accuracy(model) if math.isfinite(losses[-1]) else None,
        "loss": sum(losses[-200:]) / len(losses[-200:]),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON lines; runs that it has are not repeated")
    parser.add_argument("--steps", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = arguments.results.read_text() if arguments.results.exists() else ""
    results = [json.loads(line) for line in text.splitlines()]
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            wanted = (variant, seed, arguments.steps)
            if all((r["variant"], r["seed"], r["steps"]) != wanted for r in results):
                results.append(train(*wanted))
                with arguments.results.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    for variant in VARIANTS:
        found = [
            r["accuracy"]
            for r in results
            if (r["variant"], r["steps"]) == (variant, arguments.steps)
        ]
        if any(a is None for a in found):
            print(f"{variant}: {sum(a is None for a in found)} of {len(found)} runs failed")
        else:
            sd = statistics.stdev(found) if len(found) > 1 else math.nan
            print(f"{variant}: {statistics.mean(found):.2f} ± {sd:.2f} % over {len(found)} seeds")


if __name__ == "__main__":
    main()
