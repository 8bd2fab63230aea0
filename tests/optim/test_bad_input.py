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


ALL = [*CLASSES.values()]
FLAGS = ["nesterov", "maximize", "differentiable", "stochastic_rounding", "foreach", "fused"]


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("option", FLAGS)
@pytest.mark.parametrize("value", ["no", "yes", 1, [], torch.tensor(True)])
def test_a_switch_is_true_or_false(make, option, value):
    with pytest.raises(ValueError, match=f"Invalid {option}") as error:
        make([torch.ones(2, 2, requires_grad=True)], **{option: value})
    one_line(error, repr(value), "must be True or False")


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", ["0.1", None, [0.1], (1e-3,), True, 1j])
def test_a_number_is_a_number(make, option, value):
    with pytest.raises(ValueError, match="Invalid") as error:
        make([torch.ones(2, 2, requires_grad=True)], **{option: value})
    one_line(error, repr(value), "must be a number, finite and 0 or more")


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999), 0.9, "09", None, {0.9: 0.99}])
def test_betas_are_two_numbers(betas):
    with pytest.raises(ValueError, match="Invalid betas") as error:
        normwise.AdamP([torch.ones(2, 2, requires_grad=True)], betas=betas)
    one_line(error, repr(betas), "must be two numbers")


@pytest.mark.parametrize("betas", [("0.9", 0.99), (0.9, None), (0.9, True)])
def test_each_beta_is_a_number(betas):
    with pytest.raises(ValueError, match="beta parameter at index") as error:
        normwise.AdamP([torch.ones(2, 2, requires_grad=True)], betas=betas)
    one_line(error, "must be a number, 0 or more and below 1")


@pytest.mark.parametrize("value", [["channel"], 3, True, b"auto"])
def test_a_view_is_a_view_or_its_spelling(value):
    with pytest.raises(ValueError, match="Invalid view") as error:
        normwise.AdamP([torch.ones(2, 2, requires_grad=True)], view=value)
    one_line(error, repr(value))


@pytest.mark.parametrize("value", ["Paper", None, 1])
def test_a_variant_is_one_of_two(value):
    with pytest.raises(ValueError, match="Invalid variant") as error:
        normwise.SGDW([torch.ones(2, 2, requires_grad=True)], variant=value)
    one_line(error, repr(value), "must be 'paper' or 'official'")


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("params", [[], [3], torch.ones(2), [{"params": ["w"]}]])
def test_options_are_looked_at_before_parameters(make, params):
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        make(params, lr=-1)


@pytest.mark.parametrize("make", ALL)
def test_fused_is_refused_at_once_for_weights_without_memory(make):
    with pytest.raises(RuntimeError, match="is on meta"):
        make([torch.ones(2, 2, device="meta", requires_grad=True)], fused=True)


@pytest.mark.parametrize("make", ALL)
def test_keys_of_wrappers_are_kept_in_groups(make):
    """As SAM does it, which hands its own groups to the optimizer that it wraps."""
    w = torch.ones(2, 2, requires_grad=True)
    optimizer = make([{"params": [w], "rho": 0.05, "adaptive": False, "layer": 3}])
    optimizer.param_groups[0]["ema"] = 0.5  # and later
    w.grad = torch.ones_like(w)
    optimizer.step()
    other = make([w.detach().clone().requires_grad_()])
    other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert [group[key] for key in ("rho", "adaptive", "layer", "ema")] == [0.05, False, 3, 0.5]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("weight_decy", "weight_decay"),
        ("weightdecay", "weight_decay"),
        ("decay", "weight_decay"),
        ("LR", "lr"),
        ("lrs", "lr"),
        ("beta", "betas"),
        ("views", "view"),
        ("nrom", "norm"),
        ("wd_rato", "wd_ratio"),
        ("maximise", "maximize"),
    ],
)
def test_what_is_nearly_an_option_is_a_misspelling(key, meant):
    with pytest.raises(ValueError, match="Invalid option") as error:
        normwise.AdamP([{"params": [torch.ones(2, requires_grad=True)], key: 0.1}])
    one_line(error, repr(key), f"did you mean {meant!r}?")


@pytest.mark.parametrize("name", ["sgdp", "sgdw"])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_momentum_of_0_keeps_no_state(name, foreach):
    w = torch.ones(2, 2, requires_grad=True)
    w.grad = torch.ones_like(w)
    optimizer = CLASSES[name]([w], foreach=foreach)
    optimizer.step()
    assert not optimizer.state
    assert optimizer.state_dict()["state"] == {}
