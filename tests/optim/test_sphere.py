"""sphere(): norms are fixed and the learning rate is an angle, around any torch optimizer."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normwise
from normwise import LearnedNorm, RadialBrake, View
from normwise.geometry import cosine, norms, radial, unit
from normwise.updates import Update

SHAPES = [(7,), (6, 4), (4, 3, 3, 3), (2, 3, 2, 2, 2), (6, 4)]
VIEWS = [View.channel(), View.channel(1), View.blocks(2), View.layer()]
PATHS = ["retract", "geodesic"]
UPDATES = ["relative", "raw"]


def parameters(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [w.to(dtype).requires_grad_() for w in drawn]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def run(optimizer, params, steps=20, start=0):
    for step in range(start, start + steps):
        give_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def assert_same(ours, theirs, atol=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def by_slice(values, w, view):
    """Values of slices in a shape that multiplies the weight's slices."""
    return values.view(-1, *(1 for _ in view.slices(w).shape[1:]))


class Lion(torch.optim.Optimizer):
    """A third-party optimizer of the usual kind."""

    def __init__(self, params, lr=1e-2, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(0.9 * m + 0.1 * p.grad))
                m.lerp_(p.grad, 0.01)


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "adamw fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "nadam": lambda p, lr: torch.optim.NAdam(p, lr=lr),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.5),
    "adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr),
    "lion": lambda p, lr: Lion(p, lr=lr),
    "adamp": lambda p, lr: normwise.AdamP(p, lr=lr),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda p, lr: torch.optim.Muon(p, lr=lr)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("view", VIEWS)
def test_along_the_great_circle_the_learning_rate_is_the_angle(name, view):
    """The cosine of a slice before and after is cos θ, and its norm is what it was."""
    shapes = [(6, 4)] if name == "muon" else SHAPES
    params = parameters(shapes=shapes)
    matrices = [p for p in params if p.ndim > 1]
    first = [norms(p.detach(), view) for p in matrices]
    optimizer = normwise.sphere(OPTIMIZERS[name](params, 0.3), view, path="geodesic")
    for step in range(4):
        before = [p.detach().clone() for p in matrices]
        run(optimizer, params, steps=1, start=step)
        for p, old, radius in zip(matrices, before, first, strict=True):
            angle = cosine(p.detach(), old, view)
            torch.testing.assert_close(
                angle, torch.full_like(angle, math.cos(0.3)), rtol=0, atol=1e-12
            )
            torch.testing.assert_close(norms(p.detach(), view), radius, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
@pytest.mark.parametrize("view", VIEWS)
def test_the_retraction_is_hyperballs_update(name, view):
    """W ← R·unit(W/R − θ·u/‖u‖), with u of the same optimizer on a weight of its own."""
    lr, params = 0.1, parameters(shapes=SHAPES[1:])
    optimizer = normwise.sphere(OPTIMIZERS[name](params, lr), view)
    expected = [p.detach().clone() for p in params]
    radii = [by_slice(norms(w, view), w, view) for w in expected]
    shadows = [torch.zeros_like(w, requires_grad=True) for w in expected]
    shadow_optimizer = OPTIMIZERS[name](shadows, lr)
    for group in shadow_optimizer.param_groups:
        group["weight_decay"] = 0.0
    for step in range(5):
        run(optimizer, params, steps=1, start=step)
        for shadow in shadows:
            shadow.data.zero_()
        run(shadow_optimizer, shadows, steps=1, start=step)
        for w, shadow, radius in zip(expected, shadows, radii, strict=True):
            slices, u = view.slices(w), view.slices(-shadow.detach())
            slices.copy_(radius * unit(slices / radius - lr * unit(u)[0])[0])
        assert_same([p.detach() for p in params], expected)


@pytest.mark.parametrize("view", VIEWS)
def test_raw_updates_are_retracted_or_take_the_exponential_map(view):
    for path in PATHS:
        params = parameters(shapes=SHAPES[1:])
        expected = [p.detach().clone() for p in params]
        optimizer = normwise.sphere(torch.optim.SGD(params, lr=0.2), view, update="raw", path=path)
        run(optimizer, params, steps=1)
        for p, w in zip(params, expected, strict=True):
            radius = by_slice(norms(w, view), w, view)
            if path == "retract":
                moved = radius * unit(view.slices(w - 0.2 * p.grad))[0]
            else:
                t = -0.2 * (p.grad - radial(p.grad, w, view))
                angle = by_slice(norms(t, view), w, view) / radius
                direction, circle = unit(view.slices(w))[0], unit(view.slices(t))[0]
                moved = radius * (angle.cos() * direction + angle.sin() * circle)
            torch.testing.assert_close(view.slices(p.detach()), moved, rtol=0, atol=1e-13)


@pytest.mark.parametrize("view", VIEWS)
def test_for_small_steps_it_is_tangential(view):
    """The difference falls with the square of the step, and on the great circle with its cube."""

    def difference(path, lr):
        ours, theirs = parameters(shapes=SHAPES[1:]), parameters(shapes=SHAPES[1:])
        sphere = normwise.sphere(torch.optim.SGD(ours, lr=lr), view, update="raw", path=path)
        fixed = normwise.tangential(torch.optim.SGD(theirs, lr=lr), view, norm="fixed")
        run(sphere, ours, steps=1)
        run(fixed, theirs, steps=1)
        return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))

    for path, order in (("retract", 2), ("geodesic", 3)):
        coarse, fine = difference(path, 2e-3), difference(path, 1e-3)
        assert coarse > 1e-10
        assert coarse / fine == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("path", PATHS)
def test_sgd_on_an_invariant_weight_follows_gradient_flow_on_the_sphere(path):
    """Of f = wᵀAw/‖w‖² the flow on the unit sphere is the direction of e^(−2At) w₀."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    a = (a + a.T) / 4
    start = unit(torch.randn(1, 8, generator=generator, dtype=torch.float64))[0]
    target = unit(start @ torch.linalg.matrix_exp(-2 * a))[0]

    def error(steps):
        w = start.clone().requires_grad_()
        sgd = torch.optim.SGD([w], lr=1 / steps)
        optimizer = normwise.sphere(sgd, "layer", update="raw", path=path)
        for _ in range(steps):
            optimizer.zero_grad()
            ((w @ a @ w.T) / w.square().sum()).backward()
            optimizer.step()
        return float((w.detach() - target).norm())

    coarse, fine = error(200), error(400)
    assert fine < 5e-3
    assert coarse / fine == pytest.approx(2, rel=0.1)  # of first order, as Euler's method


@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("view", [View.channel(), View.layer()])
def test_no_norm_drifts_in_bfloat16(view, steps, stochastic_rounding):
    w = torch.randn(16, 32).bfloat16().requires_grad_()
    optimizer = normwise.sphere(
        torch.optim.AdamW([w], lr=0.02), view, stochastic_rounding=stochastic_rounding
    )
    first = optimizer.radii[w].clone()
    run(optimizer, [w], steps)
    assert first.dtype == torch.float32
    assert torch.equal(optimizer.radii[w], first)
    ulp = torch.finfo(torch.bfloat16).eps * first.log2().floor().exp2()
    assert ((norms(w.detach(), view) - first).abs() <= ulp).all()


def test_in_half_precision_small_steps_count():
    """An angle of 1e-3 is below the spacing of most entries in bfloat16, and is taken on average.

    The part of the step along its direction is θR up to the noise of rounding, which is below 0.02
    here: 0.4·2⁻⁷ of the entries' size, as the direction is a unit vector.
    """
    w = torch.randn(1, 1 << 16).bfloat16().requires_grad_()
    old = w.detach().float()
    optimizer = normwise.sphere(
        torch.optim.SGD([w], lr=1e-3), "layer", path="geodesic", stochastic_rounding=True
    )
    run(optimizer, [w], steps=1)
    direction = unit(-(w.grad.float() - radial(w.grad.float(), old, View.layer())))[0]
    along = float(((w.detach().float() - old) * direction).sum())
    assert along == pytest.approx(1e-3 * float(old.norm()), abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["fixed", RadialBrake(), LearnedNorm(lr=0.01)])
def test_killed_and_resumed_it_ends_in_the_same_bits(norm, dtype):
    def fresh(weights):
        params = [w.detach().clone().requires_grad_() for w in weights]
        inner = torch.optim.AdamW(params, lr=0.05)
        update = "raw" if norm == RadialBrake() else "relative"
        return params, normwise.sphere(inner, "channel", norm=norm, update=update)

    params, optimizer = fresh(parameters(dtype))
    run(optimizer, params, steps=5)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), params), file)
    straight = run(optimizer, params, 5, 5)
    file.seek(0)
    state_dict, weights = torch.load(file, weights_only=True)
    resumed, again = fresh(weights)
    again.load_state_dict(state_dict)
    assert all(torch.equal(a, b) for a, b in zip(straight, run(again, resumed, 5, 5), strict=True))
    for ours, theirs in zip(optimizer.radii.values(), again.radii.values(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_a_state_dict_without_radii_is_refused_and_one_of_the_wrapped_optimizer_continues():
    params = parameters()
    inner = torch.optim.AdamW(params, lr=0.1)
    run(inner, params, steps=3)
    plain = copy.deepcopy(inner.state_dict())
    optimizer = normwise.sphere(torch.optim.AdamW(params, lr=0.1), "layer")
    with pytest.raises(ValueError, match="no radius for a parameter of shape \\(6, 4\\)"):
        optimizer.load_state_dict(plain)
    other = torch.optim.AdamW(params, lr=0.1)
    other.load_state_dict(plain)
    resumed = normwise.sphere(other, "layer")
    run(resumed, params, steps=1)
    assert resumed.state[params[1]]["step"] == 4
    torch.optim.AdamW(params).load_state_dict(resumed.state_dict())  # the radii are only more


def test_radii_of_other_slices_are_refused():
    w = torch.randn(4, 3, requires_grad=True)
    saved = normwise.sphere(torch.optim.SGD([w], lr=0.1), "channel").state_dict()
    with pytest.raises(ValueError, match=r"shape \(4,\), but its view has \(1,\)"):
        normwise.sphere(torch.optim.SGD([w], lr=0.1), "layer").load_state_dict(saved)


def test_zero_slices_are_named_unless_a_radius_is_given():
    layer = nn.Linear(3, 4, bias=False)
    nn.init.zeros_(layer.weight[:2])
    named = torch.optim.SGD(layer.named_parameters(), lr=0.5)
    with pytest.raises(ValueError, match="norm 0 have no initial radius: 2 of weight"):
        normwise.sphere(named, "channel")
    optimizer = normwise.sphere(named, "channel", radius={"weight": 2.0})
    assert (layer.weight[:2] == 0).all()
    torch.testing.assert_close(norms(layer.weight[2:].detach(), View.channel()).tolist(), [2.0] * 2)
    run(optimizer, [layer.weight], steps=1)
    # Without a direction of its own a slice takes that of its first update.
    torch.testing.assert_close(
        layer.weight[:2].detach(), -2 * unit(layer.weight.grad[:2])[0], rtol=1e-6, atol=1e-6
    )


def test_radii_are_given_as_one_or_by_weight_or_by_slice():
    a, b, c = (torch.randn(3, 5, requires_grad=True) for _ in range(3))
    kept = c.detach().clone()
    slices = torch.tensor([1.0, 2.0, 3.0])
    normwise.sphere(torch.optim.SGD([a, b, c], lr=0.1), "channel", radius={a: "unit", b: slices})
    torch.testing.assert_close(norms(a.detach(), View.channel()), torch.ones(3))
    torch.testing.assert_close(norms(b.detach(), View.channel()), slices)
    assert torch.equal(c, kept)


def test_a_weight_that_is_on_its_radius_is_not_touched_by_another_construction():
    """Or a resumed run would begin with other bits."""
    w = torch.randn(64, 32, requires_grad=True)
    optimizer = normwise.sphere(torch.optim.SGD([w], lr=0.1), "channel", radius="unit")
    run(optimizer, [w], steps=7)
    before = w.detach().clone()
    normwise.sphere(torch.optim.SGD([w], lr=0.1), "channel", radius="unit")
    assert torch.equal(w, before)


def test_decay_is_refused_with_the_reason_but_the_default_of_a_class_is_left_out():
    w, other = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"weight_decay=0.1 on weights whose norms are fixed"):
        normwise.sphere(torch.optim.AdamW([w, other], weight_decay=0.1), {w: "layer"})
    optimizer = normwise.sphere(torch.optim.AdamW([w, other], lr=0.5), {w: "layer"})
    w.grad = other.grad = torch.zeros(2, 3)
    optimizer.step()
    assert torch.equal(w, torch.ones(2, 3))
    torch.testing.assert_close(other.detach(), torch.full((2, 3), 1 - 0.5 * 0.01))


@pytest.mark.parametrize("outer", [normwise.sphere, normwise.tangential])
@pytest.mark.parametrize("inner", [normwise.sphere, normwise.tangential])
def test_a_wrapper_around_a_wrapper_is_refused(inner, outer):
    w = nn.Parameter(torch.randn(3, 4))
    wrapped = inner(torch.optim.SGD([w], lr=0.1), "layer")
    with pytest.raises(ValueError, match="wrap SGD once"):
        outer(wrapped, "channel")


def test_a_regularizer_of_weights_on_spheres_is_refused():
    layer, other = nn.Linear(3, 4), nn.Linear(3, 4)
    normwise.weight_normalize(nn.ModuleList([layer]), only=[layer])
    sgd = torch.optim.SGD([*layer.parameters(), *other.parameters()], lr=0.1)
    normwise.EpsilonShiftedL2(layer, weight_decay=0.1, eps=1e-3).attach(sgd)
    normwise.sphere(sgd, {other.weight: "layer"})
    with pytest.raises(ValueError, match="acts on weights whose norms are fixed"):
        normwise.sphere(sgd, "layer")


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("path", PATHS)
def test_a_step_with_rate_and_gradients_of_zero_changes_no_bit(path, update):
    """As frameworks take one to have state to load into."""
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(dtype)
        before = [p.detach().clone() for p in params]
        optimizer = normwise.sphere(
            torch.optim.AdamW(params, lr=0.0), "channel", path=path, update=update
        )
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert_same([p.detach() for p in params], before, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 8), (2000, 8), (2000, 1)])
def test_a_slice_that_is_only_lengthened_stays(shape, dtype):
    """On the great circle; rounding must not become a direction."""
    w = torch.randn(shape, dtype=dtype, requires_grad=True)
    before = w.detach().clone()
    optimizer = normwise.sphere(torch.optim.SGD([w], lr=0.3), "channel", path="geodesic")
    w.grad = 0.7 * before
    optimizer.step()
    torch.testing.assert_close(w.detach(), before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("update", UPDATES)
def test_norms_and_updates_may_be_extreme(update, scale):
    w = (torch.randn(4, 8) * scale).requires_grad_()
    first = norms(w.detach(), View.channel())
    optimizer = normwise.sphere(torch.optim.SGD([w], lr=0.1), "channel", update=update)
    give_gradients([w], 0)
    w.grad = w.grad * scale
    before = w.detach().clone()
    optimizer.step()
    assert not torch.equal(w, before)
    torch.testing.assert_close(norms(w.detach(), View.channel()), first, rtol=1e-6, atol=0)


def test_a_brake_of_one_is_the_wrapped_optimizer_and_of_zero_a_fixed_norm():
    for view in VIEWS:
        free, fixed, wrapped, sphere = (parameters() for _ in range(4))
        options = {"lr": 0.1, "momentum": 0.9}
        for params, norm in ((free, RadialBrake(1, 1)), (fixed, RadialBrake(0, 0))):
            inner = torch.optim.SGD(params, **options)
            run(normwise.sphere(inner, view, update="raw", norm=norm), params)
        run(torch.optim.SGD(wrapped, **options), wrapped)
        run(normwise.sphere(torch.optim.SGD(sphere, **options), view, update="raw"), sphere)
        assert_same(free, wrapped, atol=1e-10)
        assert_same(fixed, sphere)


def test_the_radial_brake_takes_a_part_of_the_change_of_the_norm():
    """‖w‖ + s(‖w − ηg‖ − ‖w‖), with its own s outwards and inwards."""
    w = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    old = w.detach().clone()
    sgd = torch.optim.SGD([w], lr=0.5)
    optimizer = normwise.sphere(sgd, "channel", update="raw", norm=RadialBrake(0.2, 0.7))
    run(optimizer, [w], steps=1, start=7)
    before, reached = norms(old, View.channel()), norms(old - 0.5 * w.grad, View.channel())
    assert (reached > before).any()
    assert (reached < before).any()
    share = torch.where(reached > before, 0.2, 0.7)
    expected = before + share * (reached - before)
    torch.testing.assert_close(norms(w.detach(), View.channel()), expected)
    torch.testing.assert_close(optimizer.radii[w], expected)
    torch.testing.assert_close(
        cosine(w.detach(), old - 0.5 * w.grad, View.channel()), torch.ones_like(expected)
    )


@pytest.mark.parametrize("maximize", [False, True])
def test_learned_norms_are_stepped_by_adam_on_the_radial_gradient(maximize):
    """The row magnitudes of Muown are torch.optim.Adam's on ∂L/∂R = ⟨ŵ, g⟩."""
    w = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    radius = norms(w.detach(), View.channel()).requires_grad_()
    adam = torch.optim.Adam([radius], lr=0.05, betas=(0.8, 0.9), maximize=maximize)
    sgd = torch.optim.SGD([w], lr=0.1, maximize=maximize)
    learned = LearnedNorm(lr=0.05, betas=(0.8, 0.9))
    optimizer = normwise.sphere(sgd, "channel", norm=learned)
    for step in range(6):
        give_gradients([w], step)
        radius.grad = (unit(w.detach())[0] * w.grad).sum(1)
        optimizer.step()
        adam.step()
        torch.testing.assert_close(norms(w.detach(), View.channel()), radius.detach())
        torch.testing.assert_close(optimizer.radii[w], radius.detach())


def test_a_floor_lengthens_raw_updates_that_are_shorter():
    w = torch.randn(5, 4, dtype=torch.float64)
    expected, floored = w.clone(), w.clone().requires_grad_()
    sgd = torch.optim.SGD([floored], lr=1.0)
    optimizer = normwise.sphere(sgd, "channel", update="raw", floor=0.1)
    radius = norms(w, View.channel()).unsqueeze(1)
    floored.grad = (
        torch.randn(5, 4, dtype=torch.float64) * torch.tensor([[0.0, 1e-3, 1e-3, 3, 3]]).T
    )
    optimizer.step()
    length = norms(floored.grad, View.channel()).unsqueeze(1)
    step = floored.grad * torch.where(length > 0, (0.1 * radius / length).clamp_min(1), 0)
    expected = radius * unit(w - step)[0]
    torch.testing.assert_close(floored.detach(), expected)


def test_small_tensors_in_one_batch_go_as_each_alone():
    together, alone = parameters(shapes=[(6, 4)] * 5), parameters(shapes=[(6, 4)] * 5)
    run(normwise.sphere(torch.optim.AdamW(together, lr=0.1), "blocks(3)"), together)
    for i, p in enumerate(alone):
        optimizer = normwise.sphere(torch.optim.AdamW([p], lr=0.1), "blocks(3)")
        for step in range(20):
            give_gradients(alone, step)
            optimizer.step()
        assert_same([p.detach()], [together[i].detach()])


def test_groups_have_learning_rates_of_their_own_that_may_be_tensors():
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": torch.tensor(0.4)}]
    optimizer = normwise.sphere(torch.optim.SGD(groups, lr=1.0), "layer", path="geodesic")
    before = [p.detach().clone() for p in (a, b)]
    run(optimizer, [a, b], steps=1, start=7)
    for p, old, angle in zip((a, b), before, (0.1, 0.4), strict=True):
        assert float(cosine(p.detach(), old, View.layer())) == pytest.approx(math.cos(angle))


class NoHostReads(TorchDispatchMode):
    """Fails where a value is read back to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "local_scalar_dense" not in str(func), "a value was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["fixed", RadialBrake(), LearnedNorm()])
def test_no_value_is_read_back_in_a_step(norm):
    params = parameters()
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer = normwise.sphere(torch.optim.SGD(params, foreach=True), "channel", norm=norm)
    optimizer.param_groups[0]["lr"] = 0.1
    run(optimizer, params, steps=1)
    optimizer = normwise.sphere(
        Lion(params, lr=lr), "channel", update="raw", path="geodesic", norm=norm
    )
    give_gradients(params, 1)
    with NoHostReads():
        optimizer.step()


def test_schedulers_closures_scalers_and_deepcopy_see_one_optimizer():
    w = torch.randn(4, 3, requires_grad=True)
    inner = torch.optim.SGD([w], lr=1.0)
    optimizer = normwise.sphere(inner, View.layer(), path="geodesic")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    target = torch.randn(4, 3)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(w.detach().clone())
        loss = (w * target).sum()
        loss.backward()
        return loss

    before = w.detach().clone()
    loss = optimizer.step(closure)
    assert float(loss.detach()) == pytest.approx(float((before * target).sum()))
    assert len(seen) == 1
    assert torch.equal(seen[0], before)  # not the zero that the wrapped optimizer steps from
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.5

    twin = copy.deepcopy(optimizer)
    (twin_w,) = twin.param_groups[0]["params"]
    assert twin_w is not w
    held = w.detach().clone()
    twin_w.grad = torch.randn(4, 3)
    twin.step()
    assert not torch.equal(twin_w, w)
    assert torch.equal(w, held)
    assert float(cosine(twin_w.detach(), held, View.layer())) == pytest.approx(math.cos(0.5))

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale((w * torch.tensor(float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(w, held)
    optimizer.zero_grad()
    scaler.scale((w * target).sum()).backward()
    scaler.step(optimizer)
    assert float(cosine(w.detach(), held, View.layer())) == pytest.approx(math.cos(0.5))


def test_a_compiled_step_of_the_wrapped_optimizer_is_compiled_once():
    plain, compiled = parameters(torch.float32), parameters(torch.float32)
    options = {"lr": 0.1, "weight_decay": 0.0, "foreach": True, "capturable": False}
    run(normwise.sphere(torch.optim.AdamW(plain, **options), "channel"), plain, 4)
    inner = torch.optim.AdamW(compiled, **options)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    inner.step = torch.compile(inner.step, backend=backend)
    optimizer = normwise.sphere(inner, "channel")
    run(optimizer, compiled, 2)
    count = len(graphs)
    run(optimizer, compiled, 2, 2)
    assert graphs
    assert len(graphs) == count
    assert_same(plain, compiled, atol=1e-5)


def test_its_rule_has_fixed_norms_and_no_decay_where_it_acts():
    w, other = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    groups = [{"params": [w], "weight_decay": 0.0}, {"params": [other]}]
    adamw = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3)
    ours, theirs = normwise.describe(normwise.sphere(adamw, {w: "layer"}))
    assert (ours.norm, ours.view, ours.shrink) == ("fixed", View.layer(), 0.0)
    assert ours.changed_by == ("sphere",)
    assert (ours.update, ours.scale) == (Update.RELATIVE, 1.0)
    turning = normwise.sphere(torch.optim.SGD([w], lr=0.1), "layer", path="geodesic")
    assert normwise.describe(turning)[0].update is Update.ROTATION
    raw = normwise.sphere(torch.optim.SGD([w], lr=0.1), "layer", update="raw")
    assert normwise.describe(raw)[0].update is Update.GRADIENT
    assert theirs == normwise.describe(adamw)[1]


def test_when_the_wrapped_step_raises_the_weights_are_what_they_were():
    w, other = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = normwise.sphere(Lion([w, other]), "layer")
    w.grad = torch.ones(2, 3)
    with pytest.raises(TypeError):  # the other parameter has no gradient
        optimizer.step()
    assert torch.equal(w, torch.ones(2, 3))


def test_weights_without_a_gradient_are_left_alone():
    w, other = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    before = other.detach().clone()
    optimizer = normwise.sphere(torch.optim.AdamW([w, other], lr=0.1), "layer")
    run(optimizer, [w], steps=2)
    assert torch.equal(other, before)


def test_complex_weights_are_pairs_of_real_ones():
    z = torch.randn(3, 4, dtype=torch.complex128, requires_grad=True)
    x = torch.view_as_real(z.detach()).clone().requires_grad_()
    gradient = torch.randn(3, 4, dtype=torch.complex128)
    for view in (View.channel(), View.layer()):
        a = normwise.sphere(torch.optim.SGD([z], lr=0.1), view)
        b = normwise.sphere(torch.optim.SGD([x], lr=0.1), view)
        z.grad, x.grad = gradient, torch.view_as_real(gradient)
        a.step()
        b.step()
        assert_same([torch.view_as_real(z.detach())], [x.detach()])


def test_gains_are_stepped_along_unless_they_are_stepped_already():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    gains = normwise.add_gains(model, {"0.weight": "row", "1.weight": ("scalar", "column")})
    matrices = [layer.parametrizations.weight.original for layer in model]
    sgd = torch.optim.SGD(matrices, lr=0.1)
    optimizer = normwise.sphere(sgd, "layer", gains={"params": gains, "lr": 0.01})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert set(optimizer.radii) == set(matrices)
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    assert all((gain != 1).all() for gain in gains)
    again = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    normwise.sphere(again, "layer", gains=gains)
    assert len(again.param_groups) == 1
    named = torch.optim.AdamW([("a", matrices[0]), ("b", matrices[1])], lr=0.1)
    normwise.sphere(named, "layer", gains=gains)
    assert len(named.param_groups) == 2


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="of newer versions of torch")
def test_muon_takes_no_gains():
    w, gain = torch.randn(2, 3, requires_grad=True), torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="Muon steps matrices alone"):
        normwise.sphere(torch.optim.Muon([w]), "layer", gains=[gain])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": "long"}, "Invalid update: 'long'"),
        ({"path": "straight"}, "Invalid path: 'straight'"),
        ({"norm": "free"}, "Invalid norm: 'free'"),
        ({"radius": "large"}, "Invalid radius: 'large'"),
        ({"radius": 0.0}, "Invalid radius: 0.0; must be positive and finite"),
        ({"radius": math.inf}, "Invalid radius: inf"),
        ({"radius": torch.ones(3)}, r"shape \(3,\) for a weight of 6 slices"),
        ({"radius": {"weight": 1.0}}, "radius names 'weight', which is not on a sphere"),
        ({"floor": -1.0, "update": "raw"}, "Invalid floor: -1.0"),
        ({"floor": 0.1}, "floor is for update='raw'"),
    ],
)
def test_bad_options_are_one_line_errors(options, message):
    w = torch.ones(6, 4, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        normwise.sphere(torch.optim.SGD([w], lr=0.1), "channel", **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RadialBrake(1.5), "Invalid outward: 1.5"),
        (lambda: RadialBrake(0.5, -1), "Invalid inward: -1"),
        (lambda: LearnedNorm(lr=-0.1), "Invalid lr: -0.1"),
        (lambda: LearnedNorm(betas=(0.9, 1.0)), "Invalid beta: 1.0"),
    ],
)
def test_bad_norms_are_one_line_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("optimizer", "views", "message"),
    [
        (torch.optim.SGD, "auto", "sphere needs a normwise.View"),
        (torch.optim.SGD, {}, "nothing to project"),
        (torch.optim.SGD, {"w": "layer"}, "'w' is not one of the optimizer's"),
        (torch.optim.LBFGS, "layer", "LBFGS evaluates the loss at several points"),
    ],
)
def test_bad_views_and_optimizers_are_one_line_errors(optimizer, views, message):
    w = torch.ones(6, 4, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        normwise.sphere(optimizer([w], lr=0.1), views)


def test_weights_on_the_meta_device_are_refused():
    w = torch.ones(6, 4, requires_grad=True, device="meta")
    with pytest.raises(ValueError, match="on the meta device and has no norm yet"):
        normwise.sphere(torch.optim.SGD([w], lr=0.1), "layer")
