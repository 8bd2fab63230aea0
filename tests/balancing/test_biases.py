"""Bias correction: the mean error that rounding makes is gone, and only biases have moved."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.balancing import correct_biases, round_weight, rounded

AFFINE = (nn.Linear, nn.Conv2d)


def outputs_by_layer(model, x):
    """The mean of each channel of what linear layers and convolutions give."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, AFFINE):

            def note(module, inputs, output, name=name):
                dims = (0, 2, 3) if output.ndim == 4 else tuple(range(output.ndim - 1))
                seen[name] = output.detach().mean(dims)

            handles.append(module.register_forward_hook(note))
    out = model.eval()(x).detach()
    for handle in handles:
        handle.remove()
    return seen, out


@pytest.mark.parametrize("name", ["mlp", "residual", "convolutions", "gated", "attention"])
def test_after_it_the_mean_error_of_every_output_is_zero(network, name):
    model, x, report = network(name)
    few = rounded(model, report, 4, "layer")
    expected, out = outputs_by_layer(model, x)
    before, _ = outputs_by_layer(few, x)
    shifts = correct_biases(few, model, x)
    after, corrected = outputs_by_layer(few, x)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AFFINE)}
    assert set(shifts) == {n for n, m in layers.items() if m.bias is not None}
    assert max(float((before[n] - expected[n]).abs().max()) for n in shifts) > 1e-3
    for layer in shifts:
        torch.testing.assert_close(after[layer], expected[layer], rtol=1e-12, atol=1e-12)
    dims = tuple(range(out.ndim - 1))
    torch.testing.assert_close(corrected.mean(dims), out.mean(dims), rtol=1e-12, atol=1e-12)


def test_of_one_layer_the_shift_is_the_weights_error_times_the_mean_input():
    """1906.04721, section 4.2: E[ỹ] − E[y] = ε E[x] with ε = W̃ − W."""
    model = nn.Linear(6, 4).double()
    few = nn.Linear(6, 4).double()
    few.load_state_dict(model.state_dict())
    with torch.no_grad():
        few.weight.copy_(round_weight(model.weight, 3))
    x = torch.rand(50, 6, dtype=torch.float64)
    shifts = correct_biases(few, model, x)
    error = (few.weight - model.weight).detach()
    torch.testing.assert_close(shifts[""], -error @ x.mean(0))
    torch.testing.assert_close(few.bias, model.bias + shifts[""])


def test_only_biases_move_and_neither_mode_nor_model_does(network):
    model, x, report = network("convolutions")
    few = rounded(model, report, 4)
    model.train(), few.train()
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, few)]
    correct_biases(few, model, x)
    assert model.training
    assert few.training
    assert all(torch.equal(v, states[0][k]) for k, v in model.state_dict().items())
    moved = {k for k, v in few.state_dict().items() if not torch.equal(v, states[1][k])}
    assert moved == {"3.bias", "6.bias", "8.bias"}  # the first has none, 1 is a normalization


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.shared(self.shared(x).relu()).relu())


def test_a_layer_that_runs_twice_keeps_its_bias_and_the_next_makes_up_for_it():
    model, few = Twice().double(), Twice().double()
    few.load_state_dict(model.state_dict())
    with torch.no_grad():
        few.shared.weight.copy_(round_weight(model.shared.weight, 3))
    x = torch.randn(40, 5, dtype=torch.float64)
    assert list(correct_biases(few, model, x)) == ["last"]
    torch.testing.assert_close(few(x).mean(0), model(x).mean(0), rtol=1e-12, atol=1e-12)


def test_a_model_without_biases_is_an_error():
    model = nn.Linear(3, 2, bias=False)
    with pytest.raises(ValueError, match="nothing to correct"):
        correct_biases(model, model, torch.randn(4, 3))


@pytest.mark.slow
def test_of_networks_trained_on_digits_it_takes_a_quarter_or_more_off_the_error_of_rounding():
    """Three networks, four and three bits, by tensor and by row; corrected on 256 other digits."""
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn")
    path = Path(__file__).parents[2] / "examples" / "quantization.py"
    spec = importlib.util.spec_from_file_location("quantization_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    calibration, test = example.IMAGES[:256], example.IMAGES[1200:]
    shares = []
    for seed in range(3):
        model = example.trained(seed, 300)
        report = nw.analyze(model, calibration[:16])
        expected = model(test).detach()
        for bits, view in itertools.product((4, 3), ("layer", "channel")):
            few = rounded(model, report, bits, view)
            before = (few(test).detach() - expected).norm()
            correct_biases(few, model, calibration)
            shares.append(float((few(test).detach() - expected).norm() / before))
    print("what is left of the error:", *(f"{share:.2f}" for share in shares))
    assert max(shares) < 0.75
