"""Measures of a weight's singular values, and of its slices' likeness."""

import math

import pytest
import torch

from normwise.geometry import View
from normwise.theory import (
    condition_number,
    effective_rank,
    log_spread,
    mean_absolute_cosine,
    mean_cosine,
    spectral_flatness_penalty,
    stable_rank,
)

MEASURES = [condition_number, log_spread, spectral_flatness_penalty, stable_rank, effective_rank]


def matrix(rows, columns):
    return torch.randn(rows, columns, dtype=torch.float64)


def with_singular_values(rows, columns, values):
    k = len(values)
    u = torch.linalg.qr(matrix(rows, k))[0]
    v = torch.linalg.qr(matrix(columns, k))[0]
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("scale", [1e-12, 3.0, 1e12])
def test_measures_ignore_the_scale_of_the_weight(measure, scale):
    w = matrix(6, 4)
    torch.testing.assert_close(measure(scale * w), measure(w))


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_spread_and_penalty_are_zero_for_orthogonal_matrices_and_positive_for_others(shape):
    q = 3 * with_singular_values(*shape, [1.0] * min(shape))
    for measure in (log_spread, spectral_flatness_penalty):
        assert abs(float(measure(q))) < 1e-14
        assert float(measure(matrix(*shape))) > 0.01
    assert float(condition_number(q)) == pytest.approx(1)
    assert float(stable_rank(q)) == pytest.approx(min(shape))
    assert float(effective_rank(q)) == pytest.approx(min(shape))


def test_they_are_what_their_formulas_say_of_known_singular_values():
    values = [4.0, 2.0, 1.0]
    w = with_singular_values(3, 6, values)
    logs = [math.log(s) for s in values]
    mean = sum(logs) / 3
    assert float(condition_number(w)) == pytest.approx(4)
    assert float(log_spread(w)) == pytest.approx(sum((x - mean) ** 2 for x in logs) / 3)
    assert float(spectral_flatness_penalty(w)) == pytest.approx(math.log(21 / 3) - 2 * mean)
    assert float(stable_rank(w)) == pytest.approx(21 / 16)
    shares = [s / 7 for s in values]
    entropy = -sum(p * math.log(p) for p in shares)
    assert float(effective_rank(w)) == pytest.approx(math.exp(entropy))


def test_the_spread_bounds_the_condition_number():
    """log²κ/(2k) ≤ Var(log σ) ≤ log²κ/4."""
    for _ in range(50):
        w = matrix(6, 6)
        square, spread = float(condition_number(w).log() ** 2), float(log_spread(w))
        assert square / 12 <= spread <= square / 4


def test_the_penalty_sees_a_condition_number_that_the_published_one_does_not():
    """(log(1e-5 + det(WᵀW/m)))² is the same for κ = 1 and κ = 10⁴; ours is 0 and large."""

    def published(w):
        return math.log(1e-5 + float(torch.linalg.det(w.T @ w / w.shape[1]))) ** 2

    # W as there, (in, out): WᵀW = m·I of κ = 1, and columns ×100 and ×0.01.
    q = math.sqrt(4) * torch.linalg.qr(matrix(9, 4))[0]
    scaled = q * torch.tensor([100.0, 0.01, 1.0, 1.0], dtype=torch.float64)
    assert published(q) == pytest.approx(1e-10, rel=1e-3)
    assert published(scaled) == pytest.approx(1e-10, rel=1e-3)
    assert published(2 * q) > 1
    assert float(spectral_flatness_penalty(q)) < 1e-14
    assert float(spectral_flatness_penalty(scaled)) > 5


def test_the_penalty_has_a_gradient_where_a_determinant_underflows():
    w = torch.randn(512, 100, requires_grad=True)
    assert float(torch.linalg.det(w.T @ w / 512 * 0.01).detach()) == 0
    spectral_flatness_penalty(w * 0.1).backward()
    assert w.grad.isfinite().all()
    assert float(w.grad.norm()) > 0
    small = matrix(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(spectral_flatness_penalty, small)


def test_gradient_steps_on_the_penalty_lower_the_condition_number():
    w = with_singular_values(4, 4, [8.0, 4.0, 2.0, 1.0]).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=1.0)
    for _ in range(400):
        optimizer.zero_grad()
        spectral_flatness_penalty(w).backward()
        optimizer.step()
    assert float(condition_number(w.detach())) < 1.5


@pytest.mark.parametrize("view", [View.channel(), View.channel(1), View.blocks(2)])
def test_the_mean_cosine_in_one_pass_is_that_of_all_pairs(view):
    w = matrix(4, 6)
    slices = [s.flatten() for s in view.slices(w)]
    pairs = [
        float(torch.nn.functional.cosine_similarity(a, b, dim=0))
        for i, a in enumerate(slices)
        for j, b in enumerate(slices)
        if i != j
    ]
    assert float(mean_cosine(w, view)) == pytest.approx(sum(pairs) / len(pairs))
    absolute = sum(map(abs, pairs)) / len(pairs)
    assert float(mean_absolute_cosine(w, view)) == pytest.approx(absolute)


def test_cosines_leave_zero_slices_out_and_ignore_scales_of_slices():
    w = matrix(4, 6)
    scaled = torch.cat([w * torch.tensor([[1.0], [1e-8], [1e8], [3.0]]), torch.zeros(1, 6)])
    for measure in (mean_cosine, mean_absolute_cosine):
        torch.testing.assert_close(measure(scaled, View.channel()), measure(w, View.channel()))


def test_a_vector_has_no_spectrum():
    with pytest.raises(ValueError, match="must have 2 dimensions"):
        stable_rank(torch.randn(3))
