"""BinaryConnect, StatsQ, their straight-through gradients, and oscillation."""

import math

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.geometry import View
from normwise.reparam import (
    BinaryConnect,
    Oscillation,
    StatsQ,
    WeightNorm,
    clip_after_steps,
    computed_once,
    reparametrize,
)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


@pytest.mark.parametrize("draw", ["deterministic", "stochastic"])
@pytest.mark.parametrize("scale", [1.0, 0.3, None])
def test_binary_weights_are_plus_or_minus_h_to_the_last_bit(draw, scale):
    w = torch.randn(20, 30)
    w[0, :3] = torch.tensor([0.0, -0.0, 5.0])
    p = BinaryConnect(scale=scale, draw=draw)
    h = p.scale_of(w)
    if scale is None:
        assert h == math.sqrt(1.5 / 50)
        assert p.scale_of(torch.empty(4, 2, 3, 3)) == math.sqrt(1.5 / (9 * 6))
    assert set(p(w).unique().tolist()) == {float(torch.tensor(h)), -float(torch.tensor(h))}


def test_the_sign_of_zero_is_plus():
    """Rounding half to even would send p = ½ to −H."""
    assert BinaryConnect()(torch.tensor([[0.0, -0.0, -1e-30]])).tolist() == [[1.0, 1.0, -1.0]]


def test_the_mean_over_draws_is_the_clipped_weight():
    """E[W_b] = clip(w, −H, H), within five standard errors."""
    h, draws = 0.5, 4000
    w = torch.linspace(-0.8, 0.8, 9).view(3, 3)
    p = BinaryConnect(scale=h, draw="stochastic")
    mean = torch.stack([p(w) for _ in range(draws)]).mean(0)
    expected = w.clamp(-h, h)
    error = (h**2 - expected**2).sqrt() / math.sqrt(draws)
    assert bool(((mean - expected).abs() <= 5 * error).all())


@pytest.mark.parametrize("draw", ["deterministic", "stochastic"])
def test_the_gradient_passes_unchanged(draw):
    w = torch.randn(3, 4, requires_grad=True)
    upstream = torch.randn(3, 4)
    (g,) = torch.autograd.grad(BinaryConnect(scale=0.2, draw=draw)(w), w, upstream)
    assert torch.equal(g, upstream)


def test_in_evaluation_a_stochastic_weight_is_the_real_one_and_a_deterministic_one_binary():
    w = torch.tensor([[0.25, -3.0]])
    assert BinaryConnect(draw="stochastic").eval()(w).tolist() == [[0.25, -1.0]]
    assert BinaryConnect().eval()(w).tolist() == [[1.0, -1.0]]


def test_after_a_step_no_real_weight_is_beyond_h():
    model = network()
    reparametrize(model, BinaryConnect, scale=0.1, only=["0", "4"])
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    handle = clip_after_steps(model, optimizer)
    originals = [model[i].parametrizations.weight.original for i in (0, 4)]

    def step():
        optimizer.zero_grad()
        model(torch.randn(5, 2, 6, 6)).square().sum().backward()
        optimizer.step()
        return max(float(w.detach().abs().max()) for w in originals)

    assert step() == pytest.approx(0.1)
    handle.remove()
    assert step() > 1


def test_before_a_normalization_h_does_not_matter():
    model = network().double()
    reparametrize(model, BinaryConnect, only=["0"])
    model[1].eps = 1e-30
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    before = model(x)
    model[0].parametrizations.weight[0].scale = 40.0
    torch.testing.assert_close(model(x), before)


def test_every_row_of_a_binary_weight_has_the_norm_h_sqrt_n():
    norms = nw.geometry.norms(BinaryConnect(scale=0.5)(torch.randn(4, 3, 3)), View.channel())
    torch.testing.assert_close(norms, torch.full((4,), 0.5 * 3.0))


@pytest.mark.parametrize(
    ("bits", "levels"),
    [(1, [-0.5, 0.5]), (2, [-0.75, -0.25, 0.25, 0.75]), (3, [k / 8 for k in range(-7, 8, 2)])],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_levels_of_statsq_are_evenly_spaced_and_never_zero(bits, levels, dtype):
    w = torch.randn(5, 400).to(dtype)
    w[:, 0], w[:, 1] = 100, -100
    s = 2 * w.to(torch.promote_types(dtype, torch.float32)).abs().mean(1, keepdim=True)
    found = StatsQ(bits=bits)(w)
    expected = (s * torch.tensor(levels)).to(dtype)
    for row, allowed in zip(found, expected, strict=True):
        assert set(row.tolist()) == set(allowed.tolist())


def test_statsq_takes_the_nearest_level_within_its_range():
    w = torch.randn(3, 200, dtype=torch.float64)
    s = 2 * w.abs().mean(1, keepdim=True)
    levels = s.unsqueeze(2) * torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64)
    nearest = (levels - w.unsqueeze(2)).abs().min(2).indices
    torch.testing.assert_close(
        StatsQ()(w), levels.expand(3, 200, 4).gather(2, nearest.unsqueeze(2)).squeeze(2)
    )
    assert torch.equal(StatsQ().levels(w), nearest.double() - 2)


def test_scaling_a_row_scales_its_quantized_weight_exactly():
    w = torch.randn(4, 3, 3, dtype=torch.float64)
    powers = torch.tensor([0.25, 1.0, 8.0, 1024.0], dtype=torch.float64).view(4, 1, 1)
    assert torch.equal(StatsQ()(powers * w), powers * StatsQ()(w))
    factors = torch.rand(4, 1, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(StatsQ()(factors * w), factors * StatsQ()(w), rtol=1e-14, atol=0)


def test_the_gradient_of_statsq_passes_inside_of_the_clip_only():
    w = torch.tensor([[0.1, -0.2, 5.0, -0.3, 0.2, 0.0]], requires_grad=True)
    s = 2 * float(w.detach().abs().mean())
    upstream = torch.randn(1, 6)
    (g,) = torch.autograd.grad(StatsQ()(w), w, upstream)
    inside = (w.detach() / s).abs() < 1
    assert inside.tolist() == [[True, True, False, True, True, True]]
    torch.testing.assert_close(g, torch.where(inside, upstream, 0))


def test_a_zero_row_stays_zero():
    w = torch.zeros(2, 3, requires_grad=True)
    out = StatsQ()(w)
    out.sum().backward()
    assert float(out.detach().abs().sum()) == 0
    assert w.grad.isfinite().all()


@pytest.mark.parametrize("method", [BinaryConnect, StatsQ])
def test_the_function_ignores_the_scale_but_the_gradient_is_not_orthogonal(method):
    """So the analysis gives the weight no view: norms do not follow the theory of invariance."""
    model = network().double()
    reparametrize(model, method, only=["0"])
    model[1].eps = 1e-30
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    before = model(x)
    w = model[0].parametrizations.weight.original
    row = nw.analyze(model, x)["0.parametrizations.weight.original"]
    assert row.view is None
    with torch.no_grad():
        w.mul_(torch.tensor([0.5, 2.0, 4.0, 0.25]).view(4, 1, 1, 1))
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("options", [{"method": BinaryConnect}, {"method": StatsQ, "bits": 3}])
def test_they_can_be_put_on_loaded_held_and_folded(options):
    model, x = network().eval(), torch.randn(2, 2, 6, 6)
    reparametrize(model, **options, only=["0", "4"])
    before = model(x)
    other = network().eval()
    reparametrize(other, **options, only=["0", "4"])
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), before, rtol=0, atol=0)
    with computed_once(model):
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    nw.fold(model)
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_a_transposed_convolution_has_a_step_size_an_output_channel():
    model = nn.Sequential(nn.ConvTranspose1d(3, 2, 4))
    reparametrize(model, StatsQ, only=["*"])
    for channel in range(2):
        assert len(model[0].weight[:, channel].unique()) <= 4


def test_computed_once_holds_one_draw():
    model = nn.Sequential(nn.Linear(30, 30))
    reparametrize(model, BinaryConnect, draw="stochastic", only=["*"])
    assert not torch.equal(model[0].weight, model[0].weight)
    with computed_once(model):
        assert torch.equal(model[0].weight, model[0].weight)


def test_oscillation_is_0_at_rest_and_in_drift_and_goes_to_1_for_what_alternates():
    tracker = Oscillation(momentum=0.1)
    for step in range(200):
        average = tracker.update(torch.tensor([0.0, step, step % 2, (step // 2) % 2]))
    assert average[:2].tolist() == [0, 0]
    assert float(average[2]) == pytest.approx(1, abs=1e-6)
    # Turning back at every other step, its average ends one step of decay around one half.
    assert 0.4 < float(average[3]) < 0.6


def test_oscillation_counts_a_turn_after_a_rest():
    tracker = Oscillation(momentum=1.0)
    found = [float(tracker.update(torch.tensor(level))) for level in (0.0, 1.0, 1.0, 0.0, -1.0)]
    assert found == [0, 0, 0, 1, 0]


def test_bad_options_are_told_and_unknown_ones_are_errors():
    model = network()
    with pytest.raises(ValueError, match="Invalid scale: 0"):
        reparametrize(model, BinaryConnect, scale=0)
    with pytest.raises(ValueError, match="Invalid draw: 'coin'"):
        reparametrize(model, BinaryConnect, draw="coin")
    with pytest.raises(ValueError, match="Invalid bits: 0"):
        reparametrize(model, StatsQ, bits=0)
    with pytest.raises(ValueError, match="Invalid momentum: 0"):
        Oscillation(0)
    with pytest.raises(TypeError, match="gian"):
        reparametrize(model, WeightNorm, gian=False)
    with pytest.raises(ValueError, match="finds no binary weight"):
        clip_after_steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
