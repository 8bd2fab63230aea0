"""Equal ranges: against the published formulas, and by what rounding then costs."""

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.balancing import round_weight, rounded


def test_ranges_on_both_sides_of_a_trade_are_equal(network):
    model, x, report = network("mlp")
    report.rescale_(model, seed=2)
    before = model(x)
    nw.equalize(model, report, batch=x)
    for first, second in ((model[0], model[2]), (model[2], model[4])):
        torch.testing.assert_close(
            first.weight.abs().amax(1), second.weight.abs().amax(0), rtol=1e-5, atol=0
        )
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)


def test_one_pair_is_cross_layer_equalization_to_the_letter():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    w1, b1, w2 = model[0].weight.clone(), model[0].bias.clone(), model[2].weight.clone()
    r1, r2 = w1.abs().amax(1), w2.abs().amax(0)
    s = (r1 * r2).sqrt() / r2  # 1906.04721, equation 11, with W1 divided by s
    nw.equalize(model, nw.analyze(model, torch.randn(8, 5)))
    torch.testing.assert_close(model[0].weight, w1 / s[:, None])
    torch.testing.assert_close(model[0].bias, b1 / s)
    torch.testing.assert_close(model[2].weight, w2 * s)


@pytest.mark.parametrize("name", ["residual", "convolutions", "gated", "attention", "recurrent"])
@pytest.mark.parametrize("for_", ["weights", "batch"])
def test_the_function_stays(network, name, for_):
    model, x, report = network(name)
    model.eval()
    report.rescale_(model, seed=4)
    before = model(x)
    result = nw.equalize(model, report, x if for_ == "batch" else "weights", batch=x)
    assert result.difference < 1e-9
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)


def test_columns_that_only_a_gain_stands_against_get_one_range(network):
    """A gain is a vector, which nobody quantizes."""
    model, _, report = network("gated")
    with torch.no_grad():
        model.norm.weight.mul_(torch.logspace(-2, 2, 6))
        model.up.weight.div_(torch.logspace(-2, 2, 6))
        model.gate.weight.div_(torch.logspace(-2, 2, 6))
    nw.equalize(model, report, tolerance=1e-10)
    read = torch.maximum(model.up.weight.abs().amax(0), model.gate.weight.abs().amax(0))
    torch.testing.assert_close(read, read[:1].expand(6), rtol=1e-6, atol=0)


def inputs_of(module, model, x):
    seen = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(x)
    handle.remove()
    return seen[0].detach().abs().flatten(0, -2)


def test_smoothquant_divides_activations_by_its_scale(network):
    model, x, report = network("gated")
    with torch.no_grad():
        model.norm.weight[2] = 30
    activations = inputs_of(model.up, model, x).amax(0)
    weights = torch.maximum(model.up.weight.abs().amax(0), model.gate.weight.abs().amax(0))
    scale = activations**0.7 / weights**0.3  # 2211.10438, equation 4, over both readers
    nw.equalize(model, report, x, alpha=0.7)
    torch.testing.assert_close(
        inputs_of(model.up, model, x).amax(0), activations / scale, rtol=1e-9, atol=0
    )


def test_awqs_scale_is_a_power_of_the_mean_activation(network):
    model, x, report = network("gated")
    gate = model.gate.weight.detach().clone()
    scale = inputs_of(model.up, model, x).mean(0) ** 0.5
    nw.equalize(model, report, x, rule="awq")
    torch.testing.assert_close(
        (model.gate.weight / gate)[0], scale / (scale.max() * scale.min()).sqrt(), rtol=1e-9, atol=0
    )


def test_rounding_restores_what_is_on_the_grid_and_errs_by_half_a_step_at_most():
    w = torch.randn(6, 40, dtype=torch.float64)
    for view, axis in (("channel", 1), ("layer", (0, 1))):
        step = w.abs().amax(axis, keepdim=True) / 7
        r = round_weight(w, 4, view)
        assert ((r - w).abs() <= step / 2 * (1 + 1e-12)).all()
        torch.testing.assert_close((r / step), (r / step).round(), rtol=0, atol=1e-12)
        torch.testing.assert_close(round_weight(r, 4, view), r, rtol=1e-14, atol=0)
    assert torch.equal(round_weight(torch.zeros(2, 3), 8), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="2 or more"):
        round_weight(w, 1)


def test_rescaled_weights_round_badly_and_equalized_ones_as_before(network):
    model, x, report = network("mlp")
    expected = model(x).detach()

    def error():
        with torch.no_grad():
            difference = rounded(model, report, 8, "layer")(x) - expected
        return float(difference.norm() / expected.norm())

    nw.equalize(model, report)
    good = error()
    with torch.no_grad():
        for symmetry in report.symmetries:
            values = torch.logspace(-2, 2, symmetry.units, dtype=torch.float64)
            for name, factor in symmetry.factors(values).items():
                model.get_parameter(name).mul_(factor)
    assert error() > 10 * good
    nw.equalize(model, report)
    assert error() == pytest.approx(good, rel=0.05)


def test_bad_arguments_are_refused(network):
    model, _, report = network("mlp")
    for options in ({"invariant": "unit"}, {"rule": "gptq"}, {"alpha": 2}, {"for_": "speed"}):
        with pytest.raises(ValueError, match="Invalid"):
            nw.equalize(model, report, **options)
    model, _, report = network("convolutions")
    with pytest.raises(ValueError, match="give `batch=`"):
        nw.equalize(model, report, invariant="equal")


def test_invariant_rows_get_one_range_and_statistics_follow(network):
    model, x, report = network("convolutions")
    for _ in range(3):
        model(x)
    model[1].eps = 1e-12
    model.eval()
    before = model(x)
    nw.equalize(model, report, batch=x, invariant="equal")
    ranges = model[0].weight.abs().flatten(1).amax(1)
    torch.testing.assert_close(ranges, ranges[:1].expand(4), rtol=1e-5, atol=0)
    torch.testing.assert_close(model(x), before, rtol=1e-8, atol=1e-8)


def test_the_search_takes_the_alpha_at_which_rounding_changes_the_readers_outputs_least(network):
    """Against every α of the grid by itself, with the readers' outputs computed here."""
    model, x, report = network("gated")
    with torch.no_grad():
        model.norm.weight[2] = 30
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    h = model.norm(x).detach()

    def error(alpha):
        model.load_state_dict(plain)
        nw.equalize(model, report, x, rule="awq", alpha=alpha, bits=3)
        change = 0.0
        for name in ("up", "gate"):
            w, original = model.get_parameter(f"{name}.weight").detach(), plain[f"{name}.weight"]
            factor = w / original
            change += (h @ (round_weight(w, 3) / factor - original).T).square().sum().item()
        return change

    errors = [error(k / 20) for k in range(20)]
    assert error("search") == pytest.approx(min(errors), rel=1e-9)
    assert min(errors) < errors[0] / 2  # with an outlier, no scaling is far from the best


def test_the_search_keeps_the_function_of_convolutions(network):
    model, x, report = network("convolutions")
    model.eval()
    before = model(x)
    nw.equalize(model, report, x, rule="awq", alpha="search", bits=4)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
