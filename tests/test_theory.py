"""Weight decay as a learning-rate schedule, and equilibrium, against runs in float64."""

import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

import normwise
from normwise import SGDP, AdamP, View, describe, tangential
from normwise.geometry import cosine
from normwise.reparam import weight_normalize, weight_standardize
from normwise.theory import (
    PlannedGroups,
    Update,
    adamw_angle,
    adamw_equilibrium,
    adamw_norms,
    adamw_schedule_limit,
    adamw_time_to_equilibrium,
    adamw_with_decay,
    adamw_without_decay,
    angle_at,
    effective_lr,
    epsilon_shifted_equilibrium,
    equilibrium_of,
    gradient_cosine,
    growth_ratio,
    lion_equilibrium_angle,
    momentum_norms,
    norm_range,
    norm_trajectory,
    scaled_fisher_trace,
    scaled_gradient_norm,
    sgd_angle,
    sgd_decay_limit,
    sgd_equilibrium,
    sgd_norms,
    sgd_schedule_limit,
    sgd_time_to_equilibrium,
    sgd_with_decay,
    sgd_without_decay,
    steps_to_norm,
    time_to_equilibrium,
)
from normwise.theory.orthogonalized import mean_square_singular_value, summed_overlaps
from normwise.updates import Coupling, UpdateRule, register, rule_of

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


# The way back: decay added, directions kept.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_decay_undoes_sgd_without_decay(momentum):
    lrs, decay = schedule(300, 0.05), 0.02
    there = sgd_without_decay(lrs, decay, momentum, torch.float64)
    back = sgd_with_decay(there.lrs, decay, momentum)
    assert back.lrs == pytest.approx(lrs, rel=1e-9)
    assert back.scales == pytest.approx(there.scales, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_run_without_decay_has_the_directions_of_one_with_decay(momentum):
    lrs, decay, data = schedule(STEPS, 0.003), 5.0, batches(STEPS)
    plan = sgd_with_decay(lrs, decay, momentum)
    undecayed = train(network(weight_normalize), sgd(0.0, momentum), (lrs, lrs), data)
    decayed = train(network(weight_normalize), sgd(decay, momentum), (plan.lrs, lrs), data)
    assert max(angles(a, b) for a, b in zip(undecayed, decayed, strict=True)) < 1e-10
    for a, b in zip(undecayed[-1], decayed[-1], strict=True):
        assert float(a.norm() / b.norm()) == pytest.approx(plan.scales[-1], rel=1e-10)


def tangent_problem(entries=8, steps=120, seed=0):
    """Losses −⟨ŵ, target_t⟩, and a start."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(steps, entries, generator=generator, dtype=torch.float64)
    return targets, torch.randn(entries, generator=generator, dtype=torch.float64)


def follow(optimizer_of, plan, lrs):
    """A run of torch's own optimizer whose group takes the values of a plan."""
    targets, start = tangent_problem(steps=len(lrs))
    w = start.clone().requires_grad_()
    optimizer = optimizer_of(w)
    scheduler = None if plan is None else PlannedGroups(optimizer, {0: plan})
    history = []
    for t, target in enumerate(targets):
        if scheduler is None:
            optimizer.param_groups[0]["lr"] = lrs[t]
        optimizer.zero_grad()
        (-(w / w.norm()) @ target).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        history.append(w.detach().clone()[None])
    return history


@pytest.mark.parametrize("foreach", [False, True])
def test_torchs_own_adam_follows_the_plan_without_decay(foreach):
    """The plan's betas and rates make torch's tied moments those that are wanted."""
    lrs, decay, betas = schedule(120, 0.01), 0.5, (0.9, 0.99)
    plan = adamw_without_decay(lrs, decay, torch.float64)
    options = {"betas": betas, "eps": 0.0, "foreach": foreach}
    decayed = follow(lambda w: torch.optim.AdamW([w], weight_decay=decay, **options), None, lrs)
    undecayed = follow(lambda w: torch.optim.Adam([w], **options), plan.groups(betas), lrs)
    for t, (a, b) in enumerate(zip(decayed, undecayed, strict=True)):
        assert angles([a], [b]) < 1e-12
        assert float(b.norm() / a.norm()) == pytest.approx(plan.scales[t + 1], rel=1e-10)


def test_torchs_own_adamw_follows_the_plan_with_decay():
    lrs, decay, betas = schedule(120, 0.01), 0.5, (0.9, 0.99)
    plan = adamw_with_decay(lrs, decay)
    undecayed = follow(lambda w: torch.optim.Adam([w], betas=betas, eps=0.0), None, lrs)
    decayed = follow(lambda w: torch.optim.AdamW([w], eps=0.0), plan.groups(betas), lrs)
    for t, (a, b) in enumerate(zip(undecayed, decayed, strict=True)):
        assert angles([a], [b]) < 1e-12
        assert float(a.norm() / b.norm()) == pytest.approx(plan.scales[t + 1], rel=1e-10)


def test_adamw_with_decay_undoes_adamw_without_decay():
    lrs = schedule(300, 0.05)
    there = adamw_without_decay(lrs, 0.5, torch.float64)
    assert adamw_with_decay(there.lrs, 0.5).lrs == pytest.approx(lrs, rel=1e-10)


def test_a_plan_resumes_where_it_was():
    lrs = schedule(20, 0.05)
    values = sgd_without_decay(lrs, 0.1).groups()

    def made():
        w = torch.ones(3, requires_grad=True)
        optimizer = torch.optim.SGD([{"params": [w]}, {"params": [torch.ones(1)]}], lr=7.0)
        return optimizer, PlannedGroups(optimizer, {0: values})

    optimizer, scheduler = made()
    for _ in range(12):
        optimizer.step()
        scheduler.step()
    other, resumed = made()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(8):
        assert other.param_groups[0]["lr"] == values[resumed.last_epoch]["lr"]
        assert other.param_groups[0]["weight_decay"] == 0.0
        assert other.param_groups[1]["lr"] == 7.0
        other.step()
        resumed.step()
    with pytest.raises(ValueError, match="the plan of group 0 has only 20 steps"):
        resumed.step()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({3: []}, "Invalid group in a plan: 3; the optimizer has 1 groups"),
        ({0: [{"weight_decay": 0.0}]}, "Invalid values in a plan for group 0, step 0"),
        ({0: [{"lr": 1.0, "momentun": 0.0}]}, "momentun"),
    ],
)
def test_a_plan_that_does_not_fit_is_an_error(plan, message):
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match=message):
        PlannedGroups(optimizer, plan)


@pytest.mark.parametrize(("lr", "decay", "momentum"), [(0.1, 0.5, 0.0), (0.01, 0.05, 0.9)])
def test_the_limit_of_the_schedule_is_where_the_schedule_ends(lr, decay, momentum):
    """To the few steps in which momentum's α settles."""
    steps = sgd_schedule_limit(lr, decay, momentum)
    slack = 0 if momentum == 0 else 40
    sgd_without_decay([lr] * steps, decay, momentum)
    with pytest.raises(ValueError, match="outgrows"):
        sgd_without_decay([lr] * (steps + 1 + slack), decay, momentum)


def test_the_limit_of_adamws_schedule_is_where_it_ends():
    steps = adamw_schedule_limit(0.1, 0.5)
    adamw_without_decay([0.1] * steps, 0.5)
    with pytest.raises(ValueError, match="outgrows"):
        adamw_without_decay([0.1] * (steps + 1), 0.5)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_beyond_the_limit_of_decay_the_weight_swings_through_zero(momentum):
    """λη ≤ (1 − √γ)² ([EXP]): simulated, decay alone keeps the sign below it and not above."""
    limit = sgd_decay_limit(momentum)
    assert limit == pytest.approx((1 - math.sqrt(momentum)) ** 2)
    for factor, flips in ((0.999, False), (1.2, True)):
        w, buffer, least = 1.0, 0.0, 1.0
        for _ in range(5000):
            buffer = momentum * buffer + factor * limit * w
            w -= buffer
            least = min(least, w)
        assert (least < 0) == flips
    for refused in (
        lambda: sgd_equilibrium(1.2 * limit, 1.0, 1.0, momentum),
        lambda: sgd_time_to_equilibrium(1.2 * limit, 1.0, 2.0, momentum),
        lambda: sgd_norms([1.2 * limit], 1.0, 1.0, 1.0, momentum),
        lambda: sgd_schedule_limit(1.2 * limit, 1.0, momentum),
    ):
        with pytest.raises(ValueError, match=r"\(1 − √"):
            refused()


# Equilibrium, in simulation: 100 slices whose gradients at norm 1 are random tangents.


def simulate(steps, make, entries=100, slices=100, start=1.0, isotropic=False):
    """Norms after each step, and the mean squared angle of each, under torch's own optimizer.

    ``isotropic`` gradients are not projected off the weight: of many entries that does not matter
    to norms, and each entry's second moment is the same.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(slices, entries, generator=generator, dtype=torch.float64)
    w = (start * w / w.norm(dim=1, keepdim=True)).requires_grad_()
    optimizer = make(w)
    norms, turns = [], []
    for _ in range(steps):
        before = w.detach().clone()
        unit = before / before.norm(dim=1, keepdim=True)
        g = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        if not isotropic:
            g = (g - unit * (unit * g).sum(1, keepdim=True)) / math.sqrt(entries - 1)
        w.grad = g / before.norm(dim=1, keepdim=True)
        optimizer.step()
        norms.append(w.detach().norm(dim=1))
        turned = cosine(before, w.detach(), View.channel()).clamp(max=1)
        turns.append(torch.acos(turned).square().mean())
    return torch.stack(norms), torch.stack(turns)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_momentum_settles_at_its_equilibrium(momentum):
    """Norm within 0.05% and angle within 0.1% plus the noise of the simulation."""
    lr, decay = 0.01, 0.05
    expected = sgd_equilibrium(lr, decay, 1.0, momentum)
    norms, turns = simulate(
        1500,
        lambda w: torch.optim.SGD([w], lr=lr, momentum=momentum, weight_decay=decay),
        start=expected.norm,
    )
    norm = float(norms[500:].pow(4).mean() ** 0.25)
    angle = float(turns[500:].mean().sqrt())
    assert norm == pytest.approx(expected.norm, rel=0.005)
    assert angle == pytest.approx(expected.angle, rel=0.005)
    assert sgd_angle(lr, expected.norm, 1.0, momentum) == pytest.approx(expected.angle, rel=1e-12)


def test_adamw_settles_at_its_equilibrium():
    lr, decay, entries = 0.001, 0.5, 400  # a slice's own norm fluctuates by 1/√C
    expected = adamw_equilibrium(lr, decay, entries)
    norms, turns = simulate(
        3000,
        lambda w: torch.optim.AdamW([w], lr=lr, weight_decay=decay, betas=(0.9, 0.999), eps=0),
        entries=entries,
        slices=25,
        start=expected.norm,
        isotropic=True,
    )
    assert float(norms[1500:].square().mean().sqrt()) == pytest.approx(expected.norm, rel=0.01)
    assert float(turns[1500:].mean().sqrt()) == pytest.approx(expected.angle, rel=0.01)
    assert adamw_angle(lr, expected.norm, entries) == pytest.approx(expected.angle, rel=1e-12)


class Lion(torch.optim.Optimizer):
    """sign(β1·m + (1 − β1)·g), decoupled decay: arXiv 2302.06675, Algorithm 2."""

    def __init__(self, params, lr, weight_decay, betas):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = (b1 * m + (1 - b1) * p.grad).sign()
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * update)
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


def test_lion_turns_at_its_equilibrium_angle():
    """The formula takes the sign for linear, and the momentum's 100 steps for few against 1/(ηλ):
    here each of the two is worth about half a percent."""
    lr, decay, betas, entries = 0.0004, 0.5, (0.9, 0.99), 400
    expected = lion_equilibrium_angle(lr, decay, betas)
    # All entries move by η, so this is the norm at which a step turns by the angle expected.
    start = lr * math.sqrt(entries) / expected
    _, turns = simulate(
        5000,
        lambda w: Lion([w], lr, decay, betas),
        entries=entries,
        slices=20,
        start=start,
        isotropic=True,
    )
    assert float(turns[2500:].mean().sqrt()) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("start", [0.6, 3.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_within_a_tenth_of_equilibrium_at_the_time_foretold(start, momentum):
    lr, decay = (0.1, 0.02) if momentum == 0 else (0.01, 0.02)
    k = sgd_equilibrium(lr, decay, 1.0, momentum).norm
    time = sgd_time_to_equilibrium(lr, decay, start, momentum)
    norms, _ = simulate(
        round(time) + 1,
        lambda w: torch.optim.SGD([w], lr=lr, momentum=momentum, weight_decay=decay),
        start=start * k,
    )
    trajectory = norms.pow(4).mean(1).pow(0.25) / k
    arrived = 1.1 if start > 1 else 0.9
    assert float(trajectory[round(time) - 1]) == pytest.approx(arrived, rel=0.02)
    foretold = sgd_norms([lr] * len(trajectory), decay, 1.0, start * k, momentum)
    # Momentum's buffer takes 1/(1 − α) steps to fill, which the closed trajectory leaves out.
    for t in (len(trajectory) // 2, len(trajectory) - 1):
        assert float(trajectory[t]) * k == pytest.approx(foretold[t + 1], rel=0.03)


@pytest.mark.parametrize("start", [0.3, 3.0])
def test_adamw_is_within_a_tenth_of_equilibrium_at_the_time_foretold(start):
    """Of gradients whose second moment is known: AdamW's own estimate lags behind the norm."""
    lr, decay, entries = 0.002, 0.5, 100
    k = adamw_equilibrium(lr, decay, entries).norm
    time = adamw_time_to_equilibrium(lr, decay, start)
    norms, _ = simulate(
        round(time),
        lambda w: KnownMoments([w], lr, decay),
        start=start * k,
        isotropic=True,
    )
    arrived = 1.1 if start > 1 else 0.9
    trajectory = norms.square().mean(1).sqrt()
    assert float(trajectory[-1]) / k == pytest.approx(arrived, rel=0.02)
    foretold = adamw_norms([lr] * len(trajectory), decay, entries, start * k)
    assert float(trajectory[-1]) == pytest.approx(foretold[-1], rel=0.02)


class KnownMoments(torch.optim.Optimizer):
    """AdamW as the theory has it: the second moment is known, not estimated."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                size = 1 / p.norm(dim=1, keepdim=True)
                m.lerp_(p.grad / size, 0.1)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m)


# Projected and orthogonalized updates: what they settle at follows from the rule of a step.

PROJECTED = {
    "SGDP, a view": lambda w, rho: SGDP(
        [w], lr=0.01, momentum=0.9, weight_decay=0.03 / rho, wd_ratio=rho, view="channel"
    ),
    "SGDP, gate": lambda w, rho: SGDP(
        [w], lr=0.01, momentum=0.9, weight_decay=0.03 / rho, wd_ratio=rho, delta=1.0
    ),
    "AdamP, a view": lambda w, rho: AdamP(
        [w], lr=0.005, weight_decay=0.2 / rho, wd_ratio=rho, view="channel", eps=1e-30
    ),
    "AdamP, gate": lambda w, rho: AdamP(
        [w], lr=0.005, weight_decay=0.2 / rho, wd_ratio=rho, delta=1.0, eps=1e-30
    ),
    "tangential SGD": lambda w, rho: tangential(
        torch.optim.SGD([w], lr=0.01, momentum=0.9, weight_decay=0.03 / rho),
        "channel",
        wd_ratio=rho,
    ),
}


def power_mean(norms, rule):
    """Of the power of the norm that relaxes: 4 where updates are gradients, else 2."""
    power = 2 * rule.update.exponent
    return float(norms.pow(power).mean() ** (1 / power))


@pytest.mark.parametrize(
    ("kind", "rho"), [(kind, (1.0, 0.1)[i % 2]) for i, kind in enumerate(PROJECTED)]
)
def test_projected_optimizers_settle_where_their_rule_says(kind, rho):
    """At angles of 0.08 and 0.04 rad, where what a buffer loses counts: κ² is 0.5 and 0.2."""
    entries, steps = 200, 3200 if kind.startswith("AdamP") else 1200
    (rule,) = describe(PROJECTED[kind](torch.zeros(2, 2, requires_grad=True), rho))
    expected = equilibrium_of(rule.with_gate(True), gradient_square=1.0, entries=entries)
    norms, turns = simulate(
        steps,
        lambda w: PROJECTED[kind](w, rho),
        entries=entries,
        slices=10,
        start=expected.norm,
    )
    assert power_mean(norms[steps // 2 :], rule) == pytest.approx(expected.norm, rel=0.014)
    assert float(turns[steps // 2 :].mean().sqrt()) == pytest.approx(expected.angle, rel=0.011)
    known = {"gradient_square": 1.0, "entries": entries}
    assert angle_at(rule.with_gate(True), expected.norm, **known) == pytest.approx(expected.angle)


@pytest.mark.parametrize("kind", ["SGDP, gate", "AdamP, gate"])
def test_where_the_gate_stays_shut_they_settle_as_sgd_and_adamw_do(kind):
    entries, lr = 400, 0.001
    make = {
        "SGDP, gate": lambda w: SGDP([w], lr=0.01, momentum=0.9, weight_decay=0.02, delta=0),
        "AdamP, gate": lambda w: AdamP([w], lr=lr, weight_decay=0.5, delta=0, eps=1e-30),
    }[kind]
    (rule,) = describe(make(torch.zeros(2, 2, requires_grad=True)))
    assert math.isnan(equilibrium_of(rule, gradient_square=1.0, entries=entries).angle)
    expected = equilibrium_of(rule.with_gate(False), gradient_square=1.0, entries=entries)
    plain = {
        "SGDP, gate": sgd_equilibrium(0.01, 0.02, 1.0, 0.9),
        "AdamP, gate": adamw_equilibrium(lr, 0.5, entries),
    }[kind]
    assert expected.norm == pytest.approx(plain.norm)
    assert expected.angle == pytest.approx(plain.angle)
    norms, turns = simulate(
        2000, make, entries=entries, slices=25, start=expected.norm, isotropic=kind[0] == "A"
    )
    assert power_mean(norms[1000:], rule) == pytest.approx(expected.norm, rel=0.01)
    assert float(turns[1000:].mean().sqrt()) == pytest.approx(expected.angle, rel=0.01)


def known_moments(optimizer, group):
    """The rule of :class:`KnownMoments`, whose first moment has β1 = 0.9."""
    decay = group["weight_decay"]
    return UpdateRule(
        "KnownMoments",
        Update.NORMALIZED,
        group["lr"],
        momentum=0.9,
        scale=1.0,
        coupling=Coupling.DECOUPLED,
        weight_decay=decay,
        decay_per_step=group["lr"] * decay,
    )


@pytest.mark.parametrize("kind", ["SGDP", "projected KnownMoments"])
@pytest.mark.parametrize("start", [0.7, 2.0])
def test_a_projected_norm_is_within_a_tenth_of_equilibrium_at_the_time_foretold(kind, start):
    make = {
        "SGDP": lambda w: SGDP(
            [w], lr=0.01, momentum=0.5, weight_decay=0.5, wd_ratio=0.5, view="channel"
        ),
        "projected KnownMoments": lambda w: tangential(
            KnownMoments([w], 0.005, 0.2), "channel", wd_ratio=0.5
        ),
    }[kind]
    register(KnownMoments, known_moments)
    (rule,) = describe(make(torch.zeros(2, 2, requires_grad=True)))
    k = equilibrium_of(rule, gradient_square=1.0, entries=200).norm
    time = time_to_equilibrium(rule, start)
    norms, _ = simulate(
        round(time), make, entries=200, slices=40, start=start * k, isotropic=kind != "SGDP"
    )
    assert power_mean(norms[-1], rule) / k == pytest.approx(1.1 if start > 1 else 0.9, rel=0.02)
    foretold = norm_trajectory(
        rule, [rule.lr] * round(time), start * k, gradient_square=1.0, entries=200
    )
    for t in (len(norms) // 2, len(norms)):
        assert power_mean(norms[t - 1], rule) == pytest.approx(foretold[t], rel=0.02)


def test_a_tenth_of_the_decay_takes_ten_times_as_long():
    def time(rho):
        w = torch.zeros(2, 2, requires_grad=True)
        (rule,) = describe(AdamP([w], weight_decay=0.1, wd_ratio=rho, view="channel"))
        return time_to_equilibrium(rule, 3.0)

    assert time(0.1) == pytest.approx(10 * time(1.0), rel=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (160, 64)])
def test_muon_settles_where_its_rule_says(shape):
    """torch's own, whose Newton–Schulz iterations leave singular values between 0.7 and 1.1."""

    def make(w):
        return torch.optim.Muon([w], lr=0.01, weight_decay=0.1, momentum=0.9)

    w = torch.zeros(shape, requires_grad=True)
    optimizer = make(w)
    rule = rule_of(optimizer, optimizer.param_groups[0], w)
    entries = shape[1]
    expected = equilibrium_of(rule, entries=entries, shape=shape)
    norms, turns = simulate(
        1500,
        make,
        entries=entries,
        slices=shape[0],
        start=expected.norm,
        isotropic=True,
    )
    assert power_mean(norms[500:], rule) == pytest.approx(expected.norm, rel=0.02)
    assert float(turns[500:].mean().sqrt()) == pytest.approx(expected.angle, rel=0.02)


@pytest.mark.parametrize("shape", [(96, 96), (128, 32)])
def test_orthogonalized_sums_of_gradients_overlap_as_the_expansion_says(shape):
    """Of c = 1, √2, 1 the overlaps at lags 1 and 2 are those of correlations 0.71 and 0.25."""
    kernel = [1.0, math.sqrt(2), 1.0]
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(16, 3 + 2, *shape, generator=generator, dtype=torch.float64)
    sums = torch.stack([sum(c * g[:, t - k] for k, c in enumerate(kernel)) for t in (2, 3, 4)])
    u, _, v = torch.linalg.svd(sums, full_matrices=False)
    polar = u @ v
    lags = [float((polar[0] * polar[lag]).sum()) / (16 * min(shape)) for lag in (1, 2)]
    assert summed_overlaps(kernel, shape) == pytest.approx(1 + 2 * sum(lags), rel=0.01)
    assert mean_square_singular_value(shape) == pytest.approx(1)


def test_the_first_coefficient_of_a_large_square_polar_factor_is_that_of_the_quarter_circle():
    small = 1e-6
    slope = (summed_overlaps([1.0, small], (64, 64)) - 1) / (2 * small)
    assert slope == pytest.approx((8 / (3 * math.pi)) ** 2, rel=1e-4)


# Norm growth, on a real run: the lab's network on handwritten digits, in float64.


def real_run(make, steps=60):
    """Weights before each step and after the last, of a network with batch norm."""
    from sklearn.datasets import load_digits

    from normwise.lab.networks import build

    digits = load_digits()
    x = torch.tensor(digits.images[:, None] / 16, dtype=torch.float64)
    y = torch.tensor(digits.target)
    net = build("convnet", 1, 10, 8).double()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = 1e-300
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    optimizer = make(weights)
    rest = torch.optim.SGD(
        [p for p in net.parameters() if all(p is not w for w in weights)], lr=0.05
    )
    generator = torch.Generator().manual_seed(0)
    trajectory = [[w.detach().clone() for w in weights]]
    for _ in range(steps):
        chosen = torch.randint(len(y), (32,), generator=generator)
        net.zero_grad()
        nn.functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
        rest.step()
        trajectory.append([w.detach().clone() for w in weights])
    return trajectory


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("scheduled", [False, True])
def test_norm_growth_of_lemmas_2_1_and_2_2_on_a_real_run(momentum, scheduled):
    """[AdamP] Lemma 2.1 without momentum, 2.2 with it, slice by slice, to 1e-10."""
    lrs = schedule(60, 0.05) if scheduled else [0.05] * 60

    def make(weights):
        optimizer = torch.optim.SGD(weights, lr=1.0, momentum=momentum)
        values = [{"lr": lr} for lr in [*lrs, 0.0]]
        planned = PlannedGroups(optimizer, {0: values})
        optimizer.register_step_post_hook(lambda *_: planned.step())
        return optimizer

    trajectory = real_run(make)
    for i in range(len(trajectory[0])):
        steps = torch.stack(
            [
                ((a[i] - b[i]) / lr).flatten(1).norm(dim=1)
                for (a, b), lr in zip(pairwise(trajectory), lrs, strict=True)
            ]
        )
        measured = torch.stack([c[i].flatten(1).norm(dim=1) for c in trajectory])
        lr = lrs if scheduled else lrs[0]
        foretold = momentum_norms(steps**2, lr, measured[0], momentum)
        assert float((foretold / measured - 1).abs().max()) < 1e-10
        assert float((measured[-1] / measured[0] - 1).mean()) > 1e-4


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_a_projected_step_adds_its_own_square_on_a_real_run(name):
    """‖w + Δ‖² = ‖w‖² + ‖Δ‖², [AdamP] Eq. 8, to 1e-10."""
    options = {"lr": 0.01} | ({"momentum": 0.9} if name == "SGDP" else {})
    optimizer = getattr(normwise, name)
    trajectory = real_run(lambda ws: optimizer(ws, view=View.channel(), **options))
    for a, b in pairwise(trajectory):
        for old, new in zip(a, b, strict=True):
            square = [t.flatten(1).square().sum(1) for t in (old, new, new - old)]
            assert torch.allclose(square[1], square[0] + square[2], rtol=1e-10, atol=0)


def test_the_growth_ratio_is_that_of_the_sums():
    for momentum, steps in ((0.9, 7), (0.5, 100), (0.0, 3)):
        ones = torch.ones(steps)
        grown = float(momentum_norms(ones, 1.0, 1.0, momentum)[-1]) ** 2 - 1
        assert growth_ratio(momentum, steps) == pytest.approx(grown / steps, rel=1e-12)
    assert growth_ratio(0.9) == pytest.approx(19)
    assert growth_ratio(0.9, 10**6) == pytest.approx(19, rel=1e-4)


def test_the_effective_learning_rate_is_how_fast_directions_turn():
    """Scaled by c, a weight turns as before if η/‖w‖² (SGD) or η/‖w‖ (Adam) is as before."""
    target = torch.randn(6, dtype=torch.float64)
    for update, make in (
        (Update.GRADIENT, lambda w, lr: torch.optim.SGD([w], lr=lr)),
        (Update.NORMALIZED, lambda w, lr: torch.optim.Adam([w], lr=lr, eps=0)),
    ):
        ends = []
        for c in (1.0, 7.0):
            w = (c * torch.arange(1.0, 7.0, dtype=torch.float64)).requires_grad_()
            norm = float(w.detach().norm())
            lr = 0.01 / effective_lr(1.0, norm, update)
            make_step = make(w, lr)
            (w / w.norm() @ target).backward()
            make_step.step()
            ends.append((w / w.norm()).detach())
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_range_of_norms_is_where_arithmetic_ends(dtype):
    """At its ends 1/‖w‖ and ‖w‖² (in float32 or better) are still normal; beyond, one is not."""
    low, high = norm_range(dtype)
    wide = torch.promote_types(dtype, torch.float32)

    def fits(norm):
        w = torch.tensor(norm, dtype=wide)
        square = w * w
        normal = torch.finfo(wide).tiny <= square <= torch.finfo(wide).max
        return bool(normal) and 1 / norm <= torch.finfo(dtype).max >= norm

    for inside, outside in ((low * 1.001, low / 1.1), (high / 1.001, high * 1.1)):
        assert fits(inside)
        assert not fits(outside)


def test_steps_to_a_norm_are_those_of_decay():
    steps = steps_to_norm(2.0, 1e-5, 1 - 0.01)
    assert 2.0 * 0.99 ** math.floor(steps) > 1e-5 > 2.0 * 0.99 ** math.ceil(steps)
    assert steps_to_norm(1.0, 0.5, 1.01) == math.inf
    assert steps_to_norm(1.0, 1.0, 0.9) == 0
    with pytest.raises(ValueError, match=r"Invalid norm: 0\.0"):
        steps_to_norm(0.0, 1.0, 0.9)


# Measures that do not see the scale.


def classifier():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    return net, x


def test_the_fisher_trace_is_that_of_all_labels_weighed():
    """tr F = mean over examples of Σ_y p(y)‖∇ log p(y)‖², gone through label by label."""
    net, x = classifier()
    w, view = net[0].weight, View.channel()
    exact = torch.zeros(4, dtype=torch.float64)
    for example in x:
        scores = net(example[None]).log_softmax(1)[0]
        for score in scores:
            (g,) = torch.autograd.grad(score, w, retain_graph=True)
            exact += score.exp().detach() * g.flatten(1).square().sum(1)
    exact *= w.detach().square().sum(1) / len(x)
    draws = 1500
    found = scaled_fisher_trace(lambda: net(x), {w: view}, draws=draws)[w]
    # A draw's relative spread is below 2 here; five standard errors.
    torch.testing.assert_close(found, exact, rtol=5 * 2 / math.sqrt(draws), atol=0)


def test_the_measures_do_not_see_the_scale_of_an_invariant_weight():
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 6, 6).double(), torch.randint(4, (16,))
    found = []
    for c in (1.0, 30.0):
        torch.manual_seed(1)
        norm = nn.BatchNorm2d(5, eps=1e-300)
        net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), norm, nn.Flatten(), nn.Linear(80, 4))
        net = net.double()
        w, view = net[0].weight, View.channel()
        with torch.no_grad():
            w.mul_(c)

        def gradient(part, net=net, w=w):
            loss = nn.functional.cross_entropy(net(x[part]), y[part])
            return torch.autograd.grad(loss, w)[0]

        one, other = gradient(slice(0, 8)), gradient(slice(8, 16))
        found.append(
            torch.stack(
                [
                    scaled_gradient_norm(w, one, view),
                    gradient_cosine(one, other, view),
                    scaled_fisher_trace(
                        lambda net=net: net(x),
                        {w: view},
                        draws=3,
                        generator=torch.Generator().manual_seed(5),
                    )[w],
                ]
            )
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="Invalid draws: 0"):
        scaled_fisher_trace(lambda: x, {}, draws=0)
