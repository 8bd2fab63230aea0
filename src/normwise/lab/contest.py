"""The user's own problem: every optimizer at its own best, on every seed, and what that says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.figures.tables import Table
from normwise.geometry import View
from normwise.lab.data.files import data_root
from normwise.lab.digits import default_folder
from normwise.lab.errors import UsageError
from normwise.lab.imports import place
from normwise.lab.methods import Inspected, Method, Setting
from normwise.lab.optimizers import OptimizerSpec, parse
from normwise.lab.recipes import Recipe, RecipeCell, Training, read
from normwise.lab.recipes.schema import MOST_SEEDS
from normwise.lab.running.cell import check_device
from normwise.lab.running.events import Observer, ignore
from normwise.lab.running.executors import check_trust, run_cells
from normwise.lab.running.invariant import invariant_views
from normwise.lab.running.prepare import make_optimizer
from normwise.lab.running.results import RECIPE, Done, ResultTable, read_cells, tables
from normwise.lab.store import write_atomically
from normwise.lab.tasks.kinds import is_own, kind
from normwise.lab.tasks.own import give, metrics_of
from normwise.lab.tasks.problem import Metric, Problem
from normwise.lab.trust import is_code, trusting
from normwise.updates import Coupling, Update, UpdateRule, describe

__all__ = ["OPTIMIZERS", "Contest", "Result", "compare"]

OPTIMIZERS = ("sgd", "sgdp", "adamw", "adamp")
FINAL, SWEEP, ROW, RUN = "paper", "sweep", "own", "run.json"
HELD_OUT = 0.1
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
    out: str | Path | None = None,
    jobs: int = 1,
    device: str = "cpu",
    observe: Observer = ignore,
) -> Result:
    """Compare optimizers on a network and data of your own.

    Args:
        problem: what :func:`normwise.lab.supervised` made, a function that makes one, or the name
            of either, ``"MODULE:FACTORY"``.
        optimizers: any of sgd, sgdp, adam, adamw, adamp; ``"torch:CLASS"``; ``"MODULE:FACTORY"``, a
            function of parameter groups and ``lr``; or ``"tangential(…)"`` around one of these.
        lr: learning rates, of which every method takes its own best on held-out data (default: one
            for each method: 0.1 for gradient steps, 0.001 for others).
        weight_decay: the same (default: 0.01 where decay is decoupled, else 0.0001).
        seeds: how many; they are 0, 1, 2, … (default: 3).
        epochs: passes over the training data (default: the problem's).
        batch_size: examples per step (default: the problem's).
        out: the output folder; one of the same comparison is gone on with (default: a new one
            under ``runs``).
        jobs: trainings at once (default: 1).
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
    )
    return contest.run(None if out is None else Path(out), jobs=jobs, observe=observe)


def _task(problem: Any) -> str:
    if isinstance(problem, str):
        return place(problem)
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
    trust: frozenset[str] = field(default=frozenset())

    def __post_init__(self) -> None:
        if not is_own(self.task):
            raise UsageError(f"{self.task!r} is no MODULE:FACTORY")
        if not self.optimizers:
            raise UsageError("no optimizer given")
        if type(self.seeds) is not int or not 1 <= self.seeds <= MOST_SEEDS:
            raise UsageError(f"{self.seeds} seeds are not allowed: must be from 1 to {MOST_SEEDS}")
        named = [self.task, *(c.code or "" for c in self._specs)]
        modules = {name.partition(":")[0] for name in named if is_code(name)}
        object.__setattr__(self, "trust", frozenset(modules))
        check_device(self.device)
        _ = self.methods

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
        return {**usual, **own, **{k: v for k, v in given.items() if v is not None}}

    @cached_property
    def _problem(self) -> Problem:
        with trusting(self.trust), torch.random.fork_rng():
            torch.manual_seed(0)
            own = kind(self.task)
            return own.build(own.options(), data_root(), torch.device(self.device))

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
        views, reason = self._views
        params = dict(problem.model.named_parameters())
        return Inspected(
            network=type(problem.model).__name__,
            weights=sum(p.numel() for p in params.values() if p.requires_grad),
            invariant={name: (str(view), params[name].numel()) for name, view in views.items()},
            not_analyzed=reason,
            metrics=metrics,
            facts=dict(problem.facts),
        )

    @cached_property
    def _views(self) -> tuple[dict[str, View], str | None]:
        with torch.random.fork_rng():
            return invariant_views(self._problem, self.defaults["batch_size"])

    @cached_property
    def methods(self) -> dict[str, Method]:
        """The optimizers, by the names of their folders."""
        _ = self.inspected
        found: dict[str, Method] = {}
        for spec in self._specs:
            rule = describe(self._made(spec))[0]
            name = re.sub(r"[^\w.+-]+", "-", str(spec)).strip("-.")
            found[name] = Method(name, _label(spec), spec, rule, self._settings(spec, rule))
        return found

    def _made(self, spec: OptimizerSpec) -> Optimizer:
        """The optimizer on the network, only to be described."""
        problem = self._problem
        training = Training(1, 1, str(spec), lr=1e-3)
        views, _ = self._views
        params = dict(problem.model.named_parameters())
        with trusting(self.trust):
            by_parameter: dict[Tensor, View] = {params[name]: view for name, view in views.items()}
            return make_optimizer(problem.model, training, by_parameter)

    def _settings(self, spec: OptimizerSpec, rule: UpdateRule) -> tuple[Setting, ...]:
        gradient = rule.update is Update.GRADIENT
        own = self.lrs_gradient if gradient else self.lrs_other
        lrs = own or self.lrs or ((0.1,) if gradient else (1e-3,))
        usual = 1e-2 if rule.coupling is Coupling.DECOUPLED and not gradient else 1e-4
        if "sphere" in spec.wrappers or rule.coupling is Coupling.NONE:
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
        inner = _BASELINES.get(spec.name, "") if not spec.wrappers else spec.name
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
    ) -> Result:
        """Choose each method's settings, train all seeds, and write the report.

        Args:
            folder: where to; absent, empty, or one of this comparison, which goes on (default: a
                new one under ``runs``).
            jobs: trainings at once (default: 1).
            executor: ``local`` or ``ray`` (default: local).
            observe: called with what happens (default: nothing is).

        Raises:
            UsageError: if the folder holds something else.
        """
        if not is_code(self.task) and (jobs > 1 or executor != "local"):
            raise UsageError(
                f"jobs {jobs} with executor {executor!r} is not allowed: {self.task!r} is an "
                "object of this process; put it into a module and name MODULE:FACTORY"
            )
        folder = folder or default_folder()
        _take(folder, self._identity(), is_code(self.task))

        def trained(recipe: Recipe, cells: Sequence[RecipeCell], text: str) -> list[Done]:
            check_trust(cells, tuple(self.trust))
            scale = cells[0].scale
            home = folder / "cells" / f"{recipe.id}-{scale}"
            home.mkdir(parents=True, exist_ok=True)
            write_atomically(home / RECIPE, text.encode())
            run_cells(
                cells,
                folder / "cells",
                data_root(),
                jobs=jobs,
                executor=executor,
                device=self.device,
                observe=observe,
                trust=tuple(self.trust),
            )
            return read_cells([folder / "cells" / cell.folder for cell in cells])

        first = {name: method.settings[0] for name, method in self.methods.items()}
        swept: list[Done] = []
        if self.sweeps:
            text = self.source(first)
            recipe = read(text, RECIPE)
            cells = [
                cell
                for name, method in self.methods.items()
                for cell in recipe.cells(SWEEP, 1, [name], [s.row for s in method.settings])
            ]
            swept = trained(recipe, cells, text)
        chosen = self._chosen(swept) if swept else first
        text = self.source(chosen)
        write_atomically(folder / RECIPE, text.encode())
        recipe = read(text, RECIPE)
        done = trained(recipe, recipe.cells(FINAL, self.seeds), text)
        return self._report(folder, chosen, swept, tables(done))

    def _identity(self) -> dict[str, Any]:
        shared = {"seeds": self.seeds, "device": self.device, **self.defaults}
        methods = {
            name: {"optimizer": str(m.spec), "settings": [_written(s) for s in m.settings]}
            for name, m in self.methods.items()
        }
        return {"schema": 1, "task": self.task, "settings": shared, "methods": methods}

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
        chosen: dict[str, Setting],
        swept: Sequence[Done],
        made: list[ResultTable],
    ) -> Result:
        from normwise.lab.report.own import Answer, render

        answer = Answer(self.name, self.task, self.inspected, self.methods, chosen, swept, made)
        summary = answer.summary()
        text = json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        write_atomically(folder / "summary.json", text.encode())
        write_atomically(folder / "report.html", render(answer, self._identity()).encode())
        return Result(folder, answer.headline, summary, made, answer.table())


def _written(setting: Setting) -> dict[str, float]:
    return {"lr": setting.lr, "weight_decay": setting.weight_decay}


def _label(spec: OptimizerSpec) -> str:
    inner = _LABELS.get(spec.name, spec.name.rpartition(":")[2])
    return str(OptimizerSpec(inner, spec.wrappers))


def _take(folder: Path, identity: dict[str, Any], may_go_on: bool) -> None:
    """Make the folder, or find that it is this comparison's."""
    path = folder / RUN
    identity = json.loads(json.dumps(identity))
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            there = None
        if there == identity and may_go_on:
            return
        why = (
            "another comparison" if there != identity else "one of an object, whose code may differ"
        )
        raise UsageError(f"output folder {str(folder)!r} holds {why}: give one that is absent")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(
                f"output folder {str(folder)!r} is not empty: give one that is absent or empty"
            )
        write_atomically(path, (json.dumps(identity, indent=1) + "\n").encode())
    except OSError as error:
        raise UsageError(
            f"cannot write to output folder {str(folder)!r}: {error.strerror or error}"
        ) from None
