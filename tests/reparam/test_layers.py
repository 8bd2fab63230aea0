"""Mean-only batch normalization, and the translated ReLU."""

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.reparam import MeanOnlyBatchNorm, TranslatedReLU


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


def test_the_translated_relu_is_the_larger_of_input_and_threshold():
    """max(x − α, 0) + α, α a channel."""
    layer = TranslatedReLU(3).double()
    with torch.no_grad():
        layer.threshold.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    x = 3 * torch.randn(4, 3, 5, dtype=torch.float64)
    alpha = layer.threshold.view(3, 1)
    torch.testing.assert_close(layer(x), torch.relu(x - alpha) + alpha)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_with_a_slope_it_is_a_translated_prelu():
    layer = TranslatedReLU(3, slope=0.25).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.PReLU(3).double()(x))
    with torch.no_grad():
        layer.threshold.fill_(0.5)
    torch.testing.assert_close(layer(x), nn.PReLU(3).double()(x - 0.5) + 0.5)


def test_it_keeps_a_strictly_normalized_layer_scale_invariant():
    """Weight normalization without gain and bias: α can be learned, no row's scale comes back."""
    model = nn.Sequential(nn.Linear(5, 4, bias=False), TranslatedReLU(4), nn.Linear(4, 2))
    nw.weight_normalize(model, gain=False)
    report = nw.analyze(model, torch.randn(6, 5))
    assert report["0.parametrizations.weight.original"].verdict == "channel"
    assert report["1.threshold"].verdict == "none"


def test_the_translated_relu_says_what_it_cannot_take():
    with pytest.raises(ValueError, match="dimension 1 must be the channels"):
        TranslatedReLU(3)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="Invalid channels: 0"):
        TranslatedReLU(0)
