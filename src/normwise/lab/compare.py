"""The comparison: every optimizer on every seed, into one folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from normwise.lab.contenders import CONTENDERS
from normwise.lab.environment import environment
from normwise.lab.errors import UsageError
from normwise.lab.models import LabModel
from normwise.lab.parallel import ALONE, Processes
from normwise.lab.settings import Settings
from normwise.lab.store import RunFolder
from normwise.lab.summary import summarize
from normwise.lab.tasks import TASKS, Data
from normwise.lab.train import Diverged, Watch, train
from normwise.monitor import Monitor
from normwise.monitor.writers import JsonLines

__all__ = ["Outcome", "assist", "compare", "default_folder"]

Record = dict[str, Any]
Observer = Callable[[Record], None]
# Measurements that a monitor takes in a run.
_MEASURED = 100


@dataclass(frozen=True)
class Outcome:
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
    settings: Settings,
    folder: Path,
    observe: Observer = lambda record: None,
    processes: Processes = ALONE,
) -> Outcome:
    """Train every optimizer on every seed, one after the other, and report.

    The outcome depends on the settings alone, and not on the number of cores: it computes in one
    thread. Ctrl-C ends the training and not the report: what has been finished is kept and marked
    as interrupted. A run that diverges is recorded as failed, and the next one goes on.

    Args:
        settings: what to train.
        folder: where to; absent or empty.
        observe: called with every record, as soon as it is written.
        processes: those that train together; this one is to be the first of them, which writes.
            The others call :func:`assist`.

    Raises:
        UsageError: if the folder or the batch size is not usable.
    """
    data = _load(settings)
    store = RunFolder(folder)
    begin = time.monotonic()
    run: dict[str, Any] = {
        "schema": 1,
        "status": "running",
        "started": _now(),
        "command": settings.command(),
        "settings": {
            **asdict(settings),
            "decay_on_biases_and_norms": 0.0,
            "view": "auto",
            "nesterov": False,
            "drop_epochs": settings.drop_epochs(),
        },
        "task": {
            "title": TASKS[settings.task].title,
            "source": TASKS[settings.task].source,
            "network": "four 3×3 convolutions, each with BatchNorm and ReLU; a linear classifier",
            "train_examples": len(data.train_targets),
            "test_examples": len(data.test_targets),
            "steps_per_epoch": len(data.train_targets) // settings.batch_size,
        },
        "methods": [
            {
                "name": name,
                "label": CONTENDERS[name].label,
                "update": CONTENDERS[name].family.update.name.lower(),
                "baseline": CONTENDERS[name].baseline,
            }
            for name in settings.optimizers
        ],
        "environment": {**environment(), "processes": processes.size},
    }
    records: list[Record] = []
    monitors: dict[str, Monitor] = {}

    def keep(record: Record) -> None:
        store.append_metrics(record)
        records.append(record)
        observe(record)

    def finish(status: str) -> Outcome:
        run.update(status=status, ended=_now(), seconds=round(time.monotonic() - begin, 1))
        return _finish(store, run, records, settings, monitors)

    try:
        store.write_json("run.json", run)
        try:
            with _one_thread():
                _train_all(settings, data, keep, processes, monitors, store.path)
        except KeyboardInterrupt:
            return finish("interrupted")
        finished = any(r["status"] == "ok" and r["epoch"] == settings.epochs for r in records)
        return finish("complete" if finished else "failed")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            run.update(status="interrupted", ended=_now())
        else:
            run.update(status="failed", ended=_now(), error=f"{type(error).__name__}: {error}")
        store.write_json("run.json", run)
        raise
    finally:
        store.close()


def assist(settings: Settings, processes: Processes) -> None:
    """Take part in the training of a :func:`compare` that runs on the first process."""
    data = _load(settings)
    with _one_thread():
        _train_all(settings, data, lambda record: None, processes, {}, None)


def _load(settings: Settings) -> Data:
    """The data, if a batch fits into them."""
    data = TASKS[settings.task].load()
    examples = len(data.train_targets)
    if settings.batch_size > examples:
        raise UsageError(
            f"--batch-size {settings.batch_size} is not allowed: task {settings.task!r} has "
            f"{examples} training examples"
        )
    return data


def _train_all(
    settings: Settings,
    data: Data,
    keep: Observer,
    processes: Processes,
    monitors: dict[str, Monitor],
    folder: Path | None,
) -> None:
    """Seed by seed, so that an interrupted comparison has whole seeds of every optimizer.

    The first seed of each is watched layer by layer, if one process has the weights whole.
    """
    steps = settings.epochs * (len(data.train_targets) // settings.batch_size)

    def watch(model: LabModel, optimizer: Optimizer) -> None:
        assert folder is not None
        monitors[name] = Monitor(
            model,
            optimizer,
            {w.name: w.view for w in model.invariant_weights()},
            every=max(1, steps // _MEASURED),
            writers=[JsonLines(folder / f"layers-{name}.jsonl")],
            alarms=lambda alarm: None,  # they stand in the report
        )

    for seed in range(settings.seeds):
        for name in settings.optimizers:
            watched = seed == 0 and processes.size == 1
            try:
                _train_one(settings, data, name, seed, keep, processes, watch if watched else None)
            finally:
                if watched and name in monitors:
                    monitors[name].close()


def _train_one(
    settings: Settings,
    data: Data,
    name: str,
    seed: int,
    keep: Observer,
    processes: Processes,
    watch: Watch | None,
) -> None:
    task, contender = TASKS[settings.task], CONTENDERS[name]
    try:
        for record in train(task, data, contender, settings, seed, processes, watch):
            keep({"status": "ok", **asdict(record)})
    except Diverged as error:
        keep(
            {
                "status": "failed",
                "optimizer": name,
                "seed": seed,
                "epoch": error.epoch,
                "step": error.step,
                "error": str(error),
            }
        )


def _finish(
    store: RunFolder,
    run: dict[str, Any],
    records: list[Record],
    settings: Settings,
    monitors: dict[str, Monitor],
) -> Outcome:
    """Write all that is made from the metrics, and the final ``run.json`` last."""
    from normwise.lab.plots import PLOTS
    from normwise.lab.report import render

    summary = {
        "schema": 1,
        "status": run["status"],
        **summarize(records, settings.optimizers, settings.epochs, run["task"]["test_examples"]),
    }
    store.write_json("summary.json", summary)
    for name, plot in PLOTS.items():
        store.write_bytes(name, plot(run, records))
    store.write_text("report.html", render(run, records, summary, monitors))
    store.write_json("run.json", run)
    return Outcome(store.path, run, records, summary)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: small networks gain nothing from more, and sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
