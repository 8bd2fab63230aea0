"""The attack: where it may go, that it gets there, and where its best is known in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.lab.data.images import Labelled
from normwise.lab.errors import UsageError
from normwise.lab.tasks.adversarial import (
    BALLS,
    Adversarial,
    AdversarialOptions,
    attack,
    trades,
)

NORM = {"linf": torch.inf, "l2": 2.0}


def lengths(delta: Tensor, ball: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), NORM[ball], dim=1)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).eval()


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("radius", [0.01, 0.3, 2.0])
def test_attacked_images_stay_in_the_ball_and_in_the_range_of_pixels(
    ball: str, radius: float
) -> None:
    x, y = torch.rand(16, 3, 8, 8).round(decimals=1), torch.randint(5, (16,))
    start = 3 * torch.randn_like(x)  # outside the ball
    model, seen = network(), []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    worst = attack(model, x, y, ball=ball, radius=radius, steps=7, start=start)
    assert len(seen) == 7
    # Also on its way it shows the network only images; a difference and a sum may round.
    assert all(float(at.min()) > -1e-6 and float(at.max()) < 1 + 1e-6 for at in seen)
    assert float(worst.min()) >= 0
    assert float(worst.max()) <= 1
    assert float(lengths(worst - x, ball).max()) <= radius * (1 + 1e-5)
    assert not worst.requires_grad


@pytest.mark.parametrize("ball", BALLS)
def test_a_start_in_the_ball_is_kept_and_one_outside_is_brought_to_its_edge(ball: str) -> None:
    x, y = 0.4 + 0.2 * torch.rand(4, 3, 8, 8), torch.randint(5, (4,))
    start = torch.randn_like(x)
    start /= lengths(start, ball)[:, None, None, None]

    def begun(size: float) -> Tensor:
        at = attack(network(), x, y, ball=ball, radius=0.3, steps=0, start=size * start)
        return lengths(at - x, ball)

    for size in (0.1, 0.7, 1.0):
        torch.testing.assert_close(begun(size), torch.full((4,), 0.3 * size))
    torch.testing.assert_close(begun(5.0), torch.full((4,), 0.3))


@pytest.mark.parametrize("ball", BALLS)
def test_the_attack_raises_the_loss_of_every_image_above_that_of_its_start(ball: str) -> None:
    model = network()
    x, y = 0.2 + 0.6 * torch.rand(32, 3, 8, 8), torch.randint(5, (32,))
    start = torch.rand_like(x) * 2 - 1
    settings = {"ball": ball, "radius": 0.05, "start": start}
    first = attack(model, x, y, steps=0, **settings)
    worst = attack(model, x, y, steps=10, **settings)
    with torch.no_grad():
        clean, begun, ended = (
            F.cross_entropy(model(at), y, reduction="none") for at in (x, first, worst)
        )
    assert (ended > begun).all()
    assert (ended > clean).all()


@pytest.mark.parametrize(("ball", "dual"), [("linf", 1), ("l2", 2)])
def test_a_linear_model_is_driven_to_its_worst_case(ball: str, dual: int) -> None:
    # The logits' difference is ⟨w, x⟩ + b, which falls by at most ε‖w‖ in the dual norm: ‖w‖₁ in
    # the L∞ ball and ‖w‖₂ in the L2 ball. L∞ gets there from anywhere; L2, whose steps add up to
    # 2.5 radii, gets there from the centre and comes close from elsewhere (tan θ falls by at least
    # 1 + step/radius a step from θ ≤ 90°: after ten steps of a quarter, 1 − cos θ < 0.6%).
    torch.set_default_dtype(torch.float64)
    try:
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
        x, y = 0.4 + 0.2 * torch.rand(20, 3, 4, 4), torch.randint(2, (20,))
        radius = 0.1  # no pixel comes near 0 or 1
        start = torch.randn_like(x) if ball == "linf" else torch.zeros_like(x)
        worst = attack(model, x, y, ball=ball, radius=radius, steps=10, start=start)
        with torch.no_grad():
            linear = model[1]
            w = linear.weight[1] - linear.weight[0]
            margin = (2 * y - 1) * (x.flatten(1) @ w + linear.bias[1] - linear.bias[0])
            expected = F.softplus(-(margin - radius * torch.linalg.vector_norm(w, dual)))
            reached = F.cross_entropy(model(worst), y, reduction="none")
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(reached, expected, rtol=1e-12, atol=0)


def test_where_pixels_end_the_worst_case_of_a_linear_model_is_cut_there() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    x, y = torch.rand(20, 3, 4, 4), torch.zeros(20, dtype=torch.int64)
    worst = attack(model, x, y, ball="linf", radius=0.2, steps=10, start=2 * torch.rand_like(x) - 1)
    w = (model[1].weight[1] - model[1].weight[0]).detach().view(1, 3, 4, 4)
    torch.testing.assert_close(worst, (x + 0.2 * w.sign()).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ball", BALLS)
def test_an_image_without_a_gradient_is_left_where_it_began(ball: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    nn.init.zeros_(model[1].weight)
    x = torch.rand(4, 3, 4, 4)
    y = torch.zeros(4, dtype=torch.int64)
    worst = attack(model, x, y, ball=ball, radius=0.1, steps=3, start=torch.zeros_like(x))
    assert torch.equal(worst, x)


def test_trades_adds_the_divergence_of_attacked_from_clean_outputs() -> None:
    """By its definition, Σ p log(p/q); nothing is added where the outputs are the same."""
    clean, attacked = torch.randn(2, 6, 4, dtype=torch.float64)
    y = torch.randint(4, (6,))
    p, q = clean.softmax(1), attacked.softmax(1)
    expected = F.cross_entropy(clean, y) + 6 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(trades(clean, attacked, y, 6.0, 0.0), expected)
    torch.testing.assert_close(trades(clean, clean, y, 6.0, 0.0), F.cross_entropy(clean, y))
    # Both sides learn: the gradient at clean logits is not that of the cross-entropy alone.
    at = clean.clone().requires_grad_()
    (g,) = torch.autograd.grad(trades(at, attacked, y, 6.0, 0.0), at)
    (plain,) = torch.autograd.grad(F.cross_entropy(at, y), at)
    assert (g - plain).norm() > plain.norm()


@pytest.mark.parametrize("ball", BALLS)
def test_trades_attacks_what_the_network_says_of_the_clean_image(
    monkeypatch: pytest.MonkeyPatch, ball: str
) -> None:
    data = Labelled(
        "made",
        np.random.default_rng(0).integers(60, 190, (32, 3, 8, 8)).astype(np.uint8),
        np.arange(32) % 4,
        np.zeros((8, 3, 8, 8), np.uint8),
        np.arange(8) % 4,
        tuple("abcd"),
    )
    monkeypatch.setattr(Adversarial, "labelled", staticmethod(lambda options, root: data))
    options = AdversarialOptions(
        data="made", network="convnet", width=4, ball=ball, radius=8, objective="trades"
    )
    problem = Adversarial(options, Path(), torch.device("cpu"))
    assert not problem.divisible  # its two passes share batch statistics
    batch = problem.batch(torch.arange(32), torch.Generator().manual_seed(0))
    x, y, start = batch
    ready = problem.prepared(batch)
    assert problem.model.training
    assert torch.equal(ready.clean, x)
    assert float(lengths(ready.images - x, ball).max()) <= 8 / 255 * (1 + 1e-5)
    problem.model.eval()
    begun = attack(problem.model, x, y, ball=ball, radius=8 / 255, steps=0, start=start)
    with torch.no_grad():
        clean, first, worst = (problem.model(at) for at in (x, begun, ready.images))
        expected = trades(clean, worst, y, 6.0, 0.0)
        assert expected > trades(clean, first, y, 6.0, 0.0)  # the divergence has grown
        torch.testing.assert_close(problem.loss(ready), expected)
    # Targets play no part in the attack.
    assert torch.equal(problem.prepared((x, y.flip(0), start)).images, ready.images)


def test_a_mistake_in_the_options_is_shown() -> None:
    def options(**given: object) -> AdversarialOptions:
        return AdversarialOptions(data="cifar10", network="resnet8", **given)

    with pytest.raises(UsageError, match=r"unknown ball 'l-inf': did you mean 'linf'"):
        options(ball="l-inf")
    with pytest.raises(UsageError, match=r"radius -4 is not allowed"):
        options(radius=-4)
    with pytest.raises(UsageError, match=r"attack_steps 0 is not allowed"):
        options(attack_steps=0)
    with pytest.raises(UsageError, match=r"unknown objective 'trade': did you mean 'trades'"):
        options(objective="trade")
    with pytest.raises(UsageError, match=r"beta -1 is not allowed"):
        options(beta=-1)
    with pytest.raises(UsageError, match=r"unknown augmentation 'flipp'"):
        options(augment=("flipp",))
