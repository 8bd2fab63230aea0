"""Trainings in stages: rows of a finished classifier rescaled, classes that come one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from normwise.lab.data.images import Labelled
from normwise.lab.errors import UsageError
from normwise.lab.recipes import RecipeCell, find, read
from normwise.lab.report.runs import picture
from normwise.lab.running.cell import run_cell
from normwise.lab.running.executors import run_cells
from normwise.lab.running.results import read_cells, tables
from normwise.lab.running.trainer import CHECKPOINT
from normwise.lab.tasks.incremental import Incremental, distillation, herded
from normwise.lab.tasks.kinds import kind
from normwise.lab.tasks.long_tail import long_tailed

ROOT = Path("no data is needed")
DIGITS = {"data": "digits", "network": "resnet8", "width": 4, "shrink": 1, "augment": ()}
QUICK = {"batch_size": 16, "autocast": "none", "evaluate_every": 1}


def cells(name: str, epochs: int = 2, **options: Any) -> dict[str, RecipeCell]:
    """The first seed of a recipe on digits, trainings shortened."""
    made = {}
    for cell in find(name).cells("small", seeds=1):
        training = replace(cell.training, **QUICK)
        if training.epochs:
            training = replace(training, epochs=epochs)
        changed = {**DIGITS, "train_examples": None, "test_examples": 300, **options}
        made[cell.method] = replace(
            cell, training=training, options=replace(cell.options, **changed)
        )
    return made


def weights(out: Path, cell: RecipeCell) -> dict[str, torch.Tensor]:
    state = torch.load(out / cell.folder / CHECKPOINT, weights_only=True)
    model: dict[str, torch.Tensor] = state["model"]
    return model


# Long tails


def test_class_i_keeps_n_times_the_factor_to_the_minus_i_over_k_minus_one() -> None:
    labels = np.repeat(np.arange(100), 500)
    images = np.zeros((len(labels), 1, 1, 1), np.uint8)
    data = Labelled("made", images, labels, images, labels, tuple(map(str, range(100))))
    counts = np.bincount(long_tailed(data, 100).train_labels)
    assert counts.tolist() == [math.floor(500 * 100 ** (-i / 99) + 1e-9) for i in range(100)]
    assert (counts[0], counts[-1], counts.sum()) == (500, 5, 10847)
    # The published split of classes into many, medium and few.
    groups = (counts > 100).sum(), ((counts >= 20) & (counts <= 100)).sum(), (counts < 20).sum()
    assert groups == (35, 35, 30)


@pytest.fixture(scope="module")
def long_tail(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, RecipeCell], Any]:
    """Every method of the long tails' recipe, trained."""
    out = tmp_path_factory.mktemp("long-tail")
    made = cells("long-tail", 1, imbalance=10.0, rare=30)
    # The methods that start from others stand first, and are run last.
    order = sorted(made.values(), key=lambda c: c.start is None)
    results = run_cells(order, out, ROOT)
    return out, made, {c.method: r for c, r in zip(order, results, strict=True)}


def test_what_starts_from_a_training_begins_with_its_weights(
    long_tail: tuple[Path, dict[str, RecipeCell], Any],
) -> None:
    out, made, results = long_tail
    assert all(r["status"] == "ok" for r in results.values())
    first = weights(out, made["decay"])
    head = [name for name in first if name.endswith("weight")][-1].removesuffix("weight")
    ended = weights(out, made["max-norm"])
    moved = {n for n, w in ended.items() if not torch.equal(w, first[n])}
    # Only the classifier is trained, and no batch statistic moves.
    assert moved == {f"{head}weight", f"{head}bias"}
    length, before = ended[f"{head}weight"].norm(dim=1), first[f"{head}weight"].norm(dim=1)
    radius = before.min() + 0.1 * (before.max() - before.min())
    assert length.max() <= radius * (1 + 1e-6)


def test_accuracy_of_all_is_that_of_the_groups_weighed_by_their_sizes(
    long_tail: tuple[Path, dict[str, RecipeCell], Any],
) -> None:
    _, made, results = long_tail
    problem = kind("long_tail").build(made["ce"].options, ROOT, torch.device("cpu"))
    counts = problem.counts[problem.data.test_labels]
    sizes = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    for result in results.values():
        mean = sum(result["metrics"][n] * float(s.double().mean()) for n, s in sizes.items())
        assert mean == pytest.approx(result["metrics"]["accuracy"])
    # An untrained rescaling of rows changes what is predicted and nothing else.
    assert results["decay-tau-1"]["metrics"] != results["decay"]["metrics"]


def test_every_metric_of_a_row_can_be_drawn(
    long_tail: tuple[Path, dict[str, RecipeCell], Any],
) -> None:
    out, made, _ = long_tail
    found = tables(read_cells([out]))
    charts = picture(found, ["medium", "few"]).charts
    assert [len(c.lines) for c in charts] == 2 * [len(made)]
    assert charts[0].title != charts[1].title


def test_a_method_is_refused_before_the_one_that_it_starts_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not finished, and this method starts from it"):
        run_cell(cells("long-tail")["decay-align"], tmp_path, ROOT)


RECIPE = """
schema: 1
id: mine
title: Mine
question: Which?
task: classification
paper: {source: none, metric: accuracy}
methods:
  first: {label: first, settings: {}}
  second: {label: second, start: first, settings: {epochs: 0}}
settings: {data: digits, network: resnet8, batch_size: 64, optimizer: sgd, lr: 0.1, epochs: 1}
scales:
  paper: {settings: {}, rows: {digits: {}}}
  small: {settings: {}, rows: {digits: {}}}
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("start: first", "start: frist", "did you mean 'first'"),
        ("start: first, ", "", "epochs 0 is not allowed"),
        ("{label: first,", "{label: first, start: second,", "which starts from another itself"),
        ("epochs: 1}", "epochs: 1, cycles: 0}", "cycles 0 is not allowed"),
        ("epochs: 1}", "epochs: 1, awp_gamma: -1}", "awp_gamma -1.0 is not allowed"),
        ("epochs: 1}", "epochs: 1, awp_view: rows}", "choose from layer, slices"),
    ],
)
def test_a_start_that_cannot_be_is_an_error_of_the_recipe(old: str, new: str, words: str) -> None:
    assert [c.start for c in read(RECIPE, "mine").cells("small", 1)] == [None, "first"]
    with pytest.raises(UsageError, match=words):
        read(RECIPE.replace(old, new, 1), "mine")


def test_a_schedule_of_several_cycles_is_the_schedule_of_each() -> None:
    training = replace(cells("class-incremental")["aligned"].training, warmup=0.25, cycles=3)
    once = replace(training, cycles=1)
    assert [training.factor(t, 60) for t in range(60)] == pytest.approx(
        3 * [once.factor(t, 20) for t in range(20)]
    )


# Classes that come in groups


def incremental(**options: Any) -> dict[str, RecipeCell]:
    chosen = {"group_epochs": 1, "group_examples": 40, "memory": 32, **options}
    return cells("class-incremental", epochs=5, **chosen)


def test_an_interrupted_incremental_run_ends_in_the_same_bits(
    assert_resumes: Callable[..., None],
) -> None:
    """Cut within the third group: the teacher, the rows and the memory come from the checkpoint."""
    cell = incremental(kept="herding")["aligned"]
    assert_resumes(cell, ROOT, Incremental, 22, lambda: torch.rand(7))


def test_only_classes_seen_and_kept_examples_are_trained_on() -> None:
    problem = Incremental(incremental()["aligned"].options, ROOT, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    for group in range(5):
        problem.model.epoch.fill_(group)
        steps = problem.batches(16, draw)
        assert len(steps) == problem.examples // 16
        places = problem.train_places[steps.flatten()]
        counts = torch.bincount(places, minlength=10)
        assert (counts[2 * group + 2 :] == 0).all()
        assert (counts[2 * group : 2 * group + 2] > 0).all()
        for place in range(2 * group):
            members = steps.flatten()[places == place]
            assert len(members.unique()) <= 32 // (2 * group)


def test_each_herded_example_brings_the_mean_nearest_and_none_is_taken_twice() -> None:
    """Against every candidate of every turn; all of them together are the class."""
    rows = torch.randn(9, 4, dtype=torch.float64)
    unit = rows / rows.norm(dim=1, keepdim=True)
    order = herded(rows, 9)
    assert sorted(order.tolist()) == list(range(9))
    for k in range(9):
        left = [i for i in range(9) if i not in order[:k].tolist()]
        means = torch.stack([unit[[*order[:k].tolist(), i]].mean(0) for i in left])
        assert order[k] == left[int((means - unit.mean(0)).norm(dim=1).argmin())]
    assert torch.equal(herded(7 * rows, 4), order[:4])


def test_herding_keeps_what_the_network_at_the_end_of_a_group_reads_as_typical() -> None:
    problem = Incremental(incremental(kept="herding")["aligned"].options, ROOT, torch.device("cpu"))
    before = problem.model.kept.clone()
    problem.end_epoch()
    seen: list[torch.Tensor] = []
    problem._head().register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    problem.model.eval()
    for place in range(2):
        members = problem.members[place]
        problem.model(problem.standardized(problem.data.train[members]))
        assert torch.equal(problem.model.kept[place], members[herded(seen[-1], 16)])
    assert not torch.equal(problem.model.kept[:2], before[:2])
    assert torch.equal(problem.model.kept[2:], before[2:])
    pool = problem.batches(16, torch.Generator().manual_seed(0)).flatten()
    old = pool[problem.train_places[pool] < 2].unique()
    assert set(old.tolist()) <= set(problem.model.kept[:2].flatten().tolist())


def test_alignment_gives_new_rows_the_mean_norm_of_the_old(tmp_path: Path) -> None:
    made = incremental()
    for method, cell in made.items():
        run_cell(cell, tmp_path, ROOT)
        state = weights(tmp_path, cell)
        name = [n for n in state if n.startswith("network.") and n.endswith("weight")][-1]
        length = state[name].norm(dim=1)
        # Not alone aligned at the end: the last group is trained from aligned rows.
        equal = length[8:].mean().item() == pytest.approx(length[:8].mean().item(), rel=1e-5)
        assert equal == (method == "aligned")
        assert all(state[n].equal(state["teacher" + n[7:]]) for n in state if n[:8] == "network.")


def test_distillation_is_least_at_the_teacher_where_it_is_its_entropy() -> None:
    teacher = torch.randn(5, 4, dtype=torch.float64)
    shares = F.softmax(teacher / 2, dim=1)
    entropy = -(shares * shares.log()).sum(1).mean()
    assert distillation(teacher, teacher, 2.0).item() == pytest.approx(entropy.item())
    at = teacher.clone().requires_grad_()
    (g,) = torch.autograd.grad(distillation(at, teacher, 2.0), at)
    assert g.abs().max() < 1e-15


# Steps at perturbed weights, and copies that are trained on


def test_awp_steps_are_taken_at_perturbed_weights_of_the_same_attacked_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each step attacks once and computes two losses of what it found."""
    from normwise.lab.tasks.adversarial import Adversarial

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    attacks = []
    loss, prepared = Adversarial.loss, Adversarial.prepared

    def noted(self: Any, batch: Any) -> torch.Tensor:
        rows = next(p for p in self.model.parameters() if p.ndim > 1)
        seen.append((batch[0].detach().clone(), rows.detach().clone()))
        return loss(self, batch)

    def counted(self: Any, batch: Any) -> Any:
        attacks.append(batch)
        return prepared(self, batch)

    data = Labelled(
        "made",
        np.random.default_rng(0).integers(0, 256, (32, 3, 8, 8)).astype(np.uint8),
        np.arange(32) % 4,
        np.zeros((8, 3, 8, 8), np.uint8),
        np.arange(8) % 4,
        tuple("abcd"),
    )
    monkeypatch.setattr(Adversarial, "labelled", staticmethod(lambda options, root: data))
    monkeypatch.setattr(Adversarial, "loss", noted)
    monkeypatch.setattr(Adversarial, "prepared", counted)
    (cell,) = find("awp-slices").cells("small", 1, ["slices-0.01"])
    own = replace(cell.options, train_examples=32, test_examples=8, shrink=1, width=4)
    cell = replace(
        cell, options=own, training=replace(cell.training, epochs=1, batch_size=16, autocast="none")
    )
    assert run_cell(cell, tmp_path, ROOT)["status"] == "ok"
    assert len(attacks) == 2
    steps = seen[-4:]  # before them the network is analyzed
    for (x, w), (again, moved) in (steps[:2], steps[2:]):
        assert torch.equal(x, again)
        shift = (moved - w).flatten(1).norm(dim=1) / w.flatten(1).norm(dim=1)
        torch.testing.assert_close(shift, torch.full_like(shift, 0.01), rtol=1e-3, atol=0)


def test_the_probe_leaves_the_run_as_it_would_have_been(tmp_path: Path) -> None:
    found = {}
    for probes in (1, 3):
        made = cells("loss-stabilization", 1, probe_epochs=probes, train_examples=256)
        cell = made["large-decay"]
        result = run_cell(cell, tmp_path / str(probes), ROOT)
        found[probes] = result
        assert result["metrics"]["settled_loss"] < result["metrics"]["running_loss"]
    assert found[1]["weights"] == found[3]["weights"]
    assert found[1]["metrics"]["running_loss"] == found[3]["metrics"]["running_loss"]
