"""Epsilons vanish wherever a normalization adds one, and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normwise.invariance import analyze
from normwise.invariance.exact import SHRINK, Exact


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)


def rms_in_half_precision(x):
    y = x.to(torch.float32)
    return (y * (y.square().mean(-1, keepdim=True) + 1e-2).pow(-0.5)).type_as(x.half())


def standardized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-2)


def by_variance(x):
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(1e-2 + variance)


def by_moments(x):
    variance = (x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2
    return (x - x.mean(-1, keepdim=True)) * (variance + torch.tensor(1e-2)).rsqrt()


def by_norm(x):
    return x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-2)


def in_place(x):
    variance = x.var(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / variance.add_(1e-2).sqrt_()


WRITTEN_BY_HAND = [rms, rms_in_half_precision, standardized, by_variance, by_moments, by_norm]
OF_TORCH = {
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-2),
    "torch.layer_norm": lambda x: torch.layer_norm(x, x.shape[-1:], None, None, 1e-2),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-2),
    "rms_norm without eps": lambda x: F.rms_norm(x, x.shape[-1:]),
    "group_norm": lambda x: F.group_norm(x, 1, eps=1e-2),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "instance_norm": lambda x: F.instance_norm(x.unsqueeze(1), eps=1e-2),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True, eps=1e-2),
}


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first = nn.Linear(6, 8, bias=False)
        self.last = nn.Linear(8, 3)
        self.function = function

    def forward(self, x):
        return self.last(torch.tanh(self.function(self.first(x))).reshape(-1, 8))


@pytest.mark.parametrize("function", WRITTEN_BY_HAND, ids=lambda f: f.__name__)
def test_a_weight_before_a_normalization_written_by_hand_is_invariant(function):
    assert analyze(Net(function), torch.randn(5, 6))["first.weight"].verdict == "layer"


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_weight_before_a_normalization_of_torch_is_invariant(name):
    expected = "channel" if name == "batch_norm" else "layer"
    assert analyze(Net(OF_TORCH[name]), torch.randn(5, 6))["first.weight"].verdict == expected


@pytest.mark.parametrize("function", [*WRITTEN_BY_HAND, *OF_TORCH.values()])
def test_a_shrunk_epsilon_is_the_limit_of_large_inputs(function):
    """f(c·x; ε) = f(x; ε/c²) for ε under a root: at c = 2⁴⁰ both are f(x; 2⁻⁸⁰ε)."""
    x = torch.randn(4, 8, dtype=torch.float64)
    with Exact():
        shrunk = function(x)
    with Exact(1):
        scaled = function(x * SHRINK**-0.5)
    torch.testing.assert_close(shrunk, scaled, rtol=1e-11, atol=1e-11)


def test_other_additions_of_a_number_are_left_alone():
    x = torch.randn(4, 8, dtype=torch.float64)
    functions = [
        lambda x: x / torch.sqrt(1 + x * x),  # an activation
        lambda x: 1 / (1 + torch.exp(-x)),
        lambda x: x.exp() / (1 + x.exp().sum(-1, keepdim=True)),  # no length is divided by
        lambda x: x * (1 + x.mean(-1, keepdim=True)),
    ]
    for function in functions:
        with Exact():
            found = function(x)
        assert torch.equal(found, function(x))


def test_the_running_statistics_of_batch_norm_keep_their_epsilon():
    x, mean, var = torch.randn(4, 8).double(), torch.zeros(8).double(), torch.zeros(8).double()
    with Exact():
        found = F.batch_norm(x, mean, var, training=False, eps=1e-2)
    torch.testing.assert_close(found, x / 1e-2**0.5)


def test_requests_for_narrower_types_are_answered_in_float64():
    with Exact():
        x = torch.ones(2, dtype=torch.float32)
        for y in (x, x.float(), x.half(), x.to(torch.bfloat16), x.softmax(0, dtype=torch.float32)):
            assert (y * torch.tensor(1.0, dtype=torch.float64)).dtype == torch.float64
        assert x.to(torch.int32).dtype == torch.int32
    assert torch.ones(2).dtype == torch.float32


def test_the_residual_with_the_models_own_epsilon_falls_as_the_weight_grows():
    """⟨w, g⟩ of x/√(x² + ε) falls as 1/c² when w is multiplied by c."""
    net = Net(rms)
    x = torch.randn(5, 6)
    residuals = []
    for _ in range(2):
        residuals.append(analyze(net, x)["first.weight"].residual_with_eps)
        with torch.no_grad():
            net.first.weight.mul_(10)
    assert residuals[0] > 1e-3
    assert 50 < residuals[0] / residuals[1] < 200


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, (1, 3)])
@pytest.mark.parametrize("padding", [0, (1, 0), "same", "valid"])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
def test_convolutions_are_torchs(groups, kernel, padding, stride):
    if padding == "same":
        stride = 1  # torch takes no other
    options = {"stride": stride, "padding": padding, "groups": groups, "dtype": torch.float64}
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    for channels in (2, 200):  # fewer and more than there are positions
        net = nn.Conv2d(4, channels, kernel, **options)
        expected = net(x)
        with Exact():
            found = net(x)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
