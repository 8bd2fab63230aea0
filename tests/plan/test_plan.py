"""``normwise plan`` says what the closed forms say, and refuses where they do not hold."""

import json
import math

import pytest
import torch

import normwise
from normwise import cli
from normwise.plan import OPTIMIZERS, Settings, Weights, plan
from normwise.theory import (
    adamw_equilibrium,
    adamw_without_decay,
    equilibrium_of,
    lion_equilibrium_angle,
    sgd_equilibrium,
    time_to_equilibrium,
)

SGD = ["plan", "--optimizer", "sgd", "--lr", "0.1", "--weight-decay", "5e-4"]


def test_the_table_is_that_of_the_theory(capsys):
    assert cli.main([*SGD, "--json", "--gradient", "2", "--norm", "3"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    expected = sgd_equilibrium(0.1, 5e-4, 4.0, 0.9)
    assert row["norm"] == pytest.approx(expected.norm)
    assert row["angle"] == pytest.approx(expected.angle)
    assert row["effective_lr"] == pytest.approx([0.1 / 9, 0.1 / expected.norm**2])
    assert row["final_norm"] == pytest.approx(expected.norm, rel=0.01)


def test_a_simulated_run_does_what_was_planned():
    """AdamW on random gradients: the norm at half time and the angle at the end."""
    settings = Settings("adamw", 0.002, 0.5, 1200, betas=(0.9, 0.999), schedule="cosine")
    found = plan(settings, [Weights("w", 1, 100, 1.0)])
    norms, angles = found.trajectory(found.rows[0].weights)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(100, 100, generator=generator, dtype=torch.float64)
    w = (w / w.norm(dim=1, keepdim=True)).requires_grad_()
    optimizer = torch.optim.AdamW([w], lr=1.0, weight_decay=0.5, eps=0)
    turned = []
    for t, lr in enumerate(settings.lrs()):
        if t in (300, 600, 1199):
            norm = float(w.detach().norm(dim=1).square().mean().sqrt())
            assert norm == pytest.approx(norms[t], rel=0.03)
        optimizer.param_groups[0]["lr"] = lr
        # As large as ever, so that v is what its formula takes it for.
        w.grad = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        before = w.detach() / w.detach().norm(dim=1, keepdim=True)
        optimizer.step()
        after = w.detach() / w.detach().norm(dim=1, keepdim=True)
        turned.append(float((after - before).norm(dim=1).square().mean().sqrt()))
    for t in (100, 500, 900):
        measured = sum(turned[t : t + 20]) / 20
        assert measured == pytest.approx(sum(angles[t : t + 20]) / 20, rel=0.05)


def test_a_network_gives_its_own_weights(tmp_path, monkeypatch, capsys):
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "def build():\n"
        "    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4),\n"
        "        torch.nn.Flatten(), torch.nn.LazyLinear(2))\n"
        "    x = torch.randn(4, 3, 6, 6)\n"
        "    net(x)\n"
        "    return net, x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = "plan --optimizer adamw --lr 1e-3 --weight-decay 0.1 --json --model nets:build"
    assert cli.main(arguments.split()) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["weights"]["name"] == "0.weight"
    assert (row["weights"]["slices"], row["weights"]["entries"]) == (4, 27)
    assert row["norm"] == pytest.approx(adamw_equilibrium(1e-3, 0.1, 27).norm)


def test_lion_has_an_angle_and_no_norm():
    found = plan(Settings("lion", 1e-4, 1.0, 100, betas=(0.9, 0.99)), [Weights("w", 1, 10, 1.0)])
    assert found.rows[0].angle == lion_equilibrium_angle(1e-4, 1.0, (0.9, 0.99))
    assert math.isnan(found.rows[0].norm)
    assert "No closed form of the norm is known for Lion" in str(found)


def test_without_decay_norms_only_grow(capsys):
    assert cli.main([*SGD[:-1], "0", "--steps", "100"]) == 0
    assert "norms grow for as long as there is a gradient" in capsys.readouterr().out


def test_how_long_the_translated_run_fits_is_told():
    found = plan(Settings("adamw", 0.1, 0.5, 10), [Weights("w", 1, 10, 1.0)])
    (note,) = [note for note in found.notes if "without decay" in note]
    steps = int(note.split(" holds it for ")[1].split(" steps")[0].replace(",", ""))
    adamw_without_decay([0.1] * steps, 0.5)
    with pytest.raises(ValueError, match="outgrows"):
        adamw_without_decay([0.1] * (steps + 1), 0.5)


def test_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    path = tmp_path / "plan.png"
    assert cli.main([*SGD, "--schedule", "cosine", "--plot", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*SGD, "--plot", str(path)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optimizer sgd --lr 1 --weight-decay 0.1", "above (1 − √momentum)² = 0.00263"),
        ("--optimizer adamw --lr 1 --weight-decay 2", "lr·weight_decay is 2, and must be below 1"),
        ("--optimizer sgd --lr -1 --weight-decay 0.1", "Invalid"),
        ("--optimizer sgd --lr 0.1 --weight-decay 1e-4 --steps 0", "Invalid steps: 0"),
        ("--optimizer sgd --lr 0.1 --weight-decay 1e-4 --batch 2x3", "are of a --model"),
        ("--optimizer lion --lr 0.1 --weight-decay 1e-4 --plot x.png", "no closed form"),
    ],
)
def test_refusals_say_why(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="it came with torch 2.9")
MUON = pytest.param("muon", marks=needs_muon)
MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "sgdw": lambda p: normwise.SGDW(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "sgdp": lambda p: normwise.SGDP(p, lr=0.01, momentum=0.9, weight_decay=0.01, view="channel"),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.01),
    "adamp": lambda p: normwise.AdamP(p, lr=0.01, weight_decay=0.01, view="channel"),
    "muon": lambda p: torch.optim.Muon(p, lr=0.01, momentum=0.95, weight_decay=0.01),
}


@pytest.mark.parametrize("name", [*(name for name in MAKERS if name != "muon"), MUON])
def test_a_plan_is_that_of_the_optimizer_itself(name, capsys):
    p = torch.nn.Parameter(torch.zeros(32, 32))
    optimizer = MAKERS[name]([p])
    rule = normwise.updates.rule_of(optimizer, optimizer.param_groups[0], p)
    expected = equilibrium_of(rule, gradient_square=1.0, entries=32, shape=(32, 32))
    options = ["--lr", "0.01", "--weight-decay", "0.01", "--entries", "32", "--json"]
    assert cli.main(["plan", "--optimizer", name, *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["norm"] == pytest.approx(expected.norm)
    assert row["angle"] == pytest.approx(expected.angle)
    assert row["settles"] == pytest.approx(time_to_equilibrium(rule, 1 / expected.norm))


def test_every_optimizer_that_is_offered_is_planned():
    assert set(OPTIMIZERS) == {*MAKERS, "lion", "sphere"}


@pytest.mark.parametrize("name", ["sgd", "sgdp", "adamw", "adamp", MUON])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_what_a_start_counts_for_is_what_a_start_at_twice_the_norm_changes(name, schedule):
    settings = Settings(name, 0.01, 0.01, 4000, momentum=0.5, schedule=schedule)
    one, two = plan(settings, [Weights("w", 1, 64, norm) for norm in (1.3, 2.6)]).rows
    assert two.final_norm / one.final_norm - 1 == pytest.approx(one.remembered, rel=0.02)


def test_that_all_settle_does_not_say_that_the_start_is_forgotten():
    """Under a cosine the learning rate ends small: twice the norm ends more than 2% higher."""
    settings = Settings("sgd", 0.1, 5e-4, 1500, momentum=0.9, schedule="cosine")
    found = plan(settings, [Weights("a", 1, 10, 5.2), Weights("b", 1, 10, 6.0)])
    ends = [row.final_norm for row in found.rows]
    assert all(row.settles < 1500 for row in found.rows)
    twice = plan(settings, [Weights("b", 1, 10, 12.0)]).rows[0].final_norm
    assert twice / ends[1] > 1.02
    (note,) = [note for note in found.notes if "at the start" in note and "counts" in note]
    assert f"up to {twice / ends[1] - 1:.0%} higher" in note


def test_a_start_at_the_equilibrium_is_told_as_that():
    norm = sgd_equilibrium(0.1, 5e-4, 1.0, 0.9).norm
    text = str(plan(Settings("sgd", 0.1, 5e-4, 10, 0.9), [Weights("w", 1, 10, 1.05 * norm)]))
    assert "from the start" in text
    assert "All start within 10%" in text
    assert " 0 steps" not in text


def test_a_small_share_is_not_told_as_nothing():
    text = str(plan(Settings("adamw", 1e-4, 0.01, 10), [Weights("w", 1, 10, 1.0)]))
    assert "loses 0.0001% of its norm per step" in text


def test_a_plan_says_where_a_run_does_not_settle():
    """The default wd_ratio of 0.1 makes AdamP ten times as slow."""
    slow, fast = (
        plan(Settings("adamp", 1e-3, 0.1, 20_000, wd_ratio=rho), [Weights("w", 1, 576, 1.0)])
        for rho in (0.1, 1.0)
    )
    assert slow.rows[0].settles > 20_000 > fast.rows[0].settles
    assert "Not settled within the 20,000 steps: 1 of 1" in str(slow)
    assert "wd_ratio 0.1 makes that 10 times as long" in str(slow)
    assert "beyond the run" in str(slow)
    assert "Not settled" not in str(fast)


@needs_muon
def test_muon_plans_matrices_and_names_what_it_leaves():
    weights = [Weights("conv", 8, 27, 1.0, (8, 3, 3, 3)), Weights("linear", 8, 27, 1.0, (8, 27))]
    found = plan(Settings("muon", 0.02, 0.1, 100, momentum=0.95), weights)
    assert [row.weights.name for row in found.rows] == ["linear"]
    assert "Muon takes matrices only, and not conv." in str(found)
    with pytest.raises(ValueError, match="no weight to plan for that muon can train"):
        plan(Settings("muon", 0.02, 0.1, 100), weights[:1])


def test_of_a_sphere_the_angle_is_the_learning_rates_and_norms_stay():
    settings = Settings("sphere", 0.1, 0.0, 100, schedule="cosine")
    found = plan(settings, [Weights("linear", 8, 27, 3.0, (8, 27))])
    (row,) = found.rows
    assert (row.norm, row.final_norm, row.settles) == (3.0, 3.0, 0.0)
    assert row.angle == pytest.approx(math.atan(0.1))
    norms, angles = found.trajectory(row.weights)
    assert norms == [3.0] * 100
    assert angles == pytest.approx([math.atan(lr) for lr in settings.lrs()])
    assert "Norms are fixed" in str(found)
    with pytest.raises(ValueError, match="norms on spheres do not decay, but weight_decay is"):
        plan(Settings("sphere", 0.1, 0.1, 100), [row.weights])
