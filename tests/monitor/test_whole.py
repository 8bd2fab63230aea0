"""Quantities of whole weights: what they measure, and that each has a schedule of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.monitor import (
    Imbalance,
    L2Share,
    Monitor,
    OfEach,
    OscillationRate,
    UtilizedRank,
    cosines,
    every,
    spectral,
)
from normwise.reparam import StatsQ, reparametrize
from normwise.theory import condition_number


def steps_of(monitor, name):
    """After which steps a quantity was measured."""
    monitor.fetch()
    steps, values = monitor.series(name)
    return [step for step, v in zip(steps, values, strict=True) if not v.isnan().all()]


def test_each_quantity_keeps_its_own_schedule(training):
    sizes = OfEach("size", lambda w: w.square().sum(), every(3))
    monitor = Monitor(
        training.model, training.optimizer, every=4, of_weights=[sizes, *spectral(every(5))]
    )
    training.run(8)
    assert steps_of(monitor, "size") == [1, 3, 6]
    assert steps_of(monitor, "condition_number") == [1, 5]
    assert steps_of(monitor, "norm") == [1, 3, 4, 5, 6, 8]
    monitor.close()


def test_spectral_quantities_are_those_of_the_weights_after_the_step(training):
    with Monitor(training.model, training.optimizer, of_weights=spectral()) as monitor:
        training.step()
    for name, value in monitor.history[0]["condition_number"].items():
        s = torch.linalg.svdvals(training.model.get_parameter(name).detach().flatten(1))
        assert value == pytest.approx(float(s[0] / s[-1]), rel=1e-5)
        assert monitor.history[0]["log_spread"][name] == pytest.approx(
            float(s.log().var(correction=0)), rel=1e-4
        )
        assert 1 <= monitor.history[0]["stable_rank"][name] <= len(s)


def test_cosines_are_those_of_all_pairs_of_slices(training):
    with Monitor(training.model, training.optimizer, of_weights=cosines()) as monitor:
        training.step()
    for name, value in monitor.history[0]["mean_cosine"].items():
        rows = torch.nn.functional.normalize(training.model.get_parameter(name).flatten(1), dim=1)
        pairs = torch.tril_indices(len(rows), len(rows), -1)
        all_of_them = (rows @ rows.T)[pairs[0], pairs[1]].detach()
        assert value == pytest.approx(float(all_of_them.mean()), abs=1e-5)
        absolute = monitor.history[0]["mean_absolute_cosine"][name]
        assert absolute == pytest.approx(float(all_of_them.abs().mean()), abs=1e-5)


def test_of_a_parametrized_weight_it_is_the_one_that_acts():
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        model[0].weight *= torch.logspace(-3, 3, 6).unsqueeze(1)
    nw.weight_normalize(model, gain=False, only=["*"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, of_weights=spectral()) as monitor:
        model(torch.randn(2, 6)).square().sum().backward()
        optimizer.step()
    (value,) = monitor.history[0]["condition_number"].values()
    assert value == pytest.approx(float(condition_number(model[0].weight.detach())), rel=1e-4)
    assert value < 1e-2 * float(condition_number(next(model.parameters()).detach()))


def test_measuring_whole_weights_changes_no_bit_of_the_training(make_training):
    plain, watched = make_training(), make_training()
    batch = torch.randn(8, 2, 6, 6)
    report = nw.analyze(watched.model, batch)
    of_weights = [*spectral(every(2)), UtilizedRank([batch], when=every(2)), Imbalance(report)]
    with Monitor(watched.model, watched.optimizer, of_weights=of_weights):
        assert plain.run(5) == watched.run(5)
    states = (t.model.state_dict().values() for t in (plain, watched))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert all(module.training for module in watched.model.modules())


def test_inputs_of_rank_three_use_three_directions_of_a_weight():
    model = nn.Sequential(nn.Linear(8, 12, bias=False))
    inputs = torch.randn(40, 3) @ torch.randn(3, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    used = UtilizedRank([inputs], share=0.999999)
    with Monitor(model, optimizer, of_weights=[used]) as monitor:
        model(inputs).sum().backward()
        optimizer.step()
    assert list(monitor.history[0]["utilized_rank"].values()) == [3 / 8]


def test_oscillation_is_one_for_weights_that_alternate_and_zero_for_those_that_rest():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    reparametrize(model, StatsQ, bits=2, only=["*"])
    (w,) = model.parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rate = OscillationRate(momentum=0.5, when=every(1))
    with torch.no_grad():
        w.copy_(torch.tensor([[1.0, 1.0, -1.0, 0.2]] * 3))
    with Monitor(model, optimizer, of_weights=[rate], every=1) as monitor:
        for step in range(20):
            w.grad = torch.zeros_like(w)
            w.grad[0, 3] = 0.4 * (-1) ** step  # 0.2, −0.2, 0.2, … in one row
            optimizer.step()
    values = [v for m in monitor.history for v in m["oscillation"].values()]
    assert values[0] == 0
    assert values[-1] == pytest.approx(1 / 12, rel=1e-3)


def adam(weight_decay):
    w = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64))
    model = nn.Module()
    model.w = w
    return model, w, torch.optim.Adam([w], lr=0.01, weight_decay=weight_decay)


def test_the_shares_of_decay_and_gradient_in_the_first_moment_sum_to_one():
    """Against both averages kept by hand."""
    model, w, optimizer = adam(0.3)
    share = L2Share(optimizer, every(1))
    own, decays = torch.zeros_like(w), torch.zeros_like(w)
    generator = torch.Generator().manual_seed(0)
    with Monitor(model, optimizer, {"w": "layer"}, of_weights=[share], every=1) as monitor:
        for _ in range(12):
            w.grad = torch.randn(2, 2, generator=generator, dtype=torch.float64)
            own = 0.9 * own + 0.1 * w.grad
            decays = 0.9 * decays + 0.1 * 0.3 * w.detach()
            optimizer.step()
            monitor.fetch()
            m = own + decays
            torch.testing.assert_close(optimizer.state[w]["exp_avg"], m, rtol=1e-12, atol=1e-14)
            of_gradient = float((own * m).sum() / m.square().sum())
            (value,) = monitor.history[-1]["l2_share"].values()
            assert value + of_gradient == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("decay", "gradient", "expected"), [(0.3, 0.0, 1.0), (0.0, 1.0, 0.0)])
def test_decay_alone_has_all_of_the_moment_and_no_decay_none(decay, gradient, expected):
    model, w, optimizer = adam(decay)
    share = L2Share(optimizer, every(1))
    with Monitor(model, optimizer, {"w": "layer"}, of_weights=[share], every=1) as monitor:
        for _ in range(3):
            w.grad = torch.full_like(w, gradient)
            optimizer.step()
    assert list(monitor.history[-1]["l2_share"].values()) == pytest.approx([expected])


def test_decoupled_decay_has_no_share_of_the_moment():
    model, w, _ = adam(0.0)
    optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=0.3)
    share = L2Share(optimizer, every(1))
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert share(model, ["w"])["w"] == 0


def test_imbalance_is_zero_at_least_mass_and_conserved_by_gradient_flow():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.randn(16, 3, dtype=torch.float64)
    report = nw.analyze(model, x)
    imbalance = Imbalance(report)
    names = [name for name, _ in model.named_parameters()]
    row, bias = model[0].weight.detach().square().sum(1), model[0].bias.detach().square()
    column = model[2].weight.detach().square().sum(0)
    expected = ((row + bias - column).abs() / (row + bias + column)).mean()
    assert float(imbalance(model, names)["0.weight"]) == pytest.approx(float(expected), rel=1e-12)
    (model(x).exp().sum()).backward()
    rows, biases, columns = (
        p.detach() * p.grad for p in (model[0].weight, model[0].bias, model[2].weight)
    )
    # Half of the derivative of ‖row‖² + bias² − ‖column‖² along the gradient.
    left = rows.sum(1) + biases - columns.sum(0)
    assert left.abs().max() < 1e-13 * rows.abs().sum()
    balanced = copy.deepcopy(model)
    nw.balance(balanced, report)
    assert float(imbalance(balanced, names)["2.weight"]) < 1e-6


def test_two_quantities_of_one_name_are_refused(training):
    with pytest.raises(ValueError, match="two quantities have one name"):
        Monitor(
            training.model,
            training.optimizer,
            of_weights=[OfEach("norm", lambda w: w.norm())],
        )
