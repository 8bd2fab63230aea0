"""How soon a monitor's alarms see a fault, and how often they cry for none::

    python benchmarks/alarms.py --seeds 5

A small ConvNet with BatchNorm learns scikit-learn's digits for 400 steps under a cosine, watched at
every fifth step. In step 251 something goes wrong, or nothing:

* batch: inputs 30 times too large, with random labels, for this one step;
* rate: the learning rate is ten times too large from here on;
* weight: the third convolution is multiplied by 0.3, as by a bad load.

Printed are, of all runs, how many raised an alarm of each kind by when, and the false alarms: those
before the fault, or in runs without any.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict

import torch
from sklearn.datasets import load_digits
from torch import nn

import normwise as nw

STEPS, FAULT, EVERY = 400, 250, 5
FAULTS = {
    "batch": "update above expected",
    "rate": "learning rate jumped",
    "weight": "norm jumped",
    "none": "",
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.05),
    "AdamP": lambda p: nw.AdamP(p, lr=2e-3, weight_decay=0.05, view="channel"),
}


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 32)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def run(optimizer_of, fault: str, seed: int) -> list[nw.monitor.Alarm]:
    """The alarms of one training."""
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    model = network()
    optimizer = optimizer_of(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    views = {f"{k}.weight": "channel" for k in (0, 3, 6)}
    # An exact start: the step after the fault is a measured one, or up to four steps before one.
    with nw.Monitor(
        model, optimizer, views, every=EVERY, fetch_every=1, alarms=lambda alarm: None
    ) as monitor:
        for step in range(STEPS):
            index = torch.randint(len(labels), (32,))
            x, y = images[index], labels[index]
            if step == FAULT and fault == "batch":
                x, y = 30 * x, torch.randint(10, (32,))
            if step == FAULT and fault == "weight":
                model[6].weight.data.mul_(0.3)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if step >= FAULT and fault == "rate":
                for group in optimizer.param_groups:
                    group["lr"] *= 10
            optimizer.step()
            if step >= FAULT and fault == "rate":
                for group in optimizer.param_groups:
                    group["lr"] /= 10
            schedule.step()
    return monitor.raised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print(
        f"{'optimizer':10}{'fault':8}{'seen':>8}{'steps later':>13}   false alarms in {seeds} runs"
    )
    for name, optimizer_of in OPTIMIZERS.items():
        for fault, kind in FAULTS.items():
            later, false = [], defaultdict(int)
            for seed in range(seeds):
                for alarm in run(optimizer_of, fault, seed):
                    if fault == "none" or alarm.step <= FAULT:
                        false[alarm.kind] += 1
                    elif alarm.kind == kind:
                        later.append(alarm.step - FAULT - 1)
                        break
            when = f"{statistics.median(later):.0f}" if later else ""
            seen = f"{len(later)}/{seeds}" if kind else ""
            cried = ", ".join(f"{k} {n}" for k, n in sorted(false.items())) or "none"
            print(f"{name:10}{fault:8}{seen:>8}{when:>13}   {cried}")


if __name__ == "__main__":
    main()
