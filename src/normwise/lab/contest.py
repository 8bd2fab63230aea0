"""The user's own problem: every optimizer at its own best, on every seed, and what that says."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.decay import Cautious
from normwise.figures.tables import Table
from normwise.geometry import View
from normwise.lab.checks import within
from normwise.lab.data.files import data_root
from normwise.lab.data.own import fingerprint
from normwise.lab.digits import default_folder
from normwise.lab.errors import UsageError
from normwise.lab.imports import place
from normwise.lab.methods import Inspected, Method, Setting
from normwise.lab.optimizers import OptimizerSpec, parse
from normwise.lab.parallel import ALONE, Processes
from normwise.lab.recipes import Recipe, RecipeCell, Training, read
from normwise.lab.recipes.schema import MOST_SEEDS
from normwise.lab.running.cell import check_device
from normwise.lab.running.events import Observer, Planned, ignore
from normwise.lab.running.executors import check_trust, run_cells
from normwise.lab.running.invariant import Analyzed, invariant_views
from normwise.lab.running.pace import Pace, fitted, pace
from normwise.lab.running.prepare import make_optimizer
from normwise.lab.running.results import RECIPE, Done, ResultTable, read_cells, tables
from normwise.lab.store import write_atomically
from normwise.lab.tasks.kinds import is_own, kind
from normwise.lab.tasks.own import give, metrics_of
from normwise.lab.tasks.problem import Metric, Problem
from normwise.lab.trust import is_code, is_library, source_hash, trusting
from normwise.updates import Coupling, Update, UpdateRule, describe

__all__ = ["OPTIMIZERS", "Contest", "Result", "compare"]

OPTIMIZERS = ("sgd", "sgdp", "adamw", "adamp")
FINAL, SWEEP, ROW, RUN, SUMMARY = "paper", "sweep", "own", "run.json", "summary.json"
HELD_OUT = 0.1
# Radians per step of weights on spheres, whose learning rate is an angle.
_ANGLE = 0.01
_LABELS = {"sgd": "SGD", "sgdp": "SGDP", "adam": "Adam", "adamw": "AdamW", "adamp": "AdamP"}
_BASELINES = {"sgdp": "sgd", "adamp": "adamw"}

Choices = float | Sequence[float] | None


@dataclass(frozen=True)
class Result:
    """What came of a comparison.

    Args:
        folder: where its files are.
        headline: the answer in a sentence.
        summary: the content of ``summary.json``.
        tables: the numbers, one table for each metric, the first above all.
        table: all of them, the best method first, as it is shown.
    """

    folder: Path
    headline: str
    summary: dict[str, Any]
    tables: list[ResultTable]
    table: Table

    @property
    def failures(self) -> list[str]:
        """The trainings that diverged or could not go on, in words."""
        return [
            f"{cell.config['method']}, seed {cell.config['seed']}: "
            + ("not finished" if cell.result is None else str(cell.result["error"]))
            for cell in self.tables[0].cells
            if cell.result is None or cell.result["status"] != "ok"
        ]


def compare(
    problem: Any,
    *,
    optimizers: Sequence[str] = OPTIMIZERS,
    lr: Choices = None,
    weight_decay: Choices = None,
    seeds: int = 3,
    epochs: int | None = None,
    batch_size: int | None = None,
    data: str = "",
    size: int | None = None,
    network: Mapping[str, Any] = MappingProxyType({}),
    budget: float | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    executor: str = "local",
    device: str = "cpu",
    observe: Observer = ignore,
) -> Result:
    """Compare optimizers on a network and data of your own.

    Args:
        problem: what :func:`normwise.lab.supervised` made, a function that makes one, or the name
            of either, ``"MODULE:FACTORY"``; or, with ``data``, a network: ``"hf:MODEL"``,
            ``"timm:NAME"``, ``"mlp:64x64"``, or a ``"MODULE:FACTORY"`` that makes one.
        optimizers: any of sgd, sgdp, adam, adamw, adamp; ``"torch:CLASS"``; ``"MODULE:FACTORY"``, a
            function of parameter groups and ``lr``; ``"tangential(…)"`` or ``"sphere(…)"`` around
            one of these; and any of these with its decay changed, ``"sgd+early(0.33)"``.
        lr: learning rates, of which every method takes its own best on held-out data (default: one
            for each method: 0.1 for gradient steps, 0.001 for others).
        weight_decay: the same (default: 0.01 where decay is decoupled, else 0.0001).
        seeds: how many; they are 0, 1, 2, … (default: 3).
        epochs: passes over the training data (default: the problem's).
        batch_size: examples per step (default: the problem's).
        data: ``"csv:FILE:TARGET"``, ``"folder:PATH"`` or ``"text:FILE"`` (default: the problem's).
        size: of these, pixels a side or tokens a sequence (default: 32, and 64).
        network: arguments of the network, or fields of its configuration (default: none).
        budget: seconds that all may take; epochs and seeds are lowered to fit (default: any).
        out: the output folder; one of the same comparison is gone on with (default: under
            ``runs``, the one that the same comparison did not finish, or a new one).
        jobs: trainings at once (default: 1).
        executor: ``"local"``, or ``"ray"`` for an existing Ray cluster (default: local).
        device: where to compute (default: ``"cpu"``).
        observe: called with what happens (default: nothing is).

    Returns:
        The folder with the report, its first sentence, and the numbers.

    Raises:
        UsageError: if the problem, an optimizer or a setting is not allowed.
    """
    contest = Contest(
        task=_task(problem),
        optimizers=tuple(optimizers),
        lrs=_listed(lr),
        weight_decays=_listed(weight_decay),
        seeds=seeds,
        epochs=epochs,
        batch_size=batch_size,
        device=device,
        data=data,
        size=size,
        network=dict(network),
        budget=budget,
    )
    folder = None if out is None else Path(out)
    return contest.run(folder, jobs=jobs, executor=executor, observe=observe)


def _task(problem: Any) -> str:
    if isinstance(problem, str):
        return problem if is_library(problem) else place(problem)
    name = getattr(problem, "__name__", "") or getattr(problem, "name", "") or "problem"
    module = getattr(problem, "__module__", "__main__")
    if callable(problem) and module != "__main__" and name.isidentifier():
        import sys

        found = getattr(sys.modules.get(module), name, None)
        file = getattr(sys.modules.get(module), "__file__", None)
        if found is problem and file:
            return f"{module}:{name}"
    return give(re.sub(r"\W", "_", name), problem)


def _listed(value: Choices) -> tuple[float, ...]:
    if value is None:
        return ()
    return tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),)


@dataclass(frozen=True)
class Contest:
    """A comparison on the user's own problem, looked at before anything is trained.

    Args:
        task: ``MODULE:FACTORY``, or the name of an object that was given.
        optimizers: names as :func:`normwise.lab.optimizers.parse` reads them.
        lrs, weight_decays: to choose from (default: one that is usual).
        lrs_gradient, lrs_other: the same for methods whose steps are as long as the gradient, and
            for all others (default: ``lrs``).
        seeds: how many.
        epochs, batch_size: (default: the problem's).
        device: where to compute.
        data: what a network learns, by name (default: the problem's own).
        size: of the data, pixels a side or tokens a sequence (default: the data's).
        network: arguments of the network, or fields of its configuration.
        budget: seconds that all may take (default: any).
    """

    task: str
    optimizers: tuple[str, ...] = OPTIMIZERS
    lrs: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()
    lrs_gradient: tuple[float, ...] = ()
    lrs_other: tuple[float, ...] = ()
    seeds: int = 3
    epochs: int | None = None
    batch_size: int | None = None
    device: str = "cpu"
    data: str = ""
    size: int | None = None
    network: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    trust: frozenset[str] = field(default=frozenset())

    def __post_init__(self) -> None:
        if not is_own(self.task):
            raise UsageError(f"{self.task!r} is no MODULE:FACTORY")
        if not self.optimizers:
            raise UsageError("no optimizer given")
        if type(self.seeds) is not int or not 1 <= self.seeds <= MOST_SEEDS:
            raise UsageError(f"{self.seeds} seeds are not allowed: must be from 1 to {MOST_SEEDS}")
        within(self, "budget", 0, above=True)
        modules = {name.partition(":")[0] for name in self._code}
        object.__setattr__(self, "trust", frozenset(modules))
        check_device(self.device)
        _ = self.methods

    @cached_property
    def _code(self) -> list[str]:
        """The user's functions that are called, ``MODULE:FACTORY``."""
        named = [self.task, *(c.code or "" for c in self._specs)]
        return [name for name in named if is_code(name)]

    @cached_property
    def _specs(self) -> tuple[OptimizerSpec, ...]:
        found = tuple(parse(text) for text in self.optimizers)
        for spec in found:
            if found.count(spec) > 1:
                raise UsageError(f"optimizer {str(spec)!r} is listed twice; list each once")
        return found

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Settings of a training that all methods share."""
        given = {"epochs": self.epochs, "batch_size": self.batch_size}
        usual = {"epochs": 10, "batch_size": 32, "schedule": "cosine", "warmup": 0.0}
        own = getattr(self._problem, "defaults", {})
        given = {k: v for k, v in given.items() if v is not None}
        return {**usual, **own, **given, **self._of_data}

    @cached_property
    def _of_data(self) -> dict[str, Any]:
        given = {"data": self.data, "size": self.size, "set": dict(self.network)}
        return {k: v for k, v in given.items() if v}

    @cached_property
    def _problem(self) -> Problem:
        with trusting(self.trust), torch.random.fork_rng():
            torch.manual_seed(0)
            own = kind(self.task)
            options = own.options(**self._of_data)
            return own.build(options, data_root(), torch.device(self.device))

    @cached_property
    def inspected(self) -> Inspected:
        """The problem, after a batch of it has been through the network."""
        problem, size = self._problem, self.defaults["batch_size"]
        metrics = metrics_of(problem)
        if size > problem.examples:
            raise UsageError(
                f"batch size {size} is not allowed: there are {problem.examples} training examples"
            )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                chosen = problem.batches(size, torch.Generator().manual_seed(0))[0]
                problem.model.train()
                loss = problem.loss(problem.batch(chosen, torch.Generator().manual_seed(0)))
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
                value = float(loss.detach())
                problem.model.zero_grad()
            except UsageError:
                raise
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                raise UsageError(
                    f"the first batch of {self.task!r} fails: {type(error).__name__}: {lines[0]}"
                ) from error
            if not math.isfinite(value):
                raise UsageError(f"the loss of the first batch is {value}; must be finite")
            problem.evaluate()
        views, reason, _ = self._analyzed
        params = dict(problem.model.named_parameters())
        trained = [p for p in params.values() if p.requires_grad]
        return Inspected(
            network=type(problem.model).__name__,
            weights=sum(p.numel() for p in trained),
            tensors=len(trained),
            normalizations=sum("Norm" in type(m).__name__ for m in problem.model.modules()),
            invariant={name: (str(view), params[name].numel()) for name, view in views.items()},
            not_analyzed=reason,
            metrics=metrics,
            facts=dict(problem.facts),
        )

    @cached_property
    def _analyzed(self) -> Analyzed:
        with torch.random.fork_rng():
            return invariant_views(self._problem, self.defaults["batch_size"])

    @cached_property
    def methods(self) -> dict[str, Method]:
        """The optimizers, by the names of their folders."""
        _ = self.inspected
        found: dict[str, Method] = {}
        for spec in self._specs:
            rules = tuple(describe(self._made(spec)))
            name = re.sub(r"[^\w.+-]+", "-", str(spec)).strip("-.")
            found[name] = Method(name, _label(spec), spec, rules, self._settings(spec, rules[0]))
        return found

    def _made(self, spec: OptimizerSpec) -> Optimizer:
        """The optimizer on the network, only to be described."""
        problem = self._problem
        # Of some decay, without which a policy has nothing to say.
        training = Training(1, 1, str(spec), lr=1e-3, weight_decay=1e-4)
        views, _, report = self._analyzed
        params = dict(problem.model.named_parameters())
        with trusting(self.trust):
            by_parameter: dict[Tensor, View] = {params[name]: view for name, view in views.items()}
            return make_optimizer(problem.model, training, by_parameter, report)

    def _settings(self, spec: OptimizerSpec, rule: UpdateRule) -> tuple[Setting, ...]:
        gradient = rule.update is Update.GRADIENT
        own = self.lrs_gradient if gradient else self.lrs_other
        lrs = own or self.lrs or ((0.1,) if gradient else (1e-3,))
        if "sphere" in spec.wrappers and not (own or self.lrs):
            lrs = (_ANGLE,)
        decoupled = rule.coupling is Coupling.DECOUPLED or Cautious() in spec.policies
        usual = 1e-2 if decoupled and not gradient else 1e-4
        takes_none = rule.coupling is Coupling.NONE and not spec.decays
        if ("sphere" in spec.wrappers and not spec.decays) or takes_none:
            usual = 0.0
        found = [Setting(*pair) for pair in product(lrs, self.weight_decays or (usual,))]
        return tuple(dict.fromkeys(found))

    @property
    def sweeps(self) -> bool:
        """Whether any method has a choice of settings."""
        return any(len(method.settings) > 1 for method in self.methods.values())

    @property
    def trainings(self) -> int:
        """How many there are in all."""
        swept = sum(len(m.settings) for m in self.methods.values()) if self.sweeps else 0
        return swept + len(self.methods) * self.seeds

    @property
    def name(self) -> str:
        """As a reader sees the problem."""
        return getattr(self._problem, "name", "") or self.inspected.network

    def source(self, chosen: Mapping[str, Setting]) -> str:
        """The comparison as a recipe, in YAML, with the settings that were chosen."""
        import yaml

        rows = {s.row: _written(s) for m in self.methods.values() for s in m.settings}
        content: dict[str, Any] = {
            "schema": 1,
            "id": re.sub(r"[^\w.-]+", "-", self.task).strip("-."),
            "title": self.name,
            "question": f"Which of these optimizers suits {self.name}, and what do norms do to it?",
            "task": self.task,
            "paper": {"source": "none; a network of one's own", "metric": self._metric.title},
            "methods": {name: self._written(m, chosen[name]) for name, m in self.methods.items()},
            "settings": self.defaults,
            "scales": {
                FINAL: {"settings": {}, "rows": {ROW: {}}, "seeds": self.seeds},
                "small": {"settings": {"epochs": 1}, "rows": {ROW: {}}, "seeds": 1},
                SWEEP: {"settings": {"held_out": HELD_OUT}, "rows": rows, "seeds": 1},
            },
        }
        if not self.sweeps:
            del content["scales"][SWEEP]
        return str(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))

    @property
    def _metric(self) -> Metric:
        return self.inspected.metrics[0]

    def _written(self, method: Method, setting: Setting) -> dict[str, Any]:
        spec = method.spec
        inner = str(replace(spec, decays=()) if spec.decays else "")
        if not inner:
            inner = spec.name if spec.wrappers else _BASELINES.get(spec.name, "")
        baseline = re.sub(r"[^\w.+-]+", "-", inner).strip("-.")
        written: dict[str, Any] = {
            "label": method.label,
            "settings": {"optimizer": str(spec), **_written(setting)},
        }
        return {**written, "baseline": baseline} if baseline in self.methods else written

    def run(
        self,
        folder: Path | None = None,
        *,
        jobs: int = 1,
        executor: str = "local",
        observe: Observer = ignore,
        processes: Processes = ALONE,
    ) -> Result:
        """Choose each method's settings, train all seeds, and write the report.

        Args:
            folder: where to; absent, empty, or one of this comparison, which goes on (default:
                under ``runs``, the one that this comparison did not finish, or a new one).
            jobs: trainings at once (default: 1).
            executor: ``local`` or ``ray`` (default: local).
            observe: called with what happens (default: nothing is).
            processes: those that train each network together, each of which calls this (default:
                one alone).

        Raises:
            UsageError: if the folder holds something else, or the budget is too little.
        """
        self._check_where(jobs, executor, processes)
        folder = Path(processes.first(lambda: str(folder or self._unfinished or default_folder())))
        contest = self._planned(folder, jobs, observe) if processes.kind is None else self
        processes.first(lambda: contest._take(folder))
        return contest._run(_Where(folder, jobs, executor, observe, processes))

    def _check_where(self, jobs: int, executor: str, processes: Processes) -> None:
        in_turn = jobs == 1 and executor == "local" and processes.kind is None
        if not self._can_be_found and not in_turn:
            raise UsageError(
                f"several jobs or processes are not allowed: {self.task!r} is an object of this "
                "process; put it into a module and name MODULE:FACTORY"
            )
        if self.budget is not None and processes.kind is not None:
            raise UsageError("--budget goes with one process for a training: leave out --parallel")

    @property
    def _can_be_found(self) -> bool:
        """Whether another process, or this command given again, finds the same problem."""
        return is_code(self.task) or is_library(self.task)

    def _run(self, where: _Where) -> Result:
        first = {name: method.settings[0] for name, method in self.methods.items()}
        swept: list[Done] = []
        if self.sweeps:
            text = self.source(first)
            recipe = read(text, RECIPE)
            swept = self._trained(where, self._sweep_cells(recipe), text)
        chosen = self._chosen(swept) if swept else first
        text = self.source(chosen)
        recipe = read(text, RECIPE)
        done = self._trained(where, recipe.cells(FINAL, self.seeds), text)
        return where.processes.first(
            lambda: self._report(where.folder, text, chosen, swept, tables(done))
        )

    def _sweep_cells(self, recipe: Recipe) -> list[RecipeCell]:
        return [
            cell
            for name, method in self.methods.items()
            for cell in recipe.cells(SWEEP, 1, [name], [s.row for s in method.settings])
        ]

    def _trained(self, where: _Where, cells: Sequence[RecipeCell], text: str) -> list[Done]:
        trust = tuple(self.trust)
        check_trust(cells, trust)
        out = where.folder / "cells"

        def begin() -> None:
            home = out / Path(cells[0].folder).parts[0]
            home.mkdir(parents=True, exist_ok=True)
            write_atomically(home / RECIPE, text.encode())

        where.processes.first(begin)
        run_cells(
            cells,
            out,
            data_root(),
            jobs=where.jobs,
            executor=where.executor,
            device=self.device,
            observe=where.observe,
            processes=where.processes,
            trust=trust,
        )
        return read_cells([out / cell.folder for cell in cells])

    def _planned(self, folder: Path, jobs: int, observe: Observer) -> Contest:
        """This comparison, with as many epochs and seeds as fit into the budget.

        In a folder of the same comparison they are those that it was begun with.
        """
        begun = self._begun(folder)
        if begun is not None:
            return begun
        first = {name: method.settings[0] for name, method in self.methods.items()}
        cells = read(self.source(first), RECIPE).cells(FINAL, 1)
        timed = pace(cells, data_root(), self.device, self.trust)
        at_once = min(jobs, os.cpu_count() or 1)
        epochs = self.defaults["epochs"]

        def cost(seeds: int, epochs: int) -> float:
            return self._with(seeds, epochs)._seconds(timed) / at_once

        seeds = self.seeds
        if self.budget is not None:
            seeds, epochs = fitted(self.budget, self.seeds, epochs, cost)
        less = (("seeds", self.seeds, seeds), ("epochs", self.defaults["epochs"], epochs))
        gave_up = [f"{new} {name} instead of {old}" for name, old, new in less if new != old]
        contest = self._with(seeds, epochs)
        observe(Planned(contest.trainings, cost(seeds, epochs), ", ".join(gave_up)))
        return contest

    def _seconds(self, timed: Pace) -> float:
        return self.trainings * timed.seconds(self.defaults["epochs"])

    def _with(self, seeds: int, epochs: int) -> Contest:
        """The same, inspected already, with other seeds and epochs."""
        new = copy.copy(self)
        new.__dict__.update(
            seeds=seeds,
            asked={"seeds": self.seeds, "epochs": self.epochs, "budget": self.budget},
            defaults={**self.defaults, "epochs": epochs},
        )
        return new

    def _identity(self) -> dict[str, Any]:
        shared = {"seeds": self.seeds, "device": self.device, **self.defaults}
        methods = {
            name: {"optimizer": str(m.spec), "settings": [_written(s) for s in m.settings]}
            for name, m in self.methods.items()
        }
        with trusting(self.trust):
            source = {name: source_hash(name) for name in self._code}
        if self.data:
            source[self.data] = fingerprint(self.data)
        return {
            "schema": 2,
            "task": self.task,
            "asked": self.asked,
            "settings": shared,
            "methods": methods,
            "source": source,
        }

    @cached_property
    def asked(self) -> dict[str, Any]:
        """Seeds, epochs and budget as the user gave them."""
        return {"seeds": self.seeds, "epochs": self.epochs, "budget": self.budget}

    def _begun(self, folder: Path) -> Contest | None:
        """This comparison as a folder has it begun; None if it has not."""
        there = _read_run(folder)
        try:
            contest = self._with(there["settings"]["seeds"], there["settings"]["epochs"])
        except (KeyError, TypeError):
            return None
        return contest if _same(there, contest._identity()) else None

    @property
    def _unfinished(self) -> Path | None:
        """The newest of the usual folders in which this comparison was begun and not ended."""
        if not self._can_be_found:
            return None
        for run in sorted(default_folder().parent.glob(f"compare-*/{RUN}"), reverse=True):
            begun = None if (run.parent / SUMMARY).exists() else self._begun(run.parent)
            source = begun is not None and begun._identity()["source"]
            if begun is not None and _read_run(run.parent).get("source") == source:
                return run.parent
        return None

    def _take(self, folder: Path) -> None:
        """Make the folder, or find that it is this comparison's."""
        identity = json.loads(json.dumps(self._identity()))
        if (folder / RUN).exists():
            same = _same(_read_run(folder), identity)
            if same and self._can_be_found:
                return
            why = "one of an object, whose code may differ" if same else "another comparison"
            raise UsageError(f"output folder {str(folder)!r} holds {why}: give one that is absent")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UsageError(
                    f"output folder {str(folder)!r} is not empty: give one that is absent or empty"
                )
            write_atomically(folder / RUN, (json.dumps(identity, indent=1) + "\n").encode())
        except OSError as error:
            raise UsageError(
                f"cannot write to output folder {str(folder)!r}: {error.strerror or error}"
            ) from None

    def _chosen(self, swept: Sequence[Done]) -> dict[str, Setting]:
        """Each method's best settings by the first metric; where that is equal, by the next."""

        def worth(name: str, setting: Setting) -> tuple[float, ...]:
            for cell in swept:
                if (cell.config["method"], cell.config["row"]) == (name, setting.row):
                    result = cell.result
                    if result is not None and result["status"] == "ok":
                        return tuple(
                            float(result["metrics"][m.name]) * (1 if m.higher_is_better else -1)
                            for m in self.inspected.metrics
                        )
            return (-math.inf,)

        return {
            name: max(method.settings, key=lambda setting: worth(name, setting))
            for name, method in self.methods.items()
        }

    def _report(
        self,
        folder: Path,
        text: str,
        chosen: dict[str, Setting],
        swept: Sequence[Done],
        made: list[ResultTable],
    ) -> Result:
        from normwise.lab.report.own import Answer, render

        answer = Answer(self.name, self.task, self.inspected, self.methods, chosen, swept, made)
        summary = answer.summary()
        page = render(answer, self._identity())
        write_atomically(folder / RECIPE, text.encode())
        write_atomically(folder / "report.html", page.encode())
        as_json = json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        write_atomically(folder / SUMMARY, as_json.encode())
        return Result(folder, answer.headline, summary, made, answer.table())


@dataclass(frozen=True)
class _Where:
    """Where a comparison is trained, and who is told."""

    folder: Path
    jobs: int
    executor: str
    observe: Observer
    processes: Processes


def _read_run(folder: Path) -> dict[str, Any]:
    """What a folder says that it holds; empty if it says nothing."""
    try:
        there = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return there if isinstance(there, dict) else {}


def _same(there: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether two identities are equal but for the source, at which each cell looks itself."""
    mine = json.loads(json.dumps(identity))
    return {**there, "source": None} == {**mine, "source": None}


def _written(setting: Setting) -> dict[str, float]:
    return {"lr": setting.lr, "weight_decay": setting.weight_decay}


def _label(spec: OptimizerSpec) -> str:
    inner = _LABELS.get(spec.name, spec.name.rpartition(":")[2])
    return str(replace(spec, name=inner))
