"""Planted faults are alarmed before the loss is not finite; a healthy run raises nothing."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from normwise.monitor import (
    AlarmError,
    DeadSlices,
    EffectiveLRFell,
    ExplodingSlices,
    LargeAngularUpdate,
    Monitor,
    NotFinite,
    RangeForecast,
    every,
)

VIEWS = {"0.weight": "channel", "3.weight": "blocks(2)"}


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images[:, None] / 16).float(), torch.tensor(data.target)


def bn_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


CONVS = {"0.weight": "channel", "4.weight": "channel"}


def train(model, optimizer, monitor, steps, batch=32):
    """The step at which the loss was first not finite, or None."""
    x, y = digits()
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    with monitor:
        for step in range(1, steps + 1):
            chosen = torch.randint(len(y), (batch,), generator=generator)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[chosen].to(dtype)), y[chosen])
            if not math.isfinite(float(loss.detach())):
                return step
            loss.backward()
            optimizer.step()
    return None


def alarms(monitor, kind):
    return [alarm for alarm in monitor.raised if alarm.kind == kind]


@pytest.mark.slow
def test_a_healthy_run_raises_no_alarm_in_2000_steps():
    model = bn_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    monitor = Monitor(model, optimizer, CONVS)
    assert train(model, optimizer, monitor, 2000) is None
    assert len(monitor.history) == 21
    assert monitor.raised == []


def test_too_large_a_decay_under_weight_norm_is_forecast():
    """Decay outweighs the gradients: ‖v‖ falls until torch's weight_norm divides by zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    weight_norm(model[1])
    norm = model[1].parametrizations.weight
    norm.original0.requires_grad_(False).zero_()  # its gain: no gradient reaches the direction
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5.0)
    name = "1.parametrizations.weight.original1"
    monitor = Monitor(model, optimizer, {name: "channel"}, every=5, fetch_every=1)
    failed = train(model, optimizer, monitor, 400)
    assert failed is not None
    (alarm,) = alarms(monitor, "range")
    assert alarm.step < failed
    assert alarm.layer == name
    # The forecast, made at a steady rate, names the step at which ‖w‖² underflows float32.
    ahead = int(alarm.message.split("in about ")[1].split(" steps")[0])
    rate = math.log(1 / (1 - 0.1 * 5.0))
    start = monitor.history[0]["largest_inverse_norm"][name]
    assert alarm.step + ahead == pytest.approx(
        (math.log(1 / start) - math.log(math.sqrt(torch.finfo(torch.float32).tiny))) / rate, abs=3
    )
    assert "1/‖w‖" in alarm.message
    assert "float32" in alarm.message
    assert "EpsilonShiftedL2" in alarm.advice


def test_momentum_without_decay_is_told_as_a_lost_learning_rate():
    model = bn_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)
    monitor = Monitor(model, optimizer, CONVS, every=5, fetch_every=1)
    train(model, optimizer, monitor, 100)
    (alarm,) = alarms(monitor, "effective learning rate")
    # At the step of the alarm, and not before, it is true of half of the entries.
    powers = []
    for m in monitor.history:
        norms = torch.tensor([m["norm"][name] for name in CONVS])
        powers.append(norms.square())
    fell = torch.stack(powers) / torch.stack(powers).amin(0)
    assert float(fell[[m.step for m in monitor.history].index(alarm.step)].max()) >= 10
    assert "from 2 to 2" in alarm.message


def test_a_dead_channel_is_found():
    model = bn_network()
    with torch.no_grad():
        model[1].weight[3] = 0.0
        model[1].bias[3] = -1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    monitor = Monitor(model, optimizer, CONVS, every=5, fetch_every=1)
    assert train(model, optimizer, monitor, 15) is None
    (alarm,) = monitor.raised
    assert (alarm.kind, alarm.layer, alarm.slices) == ("dead slices", "0.weight", (3,))
    assert "0.weight, channel 3 had no gradient" in alarm.message
    assert alarm.step == 10


def test_overflow_of_half_precision_is_forecast():
    """float16 weights under decay, nothing pushing back: 1/‖w‖ passes 65504 before w is 0."""
    model = nn.Linear(64, 4, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.05)
    monitor = Monitor(model, optimizer, {"weight": "channel"}, every=5, fetch_every=1)
    overflow = None
    with monitor:
        for step in range(1, 400):
            model.weight.grad = torch.zeros_like(model.weight)
            inverse = (1 / model.weight.detach().float().norm(dim=1)).half()
            if overflow is None and not inverse.isfinite().all():
                overflow = step
                break
            optimizer.step()
    (alarm,) = alarms(monitor, "range")
    assert overflow is not None
    assert alarm.step < overflow
    assert "float16" in alarm.message
    ahead = int(alarm.message.split("in about ")[1].split(" steps")[0])
    assert alarm.step + ahead == pytest.approx(overflow, rel=0.1)


@pytest.mark.parametrize("each_step", [False, True])
def test_the_slice_that_went_first_is_named(training, each_step):
    monitor = Monitor(
        training.model,
        training.optimizer,
        VIEWS,
        every=4,
        fetch_every=1,
        rules=[NotFinite()],
        check_finite=every(1) if each_step else None,
    )
    training.run(5)
    overflow = torch.zeros(6, 2, 3, 3)
    overflow[2] = math.inf
    handle = training.model[0].weight.register_hook(lambda g: g + overflow)
    training.run(1)
    handle.remove()
    with monitor:
        training.run(4)  # the next steps carry it everywhere
    (alarm,) = monitor.raised
    assert alarm.kind == "not finite"
    if each_step:
        assert (alarm.step, alarm.slices) == (6, (2,))
        assert "the weights of 0.weight, channel 2 went first" in alarm.message
    else:
        assert alarm.step == 8
        assert "went first" in alarm.message


def test_a_slice_that_is_alone_not_finite_is_named_exactly(training):
    monitor = Monitor(training.model, training.optimizer, VIEWS, every=1, check_finite=every(1))
    training.run(1)
    training.optimizer.zero_grad()
    for p in training.model.parameters():
        p.grad = torch.zeros_like(p)
    training.model[0].weight.grad[4] = math.nan
    training.optimizer.step()
    monitor.close()
    (alarm,) = alarms(monitor, "not finite")
    assert (alarm.step, alarm.slices) == (2, (4,))
    assert "0.weight, channel 4" in alarm.message


def test_exploding_slices_are_told(training):
    monitor = Monitor(training.model, training.optimizer, VIEWS, every=1, rules=[ExplodingSlices()])
    training.run(1)
    with torch.no_grad():
        training.model[0].weight[1] *= 200
    with monitor:
        training.run(1)
    (alarm,) = monitor.raised
    assert (alarm.layer, alarm.slices) == ("0.weight", (1,))


def test_weights_that_begin_at_zero_have_lost_and_grown_nothing(training):
    with torch.no_grad():
        training.model[3].weight.zero_()
        training.model[0].weight.zero_()
    rules = [ExplodingSlices(), EffectiveLRFell()]
    monitor = Monitor(training.model, training.optimizer, VIEWS, every=1, rules=rules)
    training.model[3].weight.register_hook(torch.zeros_like)
    with monitor:
        training.run(2)
        with torch.no_grad():
            training.model[3].weight.fill_(0.1)
            training.model[0].weight.fill_(0.1)
        training.run(2)
    assert monitor.raised == []


def test_tumbling_weights_are_told(make_training):
    training = make_training(
        lambda p: torch.optim.AdamW(p, lr=0.5, weight_decay=1.5, betas=(0.0, 0.9))
    )
    monitor = Monitor(
        training.model, training.optimizer, VIEWS, every=1, rules=[LargeAngularUpdate()]
    )
    with monitor:
        training.run(12)
    assert {alarm.layer for alarm in monitor.raised} == {"0.weight", "3.weight"}


def test_an_alarm_comes_once_and_where_the_user_wants_it(make_training, caplog):
    def dead(**options):
        training = make_training()
        training.model[0].weight.register_hook(torch.zeros_like)
        return training, Monitor(
            training.model,
            training.optimizer,
            VIEWS,
            every=1,
            fetch_every=1,
            rules=[DeadSlices()],
            **options,
        )

    training, monitor = dead()
    with monitor, caplog.at_level("WARNING", logger="normwise.monitor"):
        training.run(8)
    assert len(monitor.raised) == len(caplog.records) == 1
    assert "all 6 slices had no gradient" in caplog.text

    heard = []
    training, monitor = dead(alarms=heard.append)
    with monitor:
        training.run(8)
    assert heard == monitor.raised

    training, monitor = dead(alarms="raise")
    with pytest.raises(AlarmError, match="no gradient in 3 measurements") as error, monitor:
        training.run(8)
    assert error.value.alarm == monitor.raised[0]
    assert monitor.step == 3


def test_a_line_needs_points():
    with pytest.raises(ValueError, match="Invalid window: 2"):
        RangeForecast(window=2)
