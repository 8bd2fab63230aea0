"""Cells as graphs: off a CUDA device, where nothing is captured, the same bits as one by one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from normwise.lab.errors import UsageError
from normwise.lab.recipes import find
from normwise.lab.running.cell import run_cell
from normwise.lab.running.events import Finished
from normwise.lab.running.executors import run_cells
from normwise.lab.store import read_metrics

ROOT = Path("no data is needed")


def cells(**training):
    """AdamP and SGD, of two epochs of three steps each, with two seeds."""
    made = find("digits").cells("small", 2, ["sgd", "adamp"])
    options = replace(made[0].options, width=4, augment=("flip", "crop"))
    changed = {"epochs": 2, "batch_size": 256, "epsilon_shift": None, "evaluate_every": 1}
    return [
        replace(c, options=options, training=replace(c.training, **{**changed, **training}))
        for c in made
    ]


def as_graphs(wanted, out, **options):
    return run_cells(wanted, out, ROOT, executor="graphs", **options)


@pytest.mark.parametrize(
    "training",
    [
        {"autocast": "bfloat16", "clip": 1.0, "schedule": "cosine"},
        {"normalization": "WS", "epsilon_shift": 0.1, "weight_decay": 0.1},
    ],
    ids=["autocast, clipped", "standardized, shifted"],
)
def test_side_by_side_they_are_what_they_are_one_by_one(training, tmp_path):
    wanted, seen = cells(**training), []
    beside = as_graphs(wanted, tmp_path / "graphs", jobs=3, observe=seen.append)
    for cell, result in zip(wanted, beside, strict=True):
        alone = run_cell(cell, tmp_path / "local", ROOT)
        assert result["weights"] == alone["weights"]
        assert result["metrics"] == alone["metrics"]
        lines, own = (read_metrics(tmp_path / how / cell.folder) for how in ("local", "graphs"))
        assert [{**line, "angular_update": None} for line in lines] == own
    assert [e.cell for e in seen if isinstance(e, Finished)] == wanted


def test_finished_ones_are_read_and_cut_off_ones_begin_anew(tmp_path, monkeypatch):
    wanted = cells()[:2]
    whole = as_graphs(wanted, tmp_path / "whole", jobs=2)
    as_graphs(wanted[:1], tmp_path / "again")
    stopped = as_graphs(wanted, tmp_path / "again", jobs=2, until=0.0)
    assert [r["status"] for r in stopped] == ["ok", "unfinished"]
    assert as_graphs(wanted, tmp_path / "again", jobs=2) == whole


def test_a_folder_of_graphs_is_not_one_of_another_executor(tmp_path):
    (cell, *_) = cells()
    as_graphs([cell], tmp_path)
    config = json.loads((tmp_path / cell.folder / "config.json").read_text())
    assert config["executor"] == "graphs"
    with pytest.raises(UsageError, match="its executor is 'graphs'"):
        run_cell(cell, tmp_path, ROOT)


def test_one_that_is_damaged_is_skipped_and_the_others_go_on(tmp_path):
    bad, good = cells()[:2]
    as_graphs([bad], tmp_path)
    (tmp_path / bad.folder / "result.json").write_text("{}")
    results = as_graphs([bad, good], tmp_path, jobs=2)
    assert [r["status"] for r in results] == ["skipped", "ok"]
    assert "result.json" in results[0]["error"]


def test_one_that_diverges_leaves_the_others(tmp_path):
    well, ill = cells()[:2]
    ill = replace(ill, training=replace(ill.training, lr=1e30))
    results = as_graphs([well, ill], tmp_path, jobs=2)
    assert [r["status"] for r in results] == ["ok", "failed"]
    assert "not finite" in results[1]["error"]


@pytest.mark.parametrize(
    ("training", "options", "named"),
    [
        ({"norm_correction": "fixed", "weight_decay": 0.0}, {}, "norm_correction 'fixed'"),
        ({"decay_window": (0.0, 0.5)}, {}, "decay_window"),
        ({"awp_gamma": 0.01}, {}, "awp_gamma 0.01"),
        ({"coupling": "schedule", "weight_decay": 0.1}, {}, "coupling 'schedule'"),
        ({}, {"augment": ("cutout",)}, "augment ['cutout']"),
    ],
)
def test_what_cannot_be_captured_is_refused_before_anything_is_written(
    training, options, named, tmp_path
):
    cell = cells(**training)[0]
    cell = replace(cell, options=replace(cell.options, **options))
    with pytest.raises(UsageError, match="--executor graphs") as error:
        as_graphs([cell], tmp_path / "out")
    assert named in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_a_replayed_step_trains_as_a_launched_one(tmp_path):
    """To what the fused steps and other sums make of rounding in a few steps."""
    wanted = cells()
    beside = as_graphs(wanted, tmp_path / "graphs", jobs=4, device="cuda")
    for cell, result in zip(wanted, beside, strict=True):
        run_cell(cell, tmp_path / "local", ROOT, device="cuda")
        lines, own = (read_metrics(tmp_path / how / cell.folder) for how in ("local", "graphs"))
        assert result["status"] == "ok"
        assert own[-1]["train_loss"] == pytest.approx(lines[-1]["train_loss"], rel=1e-3)
        assert own[-1]["norm_growth"] == pytest.approx(lines[-1]["norm_growth"], rel=1e-3)
