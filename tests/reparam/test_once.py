"""Effective weights that are computed once a step."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normwise.reparam import WeightParametrization, computed_once, weight_normalize


class Twice(nn.Module):
    """One layer that is used twice in a call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.layer(x)))).sum()


def converted():
    model = Twice().double()
    weight_normalize(model)
    return model


@pytest.fixture
def computations(monkeypatch):
    """The number of effective weights that were computed."""
    counts = []
    owner = weight_normalize.__globals__["WeightNorm"]
    compute = owner._effective
    monkeypatch.setattr(owner, "_effective", lambda *args: counts.append(1) or compute(*args))
    return counts


def test_gradients_of_several_backward_passes_are_those_without_it(computations):
    model, other = converted(), None
    other = copy.deepcopy(model)
    computations.clear()
    parts = [torch.randn(3, 4, dtype=torch.float64) for _ in range(3)]
    for part in parts:
        model(part).backward()
    assert len(computations) == 6
    computations.clear()
    with computed_once(other):
        for part in parts:
            with torch.no_grad():
                other(part)
            other(part).backward()
    assert len(computations) == 1
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_torchs_cache_is_not_enough():
    """Why there is an own context: the cache confuses a module with its copy (torch 2.13)."""
    model = converted()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer.parametrizations.weight.original0.mul_(2)
    with computed_once(model), computed_once(other):
        torch.testing.assert_close(2 * model.layer.weight, other.layer.weight)
    with parametrize.cached():
        model.layer.weight  # noqa: B018 -- the access is the use
        torch.manual_seed(0)
        model(torch.randn(1, 4, dtype=torch.float64)).backward()
        with pytest.raises(RuntimeError, match="second time"):
            model(torch.randn(1, 4, dtype=torch.float64)).backward()


def test_a_recurrent_layer_gets_the_gradients_that_it_gets_without_it():
    model = nn.LSTM(3, 4, num_layers=2)
    weight_normalize(model, only=[model])
    x = torch.randn(5, 2, 3)
    model(x)[0].sum().backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    with computed_once(other):
        (other(x)[0].sum() / 2).backward()
        (other(x)[0].sum() / 2).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_step_inside_is_an_error():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gain = model.layer.parametrizations.weight.original0
    gain.grad = torch.ones_like(gain)
    with pytest.raises(RuntimeError, match="changed inside"), computed_once(model):
        optimizer.step()
    assert model.layer.parametrizations.weight[0].held is None


def test_an_error_inside_passes_and_nothing_is_held_after():
    model = converted()
    with pytest.raises(RuntimeError, match="mat1 and mat2"), computed_once(model):
        model(torch.randn(1, 5, dtype=torch.float64))
    owners = [m for m in model.modules() if isinstance(m, WeightParametrization)]
    assert owners
    assert all(owner.held is None for owner in owners)


def test_a_copy_made_inside_is_outside():
    model = converted()
    with computed_once(model):
        other = copy.deepcopy(model)
    assert other.layer.parametrizations.weight[0].held is None
    assert model.layer.parametrizations.weight[0].held is None


def test_entering_twice_or_in_vain_is_an_error():
    model = converted()
    with computed_once(model), pytest.raises(RuntimeError, match="already entered"):
        computed_once(model).__enter__()
    with pytest.raises(ValueError, match="finds no weight"), computed_once(Twice()):
        pass
