# pip install "normwise[lab]"
"""Fixed norms: the learning rate is the angle by which every weight turns, whatever its layer.

The same network under AdamW and under `sphere` around Adam: both angles per step in a picture.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import normwise as nw
from normwise.figures import Axis, Figure, Line, Lines, Spacing, nth_of, save

IMAGES = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
LABELS = torch.tensor(load_digits().target)
NAMES = ("0.weight", "3.weight", "7.weight", "9.weight")
ROLES = ("first convolution", "second convolution", "hidden", "readout")


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 32), nn.SiLU(), nn.Linear(32, 10)),
    )


def adamw(model: nn.Module, report: nw.Report) -> torch.optim.Optimizer:
    return torch.optim.AdamW(report.param_groups(weight_decay=0.1), lr=3e-3)


def fixed(model: nn.Module, report: nw.Report) -> torch.optim.Optimizer:
    vectors = [p for p in model.parameters() if p.ndim < 2]  # biases and gains keep their lengths
    gains = {"params": nw.add_gains(model, report.freedom(NAMES)), "lr": 3e-3}
    matrices = {"params": [p for p in model.parameters() if p.ndim >= 2], "lr": 0.02}
    inner = torch.optim.Adam([matrices, {"params": vectors, "lr": 3e-3}])
    return nw.sphere(inner, "layer", path="geodesic", gains=gains)


def train(make, steps: int) -> nw.Monitor:
    torch.manual_seed(0)
    model = network()
    report = nw.analyze(model, IMAGES[:16])
    optimizer = make(model, report)
    schedule = CosineAnnealingLR(optimizer, steps)
    matrices = {name: "layer" for name, p in model.named_parameters() if p.ndim >= 2}
    with nw.Monitor(model, optimizer, matrices, every=max(1, steps // 60), rules=[]) as monitor:
        for _ in range(steps):
            chosen = torch.randint(len(IMAGES), (64,))
            loss = F.cross_entropy(model(IMAGES[chosen]), LABELS[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    print(f"{make.__name__}: loss {loss.item():.3f}")
    return monitor


def chart(monitor: nw.Monitor, title: str) -> Lines:
    at, angles = monitor.series("angular_update")
    lines = (
        Line(role, role, tuple(at), tuple(angles[:, i].tolist()), colour=nth_of(i, len(ROLES)))
        for i, role in enumerate(ROLES)
    )
    axes = Axis("step", Spacing.TIGHT), Axis("radians per step", holds=(0.0, 0.1))
    return Lines(title, "angle by which a matrix turns", *axes, tuple(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", default="fixed-norms.png")
    given = parser.parse_args()
    free = chart(train(adamw, given.steps), "AdamW, η = 0.003")
    save(Figure("", (free, chart(train(fixed, given.steps), "Norms fixed, η = 0.02"))), given.out)
