"""Folding, copies, and state dicts."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from normwise.reparam import (
    center_weight_normalize,
    computed_once,
    fold,
    weight_normalize,
    weight_standardize,
)

CONVERSIONS = [weight_normalize, center_weight_normalize, weight_standardize]


def small():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def perturb(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("gain", [True, False])
def test_folding_keeps_the_outputs_and_leaves_no_trace(convert, gain):
    plain = small().eval()
    model = copy.deepcopy(plain)
    convert(model, gain=gain)
    perturb(model)
    x = torch.randn(2, 2, 6, 6)
    before = model(x)
    assert fold(model) is model
    torch.testing.assert_close(model(x), before)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not any(m._load_state_dict_pre_hooks for m in model.modules())
    pickle.loads(pickle.dumps(model))
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), before)


def test_folding_restores_the_order_of_a_recurrent_layers_weights():
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 4, num_layers=2)})
    keys = list(model.state_dict())
    x = torch.randn(5, 2, 3)
    before = model["rnn"](x)[0]
    weight_normalize(model, only=["rnn"])
    assert list(model.state_dict()) != keys
    fold(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model["rnn"](x)[0], before)


def test_folding_a_copy_leaves_the_original_converted():
    """torch's remove_parametrizations takes the weight of the original away."""
    model = small()
    weight_standardize(model)
    other = copy.deepcopy(model)
    fold(other)
    torch.testing.assert_close(model[0].weight, other[0].weight)
    fold(model)


def test_a_recurrent_layer_can_be_copied_after_a_call():
    """torch's keeps the graph of its last call, which deepcopy refuses."""
    model = nn.LSTM(3, 4)
    weight_normalize(model, only=[model])
    x = torch.randn(5, 2, 3)
    before = model(x)[0]
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(x)[0], before)
    fold(other)
    assert not other._forward_hooks
    torch.testing.assert_close(other(x)[0], before)
    torch.testing.assert_close(model(x)[0], before)


def test_folding_leaves_the_parametrizations_of_others():
    model = nn.LSTM(3, 4)
    parametrizations.spectral_norm(model, "weight_hh_l0")
    weight_normalize(model, only=[model])
    fold(model)
    assert list(model.parametrizations) == ["weight_hh_l0"]
    assert isinstance(model.weight_ih_l0, nn.Parameter)
    model(torch.randn(5, 2, 3))


def test_folding_what_is_not_converted_is_an_error():
    with pytest.raises(ValueError, match="fold finds no weight"):
        fold(small())
    model = small()
    weight_standardize(model)
    fold(model)
    with pytest.raises(ValueError, match="fold finds no weight"):
        fold(model)


def test_folding_inside_of_computed_once_is_an_error():
    model = small()
    weight_standardize(model)
    with computed_once(model), pytest.raises(RuntimeError, match="leave the context first"):
        fold(model)


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_copies_and_state_dicts_round_trip(convert, tmp_path):
    model = small().eval()
    convert(model)
    perturb(model)
    x = torch.randn(2, 2, 6, 6)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = small().eval()
    convert(other)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_converting_again_after_folding_is_fine():
    model = small()
    weight_normalize(model)
    fold(model)
    weight_normalize(model)
