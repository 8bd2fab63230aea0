"""The toy of the AdamP paper, against the digits that its pictures print."""

from __future__ import annotations

import math

import pytest
import torch

from normwise.lab.toy import PRINTED, loss, loss_at_angle, trajectories

# What the paper's pictures print, written down here again so that neither copy can drift.
PAPER = {
    ("momentum", "loss", 40): "3.7258",
    ("projected", "loss", 40): "3.7186",
    ("momentum", "loss", 50): "1.7578",
    ("projected", "loss", 50): "1.3491",
    ("momentum", "loss", 100): ".0513",
    ("projected", "loss", 100): ".0010",
    ("gd", "norm", 500): "1.02",
    ("momentum", "norm", 500): "2.93",
    ("projected", "norm", 500): "1.12",
}


@pytest.fixture(scope="module")
def paths():
    return trajectories()


@pytest.mark.parametrize("printed", PRINTED, ids=lambda p: f"{p.method}-{p.quantity}-{p.step}")
def test_every_printed_digit_comes_out(paths, printed):
    assert (
        printed.rounded(paths[printed.method])
        == PAPER[printed.method, printed.quantity, printed.step]
    )


def test_every_number_of_the_paper_is_compared():
    assert {(p.method, p.quantity, p.step): p.text for p in PRINTED} == PAPER


def test_plain_gradient_descent_lengthens_the_weight_by_pythagoras():
    w = torch.tensor([[0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    loss(w).backward()
    stepped = w.detach() - 0.1 * w.grad
    assert math.isclose(
        stepped.square().sum().item(), 0.25 + 0.01 * w.grad.square().sum().item(), rel_tol=1e-14
    )


def test_norms_never_shrink_and_the_projection_keeps_them_smaller_than_momentum(paths):
    for path in paths.values():
        pairs = zip(path.norms, path.norms[1:], strict=False)
        assert all(after >= before - 1e-12 for before, after in pairs)
    assert paths["projected"].norms[-1] < paths["momentum"].norms[-1]


@pytest.mark.parametrize("angle", [0.0, 1.0, math.pi / 2, -2.5])
@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
def test_the_loss_depends_on_the_angle_alone(angle, scale):
    w = scale * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert math.isclose(loss(w).item(), loss_at_angle(angle), rel_tol=1e-12, abs_tol=1e-14)
