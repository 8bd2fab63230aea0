"""What steps each role of a network's weights, how long it remembers, where its norms settle."""

import json
import math
import shlex

import pytest
import torch
from torch import nn

import normwise as nw
from normwise import cli
from normwise.plan import Settings, optimizer_for, roles
from normwise.theory import adamw_equilibrium, equilibrium_of
from normwise.updates import rule_of

ADAMW = Settings("adamw", 1e-3, 0.1, 1000)
SOURCE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(50, 16), nn.Linear(16, 32, bias=False), nn.LayerNorm(32), nn.ReLU(),
        nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 50),
    )
    return net, torch.randint(50, (4, 8))

def plain():
    return nn.Linear(3, 2), torch.randn(4, 3)
"""
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="it came with torch 2.9")


@pytest.fixture
def source(tmp_path, monkeypatch):
    (tmp_path / "by_role.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "by_role:build"


@pytest.fixture(scope="module")
def analyzed():
    namespace = {}
    exec(SOURCE, namespace)
    model, batch = namespace["build"]()
    return model, nw.analyze(model, batch)


def by_role(table):
    return {(row.role, row.invariant): row for row in table}


def test_every_weight_is_in_one_row_under_the_optimizer_that_steps_it(analyzed):
    model, report = analyzed
    optimizer = optimizer_for(report, ADAMW)
    table = roles(report, optimizer, steps=1000, batch=64)
    names = [name for row in table for name in row.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(row.weights for row in table) == sum(p.numel() for p in model.parameters())
    params = dict(model.named_parameters())
    for row in table:
        for name in row.parameters:
            (group,) = [
                g for g in optimizer.param_groups if any(q is params[name] for q in g["params"])
            ]
            assert (row.lr, row.weight_decay) == (group["lr"], group["weight_decay"])


def test_only_scale_invariant_weights_have_an_equilibrium_and_vectors_remember_everything(analyzed):
    _, report = analyzed
    table = by_role(roles(report, optimizer_for(report, ADAMW), steps=1000, batch=64))
    found = table["hidden", True]
    norm = adamw_equilibrium(1e-3, 0.1, 16 * 32).norm  # LayerNorm: the whole matrix is one slice
    assert found.norms == pytest.approx((norm, norm))
    assert (found.timescale.steps, found.timescale.tokens, found.timescale.share) == pytest.approx(
        (1 / (1e-3 * 0.1), 64 / (1e-3 * 0.1), 10)
    )
    for key in (("hidden", False), ("readout", False), ("gain", False), ("bias", False)):
        assert table[key].equilibrium == "none: not invariant"
    for kind in ("gain", "bias"):
        assert table[kind, False].weight_decay == 0
        assert math.isinf(table[kind, False].timescale.steps)


@needs_muon
def test_a_combination_steps_each_role_by_its_own_optimizer(analyzed):
    model, report = analyzed
    muon = Settings("muon", 0.02, 0.2, 1000, momentum=0.95)
    others = Settings("adamw", 3e-3, 0.05, 1000)
    table = by_role(roles(report, optimizer_for(report, muon, others), steps=1000))
    assert {key: row.optimizer for key, row in table.items()} == {
        ("embedding", True): "AdamW",
        ("hidden", True): "Muon",
        ("hidden", False): "Muon",
        ("readout", False): "AdamW",
        ("gain", False): "AdamW",
        ("bias", False): "AdamW",
    }
    assert table["hidden", True].timescale.steps == pytest.approx(1 / (0.02 * 0.2))
    assert table["readout", False].timescale.steps == pytest.approx(1 / (3e-3 * 0.05))
    weight = model[1].weight
    alone = torch.optim.Muon([weight], lr=0.02, weight_decay=0.2, momentum=0.95)
    rule = rule_of(alone, alone.param_groups[0], weight)
    expected = equilibrium_of(rule, entries=weight.numel(), shape=weight.shape).norm
    assert table["hidden", True].norms == pytest.approx((expected, expected))


@needs_muon
def test_kernels_under_muon_settle_as_the_matrices_that_they_are_stepped_as():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 2)
    )
    report = nw.analyze(model, torch.randn(4, 3, 6, 6))
    muon = Settings("muon", 0.02, 0.2, 1000, momentum=0.95)
    table = by_role(roles(report, optimizer_for(report, muon, ADAMW)))
    matrix = nn.Parameter(torch.zeros(8, 27))
    alone = muon.make([matrix])
    rule = rule_of(alone, alone.param_groups[0], matrix)
    expected = equilibrium_of(rule, entries=27, shape=(8, 27)).norm
    assert table["hidden", True].norms == pytest.approx((expected, expected))


def test_the_gate_of_adamp_holds_for_invariant_weights_alone(analyzed):
    _, report = analyzed
    table = by_role(roles(report, optimizer_for(report, Settings("adamp", 1e-3, 0.1, 1000))))
    assert table["hidden", True].timescale.steps == pytest.approx(1e5)  # wd_ratio is 0.1
    assert table["hidden", False].timescale.steps == pytest.approx(1e4)


def test_frozen_weights_have_no_optimizer():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].weight.requires_grad_(False)
    report = nw.analyze(model, torch.randn(4, 4))
    table = roles(report, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
    (row,) = [row for row in table if not row.optimizer]
    assert row.parameters == ("0.weight",)
    assert row.equilibrium == "stays: frozen"
    assert "none" in str(table)


def test_optimizers_for_matrices_alone_ask_what_steps_the_rest(analyzed):
    _, report = analyzed
    with pytest.raises(ValueError, match="sphere is for hidden matrices alone: say what steps"):
        optimizer_for(report, Settings("sphere", 0.1, 0.0, 100))


def test_on_a_sphere_half_of_a_weight_is_left_after_the_half_life():
    """Steps across a weight that turn it by θ leave cos θ of what was there."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(8, 4096, generator=generator, dtype=torch.float64))
    optimizer = nw.sphere(torch.optim.SGD([w], lr=0.1), "channel")
    (found,) = nw.plan.timescales(optimizer)
    assert found.steps == pytest.approx(2 / math.atan(0.1) ** 2, rel=0.01)
    start = w.detach().clone()
    for _ in range(round(found.half_life)):
        w.grad = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    left = torch.cosine_similarity(start, w.detach()).mean()
    # Eight slices of 4096 random entries: a standard deviation of 1/√(8·4096) = 0.006.
    assert float(left) == pytest.approx(0.5, abs=0.02)


ADAMW_COMMAND = "--optimizer adamw --lr 1e-3 --weight-decay 0.1"


def run(capsys, *arguments):
    code = cli.main(["plan", *shlex.split(" ".join(arguments))])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_has_a_row_for_each_role(source, capsys):
    code, out, _ = run(capsys, ADAMW_COMMAND, "--tokens-per-step 32 --json --model", source)
    assert code == 0
    content = json.loads(out)
    rows = {(row["role"], row["invariant"]): row for row in content["roles"]}
    assert rows["hidden", True]["timescale"]["tokens"] == pytest.approx(320_000)
    assert rows["gain", False]["timescale"]["steps"] is None
    assert [row["weights"]["name"] for row in content["rows"]] == ["0.weight", "1.weight"]


def test_a_network_without_invariant_weights_has_its_roles_and_is_told_what_to_do(source, capsys):
    command = f"--optimizer sgd --lr 0.1 --weight-decay 0.01 --model {source[:-5]}plain"
    code, out, _ = run(capsys, command)
    assert code == 0
    assert "readouts" in out
    assert "No equilibrium is known of weights that are not scale-invariant" in out
    assert "normwise inspect" in out
    code, _, error = run(capsys, command, "--plot no.png")
    assert code == 2
    assert "no weight is scale-invariant by itself" in error


@needs_muon
def test_the_command_plans_a_combination(source, capsys):
    muon = f"--optimizer muon --lr 0.02 --weight-decay 0.1 --model {source}"
    code, out, _ = run(capsys, muon, "--others adamw --others-lr 3e-3")
    assert code == 0
    assert "Muon" in out
    assert "AdamW" in out
    code, _, error = run(capsys, muon)
    assert code == 2
    assert "such as --others adamw" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--others adamw --others-lr 1", "--others are of a --model, and none is given"),
        ("--batch-from 4", "--batch-from needs --tokens-per-step beside it"),
        ("--width-from 4", "--width-from needs --width beside it"),
        ("--rule keep", "--rule carries over from another run"),
        ("--horizon-from 100 --rule linear", "Invalid rule: 'linear'; must be one of keep"),
        ("--horizon-from 100 --rule muP", "'muP' has nothing to carry over that is left"),
        (
            "--width-from 4 --width 8 --horizon-from 100 --rule muP",
            "say nothing of another horizon; 'constant timescale' or 'power lines'",
        ),
        ("--horizon-from -1", "Invalid tokens: -1"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_remedy(arguments, message, capsys):
    code, _, error = run(capsys, ADAMW_COMMAND, arguments)
    assert code == 2
    assert message in error


def test_without_a_rule_settings_stay_and_each_rule_is_shown(capsys):
    code, out, _ = run(capsys, ADAMW_COMMAND, "--steps 4000 --horizon-from 1000 --json")
    assert code == 0
    content = json.loads(out)
    told = {row["rule"]: (row["lr"], row["weight_decay"]) for row in content["rules"]}
    assert told == {
        "keep": (1e-3, 0.1),
        "constant timescale": (1e-3, pytest.approx(0.025)),
        "power lines": (1e-3, pytest.approx(0.1 / 4 / 4**-0.527)),
    }
    assert all(row["source"] and row["where"] for row in content["rules"])
    assert content["settings"]["weight_decay"] == 0.1


def test_the_same_tokens_in_larger_batches_keep_their_share_of_the_run(capsys):
    """--horizon-from defaults to as many tokens: four times the batch, a quarter of the steps."""
    change = "--steps 1000 --batch-from 256 --tokens-per-step 1024 --rule 'constant timescale'"
    code, out, _ = run(capsys, ADAMW_COMMAND, change, "--json")
    assert code == 0
    content = json.loads(out)
    assert content["settings"]["weight_decay"] == pytest.approx(0.4)
    (row,) = [row for row in content["rules"] if row["rule"] == "constant timescale"]
    assert row["timescale"]["share"] == pytest.approx(1 / (1e-3 * 0.1 * 4000))


def test_rules_for_hidden_matrices_leave_all_other_weights(source, capsys):
    change = "--width-from 16 --width 64 --steps 4000 --horizon-from 1000"
    by = "--rule 'independent decay' --rule 'constant timescale'"
    code, out, _ = run(capsys, ADAMW_COMMAND, change, by, "--json --model", source)
    assert code == 0
    rows = {(row["role"], row["invariant"]): row for row in json.loads(out)["roles"]}
    hidden, readout = rows["hidden", False], rows["readout", False]
    # The width: η/4 and 4λ; then the horizon: λ/4.
    assert (hidden["lr"], hidden["weight_decay"]) == pytest.approx((1e-3 / 4, 0.1))
    assert (readout["lr"], readout["weight_decay"]) == pytest.approx((1e-3, 0.1 / 4))
