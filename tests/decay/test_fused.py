"""Decay in one pass over the memory, against the multi-tensor operations in float64."""

import importlib.util

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.decay import fused
from normwise.decay.fused import Shift, Spare

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="the extra normwise[cpu] is not installed"
)


@pytest.fixture
def plain(monkeypatch):
    """Take the multi-tensor operations from here on, when called."""

    def use():
        monkeypatch.setattr(fused, "_is_installed", lambda: False)

    return use


@pytest.fixture
def taken(monkeypatch):
    """How often a fused pass was taken."""
    counts = []
    real = fused.take_

    def count(work):
        counts.append(len(work))
        real(work)

    monkeypatch.setattr(nw.decay.epsilon_shifted, "take_", count)
    monkeypatch.setattr(nw.decay.policies, "take_", count)
    return counts


def network(convert, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.Conv2d(64, 256, 3, groups=2).to(memory_format=torch.channels_last),
        nn.ConvTranspose2d(256, 40, 3),
    )
    convert(model)
    return model.to(dtype)


CONVERT = [nw.weight_normalize, nw.center_weight_normalize, nw.weight_standardize]


@pytest.mark.parametrize("convert", CONVERT)
@pytest.mark.parametrize("coupling", ["coupled", "decoupled"])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_shifted_decay_is_the_plain_one_in_float64(convert, coupling, maximize, taken, plain):
    ends = []
    for dtype in (torch.float32, torch.float64):
        model = network(convert, dtype)
        # Transposed convolutions have slices that are scattered in memory.
        layers = [model[0], model[1]]
        reg = nw.EpsilonShiftedL2(layers, weight_decay=0.3, eps=1e-3)
        params = [p for layer in layers for p in layer.parameters()]
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, maximize=maximize)
        reg.attach(optimizer, coupling)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
                p.grad = torch.empty_like(p).copy_(p.grad)
            optimizer.step()
        ends.append([p.detach().double() for p in params])
        plain()
    assert len(taken) == 3
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("scale", ["norm", "std"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shift_is_the_papers_formula(scale, in_place, dtype):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(90, 1000, generator=generator, dtype=torch.float64)
    w[3], w[4] = 0.0, 7.0  # without a direction, and without a deviation
    w[5] *= 1e-18
    w[6] += 1e4
    w, target = w.to(dtype), torch.randn(90, 1000, generator=generator).to(dtype)
    target = w.clone() if in_place else target
    exact = nw.decay.epsilon_shifted.shifted_decay(w.double(), nw.View.channel(), scale, 1e-3)
    expected = target.double() - 0.1 * exact
    work = [Shift(target if in_place else w, target, nw.View.channel(), scale, -0.1, 1e-3)]
    assert fused.takes(work)
    fused.take_(work)
    # Of the entries that are to be added, each is off by half a spacing or two.
    spacing = 4 * torch.finfo(dtype).eps
    allowed = spacing * (w.double().abs() + target.double().abs() + 1e-3 * exact.abs())
    allowed += 1e-10 if scale == "std" else 0.0
    assert ((target.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_cautious_decay_is_the_plain_one_in_float64(name, taken, plain):
    ends = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(s).to(dtype)) for s in ((300, 400), (7,))]
        params[0].data[0] = 0.0
        optimizer = getattr(torch.optim, name)(params, lr=0.01, weight_decay=0.0)
        nw.decay.Cautious(0.5).attach(optimizer)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
                p.grad[..., 1] = 0.0
            optimizer.step()
        ends.append([p.detach().double() for p in params])
        plain()
    assert len(taken) == 3
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_entries_that_stay_or_go_towards_zero_are_decayed_and_no_others():
    before = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 1e-30]).repeat(1 << 14)
    after = torch.tensor([0.5, 1.0, 1.5, -0.5, -1.5, 1.0, 0.5e-30]).repeat(1 << 14)
    expected = after.clone()
    expected -= 0.1 * before * torch.tensor([1.0, 1, 0, 1, 0, 1, 1]).repeat(1 << 14)
    work = [Spare(before, after, 0.1)]
    assert fused.takes(work)
    fused.take_(work)
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=0)


def test_what_it_does_not_take_is_left_to_the_plain_operations():
    w = torch.randn(300, 400)
    view = nw.View.channel()
    assert fused.takes([Shift(w, w, view, "norm", 1.0, 1.0)])
    assert not fused.takes([])
    assert not fused.takes([Shift(w[:4], w[:4], view, "norm", 1.0, 1.0)])  # too little to pay
    assert not fused.takes([Shift(w, w, nw.View.channel(1), "norm", 1.0, 1.0)])
    assert not fused.takes([Shift(w, w.t().contiguous().t(), view, "norm", 1.0, 1.0)])
    half = w.bfloat16()
    assert not fused.takes([Shift(half, half, view, "norm", 1.0, 1.0)])
    assert not fused.takes([Spare(w[:, ::2], w[:, ::2], 1.0)])
