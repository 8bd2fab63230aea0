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


OWN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from normwise.lab import supervised

x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
data = TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())

def network():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))

def problem():
    return supervised(network, data, data, batch_size=20, epochs=2)
"""


@pytest.mark.slow
def test_two_processes_share_the_batches_of_ones_own_problem(tmp_path, monkeypatch, torchrun):
    (tmp_path / "shared_own.py").write_text(OWN)
    words = ["compare", "shared_own.py:problem", "--seeds", "1", "--lr", "0.01,0.1", "--quiet"]
    words += ["--optimizers", "sgd,sgdp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun(*words, "--parallel", "ddp", "--out", "two", cwd=tmp_path, env=environment)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main([*words, "--out", "one"]) == 0
    two, one = (
        json.loads((tmp_path / name / "summary.json").read_text())["methods"]
        for name in ("two", "one")
    )
    for ours, theirs in zip(two, one, strict=True):
        assert ours["lr"] == theirs["lr"]
        mine, alone = (m["values"]["cross-entropy"]["0"] for m in (ours, theirs))
        assert mine == pytest.approx(alone, rel=1e-4)


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
