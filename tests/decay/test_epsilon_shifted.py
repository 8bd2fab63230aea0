"""The ε-shifted penalty, its gradient, and how it acts through an optimizer."""

import math
import re
import warnings

import pytest
import torch
from torch import nn

from normwise import View
from normwise.decay import DecayScheduler, EpsilonShiftedL2, early
from normwise.decay.epsilon_shifted import shifted_decay, shifted_penalty
from normwise.reparam import (
    WeightNorm,
    center_weight_normalize,
    fold,
    reparametrize,
    weight_normalize,
    weight_standardize,
)

CASES = [
    (shape, view, scale)
    for shape, view in [
        ((4, 6), View.channel()),
        ((3, 4, 2, 2), View.channel(1)),
        ((6, 2, 3), View.blocks(3)),
        ((4, 6), View.layer()),
    ]
    for scale in ("norm", "std")
]


@pytest.mark.parametrize(("shape", "view", "scale"), CASES)
def test_penalty_is_as_the_paper_defines_it(shape, view, scale):
    """[ES] Eqs. 25 and 26."""
    w = torch.randn(shape, dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for s in view.slices(w):
        if scale == "norm":
            expected += (s.norm() - 0.3) ** 2 / 2
        else:
            expected += s.numel() * (s.mean() ** 2 + (s.std(correction=0) - 0.3) ** 2) / 2
    torch.testing.assert_close(shifted_penalty(w, view, scale, 0.3), expected)


@pytest.mark.parametrize(("shape", "view", "scale"), CASES)
def test_penalties_pass_gradcheck(shape, view, scale):
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: shifted_penalty(w, view, scale, 0.3), (w,))
    assert torch.autograd.gradgradcheck(lambda w: shifted_penalty(w, view, scale, 0.3), (w,))


@pytest.mark.parametrize(("shape", "view", "scale"), CASES)
def test_decay_is_the_gradient_of_the_penalty_and_the_papers_formula(shape, view, scale):
    """[ES] Eqs. 27 and 28."""
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(shifted_penalty(w, view, scale, 0.3), w)
    decay = shifted_decay(w.detach(), view, scale, 0.3)
    torch.testing.assert_close(decay, gradient)
    for d, s in zip(view.slices(decay), view.slices(w.detach()), strict=True):
        if scale == "norm":
            expected = (1 - 0.3 / s.norm()) * s
        else:
            v, m = s.std(correction=0), s.mean()
            expected = (1 - 0.3 / v) * s + 0.3 / v * m
        torch.testing.assert_close(d, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["norm", "std"])
@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_zero_and_constant_slices_have_a_finite_decay(scale, constant, dtype):
    w = torch.randn(3, 8).to(dtype)
    w[1] = constant
    w.requires_grad_()
    (gradient,) = torch.autograd.grad(shifted_penalty(w, View.channel(), scale, 0.1), w)
    assert gradient.isfinite().all()
    assert shifted_decay(w.detach(), View.channel(), scale, 0.1).isfinite().all()


@pytest.mark.parametrize("scale", ["norm", "std"])
def test_a_weight_without_slices_has_no_decay(scale):
    """What a rank has of a weight with fewer channels than there are ranks."""
    assert shifted_decay(torch.zeros(0, 3, 2), View.channel(), scale, 0.1).shape == (0, 3, 2)


def network(convert=weight_standardize):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    convert(model)
    return model


def weight(model):
    stack = model[0].parametrizations.weight
    return getattr(stack, stack[0].normalized)


def backward(model):
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    model(x).square().mean().backward()


CONVERSIONS = {"std": weight_standardize, "norm": weight_normalize}


@pytest.mark.parametrize("convert", [weight_normalize, center_weight_normalize, weight_standardize])
def test_coupled_decay_is_the_gradient_of_the_penalty(convert):
    """A step with the hook is a step on the loss with the penalty as a term."""
    one, other = network(convert), network(convert)
    hooked = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
    EpsilonShiftedL2(one, weight_decay=0.1, eps=0.01).attach(hooked)
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    penalty = EpsilonShiftedL2(other, weight_decay=0.1, eps=0.01).penalty
    for _ in range(3):
        backward(one)
        hooked.step()
        backward(other)
        penalty().backward()
        plain.step()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_decoupled_decay_acts_on_the_weight_at_the_learning_rate_of_its_group():
    model, other = network(), network()
    optimizer = torch.optim.Adam(
        [{"params": [weight(model)], "lr": 0.2}, {"params": model[4].parameters()}], lr=0.1
    )
    reference = torch.optim.Adam([weight(other)], lr=0.2)
    EpsilonShiftedL2(model, weight_decay=0.1, eps=0.01).attach(optimizer, "decoupled")
    backward(model)
    backward(other)
    optimizer.step()
    with torch.no_grad():
        decay = shifted_decay(weight(other), View.channel(), "std", 0.01)
        weight(other).sub_(decay, alpha=0.2 * 0.1)
    reference.step()
    torch.testing.assert_close(weight(model), weight(other))


@pytest.mark.parametrize("scale", ["norm", "std"])
def test_a_weight_without_a_loss_gradient_settles_at_epsilon_not_at_zero(scale):
    model = network(CONVERSIONS[scale])
    reg = EpsilonShiftedL2(model, weight_decay=1.0, eps=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.attach(optimizer)
    for _ in range(400):
        backward(model)
        weight(model).grad.zero_()
        optimizer.step()
    w = weight(model).detach().flatten(1)
    settled = w.norm(dim=1) if scale == "norm" else w.std(1, correction=0)
    torch.testing.assert_close(settled, torch.full((8,), 0.05), rtol=1e-4, atol=0)


def test_it_takes_its_weights_out_of_the_optimizers_own_decay_and_says_so():
    model = network()
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    attached = EpsilonShiftedL2(model, weight_decay=1e-4, eps=1e-3).attach(optimizer)
    decays = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if p is named[name]
    }
    assert decays.pop("0.parametrizations.weight.original") == 0
    assert len(decays) == len(named) - 1
    assert set(decays.values()) == {5e-4}
    assert attached.excluded == {"0.weight": 5e-4}
    assert "taken out of the optimizer's own weight_decay (0.0005): 1 weights" in str(attached)
    assert "1 weights, λ = 0.0001, ε = 0.001" in str(attached)
    backward(model)
    optimizer.step()


def test_a_group_of_nothing_but_its_weights_is_not_split():
    model = network()
    optimizer = torch.optim.SGD([weight(model)], lr=0.1, weight_decay=0.1)
    EpsilonShiftedL2(model, weight_decay=1e-4, eps=1e-3).attach(optimizer)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0]


def test_lambda_and_epsilon_of_each_group():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    weight_normalize(model)
    groups = [
        {"modules": model[0], "weight_decay": 0.5, "eps": 0.2},
        {"modules": [model[1]]},
    ]
    reg = EpsilonShiftedL2(groups, weight_decay=0.1, eps=0.01)
    assert [(g.weight_decay, g.eps) for g in reg.groups] == [(0.5, 0.2), (0.1, 0.01)]
    w0, w1 = (model[i].parametrizations.weight.original1 for i in (0, 1))
    view = View.channel()
    expected = 0.5 * shifted_penalty(w0, view, "norm", 0.2)
    expected = expected + 0.1 * shifted_penalty(w1, view, "norm", 0.01)
    torch.testing.assert_close(reg.penalty(), expected)
    reg.groups[0].weight_decay = 0.0
    torch.testing.assert_close(reg.penalty(), 0.1 * shifted_penalty(w1, view, "norm", 0.01))


def test_grouped_transposed_convolutions_decay_slice_by_slice():
    model = nn.Sequential(nn.ConvTranspose2d(16, 4, 3, groups=2))
    weight_normalize(model, only="0")
    w = weight(model).detach().clone()
    reg = EpsilonShiftedL2(model, weight_decay=1.0, eps=0.1)
    expected = sum((w[:8, i].norm() - 0.1) ** 2 + (w[8:, i].norm() - 0.1) ** 2 for i in range(2))
    torch.testing.assert_close(reg.penalty(), expected / 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.attach(optimizer)
    weight(model).grad = torch.zeros_like(w)
    optimizer.step()
    square = [p.square().sum((0, 2, 3), keepdim=True) for p in w.chunk(2)]
    direction = torch.cat([p / s.sqrt() for p, s in zip(w.chunk(2), square, strict=True)])
    torch.testing.assert_close(weight(model).detach(), w - 0.1 * (w - 0.1 * direction))


def test_weights_without_a_gradient_are_passed_over():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    EpsilonShiftedL2(model, weight_decay=1.0, eps=0.01).attach(optimizer)
    before = weight(model).detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight(model).detach(), before, rtol=0, atol=0)


def test_clipping_before_the_step_does_not_see_the_decay():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    EpsilonShiftedL2(model, weight_decay=1.0, eps=0.01).attach(optimizer)
    backward(model)
    before = weight(model).detach().clone()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    clipped = weight(model).grad.clone()
    optimizer.step()
    decay = shifted_decay(before, View.channel(), "std", 0.01)
    torch.testing.assert_close(weight(model).detach(), before - clipped - decay)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("coupling", ["coupled", "decoupled"])
@pytest.mark.parametrize("overflow", [False, True])
def test_gradient_scaling_changes_nothing_and_a_skipped_step_does_not_decay(
    fused, coupling, overflow
):
    model, other = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, fused=fused) for m in (model, other)]
    for m, optimizer in zip((model, other), optimizers, strict=True):
        EpsilonShiftedL2(m, weight_decay=0.1, eps=0.01).attach(optimizer, coupling)
    x = torch.randn(4, 3, 6, 6)
    scaler.scale(model(x).square().mean()).backward()
    other(x).square().mean().backward()
    if overflow:
        model[4].weight.grad[0, 0] = torch.inf
        before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizers[0])
    scaler.update()
    optimizers[1].step()
    expected = before if overflow else list(other.parameters())
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p, q)


def test_remove_ends_it():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    reg = EpsilonShiftedL2(model, weight_decay=1.0, eps=0.01)
    attached = reg.attach(optimizer)
    with pytest.raises(ValueError, match="attached to the optimizer already"):
        reg.attach(optimizer)
    attached.remove()
    before = weight(model).detach().clone()
    weight(model).grad = torch.zeros_like(before)
    optimizer.step()
    torch.testing.assert_close(weight(model).detach(), before, rtol=0, atol=0)
    reg.attach(optimizer)


def test_it_follows_weights_that_are_replaced():
    """As load_state_dict(assign=True) does."""
    model = network()
    reg = EpsilonShiftedL2(model, weight_decay=1.0, eps=0.01)
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True)
    expected = shifted_penalty(weight(model), View.channel(), "std", 0.01)
    torch.testing.assert_close(reg.penalty(), expected)


def test_no_host_synchronization_in_a_step():
    """Fake tensors have no values, so anything that asks for one fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = network()
    reg = EpsilonShiftedL2(model, weight_decay=0.1, eps=0.01)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight(model).grad = torch.zeros(weight(model).shape)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        reg.attach(optimizer)
        reg._apply(optimizer, "coupled")


def test_epsilon_above_the_weights_own_scale_is_a_warning_with_the_figures():
    with pytest.warns(UserWarning, match=r"0\.weight: 8 of 8 slices, the smallest std 0\.\d+ < "):
        EpsilonShiftedL2(network(), weight_decay=1e-4, eps=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EpsilonShiftedL2(network(), weight_decay=1e-4, eps=1e-3)


def closure_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    EpsilonShiftedL2(model, weight_decay=1e-4, eps=1e-3).attach(optimizer)
    optimizer.step(lambda: 0.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: EpsilonShiftedL2(nn.Linear(3, 3), weight_decay=1e-4, eps=1e-3),
            ValueError,
            "finds no normalized weight to act on",
        ),
        (
            lambda: EpsilonShiftedL2(fold(network()), weight_decay=1e-4, eps=1e-3),
            ValueError,
            "finds no normalized weight to act on",
        ),
        (
            lambda: EpsilonShiftedL2(network(), weight_decay=-1.0, eps=1e-3),
            ValueError,
            "Invalid weight_decay value: -1.0",
        ),
        (
            lambda: EpsilonShiftedL2(network(), weight_decay=math.nan, eps=1e-3),
            ValueError,
            "Invalid weight_decay value: nan",
        ),
        (
            lambda: EpsilonShiftedL2(network(), weight_decay=1e-4, eps=0.0),
            ValueError,
            "Invalid eps: 0.0; must be finite and above 0 (at 0 this is plain L2)",
        ),
        (
            lambda: EpsilonShiftedL2(network(), weight_decay=1e-4, eps=math.inf),
            ValueError,
            "Invalid eps: inf",
        ),
        (
            lambda: EpsilonShiftedL2([{"module": network()}], weight_decay=1e-4, eps=1e-3),
            ValueError,
            "its keys are 'modules'",
        ),
        (
            lambda: EpsilonShiftedL2(
                [{"modules": m} for m in [network()] * 2], weight_decay=1e-4, eps=1e-3
            ),
            ValueError,
            "0.weight is in more than one group",
        ),
        (
            lambda: EpsilonShiftedL2(network(), weight_decay=1e-4, eps=1e-3).attach(
                torch.optim.SGD(nn.Linear(2, 2).parameters())
            ),
            ValueError,
            "the optimizer has none of the weights",
        ),
        (
            lambda: EpsilonShiftedL2(network(), weight_decay=1e-4, eps=1e-3).attach(
                torch.optim.SGD(nn.Linear(2, 2).parameters()), "couple"
            ),
            ValueError,
            "Invalid coupling: 'couple'",
        ),
        (closure_step, RuntimeError, "is stepped with a closure"),
    ],
)
def test_bad_input_says_why(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_weight_norm_without_a_gain_is_found_too():
    model = nn.Sequential(nn.Linear(3, 3))
    reparametrize(model, WeightNorm, gain=False, only="0")
    assert EpsilonShiftedL2(model, weight_decay=1e-4, eps=1e-3).groups[0].names == ("0.weight",)


@pytest.mark.parametrize("coupling", ["coupled", "decoupled"])
def test_weights_decay_under_maximize_too(coupling):
    """Going up along −g is going down along g."""
    ends = []
    for sign in (1, -1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        weight_normalize(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=sign < 0)
        EpsilonShiftedL2(model, weight_decay=0.5, eps=1e-3).attach(optimizer, coupling)
        for _ in range(3):
            for p in model.parameters():
                p.grad = sign * torch.ones_like(p)
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends)


def test_attached_while_a_schedule_drives_the_decay_it_is_an_error():
    """The schedule would bring back the decay that is taken out."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    weight_normalize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    schedule = DecayScheduler(optimizer, early(10))
    reg = EpsilonShiftedL2(model, weight_decay=0.5, eps=1e-3)
    with pytest.raises(ValueError, match="already; attach EpsilonShiftedL2 before you make"):
        reg.attach(optimizer)
    schedule.remove()
    reg.attach(optimizer)
