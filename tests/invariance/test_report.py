"""What follows from a report: views, groups for optimizers, files and words."""

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normwise
from normwise import View
from normwise.invariance import Report, analyze
from normwise.invariance.advice import chance_of_gate
from normwise.invariance.row import KINDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, bias=False),
        nn.GroupNorm(2, 8),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(128, 4),
        nn.Linear(4, 3).requires_grad_(False),
    )


@pytest.fixture(scope="module")
def report(model):
    return analyze(model, torch.randn(4, 3, 8, 8))


def test_views(report, model):
    assert report.views() == {"0.weight": View.channel(), "3.weight": View.blocks(2)}
    assert report.parameter_views() == {
        model[0].weight: View.channel(),
        model[3].weight: View.blocks(2),
    }


def test_groups_decay_matrices_alone_and_hold_each_trainable_parameter_once(report, model):
    groups = report.param_groups(weight_decay=0.1, lr=0.01)
    assert [(g["name"], g["view"], g["weight_decay"], g["lr"]) for g in groups] == [
        ("channel", "channel", 0.1, 0.01),
        ("vector", None, 0.0, 0.01),
        ("blocks(2)", "blocks(2)", 0.1, 0.01),
        ("plain", None, 0.1, 0.01),
    ]
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {p for p in model.parameters() if p.requires_grad}
    vectors = next(g["params"] for g in groups if g["name"] == "vector")
    assert all(p.ndim == 1 for p in vectors)


def test_overrides_by_group_and_by_name(report, model):
    groups = report.param_groups(
        weight_decay=0.1,
        overrides={"plain": {"weight_decay": 0.2}, "0.*": {"lr": 5.0}, "vector": {"lr": 7.0}},
    )
    by_name = {group["name"]: group for group in groups}
    assert by_name["plain"]["weight_decay"] == 0.2
    assert by_name["vector"]["lr"] == 7.0
    assert by_name["0.* channel"]["params"] == [model[0].weight]
    assert by_name["0.* channel"] | {"params": []} == {
        "params": [],
        "name": "0.* channel",
        "view": "channel",
        "weight_decay": 0.1,
        "lr": 5.0,
    }
    assert by_name["0.*"]["params"] == [model[0].bias]
    assert (by_name["0.*"]["weight_decay"], by_name["0.*"]["lr"]) == (0.0, 5.0)
    with pytest.raises(ValueError, match=r"\['head\.\*'\] match no group .*channel"):
        report.param_groups(weight_decay=0.1, overrides={"head.*": {}, "channel": {}})


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
def test_groups_serve_torchs_optimizers_and_their_state_loads_weights_only(kind, tmp_path, report):
    optimizer = kind(report.param_groups(weight_decay=0.1, lr=0.01))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    kind(report.param_groups(weight_decay=0.1, lr=0.01)).load_state_dict(state)


@pytest.mark.parametrize("kind", [normwise.AdamP, normwise.SGDP])
def test_a_step_of_ours_changes_the_squared_norms_of_invariant_slices_by_that_of_the_step(
    kind, model, report
):
    """‖w + Δ‖² = ‖w‖² + ‖Δ‖² where it projects; not decayed, so that Δ is the step alone."""
    trained = copy.deepcopy(model)
    optimizer = kind(report.param_groups(weight_decay=0.0, lr=0.1, model=trained))
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    trained(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    for name, view in report.views().items():
        w, new = before[name], trained.get_parameter(name).detach()
        changes = [view.slices(t).flatten(1).square().sum(1) for t in (w, new, new - w)]
        torch.testing.assert_close(changes[1], changes[0] + changes[2], rtol=1e-4, atol=1e-6)
        assert (changes[2] > 0).all()


def test_json_round_trip(report, model):
    again = Report.from_json(report.to_json())
    assert str(again) == str(report)
    assert again.views() == report.views()
    assert again.symmetries == report.symmetries
    assert math.isnan(again["7.weight"].residual_with_eps)
    with pytest.raises(ValueError, match="give `model=`"):
        again.param_groups(weight_decay=0.1)
    bound = again.param_groups(weight_decay=0.1, model=model)
    assert [len(g["params"]) for g in bound] == [
        len(g["params"]) for g in report.param_groups(weight_decay=0.1)
    ]
    with pytest.raises(ValueError, match=r"model has no parameter '0\.weight'"):
        again.param_groups(weight_decay=0.1, model=nn.BatchNorm1d(2))
    bigger = nn.Sequential(*model, nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"report has no parameter '9\.weight'"):
        again.param_groups(weight_decay=0.1, model=bigger)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "null"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match="Invalid report"):
        Report.from_json(text)


def test_the_table_names_every_parameter_once_and_shares_add_up(report):
    lines = str(report).splitlines()
    for row in report:
        assert sum(line.startswith(row.name + " ") for line in lines) == 1
    assert lines[2].split() == ["0.weight", "6×3×3×3", "channel", *lines[2].split()[3:]]
    assert "feeds `1` (BatchNorm2d)" in lines[2]
    kinds = {row.kind for row in report}
    assert sum(report.share(kind) for kind in kinds) == pytest.approx(1)
    assert report.share("invariant") == (6 * 27 + 8 * 54) / sum(row.entries for row in report)
    with pytest.raises(KeyError, match="no parameter 'x'"):
        report["x"]


def test_advice_counts_what_decay_acts_on(report):
    text = " ".join(report.advice(weight_decay=0.1, lr=0.01).split())
    assert "by 0.999 per step" in text
    share = (6 * 27 + 8 * 54) / sum(row.entries for row in report)
    assert f"scale-invariant weights (2 parameters, {share:.1%} of the entries)" in text
    assert "biases, gains and scales (7 parameters" in text
    # The head before the frozen readout, and the readout.
    assert "AdamP's gate (view='auto') has nothing to project in 2 parameters" in text
    assert "projects as a whole what is invariant in parts: 3.weight (blocks(2))" in text
    assert "fix: the norms of 3 of 4 matrices, at no loss; with a gain those of 8.weight" in text
    assert "group: 3 hidden matrices apart from readout 8.weight" in text


def test_the_gate_opens_by_chance_as_often_as_the_advice_says():
    """|cos| of independent directions in n dimensions is below 0.1/√n in 2Φ(0.1) − 1 of draws."""
    torch.manual_seed(0)
    g, w = torch.randn(2, 20_000, 256).unbind()
    cosine = F.cosine_similarity(g, w)
    opened = (cosine.abs() < 0.1 / 256**0.5).float().mean()
    assert float(opened) == pytest.approx(chance_of_gate(0.1), abs=0.006)  # three deviations


def test_the_figure_links_what_is_traded_and_says_views_beside_the_names(report):
    shares, links = report.figure().charts
    assert shares.rows == tuple(KINDS[k] for k in KINDS if any(row.kind == k for row in report))
    assert links.rows == tuple(row.name for row in report)
    assert links.marks[links.rows.index("3.weight")] == ("blocks(2)", "blue")
    torch.manual_seed(0)
    traded = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    (link,) = analyze(traded, torch.randn(60, 6)).figure().charts[1].links
    assert (link.full, link.hollow, link.label) == ((0, 1), (2,), "8")


def test_figure(report, tmp_path):
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_auto_decides_wrongly_about_a_head_and_the_reports_views_never_do():
    """Over 500 steps the cosine gate opens for layers that no normalization follows."""
    spec = importlib.util.spec_from_file_location("cost", ROOT / "benchmarks" / "invariance.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    report, auto, ours = benchmark.wrong_gates(500, seed=0)
    assert set(report.views()) == {"0.weight", "3.weight"}
    assert auto["8.weight"] > 0
    assert auto["10.weight"] > 0
    assert set(ours.values()) == {0}
