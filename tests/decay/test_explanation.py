"""What explain() says is what happens."""

import math

import pytest
import torch
from torch import nn

import normwise as nw
from normwise import theory
from normwise.decay import Cautious, Corrected, Decoupled, by_rules, explain

LR, DECAY, MU = 0.1, 0.02, 0.9

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=LR, weight_decay=DECAY),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.5, weight_decay=DECAY),
    "SGD, dampened": lambda p: torch.optim.SGD(
        p, lr=LR, momentum=0.5, dampening=0.5, weight_decay=DECAY
    ),
    "SGDW": lambda p: nw.SGDW(p, lr=LR, momentum=MU, weight_decay=DECAY),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=DECAY),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=LR, weight_decay=DECAY, decoupled_weight_decay=True),
    "AdamP": lambda p: nw.AdamP(p, lr=LR, weight_decay=DECAY, view=None),
    "AdamP, projected": lambda p: nw.AdamP(p, lr=LR, weight_decay=DECAY, view="channel"),
    "SGDP": lambda p: nw.SGDP(p, lr=LR, momentum=MU, weight_decay=DECAY, view=None),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_weight_without_a_gradient_halves_in_the_half_life(kind):
    p = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer = OPTIMIZERS[kind]([p])
    (group,) = explain(optimizer).groups
    norms = []
    for _ in range(100 + round(group.half_life)):
        norms.append(float(p.detach().norm()))
        p.grad = torch.zeros_like(p)
        optimizer.step()
    # From step 100 on, where a buffer has filled.
    expected = 0.5 ** (round(group.half_life) / group.half_life)
    assert float(p.detach().norm()) / norms[100] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("kind", "per_step"), [("SGD", LR * DECAY), ("AdamW", LR * DECAY), ("NAdam", LR * DECAY)]
)
def test_decay_is_said_in_both_conventions(kind, per_step):
    (group,) = explain(OPTIMIZERS[kind]([nn.Parameter(torch.ones(2, 2))])).groups
    assert group.weight_decay == pytest.approx(DECAY)
    assert group.per_step == pytest.approx(per_step)


def test_closed_forms_are_those_of_theory():
    p = nn.Parameter(torch.randn(4, 8, dtype=torch.float64))
    p.grad = torch.randn_like(p)
    square = float((p.detach().norm() * p.grad.norm()) ** 2)
    sgd = torch.optim.SGD([p], lr=LR, momentum=MU, weight_decay=DECAY)
    (group,) = explain(sgd).groups
    expected = theory.sgd_equilibrium(LR, DECAY, square, MU)
    assert group.norm == pytest.approx((expected.norm, expected.norm))
    assert group.angle == pytest.approx(expected.angle)
    adamw = torch.optim.AdamW([p], lr=LR, weight_decay=DECAY)
    (group,) = explain(adamw).groups
    expected = theory.adamw_equilibrium(LR, DECAY, p.numel())
    assert group.norm == pytest.approx((expected.norm, expected.norm))
    assert group.rms == pytest.approx(expected.norm / math.sqrt(p.numel()))
    p.grad = None
    (group,) = explain(sgd).groups
    assert group.norm is None
    assert group.angle == pytest.approx(theory.sgd_equilibrium(LR, DECAY, 1, MU).angle)


# Angles of 0.05 a step or less, small against 1 − momentum.
SETTLED = {
    "SGDW": lambda p: nw.SGDW(p, lr=1e-2, momentum=0.5, weight_decay=0.1),
    "SGD, decoupled": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.5),
    "AdamW": lambda p: torch.optim.AdamW(
        p, lr=1e-2, weight_decay=0.1, betas=(0.5, 0.995), eps=1e-30
    ),
    "AdamP": lambda p: nw.AdamP(
        p, lr=1e-2, weight_decay=1, betas=(0.5, 0.995), view="channel", eps=1e-30
    ),
    "SGDP": lambda p: nw.SGDP(p, lr=1e-2, momentum=0.5, weight_decay=0.5, view="channel"),
}


@pytest.mark.parametrize("kind", SETTLED)
def test_weights_settle_where_it_says(kind):
    """With gradients at random, orthogonal to each slice and as 1/‖w‖; from 1.1 times the norm."""
    generator = torch.Generator().manual_seed(0)
    slices, entries = 16, 200

    def random():
        return torch.randn(slices, entries, dtype=torch.float64, generator=generator)

    def orthogonal(g):
        w = p.detach()
        return g - (g * w).sum(1, keepdim=True) * w / w.square().sum(1, keepdim=True)

    p = nn.Parameter(random())
    optimizer = SETTLED[kind]([p])
    if kind == "SGD, decoupled":
        Decoupled(0.1).attach(optimizer)
    # A gradient at norm 1 has entries − 1 coordinates of variance 1.
    p.grad = p.detach() * math.sqrt(entries - 1) / p.detach().square().sum(1, keepdim=True)
    (group,) = explain(optimizer, _Report({p: nw.View.channel()})).groups
    with torch.no_grad():
        p *= 1.1 * group.norm[0] / p.norm(dim=1, keepdim=True)
    lengths, angles = [], []
    for step in range(3000):
        before = p.detach().clone()
        p.grad = orthogonal(random()) / before.norm(dim=1, keepdim=True)
        optimizer.step()
        if step >= 2000:
            lengths.append(p.detach().norm(dim=1).mean())
            cosine = torch.cosine_similarity(p.detach(), before).clamp(max=1)
            angles.append(torch.acos(cosine).square().mean())
    assert float(torch.stack(lengths).mean()) == pytest.approx(group.norm[0], rel=0.02)
    assert float(torch.stack(angles).mean().sqrt()) == pytest.approx(group.angle, rel=0.02)


class _Report:
    def __init__(self, views):
        self.views = views

    def parameter_views(self):
        return self.views


def test_what_has_no_closed_form_is_not_known():
    p = nn.Parameter(torch.ones(2, 3))
    for optimizer in (
        torch.optim.Adam([p], weight_decay=DECAY),
        torch.optim.RMSprop([p], weight_decay=DECAY),
    ):
        (group,) = explain(optimizer).groups
        assert (group.half_life, group.norm, group.angle) == (None, None, None)
        assert "not known" in str(explain(optimizer))
    nadam = OPTIMIZERS["NAdam"]([p])
    (group,) = explain(nadam).groups
    assert group.norm is None
    assert group.half_life is not None


def test_policies_count():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 2))
    report = nw.analyze(model, torch.randn(8, 4))
    optimizer = torch.optim.AdamW(by_rules(model, 0.1), lr=LR)
    Corrected().attach(optimizer, on=report)
    Cautious(per="step").attach(optimizer, on="all others")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5)
    bias, head, first = explain(optimizer, report).groups
    assert bias.per_step == 0
    assert bias.half_life == math.inf
    assert (first.rule, first.coupling) == ("Corrected", "decoupled")
    assert first.weight_decay == pytest.approx(0.05)
    # The correction keeps the equilibrium where it is at the peak of the schedule.
    assert first.norm[0] == pytest.approx(theory.adamw_equilibrium(LR, 0.1, 4).norm)
    assert (head.rule, head.per_step, head.half_life) == ("Cautious", 0.1, None)
    text = str(explain(optimizer))
    assert "Corrected, decoupled" in text
    assert "upper bound" in text
    assert "group 0 (at most 1-dimensional)" in text


def test_the_shifted_regularizer_is_named():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    nw.weight_normalize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    nw.EpsilonShiftedL2(model, weight_decay=1e-4, eps=1e-3).attach(optimizer)
    assert "EpsilonShiftedL2 decays weights of group 1 too" in str(explain(optimizer))


def test_without_a_learning_rate_nothing_decays():
    p = nn.Parameter(torch.ones(2, 3))
    (group,) = explain(torch.optim.AdamW([p], lr=0.0)).groups
    assert group.half_life == math.inf
    assert str(explain(torch.optim.Rprop([p]))).count("none") == 1
