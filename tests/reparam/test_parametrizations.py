"""The formulas, their gradients and their guards, for every kind of layer."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normwise import View
from normwise.reparam import CenteredWeightNorm, WeightNorm, WeightStandardization

METHODS = [WeightNorm, CenteredWeightNorm, WeightStandardization]

# A weight's shape, its view, and the groups of a grouped transposed convolution.
SHAPES = [
    ((4, 6), View.channel(), 1),
    ((4, 3, 5), View.channel(), 1),
    ((4, 2, 3, 3), View.channel(), 1),
    ((3, 2, 2, 3, 2), View.channel(), 1),
    ((3, 4, 2, 2), View.channel(1), 1),
    ((6, 4, 3), View.channel(1), 2),
    ((6, 2, 3), View.blocks(3), 1),
    ((4, 6, 2), View.blocks(2, 1), 1),
    ((4, 6), View.layer(), 1),
]


def by_hand(method, w, gain, view, groups):
    """The definition, slice by slice, as the papers write it."""
    out = torch.empty_like(w)
    pieces = w.chunk(groups)
    gains = [None] * groups if gain is None else gain.chunk(groups)
    for piece, piece_gain, into in zip(pieces, gains, out.chunk(groups), strict=True):
        slices, result = view.slices(piece), view.slices(into)
        numbers = torch.ones(len(slices)) if piece_gain is None else piece_gain.flatten()
        for i, s in enumerate(slices):
            if method is not WeightNorm:
                s = s - s.mean()
            length = s.square().mean().sqrt() if method is WeightStandardization else s.norm()
            result[i] = numbers[i] * s / length
    return out


def random_gain(parametrization, w):
    gain = parametrization.right_inverse(w)[0]
    return torch.rand(gain.shape, dtype=w.dtype) + 0.5


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "view", "groups"), SHAPES)
def test_each_slice_is_as_the_paper_defines_it(method, shape, view, groups, gain):
    w = torch.randn(shape, dtype=torch.float64)
    p = method(view, groups=groups, gain=gain)
    originals = (random_gain(p, w), w) if gain else (w,)
    expected = by_hand(method, w, originals[0] if gain else None, view, groups)
    torch.testing.assert_close(p(*originals), expected)


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "view", "groups"), SHAPES)
def test_gradients_and_their_gradients_pass_gradcheck(method, shape, view, groups, gain):
    w = torch.randn(shape, dtype=torch.float64)
    p = method(view, groups=groups, gain=gain)
    originals = (random_gain(p, w), w) if gain else (w,)
    originals = tuple(t.requires_grad_() for t in originals)
    assert torch.autograd.gradcheck(p, originals)
    assert torch.autograd.gradgradcheck(p, originals)


def test_jacobian_of_weight_norm_is_the_projection_over_the_norm():
    """(I − ŵŵᵀ)/‖w‖, where [ES] Eqs. 14–18 have an elementwise one."""
    w = torch.randn(1, 7, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(WeightNorm(gain=False), w).view(7, 7)
    unit = w[0] / w.norm()
    expected = (torch.eye(7, dtype=torch.float64) - torch.outer(unit, unit)) / w.norm()
    torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-14)


def test_jacobian_of_weight_standardization_projects_out_the_mean_too():
    """√n·(I − ŵŵᵀ − 11ᵀ/n)/‖w − w̄‖, with ŵ the direction of w − w̄."""
    n = 7
    w = torch.randn(1, n, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(WeightStandardization(), w).view(n, n)
    centered = w[0] - w.mean()
    unit = centered / centered.norm()
    projection = torch.eye(n, dtype=torch.float64) - torch.outer(unit, unit) - 1 / n
    expected = math.sqrt(n) * projection / centered.norm()
    torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "view", "groups"), SHAPES)
def test_the_gradient_of_a_slice_is_orthogonal_to_it(method, shape, view, groups):
    """⟨g, w⟩ = 0 for every upstream gradient, and the mean of g is 0 where w is centered."""
    w = torch.randn(shape, dtype=torch.float64).requires_grad_()
    effective = method(view, groups=groups, gain=False)(w)
    (g,) = torch.autograd.grad(effective, w, torch.randn_like(effective))
    for gp, wp in zip(g.chunk(groups), w.detach().chunk(groups), strict=True):
        gs, ws = view.slices(gp).flatten(1), view.slices(wp).flatten(1)
        assert float(((gs * ws).sum(1) / gs.norm(dim=1) / ws.norm(dim=1)).abs().max()) < 1e-13
        if method is not WeightNorm:
            assert float((gs.mean(1) / gs.norm(dim=1)).abs().max()) < 1e-13


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e8])
def test_the_size_of_a_slice_changes_nothing_but_the_size_of_its_gradient(method, size):
    """f(cw) = f(w) and ∇f(cw) = ∇f(w)/c, in float32 and down to an rms of 1e-4."""
    w = torch.randn(3, 4, 3, 3).requires_grad_()
    scaled = (size * w.detach()).requires_grad_()
    upstream = torch.randn(3, 4, 3, 3)
    p = method(gain=False)
    torch.testing.assert_close(p(scaled), p(w), rtol=1e-5, atol=1e-6)
    (g,) = torch.autograd.grad(p(w), w, upstream)
    (h,) = torch.autograd.grad(p(scaled), scaled, upstream)
    torch.testing.assert_close(h * size, g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_zero_and_constant_slices_have_finite_values_and_gradients(method, dtype, gain, constant):
    w = torch.randn(3, 4, 3, 3).to(dtype)
    w[1] = constant
    p = method(gain=gain)
    originals = [t.detach().requires_grad_() for t in (p.right_inverse(w) if gain else (w,))]
    effective = p(*originals)
    assert effective.dtype == dtype
    assert effective.isfinite().all()
    for g in torch.autograd.grad(effective, originals, torch.randn(3, 4, 3, 3).to(dtype)):
        assert g.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_types_are_computed_in_float32_and_rounded_once(method, dtype):
    w = (0.02 * torch.randn(8, 16, 3, 3)).to(dtype)
    exact = method(gain=False, eps=1e-3 if dtype == torch.float16 else None)(w.double())
    torch.testing.assert_close(method(gain=False)(w), exact.to(dtype), rtol=1e-2, atol=0)


def test_epsilon_outside_of_the_root_would_not_be_enough():
    """[ES] Eq. 24: with (W − W̄)/(std + eps) the backward pass still divides by the std."""
    w = torch.full((1, 4), 0.5, requires_grad=True)
    naive = (w - w.mean()) / (w.var(correction=0).sqrt() + 1e-5)
    (g,) = torch.autograd.grad(naive, w, torch.randn(1, 4))
    assert not g.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_the_memory_format_of_a_weight_is_kept(method):
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    channels_last = w.contiguous(memory_format=torch.channels_last)
    p = method(gain=False)
    assert p(channels_last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(p(channels_last), p(w))


def test_right_inverse_of_weight_norm_gives_the_weight_back():
    w = torch.randn(4, 3, 2)
    w[2] = 0
    p = WeightNorm()
    torch.testing.assert_close(p(*p.right_inverse(w)), w)


@pytest.mark.parametrize("method", [CenteredWeightNorm, WeightStandardization])
def test_right_inverse_with_a_gain_loses_only_the_mean(method):
    w = torch.randn(4, 3, 2)
    p = method(gain=True)
    centered = w - w.mean((1, 2), keepdim=True)
    torch.testing.assert_close(p(*p.right_inverse(w)), centered)
    torch.testing.assert_close(p(*p.right_inverse(centered)), centered)


def layers():
    return [
        (nn.Linear(5, 4), (2, 5), 0),
        (nn.Conv1d(2, 4, 3), (1, 2, 8), 0),
        (nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4), 0),
        (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 6, 6), 0),
        (nn.ConvTranspose2d(4, 6, 3), (1, 4, 6, 6), 1),
    ]


@pytest.mark.parametrize("index", range(5))
def test_scaling_one_slice_of_a_weight_scales_one_output_channel(index):
    """So the dimension is that of the output channels, for transposed convolutions too."""
    layer, shape, dim = layers()[index]
    layer.bias = None
    parametrize.register_parametrization(layer, "weight", WeightNorm(View.channel(dim)))
    x = torch.randn(shape)
    channel = 1 if len(shape) > 2 else -1
    with torch.no_grad():
        before = layer(x).movedim(channel, 0)
        layer.parametrizations.weight.original0.view(-1)[2] *= 3
        after = layer(x).movedim(channel, 0)
    expected = before.clone()
    expected[2] *= 3
    torch.testing.assert_close(after, expected)


def test_output_channels_of_a_grouped_transposed_convolution_are_group_times_channel():
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)
    parametrize.register_parametrization(layer, "weight", WeightNorm(View.channel(1), groups=2))
    x = torch.randn(1, 6, 5, 5)
    gain = layer.parametrizations.weight.original0
    assert gain.shape == (2, 2, 1, 1)
    with torch.no_grad():
        before = layer(x)
        gain[1, 0] *= 3  # group 1, its channel 0: output channel 2
        after = layer(x)
    before[:, 2] *= 3
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: WeightNorm(eps=-1.0), "Invalid eps: -1.0"),
        (lambda: WeightNorm(eps=math.nan), "Invalid eps: nan"),
        (lambda: WeightNorm(groups=0), "Invalid groups: 0"),
        (
            lambda: parametrize.register_parametrization(
                nn.Conv2d(1, 4, 1), "weight", WeightStandardization()
            ),
            "1 entries a slice are too few",
        ),
        (
            lambda: parametrize.register_parametrization(
                nn.Linear(3, 3), "weight", WeightNorm(View.channel(2))
            ),
            "does not fit",
        ),
    ],
)
def test_bad_arguments_say_why(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_recurrent_weights_take_part_in_the_forward_pass():
    lstm = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    before = lstm(x)[0]
    parametrize.register_parametrization(lstm, "weight_hh_l0", WeightNorm())
    torch.testing.assert_close(lstm(x)[0], before)
    lstm(x)[0].sum().backward()
    assert lstm.parametrizations.weight_hh_l0.original0.grad.abs().sum() > 0
