# pip install "normwise[lab]"
"""Your own network: which weights are scale-invariant, and what training does to their norms.

Put your network and data in place of `network` and `batches`; the rest stays as it is.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normwise as nw


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def batches(size: int = 64):
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    while True:
        chosen = torch.randint(len(images), (size,))
        yield images[chosen], labels[chosen]


def train(kind: type[torch.optim.Optimizer], steps: int, picture: Path) -> None:
    torch.manual_seed(0)
    model, data = network(), batches()
    report = nw.analyze(model, next(data)[0])
    # torch's optimizers do not read the groups' "view"; normwise's project along it.
    optimizer = kind(report.param_groups(weight_decay=1e-4), lr=0.1, momentum=0.9)
    with nw.Monitor(model, optimizer, report, every=max(1, steps // 50)) as monitor:
        for _ in range(steps):
            x, y = next(data)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    monitor.plot(picture)
    norms = monitor.series("norm")[1].log().mean(1).exp()  # geometric mean of the layers
    print(f"{kind.__name__}: loss {loss.item():.3f}, norms × {norms[-1] / norms[0]:.2f}; {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the pictures")
    parser.add_argument("--format", default="png", help="png, svg or pdf")
    arguments = parser.parse_args()

    print(nw.analyze(network(), next(batches())[0]))
    for kind in (torch.optim.SGD, nw.SGDP):
        train(kind, arguments.steps, arguments.out / f"norms-{kind.__name__}.{arguments.format}")
