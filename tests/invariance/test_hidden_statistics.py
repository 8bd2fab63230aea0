"""Epsilons, statistics and states that hide an invariance or feign one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normwise.invariance import analyze


class Normalized(nn.Module):
    """A layer whose output a function normalizes, before a curved one and another layer."""

    def __init__(self, normalize):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
        self.normalize = normalize

    def forward(self, x):
        return self.b(torch.tanh(self.normalize(self.a(x))))


def square(y):
    return y.pow(2).mean(-1, keepdim=True)


def added_in_place(y):
    v = square(y)
    v.add_(1e-5)
    return y * v.rsqrt()


def assigned_in_place(y):
    v = square(y)
    v += 1e-5
    return y / v.sqrt_()


ADDED = {
    "in place": added_in_place,
    "by assignment": assigned_in_place,
    "with alpha": lambda y: y / torch.sqrt(torch.add(square(y), 1, alpha=1e-5)),
    "as a tensor": lambda y: y / torch.sqrt(torch.add(square(y), torch.tensor(1e-5))),
    "to a mean of sizes": lambda y: y / (y.abs().mean(-1, keepdim=True) + 1e-5),
    "to a maximum": lambda y: y / (y.abs().amax(-1, keepdim=True) + 1e-5),
    "to a pooled statistic": lambda y: (
        y * torch.rsqrt(F.avg_pool1d(y.pow(2).unsqueeze(1), 8).squeeze(1) + 1e-5)
    ),
    "to a matrix product": lambda y: (
        y * torch.rsqrt(y.pow(2) @ torch.full((8, 1), 1 / 8, dtype=y.dtype) + 1e-5)
    ),
    "to a running sum": lambda y: y / torch.sqrt(y.square().cumsum(-1)[:, -1:] + 1e-5),
    "to a power of a tensor": lambda y: y * (square(y) + 1e-5) ** torch.tensor(-0.5),
}


@pytest.mark.parametrize("how", ADDED)
def test_an_epsilon_is_found_wherever_it_is_added(how):
    torch.manual_seed(0)
    report = analyze(Normalized(ADDED[how]), torch.randn(12, 6))
    assert report["a.weight"].verdict == "layer"
    assert not report.notes


@pytest.mark.parametrize(
    "normalize",
    [
        lambda y: y / torch.hypot(y.norm(dim=-1, keepdim=True), torch.full((1,), 1e-3).to(y)),
        lambda y: y * torch.rsqrt(torch.addcmul(torch.full((1,), 1e-5).to(y), y, y).mean(-1, True)),
    ],
)
def test_an_epsilon_out_of_reach_is_told_as_a_near_miss(normalize):
    torch.manual_seed(0)
    report = analyze(Normalized(normalize), torch.randn(12, 6))
    assert report["a.weight"].verdict == "none"
    assert report.notes[0].startswith("a.weight is nearly scale-invariant (layer, residual")


@pytest.mark.parametrize(
    "curve",
    [lambda y: y / (1 + y.abs().sum(-1, keepdim=True)), lambda y: 1 / (1 + (-y).exp())],
)
def test_a_number_that_is_not_small_is_part_of_the_function(curve):
    torch.manual_seed(0)
    report = analyze(Normalized(curve), torch.randn(12, 6))
    assert report["a.weight"].verdict == "none"
    assert not report.notes


class OwnStatistics(nn.Module):
    """Batch normalization by hand, with running statistics in buffers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x):
        y = self.a(x)
        if self.training:
            with torch.no_grad():
                self.mean += 0.1 * (y.mean(0) - self.mean)
                self.var += 0.1 * (y.var(0) - self.var)
        return self.b(torch.relu((y - self.mean) / self.var.sqrt()))


def test_statistics_that_training_changes_are_moved_where_they_are_used_as_they_are():
    """At a mean of zero rows and columns trade, five steps later they do not."""
    torch.manual_seed(0)
    model, x = OwnStatistics(), torch.randn(30, 6)
    report = analyze(model, x, mode="eval")
    assert not report.symmetries
    assert model.mean.count_nonzero() == 0


def test_a_cell_whose_state_is_zero_is_not_said_to_remove_anything():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.norm, self.out = nn.GRUCell(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.norm(self.cell(x)))

    row = analyze(Cell(), torch.randn(9, 6))["cell.weight_hh"]
    assert row.kind == "no effect"
    assert row.why == "zero gradient; its change does not leave `cell` (GRUCell)"


def test_a_bias_before_group_norm_is_invariant_with_its_weight_group_by_group():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(), nn.Linear(288, 3)
    )
    report = analyze(net, torch.randn(4, 3, 8, 8))
    (family,) = report.symmetries
    assert str(family) == "0.weight rows, in runs of 4, 0.bias entries, in runs of 4: 2 units"


@pytest.mark.parametrize("batch", [torch.randn(0, 6), lambda model: model(torch.randn(0, 6)).sum()])
def test_a_batch_without_samples_is_refused(batch):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="give a batch with samples"):
        analyze(net, batch)


@pytest.mark.parametrize(("closed", "unseen"), [(None, 0), (3, 1)])
def test_units_that_open_late_or_not_at_all_do_not_tear_a_family_apart(closed, unseen):
    """Few samples: some positions of a channel show a gradient at one point and not at another."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
    )
    if closed is not None:
        net[1].bias.data[closed] = -100.0
    _, family = analyze(net, torch.randn(4, 3, 8, 8)).symmetries
    assert (family.units, family.unseen) == (8, unseen)
    assert str(family).startswith("1.weight, 1.bias ↔ 4.weight columns, in runs of 36: 8 units")
