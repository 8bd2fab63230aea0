"""``normwise paper run --parallel``: cells that several processes train together."""

import json
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
from torch.nn.utils.parametrizations import weight_norm

from normwise import cli
from normwise.lab.data.catalogue import CATALOGUE
from normwise.lab.data.images import Labelled
from normwise.lab.errors import UsageError
from normwise.lab.networks import NETWORKS
from normwise.lab.parallel import Processes, _blocks
from normwise.lab.recipes import find
from normwise.lab.running.cell import run_cell
from normwise.lab.running.trainer import Trainer, digest

KINDS = ("ddp", "fsdp")
FILES = ("metrics.jsonl", "result.json", "config.json")
RECIPE = """
schema: 1
id: letters
title: Letters
question: Do processes together learn what one learns?
task: language
paper: {source: none, metric: perplexity}
methods:
  adamp: {label: AdamP, settings: {optimizer: adamp, lr: 0.003, weight_decay: 0.01, clip: 0.5}}
settings: {data: tinyshakespeare, context: 8, layers: 1, width: 16, heads: 2, batch_size: 48}
scales:
  paper: {settings: {epochs: 2}, rows: {letters: {}}}
  small: {settings: {epochs: 2}, seeds: 1, rows: {letters: {}}}
"""


def plain(channels, classes, width):
    """A network without batch statistics."""
    return nn.Sequential(
        *(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.AdaptiveAvgPool2d(2)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, classes)),
    )


def pictures(root):
    """Pixels between 0 and 255, which an attack needs."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(256, (96, 1, 8, 8), dtype=torch.uint8, generator=draw).numpy()
    y = torch.arange(96).numpy() % 3
    return Labelled("pictures", x, y, x, y, ("a", "b", "c"))


NETWORKS["plain"] = plain
_READER = ModuleType("normwise.lab.data.painted")
_READER.pictures = pictures
sys.modules[_READER.__name__] = _READER
CATALOGUE["pictures"] = replace(
    next(iter(CATALOGUE.values())), name="pictures", labelled="painted:pictures"
)


def digits(network="plain", **training):
    """Two epochs of three steps, which augment in every way there is."""
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn")
    (cell,) = find("digits").cells("small", 1, ["adamp"])
    options = replace(
        cell.options, network=network, width=6, augment=("crop", "flip", "cutout", "cutmix")
    )
    quick = {"epochs": 2, "batch_size": 252, "normalization": "WS", "epsilon_shift": 0.1}
    return replace(cell, options=options, training=replace(cell.training, **{**quick, **training}))


class Tied(nn.Module):
    """Blocks of which one shares its weight with what is outside, and one is a list itself."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
                nn.ModuleList([weight_norm(nn.Linear(4, 4)), nn.Flatten()]),
                self.inside,
            ]
        )


def test_fsdp_gathers_blocks_one_by_one():
    """Not what has no forward of its own, no weights, or weights that are used elsewhere."""
    model = Tied()
    whole, parts, _ = model.blocks
    assert _blocks(model) == [whole, parts[0]]
    assert _blocks(nn.Linear(2, 2)) == []


def attacked():
    cell = find("adamp-adversarial").cells("small", 1, ["adamp"])[0]
    options = replace(
        cell.options,
        **{"data": "pictures", "network": "plain", "augment": ("flip",), "width": 4},
        **{"train_examples": None, "test_examples": None, "ball": "l2", "radius": 100.0},
        **{"attack_steps": 2, "test_attack_steps": 1},
    )
    quick = {"epochs": 2, "batch_size": 24}
    return replace(cell, options=options, training=replace(cell.training, **quick))


def train(cell, out, kind, killed=None):
    """Train a cell on all ranks; with ``killed`` (rank, n) that rank dies at its n-th step.

    With (None, n) no rank dies, but all stop there with an error.
    """
    me = Processes(kind, dist.get_rank(), dist.get_world_size())
    take, steps = Trainer.take, []

    def last(self, chosen):
        steps.append(chosen)
        if (me.rank, len(steps)) == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if (None, len(steps)) == killed:
            raise InterruptedError
        return take(self, chosen)

    Trainer.take = last
    try:
        return run_cell(cell, Path(out), Path("no data"), checkpoint_seconds=0, processes=me)
    except RuntimeError:
        if killed is None:
            raise
        os._exit(1)  # a peer has gone; as under torchrun none shall wait for this process
    finally:
        Trainer.take = take


def records(out, cell):
    lines = (Path(out) / cell.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def contents(out, cell):
    return {name: (Path(out) / cell.folder / name).read_bytes() for name in FILES}


def assert_close(ours, theirs, rel=1e-4):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a == {k: v if v is None else pytest.approx(v, rel=rel) for k, v in b.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [digits, attacked])
def test_two_processes_learn_what_one_learns(world2, tmp_path, kind, make):
    cell = make()
    one = run_cell(cell, tmp_path / "one", Path("no data"))
    first, second = world2(train, cell, str(tmp_path / "two"), kind)
    assert first == second
    ours, theirs = records(tmp_path / "two", cell), records(tmp_path / "one", cell)
    if kind == "fsdp":  # a Monitor reads whole weights only
        assert {record["angular_update"] for record in ours} == {None}
        theirs = [{**record, "angular_update": None} for record in theirs]
    assert_close(ours, theirs)
    assert first["wrong"] == one["wrong"]
    assert len(records(tmp_path / "two", cell)) == 3
    config = json.loads((tmp_path / "two" / cell.folder / "config.json").read_text())
    assert config.pop("parallel") == {"kind": kind, "processes": 2}
    assert config == json.loads((tmp_path / "one" / cell.folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("kind", "size", "killed"),
    [
        ("ddp", 2, (None, 5)),
        ("fsdp", 2, (None, 3)),
        pytest.param("ddp", 2, (0, 5), marks=pytest.mark.slow),
        pytest.param("fsdp", 2, (1, 2), marks=pytest.mark.slow),
        pytest.param("ddp", 4, (3, 2), marks=pytest.mark.slow),
        pytest.param("fsdp", 4, (0, 6), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_cut_short_ends_in_the_same_bits(worlds, tmp_path, kind, size, killed):
    cell = digits("resnet8")  # whose BatchNorm has a state of its own
    worlds(size)(train, cell, str(tmp_path / "whole"), kind)
    with pytest.raises(pytest.fail.Exception, match="rank"):
        worlds(size)(train, cell, str(tmp_path / "killed"), kind, killed)
    if killed[0] is not None:
        worlds(size).close()
    assert not (tmp_path / "killed" / cell.folder / "result.json").exists()
    worlds(size)(train, cell, str(tmp_path / "killed"), kind)
    assert contents(tmp_path / "killed", cell) == contents(tmp_path / "whole", cell)
    log = (tmp_path / "killed" / cell.folder / "log.txt").read_text()
    step = killed[1] - 1  # it died before this one's checkpoint
    assert f"resumed after epoch {step // 3}, step {step % 3}" in log


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_is_that_of_the_whole_network(world2, tmp_path, kind):
    cell = digits()
    result = world2(train, cell, str(tmp_path), kind)[0]
    state = torch.load(tmp_path / cell.folder / "checkpoint.pt", weights_only=True)
    torch.manual_seed(1)
    alone = Trainer(cell, tmp_path, Path("no data"), torch.device("cpu"), Processes(None, 0, 1))
    model, optimizer = alone.problem.model, alone.optimizer
    model.load_state_dict(state["model"])
    assert digest(model.state_dict()) == result["weights"]
    assert alone.problem.evaluate().metrics == result["metrics"]
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    assert [m.shape for m in moments] == [p.shape for p in model.parameters()]
    assert all(m.abs().max() > 0 for m in moments)


def test_another_number_of_processes_is_another_run(world2, tmp_path):
    cell = digits(epochs=1)
    world2(train, cell, str(tmp_path), "ddp")
    with pytest.raises(UsageError, match=r"its parallel is .*'processes': 2.*, not None; give"):
        run_cell(cell, tmp_path, Path("no data"))
    with pytest.raises(pytest.fail.Exception, match="parallel: kind is 'ddp', not 'fsdp'"):
        world2(train, cell, str(tmp_path), "fsdp")


def test_a_training_that_diverges_fails_on_all(world2, tmp_path):
    cell = digits(optimizer="sgd", lr=1e30, normalization="none", epsilon_shift=None)
    first, second = world2(train, cell, str(tmp_path), "fsdp")
    assert first == second
    assert first["status"] == "failed"


@pytest.mark.parametrize("recipe", ["adamp-biased-mnist", "adamp-retrieval", "adamp-detection"])
def test_a_loss_of_the_whole_batch_is_refused(tmp_path, recipe):
    cell = find(recipe).cells("small", 1)[0]
    with pytest.raises(UsageError, match=f"task '{cell.task}' is not allowed with --parallel"):
        run_cell(cell, tmp_path, Path("no data"), processes=Processes("ddp", 0, 2))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """A recipe of a small transformer, and the text that it reads."""
    folder = tmp_path / "data" / "tinyshakespeare"
    folder.mkdir(parents=True)
    draw = random.Random(0)
    words = draw.choices(["to", "be", "or", "not", "that", "is", "the", "question"], k=600)
    (folder / "input.txt").write_text(" ".join(words))
    (tmp_path / "letters.yaml").write_text(RECIPE)
    monkeypatch.setenv("NORMWISE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return find("letters.yaml").cells("small")[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_under_torchrun_the_first_process_writes(letters, tmp_path, kind, capsys, torchrun):
    command = ["paper", "run", "letters.yaml"]
    assert cli.main([*command, "--json", "--out", "one"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    for _ in range(2):  # the second only reads
        done = torchrun(*command, "--parallel", kind, "--json", "--out", "two")
        (together,) = json.loads(done.stdout)
        assert together["mean"] == pytest.approx(one["mean"], rel=1e-4)
        assert done.stderr.count("1/1 letters adamp seed 0") == 1
    assert_close(records("two", letters), records("one", letters))
    log = (tmp_path / "two" / letters.folder / "log.txt").read_text()
    assert log.count("started") == log.count("finished") == 1
    (start,) = json.loads((tmp_path / "two" / letters.folder / "environment.json").read_text())
    assert start["processes"] == 2


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ([], None, "torchrun --nproc-per-node 2 -m normwise paper run letters.yaml --parallel ddp"),
        ([], "5", "batch_size 48 is not allowed: must be a multiple of the 5"),
        (["--jobs", "2"], None, "--jobs 2 is not allowed with --parallel"),
        (["--executor", "ray"], None, "--executor ray is not allowed with --parallel"),
        (["--device", "cuda:0"], "2", "--device cuda:0 is not allowed"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    letters, capsys, monkeypatch, options, size, message
):
    monkeypatch.delenv("RANK", raising=False)
    if size is not None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", size)
    assert cli.main(["paper", "run", "letters.yaml", "--parallel", "ddp", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()
