"""Schedules of λ, and SGDWR and AdamWR as the paper writes them."""

import copy
import math

import pytest
import torch

import normwise as nw
from normwise.decay import (
    Cosine,
    DecayScheduler,
    Decoupled,
    Linear,
    Piecewise,
    Restarts,
    Window,
    early,
    late,
    normalized,
    warm_restarts,
)


def optimizer(decays=(0.2,), kind=torch.optim.SGD, **options):
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": d} for d in decays]
    return kind(groups, lr=0.1, **options)


def driven(scheduler, steps):
    """λ of the first group in each step."""
    values = []
    for _ in range(steps):
        values.append(scheduler.get_last_weight_decay()[0])
        scheduler.step()
    return values


@pytest.mark.parametrize(
    ("when", "factors"),
    [
        (early(2), [1, 1, 0, 0, 0, 0]),
        (late(2), [0, 0, 1, 1, 1, 1]),
        (Window(1, 3), [0, 1, 1, 0, 0, 0]),
        (Linear(4), [1, 0.75, 0.5, 0.25, 0, 0]),
        (Linear(2, 0.5, 1), [0.5, 0.75, 1, 1, 1, 1]),
        (
            Cosine(4, 1, 0.2),
            [0.2 + 0.4 * (1 + math.cos(math.pi * t / 4)) for t in (0, 1, 2, 3, 4, 4)],
        ),
        (Piecewise((1, 4), (1, 0.1, 3)), [1, 0.1, 0.1, 0.1, 3, 3]),
        (Restarts(1, 2), [1, 0.5**0.5, 0.5**0.5, 0.5, 0.5, 0.5]),
        (Restarts(2), [1] * 6),
        (lambda t: 1 / (1 + t), [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6]),
        (Linear(4) * early(2), [1, 0.75, 0, 0, 0, 0]),
        (Linear(4) * (lambda t: t), [0, 0.75, 1, 0.75, 0, 0]),
        (0.5 * late(1), [0, 0.5, 0.5, 0.5, 0.5, 0.5]),
        (late(1).then(3, Linear(2)), [0, 1, 1, 1, 0.5, 0]),
    ],
)
def test_schedules_are_their_formulas(when, factors):
    expected = [0.2 * factor for factor in factors]
    assert driven(DecayScheduler(optimizer(), when), 6) == pytest.approx(expected)


def test_each_group_keeps_its_own_decay():
    scheduler = DecayScheduler(optimizer([0.2, 0.0, 0.4]), [early(1), early(1), late(1)])
    assert scheduler.get_last_weight_decay() == [0.2, 0, 0]
    scheduler.step()
    assert scheduler.get_last_weight_decay() == [0, 0, 0.4]


def test_groups_are_driven_by_number_or_name():
    target = optimizer([0.2, 0.4])
    target.param_groups[1]["name"] = "head"
    DecayScheduler(target, late(1), groups=["head"])
    assert [group["weight_decay"] for group in target.param_groups] == [0.2, 0]
    other = DecayScheduler(target, late(1), groups=[0])
    assert [group["weight_decay"] for group in target.param_groups] == [0, 0]
    other.remove()
    assert [group["weight_decay"] for group in target.param_groups] == [0.2, 0]


def test_a_schedule_goes_on_from_its_state(tmp_path):
    whole = DecayScheduler(optimizer(), Cosine(5))
    first = driven(whole, 3)
    torch.save(whole.state_dict(), tmp_path / "schedule.pt")
    resumed = DecayScheduler(optimizer([0.7]), Cosine(5))
    resumed.load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))
    assert driven(resumed, 3) == driven(whole, 3)
    assert first[0] == 0.2
    with pytest.raises(ValueError, match="of 1 groups; this has 2"):
        DecayScheduler(optimizer([0.1, 0.2]), early(1)).load_state_dict(whole.state_dict())


def test_a_schedule_drives_the_regularizer():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    nw.weight_normalize(model)
    reg = nw.EpsilonShiftedL2(model, weight_decay=0.2, eps=1e-3)
    scheduler = DecayScheduler(reg, Linear(2))
    assert driven(scheduler, 3) == [0.2, 0.1, 0]
    assert reg.groups[0].weight_decay == 0


def test_a_tensor_is_changed_in_place():
    target = nw.SGDW([torch.nn.Parameter(torch.ones(2))], lr=0.1, weight_decay=torch.tensor(0.2))
    decay = target.param_groups[0]["weight_decay"]
    scheduler = DecayScheduler(target, Linear(2))
    scheduler.step()
    assert target.param_groups[0]["weight_decay"] is decay
    torch.testing.assert_close(decay, torch.tensor(0.1))


def test_early_decay_under_a_policy_is_the_loop():
    w = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    expected = w.detach().clone()
    target = torch.optim.SGD([w], lr=0.1)
    Decoupled(0.2, per="step").attach(target)
    scheduler = DecayScheduler(target, early(3))
    for t in range(6):
        w.grad = torch.randn(4, dtype=torch.float64)
        expected = (1 - 0.2 * (t < 3)) * expected - 0.1 * w.grad
        target.step()
        scheduler.step()
    torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-12)


def test_a_policy_may_come_after_a_schedule_whose_factor_is_zero():
    target = optimizer()
    scheduler = DecayScheduler(target, late(1))
    attached = Decoupled(per="step").attach(target)
    scheduler.step()
    assert attached.effect(target.param_groups[0]).shrink == 0.2


def test_an_optimizer_without_decay_is_given_one():
    w = torch.nn.Parameter(torch.ones(2))
    target = torch.optim.Rprop([w], lr=0.1)
    Decoupled(0.2, per="step").attach(target)
    scheduler = DecayScheduler(target, early(1))
    for _ in range(3):
        w.grad = torch.zeros(2)
        target.step()
        scheduler.step()
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.8))


def test_normalized_decay_is_the_papers_formula():
    assert normalized(0.05, 128, 50_000, 100) == pytest.approx(0.05 * (128 / 5e6) ** 0.5)
    for name, value in (("batch_size", 0), ("samples", -1), ("epochs", 0)):
        arguments = {"batch_size": 8, "samples": 64, "epochs": 2, name: value}
        with pytest.raises(ValueError, match=f"Invalid {name}: {value}"):
            normalized(0.1, **arguments)
    with pytest.raises(ValueError, match="Invalid norm_weight_decay: -1"):
        normalized(-1, 8, 64, 2)


RESTARTS = {
    "norm_weight_decay": 0.5,
    "batch_size": 8,
    "samples": 24,
    "epochs": 2,
    "factor": 2,
    "eta_min": 0.01,
}


def paper(kind, w, grads, alpha=0.1):
    """Algorithms 1 and 2 of arXiv 1711.05101, with the normalization of its appendix B.1."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    per_epoch, epochs, since = 3, 2, 0
    for t, g in enumerate(grads, 1):
        decay = 0.5 * math.sqrt(8 / (24 * epochs))
        cosine = (1 + math.cos(math.pi * since / (epochs * per_epoch))) / 2
        s = (0.01 + (alpha - 0.01) * cosine) / alpha
        if kind == "SGDWR":
            m = 0.9 * m + s * alpha * g
            w = w - m - s * decay * w
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            u = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            w = w - s * (alpha * u + decay * w)
        since += 1
        if since == epochs * per_epoch:
            since, epochs = 0, 2 * epochs
    return w


RESTARTED = {
    "SGDWR": lambda p: nw.SGDW(p, lr=0.1, momentum=0.9),
    "AdamWR": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0),
    "AdamWR on Adam": lambda p: torch.optim.Adam(p, lr=0.1),
}


@pytest.mark.parametrize("kind", RESTARTED)
def test_warm_restarts_are_the_papers_algorithms(kind):
    w = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    grads = [torch.randn(5, dtype=torch.float64) for _ in range(30)]
    expected = paper(kind.split()[0], w.detach(), grads)
    target = RESTARTED[kind]([w])
    schedule = warm_restarts(target, **RESTARTS)
    for g in grads:
        w.grad = g
        target.step()
        schedule.step()
    torch.testing.assert_close(w.detach(), expected, rtol=1e-10, atol=1e-12)


def test_warm_restarts_go_on_from_their_state():
    values = []
    target = optimizer([0.0])
    schedule = warm_restarts(target, **RESTARTS)
    for step in range(12):
        if step == 8:
            saved = copy.deepcopy((schedule.state_dict(), target.state_dict()))
        group = target.param_groups[0]
        values.append((group["lr"], group["weight_decay"]))
        target.step()
        schedule.step()
    target = optimizer([0.0])
    schedule = warm_restarts(target, **RESTARTS)
    target.load_state_dict(saved[1])
    schedule.load_state_dict(saved[0])
    for expected in values[8:]:
        group = target.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == expected
        target.step()
        schedule.step()


def test_a_schedule_attached_twice_is_an_error():
    target = optimizer([0.2, 0.4])
    first = DecayScheduler(target, early(1), groups=[0])
    with pytest.raises(ValueError, match="drives the weight_decay of group 0 already; multiply"):
        DecayScheduler(target, late(1))
    with pytest.raises(ValueError, match="already; attach Decoupled"):
        Decoupled(0.2).attach(target)
    first.remove()
    DecayScheduler(target, late(1))


def test_a_schedule_that_is_gone_is_no_obstacle():
    target = optimizer()
    DecayScheduler(target, early(1))
    DecayScheduler(target, early(1))


@pytest.mark.parametrize("group", ["head", 2, -1])
def test_an_unknown_group_is_an_error(group):
    with pytest.raises(ValueError, match=f"unknown group {group!r}; there are 0, 1"):
        DecayScheduler(optimizer([0.2, 0.4]), early(1), groups=[group])


def test_groups_that_come_later_are_an_error():
    target = optimizer()
    scheduler = DecayScheduler(target, early(1))
    target.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match=r"there were 1 groups .* and there are 2"):
        scheduler.step()


@pytest.mark.parametrize("factor", [-0.5, math.inf, math.nan])
def test_a_factor_must_be_finite_and_not_negative(factor):
    scheduler = DecayScheduler(optimizer(), lambda t: factor if t == 1 else 1)
    with pytest.raises(ValueError, match=f"Invalid factor on weight_decay: {factor} at step 1"):
        scheduler.step()


def test_what_cannot_be_scheduled_is_an_error():
    with pytest.raises(TypeError, match="Linear is not an Optimizer or EpsilonShiftedL2"):
        DecayScheduler(torch.nn.Linear(1, 1), early(1))
    with pytest.raises(ValueError, match="2 functions for 1 groups"):
        DecayScheduler(optimizer(), [early(1), late(1)])
    rprop = torch.optim.Rprop([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="has no weight_decay; attach a policy"):
        DecayScheduler(rprop, early(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: early(0), "Invalid number of steps: 0"),
        (lambda: late(-1), "Invalid window: from -1"),
        (lambda: Cosine(0), "Invalid number of steps: 0"),
        (lambda: Linear(-2), "Invalid number of steps: -2"),
        (lambda: Piecewise((1,), (1,)), "1 milestones need 2 values"),
        (lambda: Piecewise((2, 1), (1, 1, 1)), r"Invalid milestones: \(2, 1\)"),
        (lambda: Restarts(3, 0), "Invalid factor: 0"),
        (lambda: early(1).then(0, late(1)), "Invalid number of steps: 0"),
    ],
)
def test_schedules_out_of_range_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
