"""Rescalings that mean to change the function: each against its own formula."""

import math

import pytest
import torch
from torch import nn

from normwise.balancing import (
    MaxNorm,
    adjust_logits,
    align_rows,
    class_balanced_weights,
    rescale_rows,
    simplex_etf,
    tau_normalize,
)


@pytest.fixture
def weight():
    scales = torch.logspace(-1, 1, 6, dtype=torch.float64)
    return torch.randn(6, 9, dtype=torch.float64) * scales[:, None]


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.9])
def test_tau_normalization_turns_norms_into_their_power(weight, tau):
    before = weight.norm(dim=1)
    direction = weight / before[:, None]
    tau_normalize(weight, tau)
    torch.testing.assert_close(weight.norm(dim=1), before ** (1 - tau))
    torch.testing.assert_close(weight / weight.norm(dim=1, keepdim=True), direction)


def test_tau_above_one_reverses_the_order_of_norms(weight):
    order = weight.norm(dim=1).argsort()
    assert torch.equal(tau_normalize(weight, 1.5).norm(dim=1).argsort(), order.flip(0))


def test_zero_rows_stay_zero():
    weight = torch.zeros(2, 3)
    assert torch.equal(tau_normalize(weight), torch.zeros(2, 3))


def test_maxnorm_caps_norms_raises_none_and_keeps_directions(weight):
    before = weight.clone()
    cap = MaxNorm.from_norms([weight])
    (radius,) = cap.radii.values()
    lengths = before.norm(dim=1)
    assert radius == pytest.approx(float(0.9 * lengths.min() + 0.1 * lengths.max()))
    cap.project_()
    torch.testing.assert_close(weight.norm(dim=1), lengths.clamp(max=radius))
    torch.testing.assert_close(
        torch.cosine_similarity(weight, before), torch.ones(6, dtype=torch.float64)
    )
    once = weight.clone()
    cap.project_()
    torch.testing.assert_close(weight, once, rtol=1e-15, atol=0)


def test_maxnorm_is_the_nearest_point_of_the_ball(weight):
    """Projected gradient descent needs the projection: no point of the ball is nearer."""
    before = weight.clone()
    MaxNorm({weight: 1.0}).project_()
    points = torch.randn(500, 6, 9, dtype=torch.float64)
    points /= points.norm(dim=2, keepdim=True).clamp_min(1)
    assert ((points - before).norm(dim=2) >= (weight - before).norm(dim=1) - 1e-12).all()


def test_attached_maxnorm_projects_at_its_steps_until_it_is_removed():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    handle = MaxNorm({layer.weight: 0.5}).attach(optimizer, every=2)
    for step in range(1, 5):
        layer.weight.grad = -layer.weight.detach() * 9
        optimizer.step()
        longest = layer.weight.norm(dim=1).max().item()
        assert (longest <= 0.5 + 1e-6) == (step % 2 == 0)
    handle.remove()
    for _ in range(2):
        optimizer.step()
    assert layer.weight.norm(dim=1).max() > 0.5


def test_aligned_rows_have_the_mean_norm_of_the_old_ones(weight):
    before, bias = weight.clone(), torch.randn(6, dtype=torch.float64)
    z_bias = bias.clone()
    gamma = before[:4].norm(dim=1).mean() / before[4:].norm(dim=1).mean()
    align_rows(weight, [4, 5], bias)
    assert torch.equal(weight[:4], before[:4])
    torch.testing.assert_close(weight[4:], gamma * before[4:])
    torch.testing.assert_close(bias[4:], gamma * z_bias[4:])
    once = align_rows(weight.clone(), slice(4, None))
    torch.testing.assert_close(once, weight)  # idempotent


def test_aligning_keeps_the_order_of_logits_within_old_and_within_new_classes(weight):
    x = torch.randn(20, 9, dtype=torch.float64)
    before = x @ weight.T
    after = x @ align_rows(weight, [4, 5]).T
    for classes in (slice(4), slice(4, None)):
        assert torch.equal(after[:, classes].argsort(1), before[:, classes].argsort(1))
    equal = torch.nn.functional.normalize(weight, dim=1)
    torch.testing.assert_close(align_rows(equal.clone(), [4, 5]), equal, rtol=1e-15, atol=0)


def test_adjusted_weights_give_adjusted_logits(weight):
    bias, x = torch.randn(6, dtype=torch.float64), torch.randn(7, 9, dtype=torch.float64)
    priors = torch.softmax(torch.randn(6, dtype=torch.float64), 0)
    expected = (x @ weight.T + bias) * priors**-0.65
    adjust_logits(weight, priors, 0.65, bias)
    torch.testing.assert_close(x @ weight.T + bias, expected)


def test_class_balanced_weights_are_inverse_effective_numbers():
    counts, beta = [500, 50, 5], 0.9999
    effective = [sum(beta**i for i in range(n)) for n in counts]
    expected = torch.tensor([1 / e for e in effective], dtype=torch.float64)
    found = class_balanced_weights(counts, beta)
    torch.testing.assert_close(found, expected * 3 / expected.sum())
    assert torch.equal(class_balanced_weights(counts, 0), torch.ones(3, dtype=torch.float64))


def test_a_simplex_has_unit_rows_and_equal_cosines():
    torch.set_default_dtype(torch.float64)
    try:
        w = simplex_etf(5, 8, generator=torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    gram = torch.full((5, 5), -1 / 4, dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(w @ w.T, gram)
    torch.testing.assert_close(w.sum(0), torch.zeros(8, dtype=torch.float64))


def test_rows_of_any_shape_are_rescaled_in_place():
    kernel, bias = torch.randn(3, 2, 4, 4), torch.ones(3)
    before = kernel.clone()
    assert rescale_rows(kernel, torch.tensor([1.0, 2.0, 0.5]), bias) is kernel
    assert torch.equal(kernel[1], 2 * before[1])
    assert bias.tolist() == [1, 2, 0.5]


def test_bad_arguments_are_refused(weight):
    for call in (
        lambda: rescale_rows(weight, torch.ones(5)),
        lambda: align_rows(weight, range(6)),
        lambda: align_rows(weight, []),
        lambda: adjust_logits(weight, torch.zeros(6), 1.0),
        lambda: class_balanced_weights([3, 0]),
        lambda: class_balanced_weights([3], 1.0),
        lambda: simplex_etf(5, 4),
        lambda: MaxNorm({weight: -1.0}),
        lambda: MaxNorm({weight: math.nan}),
        lambda: MaxNorm({}).attach(torch.optim.SGD([nn.Parameter(weight)]), every=0),
    ):
        with pytest.raises(ValueError, match="Invalid"):
            call()
