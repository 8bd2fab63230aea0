"""What a stranger touches to add a task (two files), a data set (two) or a recipe (one)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import normwise.lab
from normwise.lab.data.catalogue import CATALOGUE, Source
from normwise.lab.data.images import Labelled
from normwise.lab.recipes import ids, read
from normwise.lab.running.cell import run_cell
from normwise.lab.tasks import classification, kinds
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

LAB = Path(normwise.lab.__file__).parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in LAB.rglob("*.py")}

RECIPE = """
schema: 1
id: mine
title: Mine
question: Does it run?
task: {task}
paper: {{source: none, metric: none}}
methods: {{sgd: {{label: SGD, settings: {{}}}}}}
settings: {{optimizer: sgd, lr: 0.1, batch_size: 8, epochs: 1, {settings}}}
scales:
  paper: {{settings: {{}}, rows: {{row: {{}}}}}}
  small: {{settings: {{}}, rows: {{row: {{}}}}}}
"""


def run(tmp_path, task, settings):
    (cell,) = read(RECIPE.format(task=task, settings=settings), "mine.yaml").cells("small", 1)
    return run_cell(cell, tmp_path, tmp_path)


@dataclass(frozen=True)
class RegressionOptions:
    width: int = 2


class Regression(Problem):
    def __init__(self, options, root, device):
        self.x = torch.linspace(-1, 1, 32)[:, None]
        self.model = nn.Sequential(nn.Linear(1, options.width), nn.Linear(options.width, 1))
        self.examples, self.facts, self.baseline = 32, {"test_examples": 32}, {"error": 0.33}

    def batch(self, chosen, draw):
        return self.x[chosen]

    def loss(self, batch):
        return (self.model(batch) - batch).square().mean()

    @torch.no_grad()
    def evaluate(self):
        return Evaluation({"error": float(self.loss(self.x))})


def test_a_task_is_its_module_and_a_line(tmp_path, monkeypatch):
    module = ModuleType("normwise.lab.tasks.regression")
    module.Regression, module.RegressionOptions = Regression, RegressionOptions
    module.METRICS = (Metric("error", "squared error", higher_is_better=False),)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(kinds.KINDS, "regression", ("regression", "Regression"))
    result = run(tmp_path, "regression", "width: 3")
    assert result["status"] == "ok"
    assert 0 < result["metrics"]["error"] < 1


@pytest.mark.parametrize("task", sorted(set(kinds.KINDS) - {"classification"}))
def test_only_two_files_know_a_task(task):
    module, name = kinds.KINDS[task]
    marks = f"tasks.{module} import", f'("{module}", "{name}")', f"class {name}("
    known = [p.name for p, text in SOURCES.items() if any(mark in text for mark in marks)]
    assert sorted(known) == sorted([f"{module}.py", "kinds.py"])


def test_a_data_set_is_its_reader_and_an_entry(tmp_path, monkeypatch):
    def noise(root):
        images = np.random.default_rng(0).random((16, 1, 8, 8), dtype=np.float32)
        labels = np.arange(16) % 2
        return Labelled("noise", images, labels, images, labels, ("a", "b"))

    module = ModuleType("normwise.lab.data.noises")
    module.noise = noise
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = replace(next(iter(CATALOGUE.values())), name="noise", labelled="noises:noise")
    assert isinstance(source, Source)
    monkeypatch.setitem(CATALOGUE, "noise", source)
    settings = "data: noise, network: resnet8, width: 2"
    assert run(tmp_path, "classification", settings)["facts"]["data"] == "noise"


# Other tests add data sets of their own.
BUILT_IN = [
    source
    for source in CATALOGUE.values()
    if source.labelled and f'"{source.name}"' in SOURCES[LAB / "data" / "catalogue.py"]
]


@pytest.mark.parametrize("source", BUILT_IN, ids=lambda s: s.name)
def test_no_file_but_the_catalogue_lists_the_data_sets(source):
    listed = [p.name for p, text in SOURCES.items() if f'"{source.labelled}"' in text]
    assert listed == ["catalogue.py"]
    assert source.name in classification.data_sets()


@pytest.mark.parametrize("recipe", ids())
def test_a_recipe_is_one_file(recipe):
    files = [p for p in LAB.rglob("*") if p.suffix in (".py", ".yaml")]
    known = [p.name for p in files if f"id: {recipe}\n" in p.read_text(encoding="utf-8")]
    assert known == [f"{recipe}.yaml"]
