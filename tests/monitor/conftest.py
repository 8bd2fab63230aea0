import pytest
import torch
from torch import nn


def network():
    """Two convolutions before batch norms, one before a group norm, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class Training:
    """A network, its optimizer and its data; ``run`` takes steps."""

    def __init__(self, make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), net=None):
        self.model = network() if net is None else net
        self.optimizer = make(self.model.parameters())
        self.generator = torch.Generator().manual_seed(1)

    def step(self):
        dtype = next(self.model.parameters()).dtype
        x = torch.randn(8, 2, 6, 6, generator=self.generator).to(dtype)
        y = torch.randint(3, (8,), generator=self.generator)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def run(self, steps):
        return [self.step() for _ in range(steps)]


@pytest.fixture
def make_training():
    return Training


@pytest.fixture
def training():
    return Training()
