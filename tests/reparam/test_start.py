"""The data-dependent start, and mean-only batch normalization."""

import pytest
import torch
from torch import nn

from normwise.reparam import (
    MeanOnlyBatchNorm,
    data_dependent_start,
    weight_normalize,
    weight_standardize,
)


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
    assert data_dependent_start(model, x) == ["0", "2", "5"]
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
    data_dependent_start(model, x)
    torch.testing.assert_close(seen[0], model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_constant_channel_keeps_gain_1():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    weight_normalize(model)
    with torch.no_grad():
        model[0].parametrizations.weight.original1[0] = 0
    data_dependent_start(model, torch.randn(8, 3))
    assert model[0].parametrizations.weight.original0[0] == 1


def test_without_gains_it_is_an_error():
    model = network()
    weight_standardize(model)
    with pytest.raises(ValueError, match="finds no linear or convolutional module with a gain"):
        data_dependent_start(model, torch.randn(2, 3, 8, 8))


def test_a_batch_that_is_not_finite_is_an_error():
    model = network()
    weight_normalize(model)
    with pytest.raises(ValueError, match="the output of 0 is not finite"):
        data_dependent_start(model, torch.full((2, 3, 8, 8), torch.inf))
    assert not any(m._forward_hooks for m in model)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 4)])
def test_mean_only_batch_norm_takes_the_mean_away_and_nothing_else(shape):
    norm = MeanOnlyBatchNorm(3)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    t = 5 + 2 * torch.randn(shape)
    out = norm(t)
    dims = [0, *range(2, len(shape))]
    torch.testing.assert_close(out.mean(dims), norm.bias)
    torch.testing.assert_close(out.std(dims), t.std(dims))
    torch.testing.assert_close(norm.running_mean, 0.1 * t.mean(dims))
    norm.eval()
    view = (-1, *[1] * (len(shape) - 2))
    torch.testing.assert_close(norm(t), t + (norm.bias - norm.running_mean).view(view))


def test_mean_only_batch_norm_says_what_it_cannot_take():
    with pytest.raises(ValueError, match="dimension 1 must be the channels"):
        MeanOnlyBatchNorm(3)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="Invalid momentum: 2"):
        MeanOnlyBatchNorm(3, momentum=2)
