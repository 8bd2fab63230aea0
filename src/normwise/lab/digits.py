"""The comparison: a recipe run, every method on every seed, with a page of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from normwise.lab.data.files import data_root
from normwise.lab.environment import environment
from normwise.lab.errors import UsageError, nearest
from normwise.lab.parallel import ALONE, Processes
from normwise.lab.recipes import Recipe, RecipeCell, ids, read, text
from normwise.lab.running.cell import now, run_cell
from normwise.lab.running.events import Event, Measured, Started
from normwise.lab.running.prepare import make_optimizer, normalize_weights
from normwise.lab.running.results import RECIPE
from normwise.lab.store import RunFolder, write_atomically
from normwise.lab.summary import summarize
from normwise.lab.tasks.kinds import kind
from normwise.lab.tasks.problem import Problem
from normwise.monitor import Monitor
from normwise.monitor.writers import JsonLines
from normwise.updates import Update, describe

__all__ = ["CELLS", "Choice", "Compared", "assist", "compare", "default_folder"]

Record = dict[str, Any]
Observer = Callable[[Record], None]

# The folder of the cells, below that of the comparison; and their scale.
CELLS, SCALE = "cells", "paper"
_GRADIENT = ("sgd", "sgdp")


@dataclass(frozen=True)
class Choice:
    """What the user chose of a recipe; the rest is the recipe's.

    Args:
        task: the recipe's name (default: digits).
        optimizers: names of its methods, each once (default: all).
        seeds: how many; they are 0, 1, 2, … (default: 3).
        epochs: passes over the training data (default: the recipe's).
        batch_size: examples per step; an incomplete last batch is left out (default: the recipe's).
        lr_sgd: of SGD and SGDP at first (default: the recipe's).
        lr_adam: of the others at first (default: the recipe's).
        parallel: ``"ddp"`` or ``"fsdp"``, on the processes of torchrun (default: one process).

    Raises:
        UsageError: for a name that is unknown or listed twice, or a value that is not allowed.
    """

    task: str = "digits"
    optimizers: tuple[str, ...] | None = None
    seeds: int = 3
    epochs: int | None = None
    batch_size: int | None = None
    lr_sgd: float | None = None
    lr_adam: float | None = None
    parallel: str | None = None

    def __post_init__(self) -> None:
        if self.task != "digits":
            known = [name for name in ids() if name == "digits"]
            raise UsageError(f"unknown task {self.task!r}: {nearest(self.task, known)}")
        known = list(self.recipe.methods)
        if self.optimizers is not None and not self.optimizers:
            raise UsageError(f"no optimizer given: (choose from {', '.join(known)})")
        for name in self.names:
            if name not in known:
                raise UsageError(f"unknown optimizer {name!r}: {nearest(name, known)}")
            if self.names.count(name) > 1:
                raise UsageError(f"optimizer {name!r} is listed twice; list each once")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The methods that are compared."""
        return tuple(self.recipe.methods) if self.optimizers is None else self.optimizers

    @cached_property
    def source(self) -> str:
        """The recipe as it is run, in YAML."""
        import yaml

        content = yaml.safe_load(text(self.task))
        given = {"epochs": self.epochs, "batch_size": self.batch_size}
        content["scales"][SCALE]["settings"] |= {k: v for k, v in given.items() if v is not None}
        for method in content["methods"].values():
            settings = method["settings"]
            lr = self.lr_sgd if settings["optimizer"] in _GRADIENT else self.lr_adam
            if lr is not None:
                settings["lr"] = lr
        return str(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe as it is run."""
        return read(self.source, self.task)

    @cached_property
    def cells(self) -> list[RecipeCell]:
        """Seed by seed, so that an interrupted comparison has whole seeds of every method."""
        return self.recipe.cells(SCALE, self.seeds, self.names)

    def settings(self) -> dict[str, Any]:
        """What ``run.json`` says of it: every number that decides the outcome."""
        first = self.cells[0].training
        of = {
            cell.training.optimizer in _GRADIENT: cell.training
            for method in self.recipe.methods
            for cell in self.recipe.cells(SCALE, 1, [method])
        }
        shared = ("momentum", "nesterov", "betas", "eps", "delta", "wd_ratio", "lr_factor")
        return {
            **asdict(self),
            "optimizers": list(self.names),
            "epochs": first.epochs,
            "batch_size": first.batch_size,
            "lr_sgd": of[True].lr,
            "lr_adam": of[False].lr,
            "weight_decay_sgd": of[True].weight_decay,
            "weight_decay_adam": of[False].weight_decay,
            "decay_on_biases_and_norms": 0.0,
            "view": "auto",
            **{name: getattr(first, name) for name in shared},
            "lr_drops": list(first.drops),
            "drop_epochs": [share * first.epochs for share in first.drops if share < 1],
        }

    def command(self) -> str:
        """A command that repeats this comparison, whatever the defaults of later versions."""
        program, parallel = "normwise", ""
        if self.parallel:
            processes = os.environ.get("WORLD_SIZE", "1")
            program = f"torchrun --nproc-per-node {processes} -m normwise"
            parallel = f" --parallel {self.parallel}"
        s = self.settings()
        return (
            f"{program} compare --task {self.task} --optimizers {','.join(self.names)} "
            f"--seeds {self.seeds} --epochs {s['epochs']} --batch-size {s['batch_size']} "
            f"--lr-sgd {s['lr_sgd']} --lr-adam {s['lr_adam']}{parallel}"
        )


@dataclass(frozen=True)
class Compared:
    """What came of a comparison.

    Args:
        folder: where its files are.
        run: the content of ``run.json``.
        records: the content of ``metrics.jsonl``.
        summary: the content of ``summary.json``.
    """

    folder: Path
    run: dict[str, Any]
    records: list[Record]
    summary: dict[str, Any]

    @property
    def interrupted(self) -> bool:
        """Whether the user stopped it."""
        return bool(self.run["status"] == "interrupted")

    @property
    def failures(self) -> list[Record]:
        """The records of the runs that diverged."""
        return [record for record in self.records if record["status"] == "failed"]


def default_folder() -> Path:
    """``runs/compare-<local time>``, with a number after it if that is taken."""
    base = Path("runs") / f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def compare(
    choice: Choice,
    folder: Path | None = None,
    observe: Observer = lambda record: None,
    processes: Processes = ALONE,
) -> Compared:
    """Train every method on every seed, one after the other, and report.

    Ctrl-C ends the training and not the report: what has been finished is kept and marked as
    interrupted. A run that diverges is recorded as failed, and the next one goes on.

    Args:
        choice: what to train.
        folder: where to; absent or empty (default: :func:`default_folder`).
        observe: called with every record, as soon as it is written.
        processes: those that train together; this one is to be the first of them, which writes.
            The others call :func:`assist`.

    Raises:
        UsageError: if the folder or the batch size is not usable.
    """
    problem, methods = _examined(choice)
    created: list[RunFolder] = []

    def create() -> str:
        created.append(RunFolder(folder or default_folder()))
        return str(created[0].path.absolute())

    processes.first(create)
    (store,) = created
    begin = time.monotonic()
    scale = choice.recipe.scales[SCALE]
    run: dict[str, Any] = {
        "schema": 2,
        "status": "running",
        "started": now(),
        "command": choice.command(),
        "settings": choice.settings(),
        "methods": methods,
        "task": {
            "title": choice.recipe.title,
            "source": scale.note,
            "network": "four 3×3 convolutions, each with BatchNorm and ReLU; a linear classifier",
            "train_examples": problem.facts["train_examples"],
            "test_examples": problem.facts["test_examples"],
            "steps_per_epoch": problem.examples // choice.cells[0].training.batch_size,
        },
        "environment": {**environment(), "processes": processes.size},
    }
    records: list[Record] = []
    monitors: dict[str, Monitor] = {}

    def keep(record: Record) -> None:
        store.append_metrics(record)
        records.append(record)
        observe(record)

    def finish(status: str, **more: Any) -> Compared:
        run.update(status=status, ended=now(), seconds=round(time.monotonic() - begin, 1), **more)
        return _finish(store, run, records, monitors)

    try:
        store.write_json("run.json", run)
        recipe = store.path / CELLS / f"{choice.recipe.id}-{SCALE}" / RECIPE
        recipe.parent.mkdir(parents=True)
        write_atomically(recipe, choice.source.encode())
        try:
            for cell in choice.cells:
                _train(cell, store.path, keep, monitors, processes)
        except KeyboardInterrupt:
            return finish("interrupted")
        epochs = run["settings"]["epochs"]
        finished = any(r["status"] == "ok" and r["epoch"] == epochs for r in records)
        return finish("complete" if finished else "failed")
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        run.update(status="interrupted" if stopped else "failed", ended=now())
        if not stopped:
            run["error"] = f"{type(error).__name__}: {error}"
        with suppress(OSError):  # the disk may be what failed; then the error says so
            _write_summary(store, run, records)
            store.write_json("run.json", run)
        raise
    finally:
        store.close()


def assist(choice: Choice, processes: Processes) -> None:
    """Take part in the training of a :func:`compare` that runs on the first process."""
    out = Path(processes.first(lambda: "")) / CELLS
    for cell in choice.cells:
        run_cell(cell, out, data_root(), processes=processes)


def _examined(choice: Choice) -> tuple[Problem, list[dict[str, Any]]]:
    """The problem, if a batch fits into its data; and what each method is."""
    with _seeded():
        methods = []
        for name in choice.names:
            cell = next(cell for cell in choice.cells if cell.method == name)
            problem = kind(cell.task).build(cell.options, data_root(), torch.device("cpu"))
            normalize_weights(problem.model, cell.training)
            (rule, *_) = describe(make_optimizer(problem.model, cell.training))
            gradient = rule.update is Update.GRADIENT
            method = choice.recipe.methods[name]
            methods.append(
                {
                    "name": name,
                    "label": method.label,
                    "update": "gradient" if gradient else "normalized",
                    "baseline": method.baseline,
                }
            )
    size = choice.cells[0].training.batch_size
    if size > problem.examples:
        raise UsageError(
            f"--batch-size {size} is not allowed: task {choice.task!r} has {problem.examples} "
            "training examples"
        )
    return problem, methods


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _train(
    cell: RecipeCell,
    folder: Path,
    keep: Observer,
    monitors: dict[str, Monitor],
    processes: Processes,
) -> None:
    """Run one cell and keep its records, and for the first seed the monitor of its layers."""
    who = {"optimizer": cell.method, "seed": cell.seed}

    def observe(event: Event) -> None:
        if isinstance(event, Started) and event.monitor is not None and cell.seed == 0:
            monitors[cell.method] = event.monitor
            event.monitor.writers.append(JsonLines(folder / f"layers-{cell.method}.jsonl"))
        elif isinstance(event, Measured):
            line = dict(event.record)
            last = event.record["epoch"] == cell.training.epochs
            keep(
                {
                    "status": "ok",
                    **who,
                    "test_accuracy": line.pop("accuracy"),
                    "test_errors": event.wrong if last else None,
                    **line,
                    "step_ms": event.times.get("step_ms"),
                    "optimizer_ms": event.times.get("optimizer_ms"),
                }
            )

    result = run_cell(cell, folder / CELLS, data_root(), processes=processes, observe=observe)
    if result["status"] == "failed":
        if cell.seed == 0:  # what is not finite cannot be drawn; it is in layers-….jsonl
            monitors.pop(cell.method, None)
        keep({"status": "failed", **who, **{k: result[k] for k in ("epoch", "step", "error")}})


def _write_summary(store: RunFolder, run: dict[str, Any], records: list[Record]) -> dict[str, Any]:
    epochs, examples = run["settings"]["epochs"], run["task"]["test_examples"]
    summary = {
        "schema": 2,
        "status": run["status"],
        **summarize(records, run["methods"], epochs, examples),
    }
    store.write_json("summary.json", summary)
    return summary


def _finish(
    store: RunFolder, run: dict[str, Any], records: list[Record], monitors: dict[str, Monitor]
) -> Compared:
    """Write all that is made from the metrics, and the final ``run.json`` last."""
    from normwise.lab.plots import PLOTS
    from normwise.lab.report import render

    summary = _write_summary(store, run, records)
    for name, plot in PLOTS.items():
        store.write_bytes(name, plot(run, records))
    store.write_text("report.html", render(run, records, summary, monitors))
    store.write_json("run.json", run)
    return Compared(store.path, run, records, summary)
