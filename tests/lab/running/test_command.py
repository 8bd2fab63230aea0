"""What ``normwise paper run`` and ``compare`` show while they train, and leave when they end."""

import errno
import itertools
import json
import os
import re
import time
from pathlib import Path

import pytest

from normwise import cli
from normwise.lab import report
from normwise.lab.cli import ProgressLines
from normwise.lab.recipes import find
from normwise.lab.running import cell
from normwise.lab.running.events import Finished, Progress


@pytest.fixture
def quick(tmp_path):
    """The command that trains one small cell of three steps an epoch."""
    recipe = (Path(find.__globals__["__file__"]).parent / "digits.yaml").read_text("utf-8")
    changed = recipe.replace("width: 8, epochs: 3", "width: 4, epochs: 2, batch_size: 256")
    assert changed != recipe
    (tmp_path / "quick.yaml").write_text(changed.replace("id: digits", "id: quick"), "utf-8")
    command = ["paper", "run", str(tmp_path / "quick.yaml"), "--seeds", "1", "--methods", "sgd"]
    return [*command, "--out", str(tmp_path / "runs")]


def test_while_a_cell_trains_its_share_loss_and_time_left_are_shown(quick, capsys, monkeypatch):
    monkeypatch.setattr(cell, "_PROGRESS_SECONDS", 0.0)
    assert cli.main(quick) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    shown = r" (\d+)%, loss \d\S*, (?:norm ×\d\S*, )?\d+ s left"
    found = [re.search(shown, line) for line in lines]
    assert [int(share[1]) for share in found] == [17, 33, 50, 67, 83, 100]


def test_progress_is_not_shown_where_it_is_not_wanted(quick, capsys, monkeypatch):
    monkeypatch.setattr(cell, "_PROGRESS_SECONDS", 0.0)
    assert cli.main([*quick, "--quiet"]) == 0
    assert "left" not in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "least"), [("0", 6), ("1e9", 0)])
def test_checkpoints_are_as_often_as_asked_for(quick, monkeypatch, seconds, least):
    """With 0 one after each step; else when an epoch and the training end, at the least."""
    saved, save = [], cell.Trainer.save
    monkeypatch.setattr(cell.Trainer, "save", lambda self: (saved.append(self.done), save(self)))
    assert cli.main([*quick, "--checkpoint-every", seconds]) == 0
    assert set(range(1, least)) <= set(saved)
    assert least or len(saved) < 6


def test_a_budget_stops_between_steps_and_the_same_command_goes_on(
    quick, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(cell, "_PROGRESS_SECONDS", 0.0)
    whole = tmp_path / "whole"
    assert cli.main([*quick[:-1], str(whole)]) == 0
    taken, take, clock = [], cell.Trainer.take, time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 1000 * len(taken))
    monkeypatch.setattr(
        cell.Trainer, "take", lambda self, batches: (taken.append(0), take(self, batches))
    )
    capsys.readouterr()
    # Of the six steps, at 1000 seconds each, two are allowed; where an epoch ends, one more.
    codes = []
    while not codes or codes[-1] == 75:
        assert len(codes) < 6
        codes.append(cli.main([*quick, "--budget", "25m"]))
        said = capsys.readouterr().err
        assert ("out of time: 1 of 1 trainings are left, about " in said) == (codes[-1] == 75)
    assert (codes[-1], len(codes), len(taken)) == (0, 3, 6)
    (folder,) = (p.parent for p in (tmp_path / "runs").rglob("result.json"))
    (expected,) = (p.parent for p in whole.rglob("result.json"))
    for name in ("metrics.jsonl", "result.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    # What is finished is read, whatever the time; what is not begun leaves nothing.
    assert cli.main([*quick, "--budget", "1s"]) == 0
    monkeypatch.setattr(time, "time", lambda: next(later))
    later = itertools.count(step=1000)
    assert cli.main([*quick[:-1], str(tmp_path / "other"), "--budget", "1s"]) == 75
    assert "left; run" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "other" / "quick-small").iterdir()] == ["recipe.yaml"]


def test_time_left_is_by_the_pace_since_the_start(monkeypatch):
    """A training that goes on at half, and is at three quarters after a minute, needs another."""
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    lines = ProgressLines(total=1, quiet=True, begin=40.0)
    (one,) = find("digits").cells("small", 1, ["sgd"])
    lines(Progress(one, share=0.75, fresh=0.25, loss=1.0, growth=None, seconds_left=60.0))
    assert lines.seconds_left == pytest.approx(60)
    lines(Finished(one, {"status": "ok", "metrics": {}}))
    assert lines.seconds_left is None


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(quick, tmp_path):
    assert cli.main([*quick, "--device", "tpu"]) == 2
    assert not (tmp_path / "runs").exists()
    assert cli.main(quick) == 0


def test_a_disk_that_is_full_at_the_end_leaves_files_that_agree(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "report.html"))

    monkeypatch.setattr(report, "render", full)
    out = tmp_path / "run"
    command = ["compare", "--seeds", "1", "--epochs", "1", "--batch-size", "256", "--quiet"]
    assert cli.main([*command, "--optimizers", "sgd", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "report.html" in error
    assert error.count("\n") == 1
    status = {n: json.loads((out / n).read_text("utf-8"))["status"] for n in FILES}
    assert status == dict.fromkeys(FILES, "failed")


FILES = ("run.json", "summary.json")


def test_what_a_monitor_saw_is_drawn_of_the_only_cell(quick, tmp_path, capsys):
    drawn = tmp_path / "pictures" / "monitor.png"
    assert cli.main([*quick, "--monitor", str(drawn)]) == 0
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*quick, "--monitor", str(drawn)]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    several = [*quick[:-4], "--monitor", str(drawn), *quick[-2:]]
    assert cli.main(several) == 2
    assert "these are 4: choose one" in capsys.readouterr().err
