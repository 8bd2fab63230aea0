"""Parameter groups by rules and from an analysis."""

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.decay import Rule, by_analysis, by_rules


def network():
    return nn.Sequential(
        nn.Embedding(5, 4),
        nn.Linear(4, 6, bias=False),
        nn.LayerNorm(6),
        nn.ReLU(),
        nn.Linear(6, 2),
    )


def names(groups):
    return {g["name"]: ([n for n, _ in g["params"]], g["weight_decay"]) for g in groups}


def test_what_has_one_dimension_is_not_decayed_by_default():
    assert names(by_rules(network(), 0.1)) == {
        "at most 1-dimensional": (["2.weight", "2.bias", "4.bias"], 0.0),
        "all others": (["0.weight", "1.weight", "4.weight"], 0.1),
    }


def test_the_first_rule_that_matches_wins():
    rules = [
        Rule(0.0, modules=nn.Embedding),
        Rule(0.3, names="4.*", modules=(nn.Linear, nn.Conv2d), max_ndim=2),
        Rule(0.0, names=("*.bias", "2.weight")),
    ]
    assert names(by_rules(network(), 0.1, rules)) == {
        "in Embedding": (["0.weight"], 0.0),
        "named 4.*, in Linear or Conv2d, at most 2-dimensional": (["4.weight", "4.bias"], 0.3),
        "named *.bias or 2.weight": (["2.weight", "2.bias"], 0.0),
        "all others": (["1.weight"], 0.1),
    }


def test_an_analysis_tells_invariant_weights_from_others():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 2))
    report = nw.analyze(model, torch.randn(8, 4))
    assert names(by_analysis(model, report, invariant=0.1, plain=0.01)) == {
        "scale-invariant": (["0.weight"], 0.1),
        "plain": (["2.weight"], 0.01),
        "vector": (["1.weight", "1.bias", "2.bias"], 0.0),
    }
    with pytest.raises(ValueError, match=r"the report has no parameter '3.weight'"):
        by_analysis(nn.Sequential(*model, nn.Linear(2, 2)), report, invariant=1, plain=1)


def test_the_account_says_what_falls_where():
    text = str(by_rules(network(), 0.1))
    assert "at most 1-dimensional: λ = 0, 3 parameters, 14 entries" in text
    assert "    1.weight  6×4" in text


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, nw.AdamP, nw.SGDW])
def test_optimizers_take_the_groups_and_know_the_names(kind):
    optimizer = kind(by_rules(network(), 0.1), lr=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1]
    assert optimizer.param_groups[0]["param_names"] == ["2.weight", "2.bias", "4.bias"]


def test_frozen_parameters_are_in_no_group_and_shared_ones_in_one():
    model = network()
    model[1].weight.requires_grad_(False)
    model.append(model[4])
    listed = [n for g in by_rules(model, 0.1) for n, _ in g["params"]]
    assert sorted(listed) == ["0.weight", "2.bias", "2.weight", "4.bias", "4.weight"]


def test_bad_rules_are_errors():
    with pytest.raises(ValueError, match="Invalid weight_decay value: -1"):
        by_rules(network(), -1)
    with pytest.raises(ValueError, match="Invalid weight_decay value: nan"):
        Rule(float("nan"), max_ndim=1)
    with pytest.raises(ValueError, match="a rule needs a condition"):
        Rule(0.0)
    with pytest.raises(ValueError, match=r"no parameter falls to the rule: named \*.bais"):
        by_rules(network(), 0.1, [Rule(0.0, names="*.bais")])
