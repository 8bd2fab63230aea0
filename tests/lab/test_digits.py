"""Whole comparisons, as short as they can be."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace

import pytest
import torch

from normwise import cli
from normwise.lab import digits as module
from normwise.lab.digits import CELLS, Choice, compare
from normwise.lab.errors import UsageError
from normwise.lab.recipes import find
from normwise.lab.running.cell import run_cell
from normwise.lab.running.events import Measured
from normwise.lab.running.results import read_cells, tables
from normwise.lab.running.trainer import Diverged, Trainer
from normwise.lab.store import read_metrics

ALL = ("sgd", "sgdp", "adamw", "adamp")
TIMES = ("step_ms", "optimizer_ms")


def choice(**changes):
    quick = {"optimizers": ALL, "seeds": 2, "epochs": 2, "batch_size": 128}
    return Choice(**{**quick, **changes})


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return compare(choice(), tmp_path_factory.mktemp("run"))


def summary(folder):
    return json.loads((folder / "summary.json").read_text("utf-8"))


def timeless(records):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def test_the_same_seeds_give_the_same_metrics_whatever_came_before(outcome, tmp_path):
    torch.manual_seed(12345)
    alone = compare(choice(optimizers=("adamp", "sgd")), tmp_path)
    for name in ("adamp", "sgd"):
        first, again = (
            [r for r in timeless(o.records) if r["optimizer"] == name] for o in (outcome, alone)
        )
        assert first == again


def test_different_seeds_start_from_different_networks(outcome):
    assert len({r["norm"] for r in outcome.records if r["epoch"] == 0}) == 2


def test_a_comparison_and_a_paper_run_give_the_same_metrics(tmp_path):
    """The recipe's own cell, of as many epochs, ends in the same bits, lines and weights."""
    out = compare(choice(optimizers=("sgdp",), seeds=1, batch_size=None), tmp_path / "compare")
    (cell,) = find("digits").cells("paper", 1, ["sgdp"])
    cell = replace(cell, training=replace(cell.training, epochs=2))
    result = run_cell(cell, tmp_path / "paper", tmp_path)
    lines = read_metrics(tmp_path / "paper" / cell.folder)
    assert result == json.loads(
        (tmp_path / "compare" / CELLS / cell.folder / "result.json").read_text("utf-8")
    )
    assert len(lines) == len(out.records) == 3
    for line, record in zip(lines, out.records, strict=True):
        assert record["test_accuracy"] == line.pop("accuracy")
        assert line.items() <= record.items()
    assert out.records[-1]["test_errors"] == result["wrong"]


@pytest.mark.slow
def test_the_commands_compare_and_paper_run_give_the_same_metrics(tmp_path, capsys):
    """As users type them, with no option but the method and the seed."""
    shared = ["--seeds", "1", "--quiet", "--json"]
    where = str(tmp_path / "a")
    assert cli.main(["compare", *shared, "--optimizers", "adamp", "--out", where]) == 0
    (row,) = json.loads(capsys.readouterr().out)["optimizers"]
    run = ["paper", "run", "digits", "--scale", "paper", "--methods", "adamp"]
    assert cli.main([*run, *shared, "--out", str(tmp_path / "b")]) == 0
    (same,) = json.loads(capsys.readouterr().out)
    assert same["values"]["0"] == 100 * row["numbers"]["test_accuracy"]["values"][0]
    lines = [
        (
            tmp_path / out / "digits-paper" / "digits" / "adamp" / "seed-0" / "metrics.jsonl"
        ).read_text()
        for out in (f"a/{CELLS}", "b")
    ]
    assert lines[0] == lines[1]


def test_a_comparison_can_be_reported_as_any_run(outcome):
    (table,) = tables(read_cells([outcome.folder]))
    means = {e.method: e.spread.mean for e in table.entries}
    for row in outcome.summary["optimizers"]:
        assert means[row["name"]] == pytest.approx(100 * row["numbers"]["test_accuracy"]["mean"])


def test_a_comparison_leaves_the_generator_and_the_threads_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    compare(choice(optimizers=("sgd",), seeds=1, epochs=1), tmp_path)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads


def test_every_optimizer_starts_from_the_same_network(outcome):
    for seed in (0, 1):
        starts = [r for r in outcome.records if r["seed"] == seed and r["epoch"] == 0]
        assert len(starts) == len(ALL)
        assert len({(r["norm"], r["test_accuracy"]) for r in starts}) == 1


def test_every_record_is_in_the_file(outcome):
    assert read_metrics(outcome.folder) == outcome.records
    assert len(outcome.records) == len(ALL) * 2 * 3


def test_effective_learning_rates_follow_from_norms_and_schedule(outcome):
    starts = {(r["optimizer"], r["seed"]): r for r in outcome.records if r["epoch"] == 0}
    for r in outcome.records:
        power = 2 if r["optimizer"] in ("sgd", "sgdp") else 1
        start = starts[r["optimizer"], r["seed"]]
        assert math.isclose(r["effective_lr"], r["lr"] / r["norm"] ** power)
        assert math.isclose(r["norm_growth"], r["norm"] / start["norm"])
        without_schedule = r["effective_lr"] / r["lr"] * start["lr"]
        assert math.isclose(r["relative_effective_lr"], without_schedule / start["effective_lr"])


def test_projected_norms_grow_less_than_under_momentum(outcome):
    growth = {r["name"]: r["numbers"]["norm_growth"]["mean"] for r in outcome.summary["optimizers"]}
    assert 1 < growth["sgdp"] < growth["sgd"]
    assert growth["adamp"] < growth["adamw"]


def test_all_files_are_there_and_whole(outcome):
    assert sorted(path.name for path in outcome.folder.iterdir()) == [
        "accuracy.png",
        "cells",
        "effective_lr.png",
        *sorted(f"layers-{name}.jsonl" for name in outcome.run["settings"]["optimizers"]),
        "metrics.jsonl",
        "norms.png",
        "report.html",
        "run.json",
        "summary.json",
    ]
    for picture in outcome.folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    run = json.loads((outcome.folder / "run.json").read_text("utf-8"))
    assert run["status"] == "complete"
    # Everything that decides the outcome is written down.
    for field in dataclasses.fields(Choice):
        assert run["settings"][field.name] is not None or field.name == "parallel"
    assert run["methods"][1] == {
        "name": "sgdp",
        "label": "SGDP",
        "update": "gradient",
        "baseline": "sgd",
    }
    assert [method["update"] for method in run["methods"]] == ["gradient"] * 2 + ["normalized"] * 2
    assert json.loads((outcome.folder / "summary.json").read_text("utf-8"))["status"] == "complete"


def test_layers_are_watched_with_the_first_seed(outcome):
    page = (outcome.folder / "report.html").read_text("utf-8")
    slices = {f"conv{k}.weight": channels for k, channels in enumerate((16, 16, 32, 32), 1)}
    for name in outcome.run["settings"]["optimizers"]:
        lines = (outcome.folder / f"layers-{name}.jsonl").read_text("utf-8").splitlines()
        measured = {line["step"]: line["norm"] for line in map(json.loads, lines)}
        epochs = [r for r in outcome.records if (r["optimizer"], r["seed"]) == (name, 0)]
        for r in epochs[1:]:
            logs = [n * math.log(measured[r["step"]][layer]) for layer, n in slices.items()]
            assert math.exp(sum(logs) / sum(slices.values())) == pytest.approx(r["norm"])
        assert "</b>: 4 layers, no alarms" in page
    assert page.count('<div class="charts panels">') == len(outcome.run["settings"]["optimizers"])


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path):
    out = compare(choice(optimizers=("sgd", "adamw"), seeds=1, lr_sgd=1e30), tmp_path)
    sgd, adamw = summary(tmp_path)["optimizers"]
    (failed,) = sgd["failed"]
    assert failed["seed"] == 0
    assert "not finite" in failed["error"]
    assert sgd["numbers"] == {}
    assert adamw["finished"] == [0]
    assert out.run["status"] == "complete"
    assert [r["status"] for r in read_metrics(tmp_path) if r["optimizer"] == "sgd"][-1] == "failed"
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "SGD, seed 0: failed" in page


def test_a_comparison_of_nothing_but_failures_has_failed(tmp_path):
    out = compare(choice(optimizers=("sgd", "sgdp"), seeds=1, lr_sgd=1e30), tmp_path)
    assert out.run["status"] == "failed"
    assert "No run came far enough" in out.summary["headline"]


def stopping(error, after):
    """A replacement of ``run_cell`` that raises after so many epochs of the second method."""
    original = module.run_cell

    def run_cell(cell, *others, observe, **more):
        def watch(event):
            observe(event)
            second = isinstance(event, Measured) and cell.method != "sgd"
            if second and event.record["epoch"] == after:
                raise error

        return original(cell, *others, observe=watch, **more)

    return run_cell


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_comparison_reports_what_it_has(tmp_path, monkeypatch, after):
    monkeypatch.setattr(module, "run_cell", stopping(KeyboardInterrupt(), after))
    out = compare(choice(seeds=1), tmp_path)
    assert out.interrupted
    assert len(read_metrics(tmp_path)) == 3 + after + 1
    assert json.loads((tmp_path / "run.json").read_text("utf-8"))["status"] == "interrupted"
    assert "Interrupted" in (tmp_path / "report.html").read_text("utf-8")
    sgd, sgdp, adamw, _ = summary(tmp_path)["optimizers"]
    assert (sgd["finished"], sgdp["unfinished"], sgdp["epoch"]) == ([0], [0], after)
    assert adamw["numbers"] == {}


def test_a_comparison_interrupted_at_once_is_readable_too(tmp_path, monkeypatch):
    def run_cell(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_cell", run_cell)
    out = compare(choice(), tmp_path)
    assert out.interrupted
    assert read_metrics(tmp_path) == []
    assert (tmp_path / "report.html").exists()


def test_an_unforeseen_error_is_marked_and_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_cell", stopping(RuntimeError("out of luck"), 0))
    with pytest.raises(RuntimeError, match="out of luck"):
        compare(choice(seeds=1), tmp_path)
    run = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert (run["status"], run["error"]) == ("failed", "RuntimeError: out of luck")
    assert summary(tmp_path)["status"] == "failed"


def test_a_nan_in_one_seed_leaves_the_other_seeds_alone(tmp_path, monkeypatch):
    line = Trainer.line

    def diverge(self, metrics):
        if self.cell.seed == 1 and self.epoch == 1:
            raise Diverged("the training loss became nan")
        return line(self, metrics)

    monkeypatch.setattr(Trainer, "line", diverge)
    out = compare(choice(optimizers=("sgd", "sgdp")), tmp_path)
    for row in summary(tmp_path)["optimizers"]:
        assert row["finished"] == [0]
        assert row["failed"] == [{"seed": 1, "error": "the training loss became nan"}]
    assert out.summary["findings"][0]["seeds"] == 1


def test_a_batch_larger_than_the_data_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(UsageError, match="898 training examples"):
        compare(choice(batch_size=899), tmp_path / "run")
    assert not (tmp_path / "run").exists()
