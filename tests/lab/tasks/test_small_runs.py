"""The tasks on real data: a run that is interrupted ends in the same bits, and learns something."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from normwise.lab.recipes import RecipeCell, find
from normwise.lab.running.cell import run_cell
from normwise.lab.tasks.kinds import kind

# The recipe, and what makes a cell of it small enough to be trained in seconds.
TINY: dict[str, dict[str, Any]] = {
    "adamp-adversarial": {"train_examples": 64, "test_examples": 50, "attack_steps": 1},
    "adamp-biased-mnist": {"train_examples": 64, "test_examples": 50},
    "adamp-retrieval": {"train_classes": 4, "test_classes": 4},
    "adamp-detection": {"scale": 0.1, "width": 4},
}
NEEDS = {"adamp-retrieval": "pytorch_metric_learning", "adamp-detection": "pycocotools"}
# By how much the first row's first metric exceeds the task's baseline.
MARGIN = {
    "adamp-adversarial": 0.10,
    "adamp-biased-mnist": 0.15,
    "adamp-retrieval": 0.15,
    "adamp-detection": 0.25,
}


def tiny(name: str) -> RecipeCell:
    cell = find(name).cells("small", seeds=1, methods=["adamp"])[0]
    training = replace(cell.training, epochs=2, batch_size=16, evaluate_every=2)
    pytest.importorskip(NEEDS.get(name, "torch"), reason="the task is judged or trained by it")
    return replace(cell, training=training, options=replace(cell.options, **TINY[name]))


@pytest.fixture
def root() -> Path:
    if "NORMWISE_DATA" not in os.environ:
        pytest.skip("NORMWISE_DATA does not name a folder with the data sets")
    return Path(os.environ["NORMWISE_DATA"])


@pytest.mark.parametrize(
    "name",  # detection resumes daily on boxes that are made, in tests/lab/data/test_boxes.py
    [pytest.param(n, marks=[pytest.mark.slow] * (n == "adamp-detection")) for n in TINY],
)
def test_an_interrupted_run_ends_in_the_same_bits(
    name: str, root: Path, assert_resumes: Callable[..., None]
) -> None:
    """What happens in between to torch's generator does not matter."""
    cell = tiny(name)
    problem = type(kind(cell.task).build(cell.options, root, torch.device("cpu")))
    assert_resumes(cell, root, problem, 4, lambda: torch.rand(7))


@pytest.mark.parametrize("name", TINY)
def test_two_tests_in_a_row_agree_and_leave_the_network_as_it_was(name: str, root: Path) -> None:
    cell = tiny(name)
    problem = kind(cell.task).build(cell.options, root, torch.device("cpu"))
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    first = problem.evaluate()
    assert problem.evaluate() == first
    after = problem.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert set(first.metrics) == {metric.name for metric in kind(cell.task).metrics}
    assert set(problem.baseline) == set(first.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGIN)
def test_at_small_scale_it_learns_more_than_the_baseline(
    name: str, root: Path, tmp_path: Path
) -> None:
    recipe = find(name)
    row = next(iter(recipe.scales["small"].rows))
    (cell,) = recipe.cells("small", seeds=1, methods=["adamp"], rows=[row])
    result = run_cell(cell, tmp_path, root)
    metric = kind(cell.task).metrics[0].name
    assert result["metrics"][metric] > result["baseline"][metric] + MARGIN[name]
