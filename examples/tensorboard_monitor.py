# pip install "normwise[lab,monitor]"
"""Norms, effective learning rates and angles in TensorBoard, and an alarm before a loss is lost.

Then: tensorboard --logdir runs
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normwise as nw
from normwise.monitor import TensorBoard, every, first

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/norms"))
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="try 0.3 for an alarm")
    arguments = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)
    )
    report = nw.analyze(model, images[:32])
    optimizer = torch.optim.SGD(
        report.param_groups(weight_decay=arguments.weight_decay), lr=0.1, momentum=0.9
    )
    with nw.Monitor(
        model,
        optimizer,
        report,
        every=first(10) | every(20),  # closely at first
        writers=[TensorBoard(str(arguments.out))],
        alarms=print,  # or "log", "raise", or a function of yours
    ) as monitor:
        for _ in range(arguments.steps):
            chosen = torch.randint(len(images), (64,))
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    last = monitor.history[-1]
    for layer in monitor.layers:
        measured, predicted = (
            last[name][layer] for name in ("angular_update", "predicted_angular_update")
        )
        print(f"{layer}: {measured:.4f} rad per step, settles at {predicted:.4f}")
