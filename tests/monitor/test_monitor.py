"""What a monitor promises beside its numbers: no wait, no trace in the training, clear errors."""

import contextlib
import math
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import normwise
import normwise.monitor
from normwise import View
from normwise.decay import Decoupled
from normwise.monitor import JsonLines, Monitor, every
from normwise.theory import (
    Update,
    adamw_equilibrium,
    adamw_time_to_equilibrium,
    effective_lr,
    sgd_equilibrium,
)

VIEWS = {"0.weight": "channel", "3.weight": "blocks(2)"}

# Fake tensors and tensors on the meta device have no values: whatever would read one raises. That
# the guard can fail is shown by what comes after the measured steps.
READING = (DataDependentOutputException, DynamicOutputShapeException, RuntimeError)
DEVICES = {
    "fake": lambda: (FakeTensorMode(), "cpu"),
    "meta": lambda: (contextlib.nullcontext(), "meta"),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_measured_steps_read_no_tensor_on_the_host(device, tensor_lr):
    mode, device = DEVICES[device]()
    with mode:
        model = nn.Sequential(nn.Linear(4, 3, device=device), nn.Conv2d(2, 4, 3, device=device))
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, foreach=True)
        monitor = Monitor(model, optimizer, every=1, fetch_every=100, check_finite=every(1))
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.step()
        assert len(monitor._taken) == 3
        with pytest.raises(READING):
            monitor.fetch()


def test_training_is_the_same_with_a_monitor(make_training):
    plain, watched = make_training(), make_training()
    with Monitor(watched.model, watched.optimizer, every=2, check_finite=every(1)):
        assert plain.run(7) == watched.run(7)
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert not watched.optimizer._optimizer_step_pre_hooks
    assert not watched.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("fetch_every", [1, 3, 100])
def test_batches_change_nothing(make_training, fetch_every):
    training, other = make_training(), make_training()
    with Monitor(training.model, training.optimizer, VIEWS, every=2, fetch_every=1) as one:
        training.run(11)
    with Monitor(other.model, other.optimizer, VIEWS, every=2, fetch_every=fetch_every) as two:
        other.run(11)
        assert len(two.history) == 6 // fetch_every * fetch_every
    steps, values = one.series("angular_update")
    assert steps == two.series("angular_update")[0] == [1, 2, 4, 6, 8, 10]
    assert torch.equal(values, two.series("angular_update")[1])


def test_a_report_says_what_to_watch(training):
    report = normwise.analyze(training.model, torch.randn(4, 2, 6, 6), joint=False)
    with Monitor(training.model, training.optimizer, report) as monitor:
        training.run(1)
    assert monitor.layers == ("0.weight", "3.weight")
    assert [len(layer) for layer in monitor.history[0].layers] == [6, 2]


def test_without_a_report_every_matrix_is_watched():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer) as monitor:
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    assert [str(layer.view) for layer in monitor.history[0].layers] == ["layer", "channel"]
    grouped = normwise.AdamP([{"params": [model[1].weight], "view": View.layer()}])
    assert [str(x.view) for x in Monitor(model, grouped)._layout.layers] == ["layer"]


def test_parametrized_and_tied_weights():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3))
    normwise.weight_standardize(model)
    model[1].parametrizations = model[0].parametrizations
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer)
    assert len(monitor.layers) == 1


def test_a_weight_without_a_gradient_stands_still(training):
    training.model[0].weight.requires_grad_(False)
    with Monitor(training.model, training.optimizer, VIEWS) as monitor:
        training.run(1)
    m = monitor.history[0]
    assert m["angular_update"]["0.weight"] == 0
    assert m["scaled_gradient"]["0.weight"] == 0
    assert m["angular_update"]["3.weight"] > 0


def test_sparse_gradients_are_measured():
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, {"weight": "channel"}) as monitor:
        model(torch.tensor([0, 3])).square().sum().backward()
        optimizer.step()
    moved = monitor.history[0].of_slices("scaled_gradient") > 0
    assert moved.tolist() == [True, False, False, True, False]


def test_schedules_of_the_learning_rate_are_followed(make_training):
    """η/‖w‖² of theory, with the η of the step, before a scheduler changes it."""
    training = make_training(lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)))
    schedule = torch.optim.lr_scheduler.ExponentialLR(training.optimizer, 0.5)
    monitor = Monitor(training.model, training.optimizer, VIEWS, every=1, fetch_every=1)
    for t in range(4):
        norm = training.model[0].weight.detach().flatten(1).norm(dim=1).double()
        training.run(1)
        schedule.step()
        m = monitor.history[-1]
        assert m.lrs == pytest.approx((0.1 * 0.5**t,) * 2)
        torch.testing.assert_close(
            m.of_slices("effective_lr", "0.weight"),
            effective_lr(0.1 * 0.5**t, norm, Update.GRADIENT),
            rtol=1e-5,
            atol=0,
        )


def test_the_prediction_is_that_of_the_theory(make_training):
    training = make_training(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01))
    with Monitor(training.model, training.optimizer, VIEWS) as monitor:
        training.run(1)
        monitor.fetch()
        m = monitor.history[0]
    square = float(m.of_slices("scaled_gradient", "0.weight").square().log().mean().exp())
    expected = sgd_equilibrium(0.01, 0.01, square, 0.9)
    assert m["predicted_norm"]["0.weight"] == pytest.approx(expected.norm)
    assert m["predicted_angular_update"]["0.weight"] == pytest.approx(expected.angle)

    training = make_training(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    with Monitor(training.model, training.optimizer, VIEWS) as monitor:
        training.run(1)
    expected = adamw_equilibrium(0.01, 0.1, 18)
    assert monitor.history[0]["predicted_norm"]["0.weight"] == pytest.approx(expected.norm)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),  # no decay, no equilibrium
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),  # L2, not decoupled
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1.0),  # beyond the limit
    ],
)
def test_nothing_is_predicted_where_no_closed_form_holds(make_training, make):
    training = make_training(make)
    with Monitor(training.model, training.optimizer, VIEWS) as monitor:
        training.run(1)
    assert all(math.isnan(v) for v in monitor.history[0]["predicted_angular_update"].values())


def test_a_monitor_goes_on_after_a_checkpoint(make_training):
    training = make_training()
    with Monitor(training.model, training.optimizer, VIEWS, every=10) as monitor:
        training.run(7)
    with Monitor(training.model, training.optimizer, VIEWS, every=10) as resumed:
        resumed.load_state_dict(monitor.state_dict())
        training.run(5)
    assert resumed.step == 12
    assert resumed.series("norm")[0] == [10]


def test_tangential_is_measured_after_its_projection(make_training):
    """Its steps have no radial part, so only the square of their length is left of growth."""
    training = make_training(
        lambda p: normwise.tangential(torch.optim.SGD(list(p), lr=0.05), "channel")
    )
    with Monitor(training.model, training.optimizer, {"0.weight": "channel"}) as monitor:
        training.run(1)
    assert monitor.history[0]["radial_share"]["0.weight"] < 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report": {"nope": "channel"}}, "the model has no parameter 'nope'"),
        ({"report": {"0.weight": "blocks(4)"}}, "view blocks\\(4\\) does not fit"),
        ({"report": {}}, "nothing to watch"),
        ({"alarms": "shout"}, "Invalid alarms: 'shout'"),
        ({"fetch_every": 0}, "Invalid fetch_every: 0"),
        ({"fetch_every": "4"}, "Invalid fetch_every: '4'"),
        ({"keep": 0}, "Invalid keep: 0"),
        ({"every": 0}, "Invalid interval: 0"),
        ({"quantities": []}, "the rule NotFinite needs norm, scaled_gradient"),
        (
            {"quantities": [normwise.monitor.Norm()] * 2, "rules": []},
            "two quantities have one name",
        ),
    ],
)
def test_bad_input_is_told_at_once(training, options, message):
    with pytest.raises(ValueError, match=message):
        Monitor(training.model, training.optimizer, **{"report": VIEWS, **options})
    assert not training.optimizer._optimizer_step_pre_hooks


def test_unknown_names_are_told(training):
    with Monitor(training.model, training.optimizer, VIEWS) as monitor:
        training.run(1)
    m = monitor.history[0]
    with pytest.raises(KeyError, match="no quantity 'nrom' is measured"):
        m["nrom"]
    with pytest.raises(KeyError, match=r"no layer '9\.weight' is watched"):
        m.of_slices("norm", "9.weight")
    with pytest.raises(KeyError, match="known of layers, not of slices"):
        m.of_slices("predicted_norm")


def test_pictures(training, tmp_path):
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    with Monitor(training.model, training.optimizer, VIEWS, every=1) as monitor:
        with pytest.raises(ValueError, match="nothing has been measured yet"):
            monitor.plot()
        training.run(6)
    monitor.plot(tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_bytes()[:4] == b"\x89PNG"
    panels = monitor.panels()
    assert panels.keys() == {"norms", "effective_lrs", "angles", "expected"}
    assert all(
        svg.startswith("<svg") and svg.rstrip().endswith("</svg>") for svg in panels.values()
    )


def test_an_error_in_training_still_leaves_what_was_measured(training, tmp_path):
    path = tmp_path / "run.jsonl"

    def train_and_fail():
        with Monitor(training.model, training.optimizer, VIEWS, writers=[JsonLines(path)], every=1):
            training.run(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_and_fail()
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantities": ["norm"]}, "Invalid quantity: 'norm'; must be a Quantity, such as Norm()"),
        ({"writers": [3]}, "Invalid writer: 3; must be a function of a Measurement"),
        ({"rules": [3]}, "Invalid rule: 3; must be an AlarmRule"),
        ({"check_finite": 1}, "Invalid check_finite: 1; must be a trigger, such as every(1)"),
        ({"update": "sgd"}, "Invalid update: 'sgd'"),
        ({"optimizer": 3}, "Invalid optimizer: 3; must be a torch optimizer"),
        ({"model": 3}, "Invalid model: 3; must be a module"),
    ],
)
def test_a_wrong_type_is_told_in_one_line(training, options, message):
    given = {"model": training.model, "optimizer": training.optimizer, "report": VIEWS}
    with pytest.raises(TypeError, match=re.escape(message)):
        Monitor(**{**given, **options})


def test_a_writer_that_fails_is_dropped_with_one_warning_and_the_training_goes_on(training, caplog):
    def full_disk(m):
        raise OSError(28, "No space left on device")

    class Unclosable:
        def __call__(self, m):
            pass

        def close(self):
            raise OSError(5, "Input/output error")

    kept = []
    writers = [full_disk, kept.append, Unclosable()]
    with Monitor(
        training.model, training.optimizer, VIEWS, every=1, fetch_every=1, writers=writers
    ) as monitor:
        training.run(3)
        assert monitor.writers == writers[1:]
    assert [m.step for m in kept] == [1, 2, 3]
    assert monitor.writers == [kept.append]
    warned = [r.getMessage() for r in caplog.records if r.name == "normwise.monitor"]
    assert len(warned) == 2
    assert "full_disk" in warned[0]
    assert "dropped" in warned[0]


def test_a_watched_weight_that_changes_its_shape_is_named(training):
    with Monitor(training.model, training.optimizer, VIEWS, every=1):
        training.run(1)
        training.model[0].weight.data = torch.zeros(6, 2, 2, 2)
        for p in training.model.parameters():
            p.grad = None
        with pytest.raises(
            RuntimeError, match=r"0\.weight had shape \(6, 2, 3, 3\).*\(6, 2, 2, 2\)"
        ):
            training.optimizer.step()


def test_the_history_is_bounded_and_spans_the_run(training):
    with Monitor(
        training.model, training.optimizer, VIEWS, every=1, fetch_every=1, keep=8
    ) as monitor:
        training.run(50)
    steps = monitor.series("norm")[0]
    assert steps == [1, 9, 17, 25, 33, 41, 49, 50]
    assert len(monitor.history[-1].slices) > 0
    assert all(m.slices.numel() == 0 for m in monitor.history[:-1])


def test_a_monitor_prints_as_a_summary(make_training):
    """A run of a few steps under a small decay: it says that, and how far, it has not settled."""
    training = make_training(
        lambda p: normwise.AdamP(p, lr=1e-3, weight_decay=0.1, view="channel", wd_ratio=0.1)
    )
    with Monitor(training.model, training.optimizer, VIEWS, every=1) as monitor:
        assert str(monitor).startswith("2 weights, 8 slices; 0 measurements in 0 steps")
        training.run(3)
    text = str(monitor)
    time = max(monitor.history[-1]["steps_to_equilibrium"].values())
    assert "step 3: norms, from" in text
    assert "0 of 2 weights are within 10%" in text
    assert f"up to {math.ceil(time):,} more steps" in text
    assert 10_000 < time < math.inf

    plain = make_training(lambda p: torch.optim.SGD(p, lr=0.1))
    with Monitor(plain.model, plain.optimizer, VIEWS, every=1) as monitor:
        plain.run(1)
    assert "no equilibrium of the norms is known" in str(monitor)


def test_the_steps_to_equilibrium_are_those_of_the_theory(make_training):
    training = make_training(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    with Monitor(training.model, training.optimizer, VIEWS) as monitor:
        training.run(1)
    m = monitor.history[0]
    ratio = m["norm"]["0.weight"] / m["predicted_norm"]["0.weight"]
    expected = adamw_time_to_equilibrium(0.01, 0.1, ratio)
    assert m["steps_to_equilibrium"]["0.weight"] == pytest.approx(expected)


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_a_gate_is_taken_as_the_cosines_let_it_stand(make_training, delta):
    """Shut at a threshold of 0: AdamW's prediction; open where gradients are orthogonal."""
    training = make_training(
        lambda p: normwise.AdamP(p, lr=0.01, weight_decay=0.1, wd_ratio=0.5, delta=delta)
    )
    with Monitor(training.model, training.optimizer, {"0.weight": "channel"}) as monitor:
        training.run(1)
    m = monitor.history[0]
    angle = m["predicted_angular_update"]["0.weight"]
    if delta:
        assert angle == pytest.approx(math.sqrt(2 * 0.01 * 0.1 * 0.5))
    else:
        assert angle == pytest.approx(adamw_equilibrium(0.01, 0.1, 18).angle)


def test_a_monitor_follows_a_weight_into_the_group_that_a_policy_splits_off(make_training):
    training = make_training(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0))
    weight = training.model[3].weight
    with Monitor(training.model, training.optimizer, VIEWS) as monitor:
        Decoupled(0.1).attach(training.optimizer, on=[weight])
        training.run(1)
    m = monitor.history[0]
    assert math.isnan(m["predicted_norm"]["0.weight"])
    entries = weight.numel() // 2
    expected = adamw_equilibrium(0.01, 0.1, entries).norm
    assert m["predicted_norm"]["3.weight"] == pytest.approx(expected)
