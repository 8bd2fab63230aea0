"""Weight decay as a learning-rate schedule, and equilibrium, against runs in float64."""

import math
import re

import pytest
import torch
from torch import nn

from normwise import View
from normwise.geometry import cosine
from normwise.reparam import weight_normalize, weight_standardize
from normwise.theory import (
    adamw_equilibrium,
    adamw_without_decay,
    epsilon_shifted_equilibrium,
    sgd_equilibrium,
    sgd_without_decay,
)

STEPS = 150


def schedule(steps, lr):
    """Warm-up, then a cosine, as people train."""
    return [
        lr * min(1, (t + 1) / 10) * (1 + 0.9 * math.cos(math.pi * t / steps)) for t in range(steps)
    ]


def network(convert):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)
    )
    convert(net)
    return net.double()


def normalized(net):
    return [stack[-1] for stack in ([*net[i].parametrizations.weight.parameters()] for i in (0, 2))]


def angles(one, other):
    """The largest angle between the slices of two runs; small ones without cancellation."""
    found = []
    for a, b in zip(one, other, strict=True):
        a = a.detach().flatten(1)
        b = b.detach().flatten(1)
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        found.append(2 * torch.asin(((a - b).norm(dim=1) / 2).clamp(max=1)).max())
    return float(torch.stack(found).max())


def train(net, make_optimizer, lrs, data):
    """Directions after each step; ``lrs`` are those of the normalized weights, then the others'."""
    of_weights, of_rest = lrs
    weights = normalized(net)
    rest = [p for p in net.parameters() if all(p is not w for w in weights)]
    optimizer = make_optimizer(weights, rest)
    history = []
    for t, (x, y) in enumerate(data):
        optimizer.param_groups[0]["lr"] = of_weights[t]
        optimizer.param_groups[1]["lr"] = of_rest[t]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        history.append([w.detach().clone() for w in weights])
    return history


def batches(steps):
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(steps)
    ]


def sgd(weight_decay, momentum=0.0):
    return lambda weights, rest: torch.optim.SGD(
        [{"params": weights, "weight_decay": weight_decay}, {"params": rest}],
        lr=1.0,
        momentum=momentum,
    )


def with_decay_without_and_nudged(convert, momentum, lr):
    """Angles, a step, between a decayed run and the run that the theorem calls the same, and
    between the decayed run and itself with one entry one unit in the last place larger."""
    lrs, decay, data = schedule(STEPS, lr), 1e-3 / lr, batches(STEPS)
    equivalent = sgd_without_decay(lrs, decay, momentum, torch.float64)
    decayed = train(network(convert), sgd(decay, momentum), (lrs, lrs), data)
    undecayed = train(network(convert), sgd(0.0, momentum), (equivalent.lrs, lrs), data)
    net = network(convert)
    with torch.no_grad():
        w = normalized(net)[0].view(-1)
        w[0] = torch.nextafter(w[0], torch.tensor(math.inf, dtype=w.dtype))
    nudged = train(net, sgd(decay, momentum), (lrs, lrs), data)
    ratios = [
        (b.norm() / a.norm() / equivalent.scales[-1]).item()
        for a, b in zip(decayed[-1], undecayed[-1], strict=True)
    ]
    error = [angles(a, b) for a, b in zip(decayed, undecayed, strict=True)]
    growth = [angles(a, b) for a, b in zip(decayed, nudged, strict=True)]
    return error, growth, ratios


@pytest.mark.parametrize(
    ("convert", "momentum", "lr"),
    [
        (weight_normalize, 0.0, 0.05),
        (weight_normalize, 0.9, 0.05),
        (weight_standardize, 0.0, 0.003),
        (weight_standardize, 0.9, 0.0003),
    ],
)
def test_theorem_1_decay_is_a_schedule_to_rounding(convert, momentum, lr):
    """[ES] Theorem 1 and its momentum form, under a schedule; norms are as predicted too."""
    error, _, ratios = with_decay_without_and_nudged(convert, momentum, lr)
    assert max(error) < 1e-10
    assert ratios == pytest.approx([1, 1], rel=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("convert", [weight_standardize, weight_normalize])
def test_theorem_1_holds_for_as_long_as_roundings_own_growth_allows(convert, momentum):
    """At this learning rate weight standardization is chaotic: one unit in the last place becomes
    visible within 50 steps. The equivalent run departs no faster than rounding itself does."""
    error, growth, _ = with_decay_without_and_nudged(convert, momentum, 0.05)
    for e, g in zip(error, growth, strict=True):
        # Rounding differs in every entry and step, the nudge in one entry, once.
        assert e < 100 * (g + 2**-52)


def test_the_directions_without_the_multipliers_are_others():
    lrs, data = schedule(STEPS, 0.003), batches(STEPS)
    decayed = train(network(weight_standardize), sgd(1 / 3), (lrs, lrs), data)
    undecayed = train(network(weight_standardize), sgd(0.0), (lrs, lrs), data)
    assert angles(decayed[-1], undecayed[-1]) > 1e-3


def test_adamw_decay_is_a_schedule_of_adam_whose_moments_forget_faster():
    lrs, decay, betas = schedule(120, 0.01), 0.5, (0.9, 0.99)
    equivalent = adamw_without_decay(lrs, decay, torch.float64)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(len(lrs), 8, generator=generator, dtype=torch.float64)
    start = torch.randn(8, generator=generator, dtype=torch.float64)

    def gradient(w, t):
        w = w.clone().requires_grad_()
        (-(w / w.norm()) @ targets[t]).backward()
        return w.grad

    reference = start.clone().requires_grad_()
    adamw = torch.optim.AdamW([reference], betas=betas, weight_decay=decay, eps=0)
    w, m, v = start.clone(), torch.zeros(8, dtype=torch.float64), torch.zeros(8).double()
    for t, lr in enumerate(lrs):
        adamw.param_groups[0]["lr"] = lr
        reference.grad = gradient(reference.detach(), t)
        adamw.step()

        g, r = gradient(w, t), equivalent.decay_factors[t]
        m = betas[0] * r * m + (1 - betas[0]) * g
        v = betas[1] * r**2 * v + (1 - betas[1]) * g**2
        u = (m / (1 - betas[0] ** (t + 1))) / (v / (1 - betas[1] ** (t + 1))).sqrt()
        w = w - equivalent.lrs[t] * u
    assert angles([reference[None]], [w[None]]) < 1e-12


def test_constant_learning_rate_gives_the_papers_powers():
    """η(1 − λη)^{−(2t+1)}, [EXP]; and d_q = 1/(p_q²(1 − λη)) of [ES] Eq. 17."""
    lr, decay = 0.1, 0.05
    equivalent = sgd_without_decay([lr] * 50, decay)
    for t, (rate, scale) in enumerate(zip(equivalent.lrs, equivalent.scales[:-1], strict=True)):
        assert rate == pytest.approx(lr * (1 - decay * lr) ** -(2 * t + 1), rel=1e-13)
        assert rate / lr == pytest.approx(1 / (scale**-2 * (1 - decay * lr)), rel=1e-13)


def test_momentum_multiplier_settles_at_the_larger_root():
    lr, decay, momentum = 0.1, 0.01, 0.9
    scales = sgd_without_decay([lr] * 2000, decay, momentum, torch.float64).scales
    alpha = scales[-2] / scales[-1]
    assert alpha**2 - (1 + momentum - decay * lr) * alpha + momentum == pytest.approx(0, abs=1e-12)
    assert alpha > math.sqrt(momentum)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1] * 500, 0.05, 0.9), "the direction would flip"),
        (([0.1] * 100, 10.0), "the direction would flip"),
        (([0.1, -0.1], 0.1), "Invalid learning rate at step 1: -0.1"),
        (([0.1, 0.0, 0.1], 0.1, 0.9), "the learning rate of step 1 is 0"),
        (([0.1], -1.0), "Invalid weight_decay: -1.0"),
        (([0.1], 0.1, 1.0), "Invalid momentum: 1.0"),
        (([0.5] * 200, 0.9), "outgrows torch.float32 at step"),
    ],
)
def test_no_equivalent_schedule_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sgd_without_decay(*arguments)


def test_adamw_needs_decay_below_one_a_step():
    with pytest.raises(ValueError, match=r"lr·weight_decay is 1 at step 0"):
        adamw_without_decay([1.0], 1.0)


def run_at_unit_gradient(steps, step):
    """A weight whose gradient at norm 1 is a random tangent of mean squared norm 1."""
    generator = torch.Generator().manual_seed(0)
    n = 100
    w = torch.randn(40, n, generator=generator, dtype=torch.float64)
    norms, turns = [], []
    for t in range(steps):
        unit = w / w.norm(dim=1, keepdim=True)
        g = torch.randn(w.shape, generator=generator, dtype=torch.float64) / math.sqrt(n - 1)
        g = g - unit * (unit * g).sum(1, keepdim=True)
        before, w = w, step(w, g / w.norm(dim=1, keepdim=True))
        if t > steps // 2:
            norms.append(w.norm(dim=1).pow(4).mean())
            turns.append(torch.acos(cosine(before, w, View.channel()).clamp(max=1)).square().mean())
    return float(torch.stack(norms).mean() ** 0.25), float(torch.stack(turns).mean().sqrt())


def test_sgd_settles_at_its_equilibrium():
    lr, decay = 0.1, 0.05
    norm, angle = run_at_unit_gradient(2000, lambda w, g: w * (1 - lr * decay) - lr * g)
    expected = sgd_equilibrium(lr, decay, 1.0)
    assert norm == pytest.approx(expected.norm, rel=0.01)
    assert angle == pytest.approx(expected.angle, rel=0.01)


def test_epsilon_shift_settles_above_epsilon():
    """k³(k − ε) = ηE‖g̃‖²/(2λ) [ours], so k > ε, and k = ε without a gradient."""
    lr, decay, eps = 0.1, 0.05, 1.5
    norm, _ = run_at_unit_gradient(
        2000, lambda w, g: w - lr * (g + decay * (1 - eps / w.norm(dim=1, keepdim=True)) * w)
    )
    k = epsilon_shifted_equilibrium(lr, decay, eps, 1.0)
    assert norm == pytest.approx(k, rel=0.01)
    assert k**3 * (k - eps) == pytest.approx(lr / (2 * decay), rel=1e-12)
    assert epsilon_shifted_equilibrium(lr, decay, eps, 0.0) == pytest.approx(eps, rel=1e-15)


def test_equilibria_as_tabled():
    momentum = sgd_equilibrium(0.1, 5e-4, 2.0, momentum=0.9)
    assert momentum.norm == pytest.approx((0.1 * 2.0 / (2 * 5e-4 * 0.1)) ** 0.25)
    assert momentum.angle == pytest.approx(math.sqrt(2 * 0.1 * 5e-4 / 1.9))
    adamw = adamw_equilibrium(1e-3, 0.1, 576)
    assert adamw.norm == pytest.approx(math.sqrt(1e-3 * 576 / 0.2))
    assert adamw.angle == pytest.approx(math.sqrt(2e-4 * 0.1 / 1.9))
    with pytest.raises(ValueError, match="Invalid weight_decay: 0"):
        sgd_equilibrium(0.1, 0.0, 1.0)
