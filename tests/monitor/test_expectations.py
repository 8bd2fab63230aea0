"""What a monitor expects of a step under any schedule, and its alarms where that fails."""

import logging

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.monitor import BelowResolution, Monitor, SuddenChange, UpdateAboveExpected
from normwise.theory import norm_after, norm_trajectory
from normwise.updates import describe

VIEWS = {"0.weight": "channel", "3.weight": "channel"}


def rule(kind):
    w = nn.Parameter(torch.ones(4, 8))
    if kind == "adamw":
        optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=0.1)
    elif kind == "adamw without decay":
        optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=0)
    elif kind == "sgd":
        optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=1e-3)
    else:
        optimizer = nw.SGDP([w], lr=0.1, momentum=0.9, weight_decay=1e-3, view="channel")
    return describe(optimizer)[0]


@pytest.mark.parametrize("kind", ["adamw", "adamw without decay", "sgd", "sgdp"])
@pytest.mark.parametrize("start", [0.5, 5.0])
def test_the_closed_form_is_the_trajectory_at_a_constant_rate(kind, start):
    known = {"gradient_square": 0.3, "entries": 8, "shape": (4, 8)}
    r = rule(kind)
    steps = 50
    walked = norm_trajectory(r, [r.lr] * steps, start, **known)[-1]
    assert norm_after(r, start, steps, **known) == pytest.approx(walked, rel=0.02)
    assert norm_after(r, start, 0, **known) == pytest.approx(start)


class Noise:
    """One scale-invariant weight whose gradients are noise alone."""

    def __init__(self, make):
        self.model = nn.Linear(64, 32, bias=False)
        self.optimizer = make(self.model.parameters())
        self.generator = torch.Generator().manual_seed(0)

    def step(self, size=1.0):
        w = self.model.weight
        noise = torch.randn(w.shape, generator=self.generator)
        tangent = nw.geometry.tangential(noise, w.detach(), nw.View.channel())
        w.grad = size * tangent / w.detach().norm(dim=1, keepdim=True)
        self.optimizer.step()


def test_the_expected_norm_follows_the_schedule_where_the_equilibrium_runs_ahead():
    torch.manual_seed(0)
    run = Noise(lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.9, 0.99), weight_decay=0.2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 800)
    with Monitor(run.model, run.optimizer, {"weight": "channel"}, every=20) as monitor:
        for _ in range(790):
            run.step()
            schedule.step()
    late = monitor.history[-1]
    norm = late["norm"]["weight"]
    assert norm == pytest.approx(late["expected_norm"]["weight"], rel=0.1)
    assert norm > 5 * late["predicted_norm"]["weight"]
    angles = [
        m["angular_update"]["weight"] / m["expected_angular_update"]["weight"]
        for m in monitor.history[5:]
    ]
    assert sum(angles) / len(angles) == pytest.approx(1, abs=0.1)
    assert monitor.raised == []


def test_nothing_is_expected_of_weights_that_are_not_known_to_be_invariant(training):
    with Monitor(training.model, training.optimizer, VIEWS, every=1) as known:
        training.run(2)
    with Monitor(training.model, training.optimizer, every=1) as unknown:
        training.run(2)
    assert "expected" in known.panels()
    assert "expected" not in unknown.panels()


def test_a_report_without_invariant_weights_has_its_symmetries_watched(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(16, 6)
    report = nw.analyze(model, x)
    assert not report.views()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, "normwise.monitor"):
        monitor = Monitor(model, optimizer, report, every=1)
    assert "no weight of this network is scale-invariant by itself" in caplog.text
    assert set(monitor.layers) == {"0.weight", "2.weight"}
    with monitor:
        model(x).square().sum().backward()
        optimizer.step()
    rows, columns = (monitor.history[0].of_slices("norm", f"{k}.weight") for k in (0, 2))
    assert rows.shape == columns.shape == (8,)
    torch.testing.assert_close(columns.float(), model[2].weight.detach().norm(dim=0))


def test_the_gradient_is_attributed_to_layers(training):
    with Monitor(training.model, training.optimizer, VIEWS, every=1) as monitor:
        training.run(1)
    shares = monitor.history[0].gradient_shares()
    squares = {n: float(training.model.get_parameter(n).grad.square().sum()) for n in VIEWS}
    total = sum(squares.values())
    assert shares == pytest.approx({n: s / total for n, s in squares.items()}, rel=1e-5)


def alarms(make, fault):
    """The kinds of alarms and their steps, over 60 steps with a fault in the fortieth."""
    torch.manual_seed(0)
    run = Noise(make)
    rules = [UpdateAboveExpected(), SuddenChange()]
    with Monitor(
        run.model, run.optimizer, {"weight": "channel"}, every=1, rules=rules, fetch_every=1
    ) as monitor:
        for k in range(60):
            if k == 39 and fault == "weight":
                run.model.weight.data.mul_(0.3)
            if k == 39 and fault == "rate":
                run.optimizer.param_groups[0]["lr"] *= 10
            run.step(30.0 if k == 39 and fault == "batch" else 1.0)
    return [(alarm.kind, alarm.step) for alarm in monitor.raised]


SGD = pytest.param(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), id="sgd")
ADAMW = pytest.param(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1), id="adamw")


@pytest.mark.parametrize("make", [SGD, ADAMW])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("batch", "update above expected"),
        ("rate", "learning rate jumped"),
        ("weight", "norm jumped"),
    ],
)
def test_a_fault_is_seen_in_its_step(make, fault, kind):
    assert (kind, 40) in alarms(make, fault)


@pytest.mark.parametrize("make", [SGD, ADAMW])
def test_without_a_fault_nothing_is_out_of_the_expected(make):
    assert alarms(make, None) == []


def low_precision(dtype, make):
    torch.manual_seed(0)
    model = nn.Linear(8, 4, bias=False).to(dtype)
    optimizer = make(model.parameters())
    with Monitor(model, optimizer, {"weight": "channel"}, rules=[BelowResolution()]) as monitor:
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
    return [alarm.kind for alarm in monitor.raised]


def test_a_decay_that_bfloat16_rounds_away_is_told_and_is_one():
    def adamw(p):
        return torch.optim.AdamW(p, lr=1e-2, weight_decay=0.01)

    assert low_precision(torch.bfloat16, adamw) == ["decay below resolution"]
    assert low_precision(torch.float32, adamw) == []
    w = torch.randn(1000).bfloat16()
    assert torch.equal(w * (1 - 1e-4), w)
    assert (
        low_precision(
            torch.bfloat16,
            lambda p: nw.AdamP(p, lr=1e-2, weight_decay=0.01, stochastic_rounding=True),
        )
        == []
    )


def test_an_update_that_bfloat16_rounds_away_is_told():
    found = low_precision(torch.bfloat16, lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0))
    assert found == ["update below resolution"]


def test_bad_thresholds_are_named():
    with pytest.raises(ValueError, match="Invalid factor: 1"):
        UpdateAboveExpected(factor=1)
    with pytest.raises(ValueError, match="Invalid warm_up: 2"):
        UpdateAboveExpected(warm_up=2)
    with pytest.raises(ValueError, match=r"Invalid rate: 0\.5"):
        SuddenChange(rate=0.5)
