# pip install "normwise[lab]"
"""Plan, train, compare: where the norms should settle, where they do, and what SGDP changes."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normwise as nw
from normwise import theory

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-3

digits = load_digits()
IMAGES = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
LABELS = torch.tensor(digits.target)


def train(kind: type[torch.optim.Optimizer], steps: int) -> nw.Monitor:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    report = nw.analyze(model, IMAGES[:32])
    optimizer = kind(report.param_groups(weight_decay=WEIGHT_DECAY), lr=LR, momentum=MOMENTUM)
    right = []
    with nw.Monitor(model, optimizer, report, every=10) as monitor:
        for _ in range(steps):
            chosen = torch.randint(len(IMAGES), (16,))
            scores = model(IMAGES[chosen])
            right.append((scores.argmax(1) == LABELS[chosen]).float().mean())
            optimizer.zero_grad()
            F.cross_entropy(scores, LABELS[chosen], label_smoothing=0.1).backward()
            optimizer.step()
    accuracy = torch.stack(right[-100:]).mean()
    print(f"\n{kind.__name__}: {accuracy:.1%} of the last 100 batches right")
    return monitor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps

    # Plan: under SGD the angle at equilibrium depends on the settings alone (arXiv 2305.17212).
    angle = theory.sgd_equilibrium(LR, WEIGHT_DECAY, 1.0, MOMENTUM).angle
    print(f"plan for SGD: each weight settles at {angle:.4f} rad per step")

    # Train and compare.
    for kind in (torch.optim.SGD, nw.SGDP):
        monitor = train(kind, steps)
        measured = monitor.series("angular_update")[1][-10:].square().mean(0).sqrt()
        norms = monitor.series("norm")[1]
        for layer, a, first, last in zip(
            monitor.layers, measured, norms[0], norms[-1], strict=True
        ):
            print(f"  {layer}: {a:.4f} rad per step, norm {first:.2f} → {last:.2f}")
