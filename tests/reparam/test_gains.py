"""add_gains(): a trainable factor in front of weights, which folds away."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import normwise
from normwise import View


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))


def inputs():
    return torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))


KINDS = ["scalar", "row", "column", ("row", "column")]


@pytest.mark.parametrize("kinds", KINDS)
def test_they_change_nothing_at_first_and_fold_away_at_last(kinds):
    model = network()
    before, keys, weight = model(inputs()), list(model.state_dict()), model[0].weight
    gains = normwise.add_gains(model, {weight: kinds, "3.weight": "scalar"})
    assert torch.equal(model(inputs()), before)
    assert model[0].parametrizations.weight.original is weight  # optimizers and reports keep it
    optimizer = torch.optim.SGD(gains, lr=1.0)
    model(inputs()).square().sum().backward()
    optimizer.step()
    assert all((gain != 1).any() for gain in gains)
    after = model(inputs())
    normwise.fold(model)
    assert type(model[0]) is nn.Conv2d
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(inputs()), after)


def test_the_effective_weight_is_scaled_by_rows_and_columns():
    model = network()
    w = model[0].weight.detach().clone()
    row, column = normwise.add_gains(model, {"0.weight": ["row", "column"]})
    assert (row.shape, column.shape) == ((4,), (3,))
    with torch.no_grad():
        row.copy_(torch.arange(1.0, 5))
        column.copy_(torch.arange(1.0, 4))
    expected = torch.einsum("oihw,o,i->oihw", w, row, column)
    torch.testing.assert_close(model[0].weight, expected)


def test_assigning_an_effective_weight_keeps_the_gain():
    model = network()
    (gain,) = normwise.add_gains(model, {"3.weight": "row"})
    with torch.no_grad():
        gain.fill_(2)
    new = torch.randn(5, 16)
    model[3].weight = new
    assert (gain == 2).all()
    torch.testing.assert_close(model[3].weight, new)


def test_a_gain_has_fewer_than_two_dimensions():
    """So that "all matrices" means no gain."""
    model = network()
    gains = normwise.add_gains(model, dict.fromkeys(["0.weight", "3.weight"], KINDS[3]))
    assert all(gain.ndim < 2 for gain in gains)
    assert set(gains.by_name) <= dict(model.named_parameters()).keys()
    assert "3.weight: column, 16 of them" in str(gains)


def test_weight_normalization_and_a_gain_fold_together():
    model = network()
    normwise.weight_normalize(model, gain=False)
    effective = model[0].weight.detach().clone()
    (gain,) = normwise.add_gains(model, {"0.parametrizations.weight.original": "scalar"})
    with torch.no_grad():
        gain.fill_(3)
    torch.testing.assert_close(model[0].weight, 3 * effective)
    normwise.fold(model)
    torch.testing.assert_close(model[0].weight, 3 * effective)


@dataclass
class Ledger:
    """What a report's ledger says of it."""

    fixed: dict = field(default_factory=dict)
    verdicts: dict = field(default_factory=dict)


@dataclass
class Report:
    ledger: Ledger

    def freedom(self):
        return self.ledger


def test_a_ledger_says_where_gains_are_needed_and_a_report_has_one():
    ledger = Ledger(
        {"0.weight": View.channel(1), "3.weight": View.layer()},
        {"0.weight": "fix with a gain", "0.bias": "leave", "3.weight": "fix with a gain"},
    )
    for source in (ledger, Report(ledger)):
        gains = normwise.add_gains(network(), source)
        assert set(gains.of.values()) == {("0.weight", "column"), ("3.weight", "scalar")}
    ledger.verdicts = dict.fromkeys(ledger.verdicts, "fix")
    assert len(normwise.add_gains(network(), ledger)) == 0


def test_the_ledger_of_a_network_is_one():
    """Of two matrices with SiLU between, both norms matter; with ReLU one gain gives back both."""
    x = torch.randn(7, 6)
    for activation, lost in ((nn.SiLU(), 2), (nn.ReLU(), 1)):
        model = nn.Sequential(nn.Linear(6, 8, bias=False), activation, nn.Linear(8, 3, bias=False))
        report = normwise.analyze(model, x)
        assert report.freedom().lost == lost
        gains = normwise.add_gains(model, report)
        assert [kind for _, kind in gains.of.values()] == ["scalar"] * lost


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"0.weight": "slice"}, "Invalid gain: 'slice'"),
        ({"0.bias": "column"}, r"shape \(4,\) has no columns"),
        ({"conv": "row"}, "'conv' is not one of the model's"),
        ({torch.ones(2, 2): "row"}, r"\(2, 2\) is not one of the model's"),
    ],
)
def test_bad_input_is_a_one_line_error_and_changes_nothing(wanted, message):
    model = network()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        normwise.add_gains(model, {"3.weight": "row", **wanted})
    assert list(model.state_dict()) == keys


def test_shared_weights_and_second_gains_are_refused():
    model = network()
    normwise.add_gains(model, {"0.weight": "row"})
    with pytest.raises(ValueError, match="has a gain already"):
        normwise.add_gains(model, {"0.parametrizations.weight.original": "row"})
    tied = nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 5)])
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"0\.weight is shared by 2 modules"):
        normwise.add_gains(tied, {"0.weight": "row"})
