"""Of norms that are fixed a monitor predicts the angle: it is the learning rate's."""

import math

import pytest
import torch
from torch import nn

import normwise
from normwise import Monitor

INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("path", ["retract", "geodesic"])
@pytest.mark.parametrize("inner", INNER)
def test_the_angle_is_predicted_within_a_percent_all_along_the_schedule(inner, path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 48, bias=False), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 4)
    ).double()
    x, y = torch.randn(128, 64).double(), torch.randint(4, (128,))
    report = normwise.analyze(model, x)
    optimizer = normwise.sphere(INNER[inner](model.parameters()), report, path=path)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    radius = float(next(iter(optimizer.radii.values()))[0])
    with Monitor(model, optimizer, report, every=4) as monitor:
        for step in range(32):
            at = torch.randperm(128, generator=torch.Generator().manual_seed(step))[:32]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()
            scheduler.step()
    assert len(monitor.history) > 5
    for m in monitor.history:
        (name,) = report.views()
        assert m["angular_update"][name] == pytest.approx(
            m["predicted_angular_update"][name], rel=0.01
        )
        lr = 0.01 * (1 + math.cos(math.pi * (m.step - 1) / 40)) / 2
        expected = lr if path == "geodesic" else math.atan(lr)
        assert m["predicted_angular_update"][name] == pytest.approx(expected)
        assert m["effective_lr"][name] == pytest.approx(lr)
        assert m["predicted_norm"][name] == pytest.approx(radius)
