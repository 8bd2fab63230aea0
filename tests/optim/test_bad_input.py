"""Bad input is a one-line error that names the value and what is allowed."""

import math

import pytest
import torch
from optimizer_table import CLASSES, PROJECTING

import normwise
from normwise import View

BOTH = [CLASSES[name] for name in PROJECTING]


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    return text


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("option", ["lr", "eps", "weight_decay", "delta", "wd_ratio"])
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, -math.inf])
def test_hyperparameters_must_be_finite_and_not_negative(make, option, value):
    w = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="Invalid") as error:
        make([w], **{option: value})
    one_line(error, str(value), "finite and 0 or more")
    with pytest.raises(ValueError, match="Invalid"):
        make([{"params": [w], option: value}])


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan])
def test_momentum_and_betas_must_be_below_one(value):
    w = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="momentum") as error:
        normwise.SGDP([w], momentum=value)
    one_line(error, str(value), "below 1")
    for i in range(2):
        betas = [0.9, 0.9]
        betas[i] = value
        with pytest.raises(ValueError, match=f"index {i}") as error:
            normwise.AdamP([w], betas=tuple(betas))
        one_line(error, str(value), "below 1")


def test_nesterov_needs_momentum_without_dampening():
    w = torch.ones(2, 2, requires_grad=True)
    for options in ({}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(ValueError, match="Nesterov momentum requires"):
            normwise.SGDP([w], nesterov=True, **options)


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(
    ("view", "error"), [("rows", ValueError), (3, ValueError), ("blocks(3)", ValueError)]
)
def test_a_view_must_exist_and_fit(make, view, error):
    with pytest.raises(error, match="view"):
        make([torch.ones(4, 2, requires_grad=True)], view=view)


@pytest.mark.parametrize("make", BOTH)
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(make):
    optimizer = make([torch.ones(4, 2, requires_grad=True)])
    with pytest.raises(ValueError, match="does not fit"):
        optimizer.add_param_group(
            {"params": [torch.ones(5, 2, requires_grad=True)], "view": View.blocks(2)}
        )
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", BOTH)
def test_a_typo_in_a_group_is_an_error_that_suggests_the_option(make):
    with pytest.raises(ValueError, match="weight_dcay") as error:
        make([{"params": [torch.ones(2, requires_grad=True)], "weight_dcay": 0.1}])
    one_line(error, "did you mean 'weight_decay'?")


@pytest.mark.parametrize("make", BOTH)
def test_a_sparse_gradient_is_refused(make):
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse") as error:
        make(embedding.parameters()).step()
    one_line(error, "(5, 3)")
