"""The data-dependent start of weight normalization."""

import pytest
import torch
from torch import nn

from normwise.init import data_dependent_init
from normwise.reparam import weight_normalize, weight_standardize


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 6, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 49, 5),
        nn.Linear(5, 2),
    )


def test_after_it_every_converted_layer_gives_mean_0_and_std_1_on_the_batch():
    model = network()
    weight_normalize(model)
    x = torch.randn(16, 3, 8, 8)
    weights = [model[i].parametrizations.weight.original1.clone() for i in (0, 2, 5)]
    assert data_dependent_init(model, x) == ["0", "2", "5"]
    for i, layer in enumerate(model):
        x = layer(x)
        if i in (0, 2, 5):
            std, mean = torch.std_mean(x.transpose(0, 1).flatten(1), 1, correction=0)
            torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
            torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-5, atol=0)
    for i, w in zip((0, 2, 5), weights, strict=True):
        torch.testing.assert_close(model[i].parametrizations.weight.original1, w)


def test_the_output_of_the_call_is_that_of_the_started_network():
    model = network()
    weight_normalize(model)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(16, 3, 8, 8)
    data_dependent_init(model, x)
    torch.testing.assert_close(seen[0], model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_constant_channel_keeps_gain_1():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    weight_normalize(model)
    with torch.no_grad():
        model[0].parametrizations.weight.original1[0] = 0
    data_dependent_init(model, torch.randn(8, 3))
    assert model[0].parametrizations.weight.original0[0] == 1


def test_without_gains_it_is_an_error():
    model = network()
    weight_standardize(model)
    with pytest.raises(ValueError, match="finds no linear or convolutional module with a gain"):
        data_dependent_init(model, torch.randn(2, 3, 8, 8))


def test_a_batch_that_is_not_finite_is_an_error():
    model = network()
    weight_normalize(model)
    with pytest.raises(ValueError, match="the output of 0 is not finite"):
        data_dependent_init(model, torch.full((2, 3, 8, 8), torch.inf))
    assert not any(m._forward_hooks for m in model)


def test_the_scale_is_the_std_of_outputs_and_may_differ_by_layer():
    """g = init_scale/√(s² + eps), b = −m·g, as the official code starts gated residual blocks."""
    model = network().double()
    weight_normalize(model)
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    data_dependent_init(model, x, init_scale={"2": 0.1, "[0-9]": 3.0})
    for i, layer in enumerate(model):
        x = layer(x)
        if i in (0, 2, 5):
            std, mean = torch.std_mean(x.transpose(0, 1).flatten(1), 1, correction=0)
            torch.testing.assert_close(std, torch.full_like(std, 0.1 if i == 2 else 3.0))
            torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)


def test_the_guard_is_added_to_the_variance():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    weight_normalize(model)
    x = 0.01 * torch.randn(50, 3, dtype=torch.float64)
    w = model[0].parametrizations.weight.original1.detach()
    outputs = x @ (w / w.norm(dim=1, keepdim=True)).T
    std, mean = torch.std_mean(outputs, 0, correction=0)
    data_dependent_init(model, x, eps=1e-4)
    gain = model[0].parametrizations.weight.original0.flatten()
    torch.testing.assert_close(gain, (std**2 + 1e-4).rsqrt())
    torch.testing.assert_close(model[0].bias, -mean * gain)


def test_bad_scales_are_told():
    model = network()
    weight_normalize(model)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="Invalid init_scale: 0"):
        data_dependent_init(model, x, init_scale=0)
    with pytest.raises(ValueError, match="init_scale names 'conv', which matches no module"):
        data_dependent_init(model, x, init_scale={"conv": 0.1})
    with pytest.raises(ValueError, match="Invalid eps: -1"):
        data_dependent_init(model, x, eps=-1)
