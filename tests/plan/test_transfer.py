"""Timescales of decay, and rules by which η and λ are carried over."""

import math

import pytest
import torch

import normwise as nw
from normwise.plan import TRANSFERS, Run, carry, timescales

RUN = Run(lr=1e-3, weight_decay=0.1, batch=2.0**15, tokens=2.0**28, width=256, parameters=1e7)


def test_decay_is_a_moving_average_whose_timescale_and_half_life_are_as_said():
    w = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0.2, eps=1e30)  # decay alone
    (t,) = timescales(optimizer, steps=500, batch=64)
    assert (t.steps, t.tokens, t.share) == pytest.approx((50, 3200, 0.1))
    steps = round(t.half_life)
    for _ in range(steps):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert float(w.detach()[0]) == pytest.approx(0.5, rel=0.01)


def test_groups_without_decay_remember_everything_and_are_named():
    p, q = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = nw.AdamP(
        [{"params": [p], "name": "matrices"}, {"params": [q], "name": "gains", "weight_decay": 0}],
        lr=0.01,
        weight_decay=0.1,
        view=None,
    )
    rows = [line.split() for line in str(timescales(optimizer)).splitlines()]
    assert ["matrices", "1,000", "693", "–", "–"] in rows
    assert ["gains", "everything", "–", "–", "–"] in rows
    with pytest.raises(ValueError, match="Invalid steps: 0"):
        timescales(optimizer, steps=0)


def test_a_constant_timescale_makes_decay_go_with_the_batch_and_against_the_horizon():
    assert carry(RUN, "constant timescale", batch=4 * RUN.batch).weight_decay == pytest.approx(0.4)
    longer = carry(RUN, "constant timescale", tokens=4 * RUN.tokens)
    assert (longer.lr, longer.weight_decay) == pytest.approx((1e-3, 0.025))
    assert longer.timescale == pytest.approx(RUN.timescale)


def test_power_lines_shorten_the_timescale_as_tokens_per_parameter_grow():
    # alone, another batch keeps τ
    assert carry(RUN, "power lines", batch=2 * RUN.batch).timescale == pytest.approx(RUN.timescale)
    more = carry(RUN, "power lines", tokens=10 * RUN.tokens)
    assert more.timescale / RUN.timescale == pytest.approx(10**-0.527)
    both = carry(RUN, "power lines", tokens=10 * RUN.tokens, parameters=10 * RUN.parameters)
    assert both.timescale == pytest.approx(RUN.timescale)


@pytest.mark.parametrize(
    ("rule", "product"),
    [("muP", 1 / 4), ("square-root decay", 1 / 2), ("independent decay", 1), ("keep", 1)],
)
def test_rules_for_the_width_differ_in_what_becomes_of_the_product(rule, product):
    wide = carry(RUN, rule, width=1024)
    assert wide.lr * wide.weight_decay == pytest.approx(product * RUN.lr * RUN.weight_decay)
    assert wide.lr == RUN.lr / (1 if rule == "keep" else 4)


def test_fixed_norms_take_a_relative_step_that_falls_with_the_tokens_alone():
    sphere = Run(lr=0.02, weight_decay=0.0, batch=1.0, tokens=1e6, width=64)
    new = carry(sphere, "hypersphere", tokens=1e7, width=512)
    assert (new.lr, new.weight_decay) == (pytest.approx(0.02 * 10**-0.32), 0.0)
    assert math.isinf(new.timescale)
    with pytest.raises(ValueError, match=r"weight_decay is 0\.1"):
        carry(RUN, "hypersphere", tokens=1e9)


def test_rules_are_never_mixed_silently():
    with pytest.raises(ValueError, match="says nothing of another width; carry that over by muP"):
        carry(RUN, "constant timescale", batch=2.0**16, width=512)
    with pytest.raises(ValueError, match="says nothing of another batch"):
        carry(RUN, "independent decay", batch=2.0**16, width=512)
    with pytest.raises(ValueError, match="must be one of keep, constant timescale"):
        carry(RUN, "linear")
    both = carry(carry(RUN, "independent decay", width=512), "constant timescale", batch=2.0**16)
    assert both.rules == ("independent decay", "constant timescale")
    assert all(t.source and t.words for t in TRANSFERS.values())


def test_what_a_rule_needs_it_asks_for():
    with pytest.raises(ValueError, match="needs parameters="):
        carry(Run(1e-3, 0.1, 1.0, 10.0), "power lines", tokens=20.0)
    with pytest.raises(ValueError, match="needs width="):
        carry(Run(1e-3, 0.1, 1.0, 10.0), "muP", width=2)
    with pytest.raises(ValueError, match="Invalid lr: 0"):
        Run(0, 0.1, 1.0, 10.0)
