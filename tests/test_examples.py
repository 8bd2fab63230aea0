"""Every example runs, in a short form, with what its first line says to install."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
GALLERY = ROOT / "examples" / "gallery.py"  # it makes a page and is not one to begin with
DEEPSPEED = ROOT / "examples" / "deepspeed_digits.py"  # DeepSpeed compiles when it first starts
FRAMEWORKS = ("accelerate", "datasets", "deepspeed", "lightning", "timm", "transformers", "trl")
EXTRAS = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def identify(path):
    return path.stem


@pytest.mark.parametrize("path", EXAMPLES, ids=identify)
def test_an_example_is_short_and_says_first_what_to_install(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80 or path == GALLERY
    pip, install, package, *_ = shlex.split(lines[0].removeprefix("# "))
    assert (pip, install) == ("pip", "install")
    assert re.fullmatch(r"normwise(\[[\w,]+\])?", package)
    assert set(re.findall(r"\w+", package)) - {"normwise"} <= set(EXTRAS)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=[pytest.mark.slow] if p in (GALLERY, DEEPSPEED) else [])
        for p in EXAMPLES
    ],
    ids=identify,
)
def test_an_example_runs(path, tmp_path, monkeypatch, capsys):
    code = path.read_text(encoding="utf-8")
    for package in ("sklearn", "tensorboard", "matplotlib", *FRAMEWORKS):
        if re.search(rf"^(from|import) {package}\b", code, re.MULTILINE):
            # A RuntimeError is timm's, beside a torchvision that does not fit torch.
            wrong = (ImportError, RuntimeError)
            pytest.importorskip(package, reason="the example is of it", exc_type=wrong)
    if "torchrun" in code:  # alone, as torchrun would start it
        started = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in started.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "3"])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def train_with_lightning(example, model, steps, folder):
    example["train"](model, steps, folder)


def train_with_accelerate(example, model, steps, folder):
    example["train"](model, steps)


def falling(optimizer, steps):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)


@pytest.mark.parametrize(
    ("package", "train", "schedule"),
    [("lightning", train_with_lightning, falling), ("accelerate", train_with_accelerate, None)],
)
def test_an_example_trains_as_a_plain_loop_with_the_same_groups(package, train, schedule, tmp_path):
    for needed in ("sklearn", package):
        pytest.importorskip(needed, reason="the example is of it")
    example = runpy.run_path(str(ROOT / "examples" / f"{package}_digits.py"))
    steps = 3
    expected = example["network"]()
    optimizer = example["optimizer_for"](expected)
    scheduler = schedule(optimizer, steps) if schedule else None
    for images, labels in example["batches"](steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(expected(images), labels).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    trained = example["network"]()
    train(example, trained, steps, tmp_path)
    torch.testing.assert_close(trained.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_the_sharded_example_runs_on_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "examples" / "fsdp2.py"), "--steps", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "view layer" in done.stdout
