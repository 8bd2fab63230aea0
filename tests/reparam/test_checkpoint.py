"""Checkpoints of plain networks, of timm's StdConv2d, and of torch's two weight norms."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d
from torch.nn.utils import parametrizations

from normwise.reparam import center_weight_normalize, weight_normalize, weight_standardize


def model():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 3, 2), nn.Linear(8, 3))


def x():
    return torch.randn(2, 2, 9, 9)


def run(net, data):
    return net[1](net[0](data))


def old_weight_norm(net, dim):
    with warnings.catch_warnings():
        # Torch says that there is a new one.
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(net[0])
        nn.utils.weight_norm(net[1], dim=dim)


def new_weight_norm(net, dim):
    parametrizations.weight_norm(net[0])
    parametrizations.weight_norm(net[1], dim=dim)


def perturbed(net):
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1 + 0.2 * torch.rand_like(p))
    return net


@pytest.mark.parametrize("dim", [1, 0, None])
def test_torchs_old_weight_norm_loads_whatever_its_dimension(dim):
    theirs, ours, data = model(), model(), x()
    old_weight_norm(theirs, dim)
    perturbed(theirs)
    weight_normalize(ours)
    state = theirs.state_dict()
    assert "0.weight_g" in state
    ours.load_state_dict(state)
    torch.testing.assert_close(run(ours, data), run(theirs, data))
    torch.testing.assert_close(ours[0].parametrizations.weight.original1, theirs[0].weight_v)


def test_torchs_new_weight_norm_loads_both_ways():
    theirs, ours, data = model(), model(), x()
    new_weight_norm(theirs, 1)
    perturbed(theirs)
    weight_normalize(ours)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(run(ours, data), run(theirs, data))
    perturbed(ours)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(run(ours, data), run(theirs, data))


def test_a_plain_checkpoint_loads_and_weight_norm_computes_the_same():
    plain, ours, data = model(), model(), x()
    weight_normalize(ours)
    ours.load_state_dict(plain.state_dict())
    torch.testing.assert_close(run(ours, data), run(plain, data))


def test_timms_std_conv_loads_and_computes_the_same():
    """A state dict with the keys of timm's StdConv2d (plain "weight"), which it standardizes by
    F.batch_norm with eps = 1e-6 at each call."""
    state = {"0.weight": 0.1 * torch.randn(4, 2, 3, 3), "0.bias": torch.randn(4)}
    ours, data = nn.Sequential(nn.Conv2d(2, 4, 3)), x()
    weight_standardize(ours, eps=1e-3)
    ours.load_state_dict(state)
    w = state["0.weight"]
    flat = w.reshape(1, 4, -1)
    theirs = batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(w)
    torch.testing.assert_close(ours(data), conv2d(data, theirs, state["0.bias"]))


def test_a_gain_of_weight_norm_is_not_dropped_in_silence():
    theirs, ours = model(), model()
    old_weight_norm(theirs, 0)
    center_weight_normalize(ours)
    message = re.escape("0.weight_g and 0.weight_v are of weight norm with a gain")
    with pytest.raises(RuntimeError, match=message):
        ours.load_state_dict(theirs.state_dict())


def test_missing_and_unexpected_keys_are_still_told():
    ours = model()
    weight_standardize(ours)
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict({**ours.state_dict(), "0.weights": torch.ones(1)})
