"""Norms, angles and effective learning rates as the lab measures them."""

from __future__ import annotations

import math

import pytest
import torch
from normwise.lab.contenders import Family
from normwise.lab.measure import angles, geometric_mean_norm, mean_angle
from normwise.lab.models import InvariantWeight
from torch.nn.functional import normalize

from normwise import View


def test_every_slice_counts_once_in_the_geometric_mean():
    first = InvariantWeight("a", torch.tensor([[3.0, 4.0], [0.0, 20.0]]), View.channel())
    second = InvariantWeight("b", torch.full((1, 4), 5.0), View.layer())
    assert math.isclose(
        geometric_mean_norm([first, second]), (5 * 20 * 10) ** (1 / 3), rel_tol=1e-7
    )


@pytest.mark.parametrize("angle", [1e-6, 1e-3, 0.5, 3.0])
def test_angles_are_right_to_single_precision_however_small(angle):
    before = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    after = torch.tensor(
        [[math.cos(angle), math.sin(angle)], [-5 * math.sin(angle), 5 * math.cos(angle)]]
    )
    assert torch.allclose(
        angles(before, after, View.channel()), torch.full((2,), angle), rtol=2e-6, atol=0
    )


def test_scaling_a_weight_is_no_turn():
    w = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    weight = InvariantWeight("w", 17 * w, View.channel())
    assert mean_angle([w], [weight]) < 1e-6


@pytest.mark.parametrize(
    ("family", "optimizer"),
    [
        (Family.SGD, lambda w, lr: torch.optim.SGD([w], lr=lr)),
        (Family.ADAM, lambda w, lr: torch.optim.AdamW([w], lr=lr, weight_decay=0, eps=0)),
    ],
)
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_equal_effective_learning_rates_turn_a_weight_equally(family, optimizer, scale):
    generator = torch.Generator().manual_seed(1)
    start, target = torch.randn(2, 1, 8, dtype=torch.float64, generator=generator)

    def turn(w, lr):
        w = w.clone().requires_grad_()
        step = optimizer(w, lr)
        (normalize(w) * target).sum().backward()
        before = w.detach().clone()
        step.step()
        return angles(before, w.detach(), View.layer())

    lr = 1e-3
    norm = float(start.norm())
    # The learning rate that has the same effect on a weight of another norm.
    other = lr * family.effective_lr(lr, norm) / family.effective_lr(lr, scale * norm)
    assert torch.allclose(turn(start, lr), turn(scale * start, other), rtol=1e-9)
