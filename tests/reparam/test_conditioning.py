"""Conditioning by rows, columns and both, and what it does for the condition number."""

import copy
import math

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.reparam import (
    ColumnConditioning,
    RowColumnConditioning,
    WeightNorm,
    condition_weights,
)


def matrix(rows, columns):
    return torch.randn(rows, columns, dtype=torch.float64)


def scales(n, spread=3.0):
    return (spread * torch.randn(n, dtype=torch.float64)).exp()


def kappa(w):
    return float(torch.linalg.cond(w))


@pytest.mark.parametrize("n", [3, 6, 12])
def test_no_other_scaling_of_the_rows_does_better_by_more_than_sqrt_n(n):
    """Van der Sluis: κ(DW) ≤ √n·κ(D′W) for every diagonal D′."""
    for _ in range(40):
        w = scales(n)[:, None] * matrix(n, n)
        conditioned = kappa(WeightNorm(gain=False)(w))
        others = min(kappa(scales(n, spread)[:, None] * w) for spread in (0.1, 1, 3))
        assert conditioned <= math.sqrt(n) * min(others, kappa(w)) * (1 + 1e-9)


def test_rows_help_against_scales_of_rows_and_columns_against_scales_of_columns():
    base, d = matrix(64, 64), scales(64)
    rows, columns = WeightNorm(gain=False), ColumnConditioning(nw.View.channel(1))
    assert kappa(rows(d[:, None] * base)) < kappa(d[:, None] * base) / 100
    assert kappa(columns(base * d)) < kappa(base * d) / 100
    assert kappa(rows(base * d)) > kappa(base * d) / 100
    assert kappa(columns(d[:, None] * base)) > kappa(d[:, None] * base) / 100


def test_both_help_against_scales_on_both_sides():
    base = scales(64)[:, None] * matrix(64, 64) * scales(64)
    both = kappa(RowColumnConditioning(sweeps=5)(base))
    assert both < kappa(base) / 1e4
    assert both < kappa(WeightNorm(gain=False)(base)) / 10


def test_rows_have_norm_1_and_columns_come_to_equal_norms():
    w = scales(6)[:, None] * matrix(6, 9) * scales(9)
    spread = []
    for sweeps in (1, 5, 60):
        conditioned = RowColumnConditioning(sweeps=sweeps)(w)
        torch.testing.assert_close(conditioned.norm(dim=1), torch.ones(6, dtype=torch.float64))
        columns = conditioned.norm(dim=0)
        spread.append(float(columns.max() / columns.min()) - 1)
    assert spread[0] > spread[1] > spread[2]
    assert spread[2] < 1e-4


@pytest.mark.parametrize(
    ("form", "view"), [("rows", "channel"), ("columns", "channel(1)"), ("both", "channel")]
)
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 4), nn.Conv1d(5, 4, 3), nn.ConvTranspose1d(5, 4, 3)],
    ids=["linear", "convolution", "transposed"],
)
def test_the_analysis_names_the_view_of_each_form(form, view, layer):
    """Of both, the rows, divided first; of a transposed convolution, the other dimension."""
    model = nn.Sequential(copy.deepcopy(layer))
    report = condition_weights(model, form, only=["*"])
    if isinstance(layer, nn.ConvTranspose1d):
        view = {"channel": "channel(1)", "channel(1)": "channel"}[view]
    x = torch.randn(3, 5) if isinstance(layer, nn.Linear) else torch.randn(3, 5, 6)
    row = nw.analyze(model, x)["0.parametrizations.weight.original"]
    assert row.verdict == view
    assert report.weights[0].view == view


@pytest.mark.parametrize("form", ["columns", "both"])
def test_the_groups_of_a_convolution_are_weights_of_their_own(form):
    layer = nn.Conv1d(4, 6, 3, groups=2, bias=False).double()
    one = nn.Sequential(copy.deepcopy(layer))
    condition_weights(one, form, only=["*"])
    for group in range(2):
        alone = nn.Sequential(nn.Conv1d(2, 3, 3, bias=False).double())
        alone[0].weight = nn.Parameter(layer.weight.detach()[3 * group : 3 * group + 3].clone())
        condition_weights(alone, form, only=["*"])
        torch.testing.assert_close(one[0].weight[3 * group : 3 * group + 3], alone[0].weight)


@pytest.mark.parametrize("form", ["rows", "columns", "both"])
def test_it_can_be_put_on_loaded_and_folded(form):
    def network():
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))

    model, x = network(), torch.randn(3, 5)
    plain = copy.deepcopy(model.state_dict())
    assert condition_weights(model, form).converted == ("0.weight", "2.weight")
    before = model(x)
    other = network()
    condition_weights(other, form)
    other.load_state_dict(plain)
    torch.testing.assert_close(other(x), before)
    nw.fold(model)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("view", [nw.View.channel(), nw.View.channel(1)])
def test_both_pass_gradcheck_and_are_orthogonal_along_the_rows(view):
    w = torch.randn(3, 4, 2, dtype=torch.float64).requires_grad_()
    both = RowColumnConditioning(view, sweeps=2)
    assert torch.autograd.gradcheck(both, w)
    effective = both(w)
    (g,) = torch.autograd.grad(effective, w, torch.randn_like(effective))
    cosines = nw.geometry.cosine(g, w.detach(), view)
    assert float(cosines.abs().max()) < 1e-13


def test_bad_options_are_told():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="Invalid form: 'diagonal'"):
        condition_weights(model, "diagonal")
    with pytest.raises(ValueError, match="Invalid sweeps: 0"):
        condition_weights(model, "both", sweeps=0)
    with pytest.raises(ValueError, match="Invalid view of rows: layer"):
        RowColumnConditioning(nw.View.layer())
