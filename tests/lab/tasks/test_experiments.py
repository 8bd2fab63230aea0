"""Tasks of experiments with optimizers and measurements of their own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from normwise.geometry import View
from normwise.lab.data.texts import EncodedText
from normwise.lab.errors import UsageError
from normwise.lab.recipes import Training, find, read
from normwise.lab.recipes import text as text_of
from normwise.lab.running.cell import run_cell
from normwise.lab.tasks import transfer
from normwise.lab.tasks.decay_moments import DECAYS, AdamDecayingIn
from normwise.lab.tasks.equilibrium import Settling, SettlingOptions
from normwise.lab.tasks.merging import Merging, MergingOptions
from normwise.lab.tasks.transfer import LRTransfer, LRTransferOptions
from normwise.monitor import Monitor

CPU = torch.device("cpu")
LR, DECAY, MOMENTUM = 0.1, 0.02, 0.9


def measured_equilibrium(tmp_path, optimizer, steps=24, settle=8):
    """A problem after some steps, and what a writer beside it has seen after ``settle``."""
    torch.manual_seed(0)
    options = SettlingOptions("digits", "convnet", width=4, settle=settle)
    problem = Settling(options, tmp_path, CPU)
    convolutions = {
        name: View.channel() for name, p in problem.model.named_parameters() if p.ndim == 4
    }
    stepper = optimizer([p for p in problem.model.parameters()])
    seen = []
    with Monitor(problem.model, stepper, convolutions, every=1, writers=[seen.append]) as monitor:
        problem.attend(stepper, monitor, convolutions)
        draw = torch.Generator().manual_seed(0)
        for chosen in problem.batches(32, draw)[:steps]:
            stepper.zero_grad()
            problem.loss(problem.batch(chosen, draw)).backward()
            stepper.step()
    return problem, [m for m in seen if m.step > settle]


def test_ratios_to_equilibrium_are_means_over_closed_forms(tmp_path):
    """Of SGD: ‖w‖⁴ = η²S·E‖g̃‖²/(2δ), S = 1/(1 − μ)², and θ² = 2δ(1 − μ)/(1 + μ), δ = ηλ/(1 − μ)."""
    problem, seen = measured_equilibrium(
        tmp_path,
        lambda params: torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
    )
    problem.evaluate()
    delta = LR * DECAY / (1 - MOMENTUM)
    for name, ratios in problem.facts["layers"].items():
        values = {
            key: np.stack([m.of_slices(key, name).double().numpy() for m in seen])
            for key in ("norm", "angular_update", "scaled_gradient")
        }
        assert len(values["norm"]) == 16
        norm = (values["norm"] ** 4).mean(0) ** 0.25
        square = (values["scaled_gradient"] ** 2).mean(0)
        predicted = ((LR / (1 - MOMENTUM)) ** 2 * square / (2 * delta)) ** 0.25
        assert ratios["norm"] == pytest.approx(np.exp(np.log(norm / predicted).mean()), rel=1e-5)
        angle = math.sqrt(2 * delta * (1 - MOMENTUM) / (1 + MOMENTUM))
        turned = np.sqrt((values["angular_update"] ** 2).mean())
        assert ratios["angle"] == pytest.approx(turned / angle, rel=1e-5)


def test_the_summary_of_layers_agrees_with_them(tmp_path):
    problem, _ = measured_equilibrium(
        tmp_path, lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.5)
    )
    metrics = problem.evaluate().metrics
    layers = problem.facts["layers"].values()
    for what in ("angle", "norm"):
        ratios = [layer[what] for layer in layers]
        assert (metrics[f"{what}_low"], metrics[f"{what}_high"]) == (min(ratios), max(ratios))
        near = sum(0.9 <= ratio <= 1.1 for ratio in ratios)
        assert metrics[f"{what}_near"] == near / len(ratios)
    # From a norm above its equilibrium the decay, 0.001 per step, takes hundreds of steps.
    assert all(layer["steps"] > 8 for layer in layers if layer["norm"] > 1.2)
    assert metrics["settled"] == sum(layer["steps"] <= 8 for layer in layers) / len(layers)


def test_before_anything_is_measured_there_is_an_accuracy_alone(tmp_path):
    options = SettlingOptions("digits", "convnet", width=4)
    assert set(Settling(options, tmp_path, CPU).evaluate().metrics) == {"accuracy"}


def test_without_decay_no_equilibrium_is_known(tmp_path):
    problem, _ = measured_equilibrium(tmp_path, lambda params: torch.optim.SGD(params, lr=LR))
    with pytest.raises(UsageError, match="no equilibrium is known of SGD"):
        problem.evaluate()
    problem, _ = measured_equilibrium(
        tmp_path, lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=0.1)
    )
    with pytest.raises(UsageError, match="no equilibrium: lr·weight_decay"):
        problem.evaluate()


SMALL = """
schema: 1
id: small
title: Small
question: Does it go on?
task: equilibrium
paper: {source: none, metric: none}
methods: {sgd: {label: SGD, settings: {optimizer: sgd, lr: 0.1, weight_decay: 0.02}}}
settings: {data: digits, network: convnet, width: 4, schedule: constant, batch_size: 128, settle: 5}
scales:
  paper: &scale {settings: {epochs: 2}, rows: {digits: {}}}
  small: *scale
"""


def test_what_is_measured_goes_on_where_it_was_cut(tmp_path, assert_resumes):
    (cell,) = read(SMALL, "small.yaml").cells("small", 1)
    assert_resumes(cell, tmp_path, Settling, 10, lambda: None)


@pytest.fixture
def text(monkeypatch):
    letters = np.random.default_rng(0).integers(0, 30, 3000)
    made = EncodedText("text", letters[:2500], letters[2500:], tuple(map(str, range(30))))
    monkeypatch.setattr(transfer, "_load", lambda root: made)


def transferred(tmp_path, lengths="fixed", **settings):
    torch.manual_seed(0)
    options = LRTransferOptions(width=16, depth=2, steps=3, lengths=lengths)
    problem = LRTransfer(options, tmp_path, CPU)
    settings = {"epochs": 1, "batch_size": 4, "lr": 0.25, "betas": (0.9, 0.95)} | settings
    return problem, problem.make_optimizer(Training(**settings))


def by_rate(problem, optimizer):
    """The names of parameters by the learning rate of their group."""
    names = {p: name for name, p in problem.model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        found.setdefault(group["lr"], set()).update(names[p] for p in group["params"])
    return found


def test_only_the_rate_of_the_blocks_matrices_is_swept(tmp_path, text):
    for name in ("adamw", "torch:Muon", "sphere(adamw)", "sphere(torch:Muon)"):
        problem, optimizer = transferred(tmp_path, optimizer=name, weight_decay=0.1)
        rates = by_rate(problem, optimizer)
        assert rates[3e-3] == {"embedding.weight", "readout.weight"}
        assert len(rates[0.25]) == 12
        decays = {g["lr"]: g["weight_decay"] for g in optimizer.param_groups}
        assert decays == {0.25: 0.0 if "sphere" in name else 0.1, 3e-3: 0.0}


def test_spheres_keep_the_norms_of_what_is_fixed_and_gains_are_as_many_as_are_lost(tmp_path, text):
    for lengths, fixed, gains in (("fixed", 12, 0), ("gains", 12, 3), ("free", 8, 0)):
        problem, optimizer = transferred(tmp_path, lengths, optimizer="sphere(adamw)")
        before = {name: float(p.norm()) for name, p in problem.matrices.items()}
        assert len(before) == fixed
        assert sum(p.numel() == 1 for p in problem.model.parameters()) == gains
        draw = torch.Generator().manual_seed(0)
        for chosen in problem.batches(4, draw):
            optimizer.zero_grad()
            problem.loss(problem.batch(chosen, draw)).backward()
            optimizer.step()
        after = {name: float(p.norm()) for name, p in problem.matrices.items()}
        assert after == pytest.approx(before, rel=1e-5)
        moved = dict(problem.model.named_parameters())["readout.weight"]
        assert float(moved.detach().norm()) != before.get("readout.weight")


def test_decay_by_the_schedule_takes_the_same_share_at_every_rate(tmp_path, text):
    shares = []
    for lr in (1e-6, 1e-7):
        problem, optimizer = transferred(
            tmp_path, optimizer="adamw", lr=lr, coupling="schedule", weight_decay=0.01
        )
        before = problem.model.blocks[0].q.weight.detach().clone()
        problem.loss(problem.batch(torch.arange(4), torch.Generator())).backward()
        optimizer.step()
        shares.append(float(problem.model.blocks[0].q.weight.detach().norm() / before.norm()))
    assert shares == pytest.approx([0.99, 0.99], rel=1e-4)


def test_an_optimizer_that_the_transfer_does_not_know_is_refused(tmp_path, text):
    for name in ("sgd", "tangential(adamw)", "adamw+early"):
        with pytest.raises(UsageError, match="choose adamw or torch:Muon"):
            transferred(tmp_path, optimizer=name)


def test_a_transfer_cell_trains_with_both_rates_on_one_schedule(tmp_path, text, monkeypatch):
    make, seen = LRTransfer.make_optimizer, []

    def watched(self, training):
        optimizer = make(self, training)
        optimizer.register_step_pre_hook(
            lambda o, *_: seen.append(sorted({g["lr"] for g in o.param_groups}))
        )
        return optimizer

    monkeypatch.setattr(LRTransfer, "make_optimizer", watched)
    recipe = find("lr-transfer")
    (cell,) = [
        c
        for c in recipe.cells("small", 1, ["sphere-muon"], ["depth-2-width-32"])
        if c.training.lr == 0.0625
    ]
    cell = replace(cell, options=replace(cell.options, steps=10))
    assert run_cell(cell, tmp_path, tmp_path)["status"] == "ok"
    factors = [cell.training.factor(t, 10) for t in range(10)]
    assert factors[:2] == [1.0, 1.0]
    assert seen == [pytest.approx([3e-3 * f, 0.0625 * f]) for f in factors]


def test_a_linear_schedule_rises_and_falls_evenly():
    training = Training(1, 1, "sgd", 1.0, schedule="linear", warmup=0.1)
    expected = [min((t + 1) / 20, (200 - t) / 180) for t in range(200)]
    assert [training.factor(t, 200) for t in range(200)] == pytest.approx(expected)


def merging(tmp_path, how):
    torch.manual_seed(0)
    return Merging(MergingOptions(how), tmp_path, CPU)


def test_networks_that_train_together_have_the_gradients_they_would_have_alone(tmp_path):
    problem = merging(tmp_path, "alone")
    batch = problem.batch(torch.arange(20), torch.Generator())
    problem.loss(batch).backward()
    together = [[p.grad.clone() for p in network.parameters()] for network in problem.model]
    for network, (x, y), found in zip(problem.model, batch, together, strict=True):
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()
        for p, g in zip(network.parameters(), found, strict=True):
            torch.testing.assert_close(p.grad, g)
    sizes = [len(x) for x, _ in problem.parts]
    assert sizes == [300] * 3
    rows = torch.cat([x for x, _ in problem.parts] + [problem.proxy[0], problem.test[0]])
    assert len(rows) == 1797 - 150


@pytest.mark.parametrize("how", ["average", "sphere", "gamma"])
def test_networks_that_are_equal_merge_into_themselves(tmp_path, how):
    """But for their running statistics, which are measured anew, and the learned scale."""
    start = merging(tmp_path, "none")
    problem = merging(tmp_path, how)
    problem.start_from(start.model.state_dict())
    merged = problem._merged(list(problem.model))
    network = start.model[0]
    if how != "gamma":
        torch.optim.swa_utils.update_bn([problem.proxy[0]], network)
        x = problem.test[0]
        torch.testing.assert_close(merged.eval()(x), network.eval()(x), rtol=1e-4, atol=1e-4)
    else:
        assert problem.facts["gamma"] > 0
    assert problem.evaluate().metrics == problem.evaluate().metrics


def two_runs(decay, other, lr=0.01, weight_decay=0.1, betas=(0.9, 0.999), steps=4):
    """Weights after some steps of Adam with its decay in one place, and of another optimizer."""
    found = []
    for make in (
        lambda p: AdamDecayingIn(
            [{"params": [p], "weight_decay": weight_decay}], lr, betas, 1e-8, decay
        ),
        other,
    ):
        draw = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(5, 3, generator=draw, dtype=torch.float64))
        optimizer = make(p)
        for _ in range(steps):
            p.grad = torch.randn(5, 3, generator=draw, dtype=torch.float64)
            optimizer.step()
        found.append(p.detach())
    return found


def test_decay_in_both_moments_is_adam_and_in_neither_is_adamw():
    adam = two_runs("both", lambda p: torch.optim.Adam([p], lr=0.01, weight_decay=0.1))
    torch.testing.assert_close(*adam)
    adamw = two_runs("decoupled", lambda p: torch.optim.AdamW([p], lr=0.01, weight_decay=10.0))
    # AdamW decays before its step, here it is after: to second order in λ the same.
    torch.testing.assert_close(*adamw, rtol=0, atol=0.1 * 0.01 * 4)


def test_without_memory_it_makes_no_difference_in_which_first_moment_the_decay_is():
    """With β1 = 0, a(g + λw) is a(g) + λw."""

    def both(p):
        groups = [{"params": [p], "weight_decay": 0.1}]
        return AdamDecayingIn(groups, 0.01, (0.0, 0.999), 1e-8, "both")

    torch.testing.assert_close(*two_runs("second", both, betas=(0.0, 0.999)))


@pytest.mark.parametrize("decay", DECAYS)
def test_the_first_step_is_the_row_of_the_table(decay):
    """At the first step a(x) = x and b(x) = |x|."""
    g = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    w = torch.nn.Parameter(torch.tensor([1.0, 4.0, -3.0], dtype=torch.float64))
    before, penalty = w.detach().clone(), 0.1 * w.detach()
    optimizer = AdamDecayingIn(
        [{"params": [w], "weight_decay": 0.1}], 0.01, (0.9, 0.999), 0.0, decay
    )
    optimizer.param_groups[0]["lr"] = 0.005  # the schedule has halved it
    w.grad = g
    optimizer.step()
    mixed = g + penalty
    taken = {
        "both": 0.005 * mixed / mixed.abs(),
        "second": 0.005 * mixed / mixed.abs(),
        "scale": 0.005 * g / mixed.abs(),
        "adaptive": 0.005 * mixed / g.abs(),
        "decoupled": 0.005 * g / g.abs() + 0.5 * penalty,
    }[decay]
    torch.testing.assert_close(before - w.detach(), taken)


def test_an_unknown_place_of_the_decay_or_way_to_merge_gets_a_suggestion():
    text = text_of("decay-moments")
    with pytest.raises(UsageError, match="did you mean 'second'"):
        read(text.replace("{decay: second}", "{decay: secnd}"), "mine.yaml")
    text = text_of("balance-merges")
    with pytest.raises(UsageError, match="did you mean 'sphere'"):
        read(text.replace("merge: sphere", "merge: spere"), "mine.yaml")
    with pytest.raises(UsageError, match="multiple of 16"):
        LRTransferOptions(width=40, depth=2)
    with pytest.raises(UsageError, match="did you mean 'gains'"):
        LRTransferOptions(width=32, depth=2, lengths="gain")
