"""Runs that change optimizer in the middle: theirs → ours and ours → theirs, 200 steps each."""

import copy
import warnings
from functools import partial

import adamp as official
import pytest
import torch
from torch import nn

import normwise
from normwise import View

STEPS = 200


def network():
    torch.manual_seed(0)
    # No bias before BN: its gradient is rounding noise, which Adam blows up to full steps. No
    # ReLU: it dies, and where a gradient is exactly zero ours differs from the official code.
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    ).double()


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=generator)
        y = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def through(first, second, load=lambda source, target: target.load_state_dict(source)):
    """Train with one optimizer, hand its state dict to another, and train on with that."""
    model = network()
    optimizer = first(model.parameters())
    train(model, optimizer, STEPS)
    successor = second(model.parameters())
    load(copy.deepcopy(optimizer.state_dict()), successor)
    train(model, successor, STEPS, STEPS)
    return weights(model)


def straight(make):
    model = network()
    train(model, make(model.parameters()), 2 * STEPS)
    return weights(model)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


ADAM = {"lr": 1e-2, "weight_decay": 1e-2, "betas": (0.85, 0.95)}
SGD = {"lr": 1e-2, "momentum": 0.9}


def test_official_adamp_to_ours():
    theirs = partial(official.AdamP, **ADAM)
    assert_same(through(theirs, normwise.AdamP), straight(theirs))


def test_our_adamp_to_the_official_one():
    """The official code counts steps with an int, so that much is translated."""

    def load(source, target):
        for state in source["state"].values():
            state["step"] = int(state["step"])
        target.load_state_dict(source)

    theirs = partial(official.AdamP, **ADAM)
    ours = partial(normwise.AdamP, **ADAM)
    assert_same(through(ours, theirs, load), straight(theirs))


def test_official_nesterov_sgdp_to_ours():
    theirs = partial(official.SGDP, nesterov=True, weight_decay=1e-3, **SGD)
    assert_same(through(theirs, normwise.SGDP), straight(theirs))


def test_our_nesterov_sgdp_to_the_official_one():
    def load(source, target):
        for state in source["state"].values():
            state["momentum"] = state.pop("momentum_buffer")
        target.load_state_dict(source)

    theirs = partial(official.SGDP, nesterov=True, weight_decay=1e-3, **SGD)
    ours = partial(normwise.SGDP, nesterov=True, weight_decay=1e-3, **SGD)
    assert_same(through(ours, theirs, load), straight(theirs))


def test_timms_layout_to_ours():
    """timm's AdamP and SGDP: the official state, and scheduler keys in the groups."""

    def load(source, target):
        for group in source["param_groups"]:
            group["initial_lr"] = group["lr"]
            group["lr_scale"] = 1.0
        target.load_state_dict(source)

    theirs = partial(official.AdamP, **ADAM)
    assert_same(through(theirs, normwise.AdamP, load), straight(theirs))


def test_torch_adamw_to_ours_and_back():
    theirs = partial(torch.optim.AdamW, **ADAM)
    ours = partial(normwise.AdamP, view=None, **ADAM)
    assert_same(through(theirs, ours), straight(theirs))
    assert_same(through(ours, theirs, to_torch), straight(theirs))


def to_torch(source, target):
    """Load our state into torch's AdamW, which wants its own options in the groups."""
    for group, current in zip(source["param_groups"], target.param_groups, strict=True):
        wanted = {"amsgrad", "decoupled_weight_decay"} & current.keys()  # the second from 2.7 on
        group.update({key: current[key] for key in wanted})
    target.load_state_dict(source)


@pytest.mark.parametrize("nesterov", [False, True])
def test_torch_sgd_to_ours_and_back(nesterov):
    theirs = partial(torch.optim.SGD, nesterov=nesterov, **SGD)
    sgdp = partial(normwise.SGDP, view=None, nesterov=nesterov, **SGD)
    sgdw = partial(normwise.SGDW, nesterov=nesterov, **SGD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(through(theirs, sgdp), straight(theirs))
        assert_same(through(theirs, sgdw), straight(theirs))
    assert_same(through(sgdp, theirs), straight(theirs))


def test_views_survive_a_checkpoint_that_has_none():
    model = network()
    theirs = torch.optim.AdamW(model.parameters(), lr=0.5)
    train(model, theirs, 1)
    ours = normwise.AdamP(
        [{"params": list(model[0].parameters()), "view": View.channel()}], view=None
    )
    theirs_first = torch.optim.AdamW(model[0].parameters(), lr=0.5)
    train(model, theirs_first, 1)
    ours.load_state_dict(theirs_first.state_dict())
    assert ours.param_groups[0]["view"] == View.channel()
    assert ours.param_groups[0]["lr"] == 0.5


def test_l2_that_becomes_decoupled_is_said_aloud():
    model = network()
    theirs = torch.optim.SGD(model.parameters(), weight_decay=0.25, **SGD)
    train(model, theirs, 1)
    with pytest.warns(UserWarning, match=r"weight_decay of 0\.25 was added to the gradient"):
        normwise.SGDP(model.parameters()).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (lambda p: torch.optim.RMSprop(p), normwise.AdamP, "square_avg"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), normwise.AdamP, "amsgrad=True"),
        (lambda p: torch.optim.AdamW(p), normwise.SGDP, "momentum_buffer"),
        (lambda p: torch.optim.Adagrad(p), normwise.SGDW, "momentum_buffer"),
    ],
)
def test_a_run_that_cannot_be_continued_is_refused(theirs, ours, message):
    model = network()
    optimizer = theirs(model.parameters())
    train(model, optimizer, 1)
    successor = ours(model.parameters())
    with pytest.raises(ValueError, match=message):
        successor.load_state_dict(optimizer.state_dict())
    assert not successor.state


def test_state_of_another_network_is_refused():
    small, large = nn.Linear(2, 3), nn.Linear(4, 3)
    for model in (small, large):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    optimizer = normwise.AdamP(small.parameters())
    optimizer.step()
    with pytest.raises(ValueError, match=r"shape \(3, 4\) has shape \(3, 2\)"):
        normwise.AdamP(large.parameters()).load_state_dict(optimizer.state_dict())
