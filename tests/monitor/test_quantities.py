"""Every quantity, against a loop over slices in float64 that says what it is."""

import math
from itertools import pairwise

import pytest
import torch

from normwise import View, describe
from normwise.geometry import norms
from normwise.monitor import Monitor, Quantity, every, first, log_spaced
from normwise.theory import Update

VIEWS = {"0.weight": "channel", "3.weight": "blocks(2)"}


def by_hand(before, after, gradient, lr, decay, power):
    """The quantities of one slice, from vectors in float64."""
    w, v, g = (t.flatten().double() for t in (before, after, gradient))
    update = v - w
    cosine = (w @ v / (w.norm() * v.norm())).clamp(max=1)
    return {
        "norm": v.norm(),
        "smallest_norm": v.norm(),
        "largest_inverse_norm": 1 / v.norm(),
        "effective_lr": lr / w.norm() ** power,
        "angular_update": torch.acos(cosine),
        "radial_share": (w @ update) ** 2 / (w @ w) / (update @ update),
        "gradient_cosine": (w @ g).abs() / (w.norm() * g.norm()),
        "decay_pull": torch.tensor(lr * decay),
        "gradient_push": v.norm() / w.norm() - 1 + lr * decay,
        "scaled_gradient": w.norm() * g.norm(),
    }


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01), 0.1, 0.1, 2),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5), 0.01, 0.5, 1),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_quantities_are_what_they_say(name, channels_last, make_training):
    """``decay_per_lr`` is λ, and λ/(1 − μ) for SGD with momentum."""
    make, lr, decay, power = OPTIMIZERS[name]
    training = make_training(make)
    if channels_last:
        training.model.to(memory_format=torch.channels_last)
    training.model.double()
    weights = {n: p for n, p in training.model.named_parameters() if n in VIEWS}
    with Monitor(training.model, training.optimizer, VIEWS, every=1, fetch_every=1) as monitor:
        for _ in range(3):
            before = {n: p.detach().clone() for n, p in weights.items()}
            training.step()
            m = monitor.history[-1]
            for n, p in weights.items():
                view = View.parse(VIEWS[n])
                triples = zip(
                    view.slices(before[n]),
                    view.slices(p.detach()),
                    view.slices(p.grad),
                    strict=True,
                )
                for i, (old, new, g) in enumerate(triples):
                    expected = by_hand(old, new, g, lr, decay, power)
                    for quantity, value in expected.items():
                        found = m.of_slices(quantity, n)[i]
                        # The arc cosine of a cosine near 1 has half of float64's digits.
                        torch.testing.assert_close(
                            found, value.double(), rtol=1e-6, atol=1e-9, msg=quantity
                        )


def test_a_layer_is_summed_up_as_its_quantity_says(training):
    with Monitor(training.model, training.optimizer, VIEWS, every=1, fetch_every=1) as monitor:
        training.run(2)
        m = monitor.history[-1]
        for layer in VIEWS:
            norm = m.of_slices("norm", layer)
            angle = m.of_slices("angular_update", layer)
            for found, expected in (
                (m["norm"][layer], norm.log().mean().exp()),
                (m["smallest_norm"][layer], norm.min()),
                (m["largest_inverse_norm"][layer], (1 / norm).max()),
                (m["angular_update"][layer], angle.square().mean().sqrt()),
                (m["radial_share"][layer], m.of_slices("radial_share", layer).mean()),
            ):
                assert found == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12, 1e18])
def test_quantities_hold_far_from_one(scale, make_training):
    """Scaled by c under a rate scaled by c², a run takes the same angles; norms scale by c."""
    found = []
    for c in (1.0, scale):
        training = make_training(lambda p, c=c: torch.optim.SGD(p, lr=0.1 * c * c))
        with torch.no_grad():
            training.model[0].weight.mul_(c)
        training.model[1].eps = 1e-300
        group = training.optimizer.param_groups[0]
        group["params"] = [training.model[0].weight]
        monitor = Monitor(training.model, training.optimizer, VIEWS, every=1, fetch_every=1)
        training.run(1)
        monitor.close()
        found.append(monitor.history[0])
    one, other = found
    for name in ("angular_update", "radial_share", "scaled_gradient"):
        torch.testing.assert_close(one.of_slices(name), other.of_slices(name), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        one.of_slices("norm") * scale, other.of_slices("norm"), rtol=1e-5, atol=0
    )


def test_half_precision_weights_are_measured_in_float32():
    w = torch.full((2, 4), 3.0, dtype=torch.bfloat16, requires_grad=True)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(w.detach())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with Monitor(model, optimizer, {"w": "channel"}) as monitor:
        model.w.grad = torch.ones_like(model.w)
        optimizer.step()
    assert monitor.history[0]["norm"]["w"] == pytest.approx(4.0)
    assert monitor.history[0]["largest_inverse_norm"]["w"] == pytest.approx(0.25)


class NearZero(Quantity):
    name = "near_zero"

    def __call__(self, s):
        return (s.after.abs() < 0.1).float().mean(1)


def test_a_quantity_of_ones_own(training):
    with Monitor(
        training.model, training.optimizer, VIEWS, quantities=[NearZero()], rules=[]
    ) as monitor:
        training.run(1)
    w = training.model[0].weight.detach()
    expected = float((w.abs() < 0.1).float().mean())
    assert monitor.history[0]["near_zero"]["0.weight"] == pytest.approx(expected)


def test_schedules():
    def steps(schedule):
        return [t for t in range(1, 101) if schedule(t)]

    assert steps(every(30)) == [1, 30, 60, 90]
    assert steps(first(3)) == [1, 2, 3]
    assert steps(first(3) | every(50)) == [1, 2, 3, 50, 100]
    marks = steps(log_spaced(4))
    assert marks[0] == 1
    assert marks[-1] == 100
    ratios = [b / a for a, b in pairwise(marks) if a > 10]
    assert ratios == pytest.approx([10**0.25] * len(ratios), rel=0.1)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"Invalid interval: {bad}"):
            every(bad)


def test_which_optimizers_make_updates_as_long_as_gradients():
    import normwise

    p = [torch.ones(2, 2, requires_grad=True)]
    for optimizer in (
        torch.optim.SGD(p, lr=1.0),
        normwise.SGDP(p, lr=1.0),
        normwise.SGDW(p, lr=1.0),
        normwise.tangential(torch.optim.SGD(p, lr=1.0), "channel"),
    ):
        assert describe(optimizer)[0].update is Update.GRADIENT
    for optimizer in (torch.optim.AdamW(p), normwise.AdamP(p), torch.optim.RMSprop(p)):
        assert describe(optimizer)[0].update is Update.NORMALIZED


def test_norms_agree_with_geometry_at_every_view():
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.randn(6, 4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for view in ("channel", "channel(1)", "blocks(3)", "blocks(2, 1)", "layer"):
        with Monitor(model, optimizer, {"w": view}) as monitor:
            model.w.grad = torch.ones_like(model.w)
            optimizer.step()
        expected = norms(model.w.detach(), View.parse(view)).flatten().double()
        torch.testing.assert_close(monitor.history[0].of_slices("norm"), expected)
        assert math.isfinite(monitor.history[0]["angular_update"]["w"])
