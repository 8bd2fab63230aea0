"""A wrong type is told as a wrong value is: one line, with the value."""

import re

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.decay import (
    L2,
    Corrected,
    Cosine,
    DecayScheduler,
    Decoupled,
    EpsilonShiftedL2,
    Restarts,
    Rule,
    by_rules,
    early,
    late,
    normalized,
)


def normalized_network():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    nw.weight_normalize(model)
    return model


def optimizer():
    return torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: L2("0.1"),
            "Invalid weight_decay value: '0.1'; must be a number, finite and 0 or more",
        ),
        (lambda: L2(True), "Invalid weight_decay value: True"),
        (lambda: Decoupled([0.1]), "Invalid weight_decay value: [0.1]"),
        (lambda: Decoupled(0.1, per=3), "Invalid per: 3"),
        (
            lambda: Corrected(max_lr="1"),
            "Invalid max_lr: '1'; must be a number, finite and above 0",
        ),
        (lambda: early("3"), "Invalid number of steps: '3'; must be a whole number"),
        (lambda: early(2.5), "Invalid number of steps: 2.5"),
        (lambda: late("3"), "Invalid window: from '3' to inf"),
        (lambda: Cosine(None), "Invalid number of steps: None"),
        (lambda: Restarts(3, 1.5), "Invalid factor: 1.5"),
        (lambda: Rule("0", max_ndim=1), "Invalid weight_decay value: '0'"),
        (lambda: Rule(0.0, names=3), "Invalid names: 3; must be a pattern"),
        (lambda: Rule(0.0, modules="Linear"), "Invalid modules: 'Linear'; must be a class"),
        (lambda: Rule(0.0, max_ndim="1"), "Invalid max_ndim: '1'; must be a whole number"),
        (lambda: by_rules(nn.Linear(2, 2), 0.1, ["bias"]), "Invalid rule: 'bias'; must be a"),
        (lambda: normalized("0.1", 1, 1, 1), "Invalid norm_weight_decay: '0.1'"),
        (
            lambda: normalized(0.1, "1", 1, 1),
            "Invalid batch_size: '1'; must be a number, finite and above 0",
        ),
        (lambda: DecayScheduler(optimizer(), 3), "Invalid schedule: 3; must be a function"),
        (lambda: DecayScheduler(optimizer(), [3]), "Invalid schedule: [3]; must be a function"),
        (
            lambda: EpsilonShiftedL2([], weight_decay=0.1, eps=0.1),
            "EpsilonShiftedL2 was given no module",
        ),
        (
            lambda: EpsilonShiftedL2([3], weight_decay=0.1, eps=0.1),
            "Invalid modules: 3 is neither a module nor a group",
        ),
        (
            lambda: EpsilonShiftedL2(3, weight_decay=0.1, eps=0.1),
            "Invalid modules: 3 is neither a module nor a group",
        ),
        (
            lambda: EpsilonShiftedL2(normalized_network(), weight_decay="0.1", eps=0.1),
            "Invalid weight_decay value: '0.1'",
        ),
        (
            lambda: EpsilonShiftedL2(normalized_network(), weight_decay=0.1, eps="0.1"),
            "Invalid eps: '0.1'; must be a number, finite and above 0",
        ),
    ],
)
def test_a_wrong_type_is_told_in_one_line(make, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as raised:
        make()
    assert "\n" not in str(raised.value)
