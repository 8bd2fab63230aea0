"""Hessian traces and Jacobian norms that ignore the scale of invariant weights."""

import pytest
import torch
from torch import nn

from normwise.geometry import View, norms
from normwise.theory import scaled_hessian_trace, scaled_jacobian_norm


def signs_of(n):
    """A generator, so that an estimate repeats."""
    return torch.Generator().manual_seed(n)


@pytest.mark.parametrize("view", [View.layer(), View.channel()])
def test_the_trace_of_a_known_quadratic_is_found_without_bias(view):
    """½·wᵀHw: the estimate's mean is the trace of each slice's block, exact for a diagonal H."""
    w = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    a = torch.randn(6, 6, dtype=torch.float64)
    for hessian, draws, tolerance in (
        (torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64)), 1, 1e-12),
        (a @ a.T, 1000, 0.1),
    ):
        found = scaled_hessian_trace(
            lambda h=hessian: w.flatten() @ h @ w.flatten() / 2,
            {w: view},
            draws=draws,
            generator=signs_of(0),
        )[w]
        traces = hessian.diag() if view.kind == "layer" else hessian.diag().view(3, 2)
        expected = traces.reshape(len(found), -1).sum(1) * norms(w.detach(), view) ** 2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


def test_the_jacobian_of_a_linear_model_has_a_closed_form():
    """y = Wx: ∂y_i/∂W_i = x, so ‖J‖² of a row is the mean of ‖x‖², of the whole rows times that."""
    layer = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(50, 4, dtype=torch.float64)
    size = x.square().sum(1).mean().sqrt()
    for view, factor in ((View.channel(), 1), (View.layer(), 3**0.5)):
        found = scaled_jacobian_norm(
            lambda: layer(x), {layer.weight: view}, draws=600, generator=signs_of(1)
        )[layer.weight]
        expected = factor * size * norms(layer.weight.detach(), view)
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0)


def test_the_scaled_jacobian_ignores_the_scale_of_every_row_and_the_plain_one_does_not():
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model[1].eps = 1e-30
    factors = torch.tensor([[0.1], [1.0], [7.0], [300.0]], dtype=torch.float64)
    x, w = torch.randn(9, 5, dtype=torch.float64), model[0].weight
    found = []
    for factor in (torch.ones(4, 1, dtype=torch.float64), factors):
        with torch.no_grad():
            w.mul_(factor)
        scaled = scaled_jacobian_norm(
            lambda: model(x), {w: View.channel()}, draws=3, generator=signs_of(3)
        )[w]
        found.append((scaled, scaled / norms(w.detach(), View.channel())))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1] / found[1][1], factors.squeeze())


def test_the_scaled_trace_of_each_slice_ignores_the_scale_of_every_row():
    """Exact blocks, by autograd's Hessian, do; the estimate agrees with them."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Tanh()).double()
    model[1].eps = 1e-30
    x, y = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    w = model[0].weight
    results = []
    for factor in (1.0, 5.0):
        with torch.no_grad():
            w[1].mul_(factor)

        def loss():
            return (model(x) - y).square().sum()

        hessian = torch.autograd.functional.hessian(
            lambda v: (model[2](model[1](x @ v.T)) - y).square().sum(), w.detach()
        )
        exact = torch.stack([hessian[i, :, i, :].trace() for i in range(2)])
        exact = exact * norms(w.detach(), View.channel()) ** 2
        estimate = scaled_hessian_trace(
            loss, {w: View.channel()}, draws=600, generator=signs_of(4)
        )[w]
        torch.testing.assert_close(estimate, exact, rtol=0.1, atol=0.05 * float(exact.abs().max()))
        results.append(exact)
    torch.testing.assert_close(*results)


def test_a_weight_that_the_loss_does_not_use_or_is_linear_in_has_no_curvature():
    used, unused = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(2, 2))
    views = {used: View.layer(), unused: View.layer()}
    assert all(float(t) == 0 for t in scaled_hessian_trace(used.sum, views).values())
    assert float(scaled_jacobian_norm(lambda: used, views)[unused]) == 0


def test_bad_input_is_told():
    w = nn.Parameter(torch.randn(2, 2))
    for measure in (scaled_hessian_trace, scaled_jacobian_norm):
        with pytest.raises(ValueError, match="Invalid draws: 0"):
            measure(w.sum, {w: View.layer()}, draws=0)
    with pytest.raises(ValueError, match="must be one number"):
        scaled_hessian_trace(lambda: w, {w: View.layer()})
    with pytest.raises(ValueError, match="outputs of no dimension"):
        scaled_jacobian_norm(w.sum, {w: View.layer()})
