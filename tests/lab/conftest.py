"""Metrics made by hand, for tests that need no training; and one that cuts a training off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from normwise.lab.digits import Choice
from normwise.lab.recipes import RecipeCell
from normwise.lab.running.cell import run_cell
from normwise.lab.tasks.problem import Problem

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def record() -> Make:
    """Makes a record of metrics; what matters to a test is given, the rest is plausible."""

    def make(optimizer: str, seed: int = 0, epoch: int = 1, **given: Any) -> dict[str, Any]:
        growth = given.get("norm_growth", 1.0)
        power = 2 if optimizer in ("sgd", "sgdp") else 1
        return {
            "status": "ok",
            "optimizer": optimizer,
            "seed": seed,
            "epoch": epoch,
            "step": 10 * epoch,
            "lr": 0.1,
            "train_loss": None if epoch == 0 else 0.5,
            "test_accuracy": 0.9,
            "test_errors": [],
            "norm": growth,
            "norm_growth": growth,
            "effective_lr": 0.1 / growth**power,
            "relative_effective_lr": 1 / growth**power,
            "angular_update": None if epoch == 0 else 0.01,
            "step_ms": None if epoch == 0 else 2.0,
            "optimizer_ms": None if epoch == 0 else 0.5,
            **given,
        }

    return make


@pytest.fixture
def failure() -> Make:
    """Makes the record of a run that diverged."""

    def make(optimizer: str, seed: int = 0, epoch: int = 1) -> dict[str, Any]:
        return {
            "status": "failed",
            "optimizer": optimizer,
            "seed": seed,
            "epoch": epoch,
            "step": 7,
            "error": "the training loss became nan",
        }

    return make


@pytest.fixture
def run() -> dict[str, Any]:
    """The content of a ``run.json``."""
    return {
        "schema": 1,
        "status": "complete",
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 1.5,
        "command": "normwise compare --task digits --optimizers sgd,sgdp --seeds 2 --epochs 2",
        "settings": Choice(optimizers=("sgd", "sgdp"), seeds=2, epochs=2).settings(),
        "methods": [
            {"name": "sgd", "label": "SGD", "update": "gradient", "baseline": None},
            {"name": "sgdp", "label": "SGDP", "update": "gradient", "baseline": "sgd"},
        ],
        "task": {
            "title": "handwritten digits",
            "source": "a book",
            "train_examples": 898,
            "test_examples": 899,
            "steps_per_epoch": 14,
        },
        "environment": {
            "versions": {"normwise": "0.1.0"},
            "system": "Linux",
            "processor": "a processor",
            "cores": 2,
            "threads": 1,
        },
    }


class Cut(BaseException):
    """Ends a training, as a signal would."""


@pytest.fixture
def assert_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """That a cell which is cut at a step, and goes on, ends in the bits of one that is not cut."""

    def check(
        cell: RecipeCell, root: Path, problem: type[Problem], at: int, between: Callable[[], object]
    ) -> None:
        whole = run_cell(cell, tmp_path / "whole", root)
        assert whole["status"] == "ok"
        loss, calls = problem.loss, list[Any]()

        def cut(self: Problem, batch: Any) -> Tensor:
            calls.append(batch)
            if len(calls) == at:
                raise Cut
            return loss(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(problem, "loss", cut)
            with pytest.raises(Cut):
                run_cell(cell, tmp_path / "parts", root, checkpoint_seconds=0)
        between()
        assert run_cell(cell, tmp_path / "parts", root) == whole
        one, two = (
            (tmp_path / x / cell.folder / "metrics.jsonl").read_bytes() for x in ("whole", "parts")
        )
        assert one == two

    return check
