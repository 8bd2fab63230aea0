"""The weights of least mass: against closed forms, a solver of another kind, and themselves."""

import copy

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.balancing.least_mass import mass
from normwise.balancing.sweep import Sizes, least

NAMES = [
    "mlp",
    "residual",
    "convolutions",
    "gated",
    "attention",
    "lora",
    "recurrent",
    "squared",
]


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def test_two_layers_end_at_twice_the_sum_of_row_norm_times_column_norm():
    model = nn.Sequential(
        nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 4, bias=False)
    ).double()
    rows = model[0].weight.detach().norm(dim=1)
    columns = model[2].weight.detach().norm(dim=0)
    result = nw.balance(model, nw.analyze(model, torch.randn(6, 5)))
    assert result.after == pytest.approx(float(2 * (rows * columns).sum()), rel=1e-12)
    assert result.after == pytest.approx(mass(model), rel=1e-14)
    torch.testing.assert_close(
        model[0].weight.norm(dim=1), model[2].weight.norm(dim=0), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays_and_the_mass_does_not_rise(network, name):
    model, x, report = network(name)
    model.eval()
    report.rescale_(model, seed=3)
    before, result = model(x), nw.balance(model, report, batch=x)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    assert result.difference < 1e-9
    assert result.after <= result.before
    assert result.factors


@pytest.mark.parametrize("name", NAMES)
def test_rescaled_copies_have_one_representative(network, name):
    """Where nothing is invariant; else with invariant slices at unit norm, which epsilons bar."""
    model, _, report = network(name)
    other = copy.deepcopy(model)
    trades = [s for s in report.symmetries if not s.is_scale]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for symmetry in trades:
            values = 10 ** (4 * torch.rand(symmetry.units, generator=generator) - 2).double()
            for key, factor in symmetry.factors(values).items():
                other.get_parameter(key).mul_(factor)
    nw.balance(model, report, tolerance=1e-14)
    nw.balance(other, report, tolerance=1e-14)
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_balancing_twice_is_balancing_once(network, name):
    model, _, report = network(name)
    nw.balance(model, report)
    once = weights(model)
    again = nw.balance(model, report)
    assert again.sweeps == 1
    for a, b in zip(once, weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def solved(model, exponents_of):
    """The least mass of a network by a quasi-Newton method from scipy; nothing of ours in it.

    ``exponents_of(θ)`` gives the logarithm of what each weight is multiplied by.
    """
    optimize = pytest.importorskip("scipy.optimize", reason="its solver is the judge")
    squares = {name: p.detach() ** 2 for name, p in model.named_parameters()}
    size, exponents = exponents_of

    def objective(values):
        theta = torch.tensor(values, requires_grad=True)
        logs = exponents(theta)
        total = sum((s * (2 * logs[n]).exp() if n in logs else s).sum() for n, s in squares.items())
        (gradient,) = torch.autograd.grad(total, theta)
        return total.item(), gradient.numpy()

    result = optimize.minimize(
        objective, torch.zeros(size).double().numpy(), jac=True, options={"gtol": 1e-9}
    )
    return result.fun


def test_a_solver_agrees_on_residual_sums(network):
    model, _, report = network("residual")

    def logs(theta):
        sums, inner = theta[:6], theta[6:]
        return {
            "a.weight": sums[:, None],
            "a.bias": sums,
            "b.weight": inner[:, None] - sums,
            "b.bias": inner,
            "c.weight": sums[:, None] - inner,
            "c.bias": sums,
            "d.weight": -sums.expand(3, 6),
        }

    expected = solved(model, (13, logs))
    assert nw.balance(model, report).after == pytest.approx(expected, rel=1e-6)


def test_a_solver_agrees_on_a_recurrence_whose_units_meet_themselves(network):
    model, _, report = network("recurrent")

    def logs(theta):
        return {
            "cell.weight_ih_l0": theta[:, None],
            "cell.weight_hh_l0": theta[:, None] - theta,
            "cell.bias_ih_l0": theta,
            "cell.bias_hh_l0": theta,
            "head.weight": -theta.expand(2, 5),
        }

    expected = solved(model, (5, logs))
    assert nw.balance(model, report).after == pytest.approx(expected, rel=1e-6)


def test_a_solver_agrees_where_the_scale_passes_as_its_square(network):
    model, _, report = network("squared")

    def logs(theta):
        return {
            "a.weight": theta[:, None],
            "a.bias": theta,
            "b.weight": -2 * theta.expand(3, 7),
        }

    expected = solved(model, (7, logs))
    assert nw.balance(model, report).after == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pull", [0.0, 1.0])
def test_the_factor_of_a_unit_is_where_the_derivative_is_zero(pull):
    generator = torch.Generator().manual_seed(1)
    sizes = [
        Sizes(a, 10 ** (8 * torch.rand(50, generator=generator, dtype=torch.float64) - 4))
        for a in (1.0, 2.0, 0.5, -1.0, -3.0)
    ]
    theta = least(sizes, pull)
    terms = [s.exponent * s.values * (2 * s.exponent * theta).exp() for s in sizes]
    derivative = sum(terms) - pull
    assert (derivative.abs() / sum(t.abs() for t in terms)).max() < 1e-13


def test_uncounted_biases_follow_and_do_not_weigh(network):
    model, x, report = network("mlp")
    biases = [name for name, p in model.named_parameters() if p.ndim == 1]
    before = model(x)
    nw.balance(model, report, uncounted=biases)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        model[0].weight.norm(dim=1), model[2].weight.norm(dim=0), rtol=1e-10, atol=0
    )


def test_invariant_slices_at_unit_norm_and_their_running_statistics(network):
    model, x, report = network("convolutions")
    for _ in range(3):
        model(x)
    model[1].eps = 1e-12
    model.eval()
    before = model(x)
    nw.balance(model, report, batch=x, invariant="unit")
    torch.testing.assert_close(
        model[0].weight.flatten(1).norm(dim=1), torch.ones(4).double(), rtol=1e-10, atol=0
    )
    torch.testing.assert_close(model(x), before, rtol=1e-8, atol=1e-8)


def test_what_writes_to_a_normalized_stream_ends_at_rows_of_norm_one_and_is_canonical():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
            self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6, bias=False)
            self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.embed(x)
            h = h + self.down(self.up(self.norm(h)).relu())
            return self.head(self.last(h))

    model = Stream().double()
    for norm in (model.norm, model.last):
        norm.eps = 1e-14
    x = torch.randint(9, (4, 5))
    report = nw.analyze(model, x)
    other = copy.deepcopy(model)
    report.rescale_(other, seed=1)
    before = model(x)
    for m in (model, other):
        nw.balance(m, report, batch=x, invariant="unit", tolerance=1e-14)
        joint = m.embed.weight.square().sum() + m.down.weight.square().sum()
        assert joint.item() == pytest.approx(9 + 6, rel=1e-10)
        torch.testing.assert_close(m(x), before, rtol=1e-9, atol=1e-9)
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_unit_norm_without_a_batch_is_refused_where_statistics_would_go_stale(network):
    model, _, report = network("convolutions")
    with pytest.raises(ValueError, match="give `batch=`"):
        nw.balance(model, report, invariant="unit")


def test_units_with_a_zero_side_are_left_and_counted(network):
    model, x, report = network("mlp")
    with torch.no_grad():
        model[2].weight[:, 3] = 0
    row = model[0].weight[3].detach().clone()
    before = model(x)
    result = nw.balance(model, report)
    assert result.left == 1
    assert torch.equal(model[0].weight[3], row)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_a_report_that_does_not_fit_leaves_the_model_as_it_is(network):
    model, x, report = network("mlp")
    curved = nn.Sequential(*(nn.Tanh() if not isinstance(m, nn.Linear) else m for m in model))
    saved = weights(curved)
    with pytest.raises(ValueError, match="does not fit"):
        nw.balance(curved, report, batch=x)
    assert all(torch.equal(a, b) for a, b in zip(saved, curved.parameters(), strict=True))


def test_a_model_without_trades_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(6, 4)
    saved = weights(model)
    result = nw.balance(model, nw.analyze(model, x), batch=x)
    assert (result.sweeps, result.difference) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(saved, model.parameters(), strict=True))


class Through(nn.Module):
    """The rows of `a` trade with the columns of `b` through a norm, whose scale the next absorbs.

    Both are scale-invariant, so only together could they be at norm 1.
    """

    def __init__(self, eps):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8, bias=False), nn.Linear(8, 6, bias=False)
        self.first = nn.RMSNorm(8, eps=1e-14, elementwise_affine=False)
        self.second = nn.GroupNorm(2, 6, eps=eps, affine=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.second(self.b(self.first(self.a(x)).relu())).relu())


def test_epsilons_that_weigh_too_much_are_refused_and_nothing_has_changed():
    model, x = Through(eps=0.1).double(), torch.randn(9, 5).double()
    report = nw.analyze(model, x)
    report.rescale_(model, seed=2)
    saved = weights(model)
    with pytest.raises(ValueError, match=r"accept=0\.01"):
        nw.balance(model, report, batch=x)
    assert all(torch.equal(a, b) for a, b in zip(saved, model.parameters(), strict=True))
    assert nw.balance(model, report, batch=x, accept=1.0).difference > 0.01


def test_invariant_weights_that_cannot_all_be_at_unit_norm_are_refused():
    model, x = Through(eps=1e-12).double(), torch.randn(9, 5).double()
    report = nw.analyze(model, x)
    with pytest.raises(RuntimeError, match="without bound"):
        nw.balance(model, report, invariant="unit")


def test_bad_arguments_are_refused(network):
    model, x, report = network("mlp")
    with pytest.raises(ValueError, match="'keep' or 'unit'"):
        nw.balance(model, report, invariant="zero")
    with pytest.raises(ValueError, match="no parameter 'nope'"):
        nw.balance(model, report, uncounted=["nope"])
    with pytest.raises(RuntimeError, match="sweeps"):
        nw.balance(model, report, max_sweeps=1)
    with pytest.raises(ValueError, match="shape"):
        nw.balance(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7)), report)
    with pytest.raises(ValueError, match="joint=True"):
        nw.balance(model, nw.analyze(model, x, joint=False))
