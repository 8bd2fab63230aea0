"""AOL and SLL: spectral norms of 1 at most, and how they shrink a signal at the start."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import normwise as nw
from normwise import View
from normwise.reparam import AOL, SLL, ContractiveResidual, computed_once, reparametrize
from normwise.theory import aol_variance, signal_variance


def matrix(rows, columns):
    return torch.randn(rows, columns, dtype=torch.float64)


def by_hand(w):
    """W·diag(d), d_j = (Σ_i |WᵀW|_ij)^−½."""
    sums = torch.tensor(
        [sum(abs(float(w[:, i] @ w[:, j])) for i in range(w.shape[1])) for j in range(w.shape[1])],
        dtype=w.dtype,
    )
    return w / sums.sqrt()


def operator(layer, shape):
    """A linear layer without bias as a matrix, column by column."""
    entries = torch.Size(shape).numel()
    inputs = torch.eye(entries, dtype=torch.float64).view(entries, *shape)
    return layer(inputs).flatten(1).T


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 3), (3, 1)])
def test_aol_of_a_matrix_is_as_defined(shape):
    w = matrix(*shape)
    torch.testing.assert_close(AOL()(w), by_hand(w))


@pytest.mark.parametrize("shape", [(64, 64), (16, 64), (64, 16), (1, 7), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_spectral_norm_is_1_at_most(shape, dtype):
    w = matrix(*shape) * (3 * torch.randn(shape[1], dtype=torch.float64)).exp()
    largest = float(torch.linalg.matrix_norm(AOL()(w.to(dtype)), 2))
    assert largest <= 1 + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda **o: nn.Conv1d(3, 4, 3, padding=1, **o), (3, 7)),
        (lambda **o: nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular", **o), (3, 7)),
        (lambda **o: nn.Conv1d(3, 4, 5, padding=2, padding_mode="circular", **o), (3, 4)),
        (lambda **o: nn.Conv2d(3, 2, 3, padding=1, **o), (3, 5, 4)),
        (lambda **o: nn.Conv2d(2, 6, 3, padding=1, stride=2, **o), (2, 6, 6)),
        (lambda **o: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, **o), (4, 5, 5)),
        (lambda **o: nn.Conv2d(4, 4, 3, padding=1, groups=4, **o), (4, 5, 5)),
        (lambda **o: nn.Conv3d(2, 2, 2, padding=1, **o), (2, 3, 3, 3)),
    ],
)
def test_a_convolution_has_norm_1_at_most_as_a_linear_map(layer, shape):
    layer = layer(bias=False).double()
    model = nn.Sequential(layer)
    reparametrize(model, AOL, only=["*"])
    with torch.no_grad():
        largest = float(torch.linalg.matrix_norm(operator(model, shape), 2))
    assert 0.3 < largest <= 1 + 1e-12


def test_a_kernel_of_one_tap_is_a_matrix():
    w = matrix(4, 3)
    torch.testing.assert_close(AOL()(w[:, :, None, None])[:, :, 0, 0], AOL()(w))


def test_orthogonal_columns_of_any_lengths_become_an_isometry():
    q = torch.linalg.qr(matrix(9, 5))[0]
    scaled = q * (2 * torch.randn(5, dtype=torch.float64)).exp()
    torch.testing.assert_close(
        torch.linalg.svdvals(AOL()(scaled)), torch.ones(5, dtype=torch.float64)
    )


def test_one_scale_of_the_tensor_changes_nothing_and_scales_of_columns_do():
    w = matrix(8, 6)
    torch.testing.assert_close(AOL()(1e6 * w), AOL()(w), rtol=1e-14, atol=0)
    columns = torch.linspace(-1, 1, 6, dtype=torch.float64).exp()
    change = (AOL()(w * columns) - AOL()(w)).norm() / AOL()(w).norm()
    assert float(change) > 0.05


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.Conv1d(4, 6, 3, groups=2)])
def test_the_analysis_calls_an_aol_weight_invariant_by_layer_not_by_column(layer):
    x = torch.randn(3, 6) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 6)
    model = nn.Sequential(layer)
    report_of = reparametrize(model, AOL, only=["*"])
    row = nw.analyze(model, x)["0.parametrizations.weight.original"]
    # Of a grouped convolution each group is a weight of its own.
    assert row.view == (View.layer() if isinstance(layer, nn.Linear) else View.blocks(2))
    assert "normalized by its parametrization AOL" in row.why
    assert report_of.weights[0].view.startswith("layer")


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 3), (3, 2, 3, 3)])
def test_gradients_pass_gradcheck_and_are_orthogonal_to_the_weight(shape):
    w = torch.randn(shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(AOL(), w)
    effective = AOL()(w)
    (g,) = torch.autograd.grad(effective, w, torch.randn_like(effective))
    cosine = (g * w.detach()).sum() / g.norm() / w.detach().norm()
    assert abs(float(cosine)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_column_and_a_zero_weight_have_finite_values_and_gradients(dtype):
    w = torch.randn(4, 3).to(dtype)
    w[:, 1] = 0
    for start in (w, torch.zeros_like(w)):
        original = start.clone().requires_grad_()
        effective = AOL()(original)
        assert effective.dtype == dtype
        assert effective.isfinite().all()
        (g,) = torch.autograd.grad(effective, original, torch.randn(4, 3).to(dtype))
        assert g.isfinite().all()


def test_it_can_be_put_on_copied_loaded_and_folded():
    def network():
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )

    model, x = network(), torch.randn(2, 2, 4, 4)
    assert reparametrize(model, AOL, only=["*"]).converted == ("0.weight", "3.weight")
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0)
    other = network()
    reparametrize(other, AOL, only=["*"])
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    with computed_once(model):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    nw.fold(model)
    assert not any(map(parametrize.is_parametrized, model.modules()))
    torch.testing.assert_close(model(x), expected)


def test_layers_that_it_cannot_bound_are_left_alone_with_the_reason():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            "circle": nn.Conv1d(2, 2, 2, padding=1, padding_mode="circular"),
            "up": nn.ConvTranspose2d(2, 2, 2),
            "linear": nn.Linear(2, 2),
        }
    )
    assert reparametrize(model, AOL, only=["*"]).left_alone == {
        "conv.weight": "AOL does not bound reflect padding",
        "circle.weight": "AOL does not bound circular padding that makes an image larger",
        "up.weight": "AOL is of linear layers and convolutions",
    }
    with pytest.raises(ValueError, match="Invalid view of AOL: channel"):
        AOL(View.channel())


@pytest.mark.parametrize("std", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize(("rows", "columns"), [(10, 10), (64, 64), (256, 64)])
def test_the_variance_at_the_start_is_the_closed_form_whatever_the_parameters(rows, columns, std):
    """Within 3%: the formula takes the mean of a sum for the sum."""
    draws = 4000 if rows == 10 else 10
    weights = std * torch.randn(draws, rows, columns, dtype=torch.float64)
    measured = torch.vmap(AOL())(weights).var()
    expected = aol_variance(rows, columns)
    assert expected <= 1 / rows
    assert float(measured) == pytest.approx(expected, rel=0.03)


def test_a_deep_network_loses_its_signal_as_the_closed_form_says():
    widths = (128,) * 6
    x = matrix(400, 128)
    expected = signal_variance(widths)
    for layer, variance in enumerate(expected):
        if layer:
            x = x.relu()
        x = x @ AOL()(matrix(128, 128)).T
        assert float(x.square().mean()) == pytest.approx(variance, rel=0.1)
    assert expected[-1] < 1e-5
    assert all(b < a / 10 for a, b in itertools.pairwise(expected))


def test_the_variance_of_the_biases_is_what_remains():
    deep = signal_variance((64,) * 40, bias_variance=0.3)
    shrink = 32 * aol_variance(64, 64)
    assert deep[-1] == pytest.approx(0.3 / (1 - shrink), rel=1e-12)
    with pytest.raises(ValueError, match="give the input's and a layer's"):
        signal_variance((3,))
    with pytest.raises(ValueError, match="Invalid shape: 0×3"):
        aol_variance(0, 3)


def sll(features=5, inner=12):
    layer = SLL(features, inner).double()
    with torch.no_grad():
        layer.weight.mul_(3)
    return layer


def test_sll_is_as_defined():
    layer = sll()
    x = matrix(4, 5)
    w, b, q = layer.weight.detach(), layer.bias.detach(), layer.log_q.detach().exp()
    gram = (w @ w.T).abs()
    t = [1 / sum(gram[i, j] * q[j] / q[i] for j in range(12)) for i in range(12)]
    t = torch.stack(t)
    for sample, out in zip(x, layer(x), strict=True):
        hand = sample - 2 * w.T @ (t * torch.relu(w @ sample + b))
        torch.testing.assert_close(out, hand)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_no_pattern_of_relus_expands_anything():
    """The Jacobian I − 2·Wᵀ·diag(t·p)·W of every pattern p in {0, 1}^12 has norm 1 at most."""
    layer = sll()
    w, t = layer.weight.detach(), layer.scales().detach()
    patterns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=12)), dtype=torch.float64)
    jacobians = torch.eye(5, dtype=torch.float64) - 2 * torch.einsum(
        "pi,ia,ib->pab", patterns * t, w, w
    )
    norms = torch.linalg.matrix_norm(jacobians, 2)
    assert float(norms.max()) == pytest.approx(1, abs=1e-14)


def test_weight_and_bias_are_scale_invariant_together():
    model = nn.Sequential(sll(), nn.Linear(5, 2).double())
    report = nw.analyze(model, matrix(6, 5))
    assert report["0.weight"].verdict == "joint"
    assert {"0.weight": 1.0, "0.bias": 1.0} in [
        {t.parameter: t.exponent for t in s.terms} for s in report.symmetries
    ]
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].weight.mul_(7)
        scaled[0].bias.mul_(7)
        scaled[0].log_q.add_(3)
    x = matrix(6, 5)
    torch.testing.assert_close(scaled(x), model(x), rtol=1e-12, atol=0)


def test_a_zero_row_and_large_log_q_are_finite():
    layer = SLL(4)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.log_q[0] = 80
    x = torch.randn(3, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_folding_gives_a_layer_without_scales_and_the_same_outputs():
    layer = sll()
    model = nn.Sequential(layer, nn.Linear(5, 5).double(), layer)
    x = matrix(6, 5)
    before = model(x)
    nw.fold(model)
    assert isinstance(model[0], ContractiveResidual)
    assert model[0] is model[2]
    torch.testing.assert_close(model(x), before)
    assert float(torch.linalg.matrix_norm(model[0].weight.detach(), 2)) <= 1


def convolutional_sll(size=3):
    layer = SLL(2, 3, kernel_size=size).double()
    with torch.no_grad():
        layer.weight.mul_(3)
    return layer


def as_matrix(function, shape):
    """The matrix of a linear function of images of a shape."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return torch.stack([function(one.unsqueeze(0)).flatten() for one in basis], 1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_convolutional_sll_is_the_dense_formula_with_its_matrix(size):
    """Wᵀ is the adjoint of W, padding included, and t belongs to channels."""
    layer, x = convolutional_sll(size), torch.randn(2, 2, 4, 5, dtype=torch.float64)
    pad = size // 2
    w, q = layer.weight.detach(), layer.log_q.detach().exp()
    matrix = as_matrix(lambda e: F.conv2d(e, w, padding=pad), (2, 4, 5))
    pixels = len(matrix) // 3
    t = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        total = 0.0
        for j in range(3):
            for a in range(-size + 1, size):
                for b in range(-size + 1, size):
                    shifted = torch.zeros(2, 3 * size, 3 * size, dtype=torch.float64)
                    shifted[:, size + a : 2 * size + a, size + b : 2 * size + b] = w[j]
                    overlap = (shifted[:, size : 2 * size, size : 2 * size] * w[i]).sum()
                    total += float(overlap.abs() * q[j] / q[i])
        t[i] = 1 / total
    torch.testing.assert_close(layer.scales(), t)
    spread, bias = t.repeat_interleave(pixels), layer.bias.detach().repeat_interleave(pixels)
    for sample, out in zip(x, layer(x), strict=True):
        flat = sample.flatten()
        hand = flat - 2 * matrix.T @ (spread * (matrix @ flat + bias).relu())
        torch.testing.assert_close(out.flatten(), hand)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_convolutional_sll_expands_nothing(size):
    """‖I − 2·Wᵀ·diag(t·p)·W‖ ≤ 1 for every pattern p if and only if diag(1/t) ≥ WWᵀ."""
    layer = convolutional_sll(size)
    for shape in ((2, 1, 1), (2, 3, 4), (2, 6, 2)):
        w = as_matrix(lambda e: F.conv2d(e, layer.weight.detach(), padding=size // 2), shape)
        t = layer.scales().detach().repeat_interleave(len(w) // 3)
        root = t.sqrt().unsqueeze(1) * w
        assert float(torch.linalg.matrix_norm(root, 2)) <= 1 + 1e-12


def test_convolutional_sll_folds_and_is_scale_invariant_with_its_bias():
    layer = convolutional_sll()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 2).double())
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    report = nw.analyze(model, x)
    assert {"0.weight": 1.0, "0.bias": 1.0} in [
        {t.parameter: t.exponent for t in s.terms} for s in report.symmetries
    ]
    before = model(x)
    nw.fold(model)
    assert isinstance(model[0], ContractiveResidual)
    torch.testing.assert_close(model(x), before)


def test_sizes_of_sll_are_checked():
    with pytest.raises(ValueError, match="Invalid kernel_size: 0"):
        SLL(2, kernel_size=0)
    with pytest.raises(ValueError, match="Invalid sizes: 0"):
        SLL(0)
