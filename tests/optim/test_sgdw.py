"""SGDW against Algorithm 1 of arXiv 1711.05101 and against its official variant."""

import pytest
import torch

import normwise

# The schedule multiplier of each step: constant, then dropped, then restarted.
MULTIPLIERS = [1.0] * 5 + [0.1] * 5 + [1.0, 0.5, 0.25] * 3


def gradient(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(3, 4, dtype=torch.float64, generator=generator)


def run(variant, alpha, decay, foreach=False, nesterov=False, momentum=0.9):
    w = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = normwise.SGDW(
        [w],
        lr=alpha,
        momentum=momentum,
        weight_decay=decay / alpha,
        variant=variant,
        foreach=foreach,
        nesterov=nesterov,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: [*MULTIPLIERS, 1.0][t])
    path = []
    for step in range(len(MULTIPLIERS)):
        w.grad = gradient(step)
        optimizer.step()
        schedule.step()
        path.append(w.detach().clone())
    return torch.stack(path)


@pytest.mark.parametrize("foreach", [False, True])
def test_paper_variant_is_algorithm_1_under_a_schedule(foreach):
    """m ← β₁m + s α g, θ ← θ − m − s λ θ (lines 8 and 9)."""
    alpha, decay, beta = 0.1, 0.05, 0.9
    theta = torch.ones(3, 4, dtype=torch.float64)
    m = torch.zeros_like(theta)
    path = []
    for step, s in enumerate(MULTIPLIERS):
        m = beta * m + s * alpha * gradient(step)
        theta = theta - m - s * decay * theta
        path.append(theta)
    torch.testing.assert_close(
        run("paper", alpha, decay, foreach), torch.stack(path), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_official_variant_keeps_the_learning_rate_outside_the_buffer(nesterov, foreach):
    alpha, decay, beta = 0.1, 0.05, 0.9
    theta = torch.ones(3, 4, dtype=torch.float64)
    m = torch.zeros_like(theta)
    path = []
    for step, s in enumerate(MULTIPLIERS):
        m = beta * m + gradient(step)
        direction = gradient(step) + beta * m if nesterov else m
        theta = theta - s * alpha * direction - s * decay * theta
        path.append(theta)
    ours = run("official", alpha, decay, foreach, nesterov)
    torch.testing.assert_close(ours, torch.stack(path), rtol=0, atol=1e-12)


def test_the_variants_agree_until_the_schedule_moves():
    paper, official = (run(variant, 0.1, 0.05) for variant in ("paper", "official"))
    torch.testing.assert_close(paper[:5], official[:5], rtol=0, atol=1e-12)
    assert (paper[5] - official[5]).abs().min() > 1e-6


def test_without_momentum_the_variants_are_one():
    paper, official = (run(variant, 0.1, 0.05, momentum=0.0) for variant in ("paper", "official"))
    torch.testing.assert_close(paper, official, rtol=0, atol=1e-12)


def test_a_variant_must_exist():
    with pytest.raises(ValueError, match="Invalid variant: 'authors'"):
        normwise.SGDW([torch.ones(1, requires_grad=True)], variant="authors")
