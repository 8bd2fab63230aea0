"""Theorem 1 run backwards: learning rates that undo the growth of norms."""

from __future__ import annotations

import copy

import pytest
import torch

from normwise import SGDP, AdamP
from normwise.geometry import View, norms
from normwise.lab.correction import correct_for_norms

VIEW = View.channel()


def start():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(3, 8, generator=draw, dtype=torch.float64)


def gradients(w, step):
    """Of ⟨a, ŵ⟩ with an a of its own for each step: no gradient has a radial part."""
    draw = torch.Generator().manual_seed(1000 + step)
    a = torch.randn(w.shape, generator=draw, dtype=torch.float64)
    norm = norms(w, VIEW)[:, None]
    unit = w / norm
    return (a - unit * (a * unit).sum(1, keepdim=True)) / norm


def trained(make, steps, reference=None):
    """The weights after so many steps, and their directions."""
    w = torch.nn.Parameter(start())
    optimizer = make([w])
    if reference:
        correct_for_norms(optimizer, {w: VIEW}, reference)
    for step in range(steps):
        w.grad = gradients(w.detach(), step)
        optimizer.step()
    return w.detach()


def directions(w):
    return w / norms(w, VIEW)[:, None]


def angle(a, b):
    """The largest between slices, in radians."""
    return float(2 * ((directions(a) - directions(b)).norm(dim=1) / 2).asin().max())


def test_corrected_to_fixed_norms_sgd_takes_the_directions_of_descent_on_spheres():
    w = start()
    radius = norms(w, VIEW)[:, None]
    for step in range(30):
        moved = w - 0.3 * gradients(w, step)
        w = radius * directions(moved)

    def sgd(params):
        return torch.optim.SGD(params, lr=0.3)

    ours = trained(sgd, 30, "fixed")
    assert (norms(ours, VIEW) > 1.02 * radius[:, 0]).all()
    assert angle(ours, w) < 1e-12
    assert angle(trained(sgd, 30), w) > 0.05


def test_without_momentum_sgd_grows_as_its_projection_does_and_needs_no_correction():
    def sgd(params):
        return torch.optim.SGD(params, lr=0.3)

    torch.testing.assert_close(trained(sgd, 30, "projected"), trained(sgd, 30), rtol=1e-12, atol=0)


MOMENTUM = {"lr": 0.04, "momentum": 0.9}
# Of a memory as short as momentum's: what the moments remember is the third test's.
SHORT = {"lr": 0.04, "betas": (0.9, 0.9), "eps": 1e-30}
LONG = {"lr": 0.04, "betas": (0.9, 0.999), "eps": 1e-30}


def compared(settings, shrink, reference):
    """How far the plain optimizer ends from the projected one: as it is, and corrected.

    The learning rate is divided by ``shrink`` and the steps are multiplied by its square, so that
    norms grow as much.
    """
    adam = "betas" in settings
    settings = {**settings, "lr": settings["lr"] / shrink, "weight_decay": 0.0}
    steps = 50 * shrink**2
    plain = torch.optim.AdamW if adam else torch.optim.SGD
    projected = AdamP if adam else SGDP
    theirs = trained(lambda p: projected([{"params": p, "view": VIEW}], **settings), steps)
    ways = [trained(lambda p: plain(p, **settings), steps, r) for r in (None, reference)]
    return [angle(way, theirs) for way in ways]


@pytest.mark.parametrize("settings", [MOMENTUM, SHORT], ids=["SGD", "AdamW"])
def test_what_the_projection_does_beside_the_learning_rate_vanishes_with_it(settings):
    apart, left = compared(settings, 1, "projected")
    still_apart, less_left = compared(settings, 3, "projected")
    assert still_apart > apart  # the growth of norms does not vanish
    assert left < apart / 4
    assert less_left < left / 2.5


def test_what_the_second_moment_remembers_of_earlier_norms_is_rescaled():
    apart, lr_alone = compared(LONG, 2, "projected")
    _, rescaled = compared(LONG, 2, "rescaled")
    assert lr_alone > apart / 5
    assert rescaled < apart / 50


def test_the_reference_norms_stand_in_the_state():
    def step(w, optimizer, number):
        w.grad = gradients(w.detach(), number)
        optimizer.step()

    def made(w):
        optimizer = torch.optim.SGD([w], **MOMENTUM)
        correct_for_norms(optimizer, {w: VIEW}, "projected")
        return optimizer

    w = torch.nn.Parameter(start())
    optimizer = made(w)
    for number in range(5):
        step(w, optimizer, number)
    other = torch.nn.Parameter(w.detach().clone())
    resumed = made(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(5, 10):
        step(w, optimizer, number)
        step(other, resumed, number)
    assert torch.equal(w, other)


def test_a_slice_of_zeros_stays_finite_and_what_decays_is_refused():
    w = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.SGD([w], lr=0.1)
    correct_for_norms(optimizer, {w: VIEW}, "projected")
    w.grad = torch.ones_like(w)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((2, 3), -0.1))
    decaying = torch.optim.SGD([w], lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay of scale-invariant weights: 0\.1; must"):
        correct_for_norms(decaying, {w: VIEW}, "fixed")
    with pytest.raises(ValueError, match="reference: 'none'; must be fixed or projected"):
        correct_for_norms(optimizer, {w: VIEW}, "none")
    with pytest.raises(ValueError, match="1 of 1 scale-invariant weights are in no group"):
        correct_for_norms(optimizer, {start(): VIEW}, "fixed")
