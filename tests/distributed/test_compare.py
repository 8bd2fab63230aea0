"""``normwise compare --parallel`` on the processes of torchrun."""

import json
import os

import pytest

from normwise import cli

COMPARE = ["compare", "--epochs", "1", "--seeds", "1", "--optimizers", "adamp", "--quiet"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_one_network(kind, tmp_path, torchrun):
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun(*COMPARE, "--parallel", kind, "--out", "run", cwd=tmp_path, env=environment)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "complete"
    assert run["environment"]["processes"] == 2
    assert "torchrun --nproc-per-node 2" in run["command"]
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["test_accuracy"] > 0.2  # chance is 0.1


def test_without_torchrun_it_says_how_to_start(capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn")
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main([*COMPARE, "--parallel", "ddp", "--out", str(tmp_path / "run")]) == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err


def test_a_batch_must_be_shared_evenly(capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    command = [*COMPARE, "--parallel", "ddp", "--batch-size", "64", "--out", str(tmp_path / "run")]
    assert cli.main(command) == 2
    assert "multiple of the 3 processes" in capsys.readouterr().err
