"""Whole comparisons, as short as they can be."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from normwise.lab import compare as module
from normwise.lab.compare import compare
from normwise.lab.contenders import CONTENDERS, Family
from normwise.lab.errors import UsageError
from normwise.lab.models import ConvNet
from normwise.lab.settings import Settings
from normwise.lab.store import read_metrics
from normwise.lab.tasks import TASKS
from normwise.lab.train import Diverged, train

ALL = ("sgd", "sgdp", "adamw", "adamp")
TIMES = ("step_ms", "optimizer_ms")


def settings(**changes):
    quick = {"optimizers": ALL, "seeds": 2, "epochs": 2, "batch_size": 128}
    return Settings(task="digits", **{**quick, **changes})


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return compare(settings(), tmp_path_factory.mktemp("run"))


def summary(folder):
    return json.loads((folder / "summary.json").read_text("utf-8"))


def timeless(records):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def test_the_same_seeds_give_the_same_metrics_whatever_came_before(outcome, tmp_path):
    torch.manual_seed(12345)
    alone = compare(settings(optimizers=("adamp", "sgd")), tmp_path)
    for name in ("adamp", "sgd"):
        first, again = (
            [r for r in timeless(o.records) if r["optimizer"] == name] for o in (outcome, alone)
        )
        assert first == again


def test_different_seeds_start_from_different_networks(outcome):
    assert len({r["norm"] for r in outcome.records if r["epoch"] == 0}) == 2


def test_different_seeds_see_different_batches():
    def same_network(data):
        torch.manual_seed(0)
        return TASKS["digits"].model(data)

    task = dataclasses.replace(TASKS["digits"], model=same_network)
    quick = settings(epochs=1)
    runs = [list(train(task, task.load(), CONTENDERS["sgd"], quick, seed)) for seed in (0, 1)]
    (start, end), (other_start, other_end) = runs
    assert start.norm == other_start.norm
    assert end.train_loss != other_end.train_loss


def test_a_comparison_leaves_the_generator_and_the_threads_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    compare(settings(optimizers=("sgd",), seeds=1, epochs=1), tmp_path)
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
        power = 2 if CONTENDERS[r["optimizer"]].family is Family.SGD else 1
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
    for field in dataclasses.fields(Settings):
        assert field.name in run["settings"]
    assert json.loads((outcome.folder / "summary.json").read_text("utf-8"))["status"] == "complete"


def test_layers_are_watched_with_the_first_seed(outcome):
    page = (outcome.folder / "report.html").read_text("utf-8")
    slices = {w.name: len(w.weight) for w in ConvNet(1, 10).invariant_weights()}
    for name in outcome.run["settings"]["optimizers"]:
        lines = (outcome.folder / f"layers-{name}.jsonl").read_text("utf-8").splitlines()
        measured = {line["step"]: line["norm"] for line in map(json.loads, lines)}
        epochs = [r for r in outcome.records if (r["optimizer"], r["seed"]) == (name, 0)]
        for r in epochs[1:]:
            logs = [n * math.log(measured[r["step"]][layer]) for layer, n in slices.items()]
            assert math.exp(sum(logs) / sum(slices.values())) == pytest.approx(r["norm"])
        assert f"<b>{CONTENDERS[name].label}</b>: 4 layers, no alarms" in page
    assert page.count('<div class="charts panels">') == len(outcome.run["settings"]["optimizers"])


def test_the_learning_rate_drops_at_the_papers_fractions():
    s = settings(epochs=100)
    assert s.drop_epochs() == [30, 60, 90]
    rates = [s.lr(Family.SGD, epoch) for epoch in (0, 1, 30, 31, 60, 61, 91, 100)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-4, 1e-4])
    assert settings(epochs=1).lr(Family.ADAM, 1) == 1e-3


def test_weight_decay_spares_biases_and_norms():
    from normwise.lab.train import _param_groups

    model = ConvNet(1, 10)
    decayed, spared = _param_groups(model, CONTENDERS["adamp"], settings())
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1e-2, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norms" in names[id(p)] or "bias" in names[id(p)] for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path):
    out = compare(settings(optimizers=("sgd", "adamw"), seeds=1, lr_sgd=1e30), tmp_path)
    sgd, adamw = summary(tmp_path)["optimizers"]
    (failed,) = sgd["failed"]
    assert failed["seed"] == 0
    assert "became" in failed["error"]
    assert sgd["numbers"] == {}
    assert adamw["finished"] == [0]
    assert out.run["status"] == "complete"
    assert [r["status"] for r in read_metrics(tmp_path) if r["optimizer"] == "sgd"][-1] == "failed"
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "SGD, seed 0: failed" in page


def test_a_comparison_of_nothing_but_failures_has_failed(tmp_path):
    out = compare(settings(optimizers=("sgd", "sgdp"), seeds=1, lr_sgd=1e30), tmp_path)
    assert out.run["status"] == "failed"
    assert "No run came far enough" in out.summary["headline"]


def stopping(error, after):
    """A replacement of ``train`` that raises ``error`` after so many epochs of the second run."""
    original = module.train

    def train(task, data, contender, settings, *others):
        for record in original(task, data, contender, settings, *others):
            yield record
            if contender.name != settings.optimizers[0] and record.epoch == after:
                raise error

    return train


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_comparison_reports_what_it_has(tmp_path, monkeypatch, after):
    monkeypatch.setattr(module, "train", stopping(KeyboardInterrupt(), after))
    out = compare(settings(seeds=1), tmp_path)
    assert out.interrupted
    assert len(read_metrics(tmp_path)) == 3 + after + 1
    assert json.loads((tmp_path / "run.json").read_text("utf-8"))["status"] == "interrupted"
    assert "Interrupted" in (tmp_path / "report.html").read_text("utf-8")
    sgd, sgdp, adamw, _ = summary(tmp_path)["optimizers"]
    assert (sgd["finished"], sgdp["unfinished"], sgdp["epoch"]) == ([0], [0], after)
    assert adamw["numbers"] == {}


def test_a_comparison_interrupted_at_once_is_readable_too(tmp_path, monkeypatch):
    def train(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", train)
    out = compare(settings(), tmp_path)
    assert out.interrupted
    assert read_metrics(tmp_path) == []
    assert (tmp_path / "report.html").exists()


def test_an_unforeseen_error_is_marked_and_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", stopping(RuntimeError("out of luck"), 0))
    with pytest.raises(RuntimeError, match="out of luck"):
        compare(settings(seeds=1), tmp_path)
    run = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert (run["status"], run["error"]) == ("failed", "RuntimeError: out of luck")


def test_a_nan_in_one_seed_leaves_the_other_seeds_alone(tmp_path, monkeypatch):
    original = module.train

    def train(task, data, contender, settings, seed, *others):
        for record in original(task, data, contender, settings, seed, *others):
            if seed == 1 and record.epoch == 1:
                raise Diverged("the training loss became nan", 1, 3)
            yield record

    monkeypatch.setattr(module, "train", train)
    out = compare(settings(optimizers=("sgd", "sgdp")), tmp_path)
    for row in summary(tmp_path)["optimizers"]:
        assert row["finished"] == [0]
        assert row["failed"] == [
            {"seed": 1, "error": "the training loss became nan at step 3, in epoch 1"}
        ]
    assert out.summary["findings"][0]["seeds"] == 1


def test_a_batch_larger_than_the_data_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(UsageError, match="898 training examples"):
        compare(settings(batch_size=899), tmp_path / "run")
    assert not (tmp_path / "run").exists()
