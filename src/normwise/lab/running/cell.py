"""One cell: a training that can be killed anywhere and goes on to the same bits.

Several processes may train one cell together. Each does all that is below, on its part of every
batch; the first of them alone reads and writes the folder, but for the checkpoint, which all read.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from normwise.lab.checks import said
from normwise.lab.data.own import fingerprint
from normwise.lab.environment import environment
from normwise.lab.errors import Damaged, UsageError
from normwise.lab.optimizers import parse as parse_optimizer
from normwise.lab.parallel import ALONE, Processes
from normwise.lab.recipes.schema import RecipeCell
from normwise.lab.running.events import Measured, Observer, Progress, Started, ignore
from normwise.lab.running.pretrained import weights_hash
from normwise.lab.running.trainer import CHECKPOINT, Diverged, Trainer, digest
from normwise.lab.store import (
    locked,
    named,
    read_sealed,
    read_sealed_json,
    seal_json,
    write_atomically,
)
from normwise.lab.tasks.kinds import is_own, kind
from normwise.lab.tasks.problem import Problem
from normwise.lab.trust import is_code, source_hash, trusting

__all__ = [
    "CONFIG",
    "RESULT",
    "CellStart",
    "DiskFull",
    "OutOfTime",
    "check_device",
    "config_of",
    "entered",
    "now",
    "one_thread",
    "run_cell",
]

SCHEMA = 2
CONFIG, RESULT = "config.json", "result.json"
CHECKPOINT_SECONDS = 60.0
_PROGRESS_SECONDS = 5.0


class DiskFull(UsageError):
    """There is no room to write; what had been written before is whole."""


class OutOfTime(Exception):  # nothing is wrong
    """The time that a cell may take is over; its last checkpoint is of its last step."""


def config_of(cell: RecipeCell, device: str, processes: Processes = ALONE) -> dict[str, Any]:
    """Everything that decides a cell's outcome, as ``config.json`` holds it.

    The number of processes is part of it: sums over a batch are rounded in another order. So is the
    source of the user's code that the cell runs.

    Raises:
        UsageError: if it would run code that is not trusted.
    """
    config = {"schema": SCHEMA, **asdict(cell), "point": dict(cell.point), "device": device}
    # What has no say is not there, so that a cell without it stays the same.
    config |= {"training": said(cell.training), "options": said(cell.options)}
    if cell.start is None:
        del config["start"]
    if not cell.point:
        del config["point"]
    if processes.kind is not None:
        config["parallel"] = {"kind": processes.kind, "processes": processes.size}
    names = (
        cell.task,
        getattr(cell.options, "network", ""),
        parse_optimizer(cell.training.optimizer).code or "",
    )
    sources = {name: source_hash(name) for name in names if is_code(name)}
    if data := getattr(cell.options, "data", "") if is_own(cell.task) else "":
        sources[data] = fingerprint(data)
    if sources:
        config["source"] = sources
    # As it will be read back: tuples become lists.
    return dict(json.loads(json.dumps(config)))


def check_device(name: str) -> None:
    """Refuse a device on which nothing can be computed.

    Raises:
        UsageError: if it is not a device, or not of this machine.
    """
    try:
        torch.ones(1, device=name).sum().item()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--device {name} is not allowed: {reason}") from None


def run_cell(
    cell: RecipeCell,
    out: Path,
    root: Path,
    *,
    device: str = "cpu",
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    processes: Processes = ALONE,
    observe: Observer = ignore,
    trust: Sequence[str] = (),
    until: float = math.inf,
) -> dict[str, Any]:
    """Train a cell to its end, going on from its checkpoint if it has one.

    Computes in one thread, so that the result does not depend on the number of cores.

    Args:
        cell: what to train.
        out: the output folder; the cell's own is ``out / cell.folder``.
        root: where the data sets are.
        device: where to compute (default: ``"cpu"``).
        checkpoint_seconds: the most time between checkpoints, in seconds (default: 60).
        processes: those that train it together, each of which calls this (default: one alone).
        observe: called with what happens (default: nothing is).
        trust: the modules of the user's whose code the cell may run (default: none).
        until: when it stops, on the clock of :func:`time.time`, if it is not at its end; needs one
            process alone (default: never).

    Returns:
        The content of its ``result.json``; at once if it was finished before.

    Raises:
        UsageError: if the folder holds another cell, or one of another version, or another process
            runs it, or if processes cannot share a batch of its task.
        Damaged: if a file that it would go on from is not what was written.
        DiskFull: if there is no room; run it again when there is.
        OutOfTime: at ``until``, after a checkpoint.
    """
    if until <= time.time() and not (out / cell.folder / RESULT).exists():
        raise OutOfTime
    _check_divisible(cell, processes)
    with entered(cell, out, root, device, processes=processes, trust=trust) as result:
        if result is not None:
            return result
        start = None if cell.start_folder is None else out / cell.start_folder
        run = CellStart(cell, out / cell.folder, processes, checkpoint_seconds, observe, until)
        return run.train(root, device, start)


@contextmanager
def entered(
    cell: RecipeCell,
    out: Path,
    root: Path,
    device: str,
    *,
    processes: Processes = ALONE,
    trust: Sequence[str] = (),
    how: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[dict[str, Any] | None]:
    """Inside, the folder of a cell is this process's; gives its result if it is finished.

    Args:
        cell, out, root, device, processes, trust: as of :func:`run_cell`.
        how: what else decides its outcome (default: nothing).
    """
    folder = out / cell.folder
    with ExitStack() as held:
        held.enter_context(trusting(trust))
        held.enter_context(one_thread())
        held.enter_context(_room_in(folder))
        config = {**config_of(cell, device, processes), **how}
        if cell.start is None and (weights := weights_hash(cell.training, root)):
            config["pretrained_sha256"] = weights

        def begin() -> dict[str, Any] | None:
            """Take the folder; the result, if there is one already."""
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / "lock"))
            for leftover in folder.glob(".*"):  # of a write that was killed
                leftover.unlink()
            _same_config(folder, config)
            return read_sealed_json(folder / RESULT) if (folder / RESULT).exists() else None

        yield processes.first(begin)


def _check_divisible(cell: RecipeCell, processes: Processes) -> None:
    if processes.kind is None:
        return
    if not kind(cell.task).divisible:
        raise UsageError(
            f"task {cell.task!r} is not allowed with --parallel: its loss is not the mean of those "
            "of a batch's parts; train it in one process"
        )
    training = cell.training
    if decays := parse_optimizer(training.optimizer).decays:
        raise UsageError(
            f"the decay {'+'.join(map(str, decays))} is not allowed with --parallel; train it in "
            "one process"
        )
    if training.coupling != "own" or training.decay_window != (0.0, 1.0):
        raise UsageError(
            f"coupling {training.coupling!r} and decay_window {list(training.decay_window)} are "
            "not allowed with --parallel, but for 'own' and [0, 1]; train it in one process"
        )
    if training.norm_correction != "none":
        raise UsageError(
            f"norm_correction {training.norm_correction!r} is not allowed with --parallel; train "
            "it in one process"
        )


def _judged(cell: RecipeCell, problem: Problem) -> dict[str, Any]:
    """What a problem of the user's is judged by, which nothing but its code says."""
    if not is_own(cell.task):
        return {}
    from normwise.lab.tasks.own import metrics_of

    return {"judged_by": [asdict(metric) for metric in metrics_of(problem)]}


@contextmanager
def _room_in(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFull(
            f"no room to write {error.filename or folder} ({error.strerror}): the last checkpoint "
            "is whole; make room and run the same command again"
        ) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, one thread computes: small networks gain nothing from more, and sums keep order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, f"{_as_json(content)}\n".encode())


def _as_json(content: Any, indent: str = "\n") -> str:
    """JSON with a line for each key; a list of numbers is one line, whatever its length."""
    deeper = f"{indent} "
    if isinstance(content, dict) and content:
        pairs = (f"{deeper}{json.dumps(k)}: {_as_json(v, deeper)}" for k, v in content.items())
        return f"{{{','.join(pairs)}{indent}}}"
    if isinstance(content, list) and any(isinstance(item, dict) for item in content):
        return f"[{','.join(deeper + _as_json(item, deeper) for item in content)}{indent}]"
    return json.dumps(content, allow_nan=False, ensure_ascii=False)


def _same_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the config, or compare it with the one that is there."""
    path = folder / CONFIG
    if not path.exists():
        _write_json(path, config)
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        schema = there.get("schema")
    except (ValueError, AttributeError) as error:
        raise Damaged(path, str(error)) from None
    if schema != SCHEMA:
        raise UsageError(
            f"{path} was written by another version (schema {schema!r}, not {SCHEMA}) "
            "and cannot be continued: give another --out"
        )
    different = next((k for k in {**config, **there} if there.get(k) != config.get(k)), None)
    if different is None:
        return
    if different == "source":
        before, after = there.get("source"), config.get("source", {})
        edited = [n for n in after if not isinstance(before, dict) or before.get(n) != after[n]]
        raise UsageError(
            f"{folder} holds a run of another source of {', '.join(map(repr, edited))}: it has "
            "been edited since; give another --out, or delete it"
        )
    old, new = there.get(different), config.get(different)
    if isinstance(new, dict) and isinstance(old, dict):
        # A setting that one of them does not have differs too, whatever its value.
        key = next(k for k in {**new, **old} if k not in old or old[k] != new.get(k))
        different = f"{different}: {key}"
        old, new = old.get(key, "not set"), new.get(key, "not set")
    raise UsageError(
        f"{folder} holds another run: its {different} is {old!r}, not {new!r}; give another "
        "--out, or delete it"
    )


def _final_weights(folder: Path) -> dict[str, Tensor]:
    """The weights and buffers that a finished training ended with."""
    if not (folder / RESULT).exists():
        raise UsageError(
            f"{folder} is not finished, and this method starts from it: train that method first"
        )
    if read_sealed_json(folder / RESULT)["status"] != "ok":
        raise UsageError(f"{folder} diverged, and this method starts from it")
    path = folder / CHECKPOINT
    try:
        content = io.BytesIO(read_sealed(path))
        model: dict[str, Tensor] = torch.load(content, map_location="cpu", weights_only=True)[
            "model"
        ]
    except UsageError:
        raise
    except Exception as error:
        raise Damaged(path, f"{type(error).__name__}: {error}".splitlines()[0]) from None
    return model


@contextmanager
def _interrupts_deferred(processes: Processes) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only counts, so that no step is cut in half; the next one ends.

    Not where several processes train together, which would not stop at the same step, or where
    signals are another's.
    """
    alone = processes.kind is None and threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if alone else ()
    before = {n: own for n in numbers if callable(own := signal.getsignal(n))}
    counted: list[int] = []

    def count(number: int, frame: Any) -> None:
        if counted:
            raise KeyboardInterrupt
        counted.append(number)

    for number in before:
        signal.signal(number, count)
    try:
        yield lambda: bool(counted)
    finally:
        for number, own in before.items():
            signal.signal(number, own)
    if counted:  # in the last step, after which there was none to stop at
        raise KeyboardInterrupt


class CellStart:
    """One start of a cell, in a folder that it holds.

    Args:
        cell: what to train.
        folder: its own.
        processes: those that train it together.
        checkpoint_seconds: the most time between checkpoints.
        observe: called with what happens, on the first process.
        until: when it stops, on the clock of :func:`time.time`.
    """

    def __init__(
        self,
        cell: RecipeCell,
        folder: Path,
        processes: Processes,
        checkpoint_seconds: float,
        observe: Observer,
        until: float,
    ) -> None:
        self.until = until
        self.cell, self.folder, self.processes = cell, folder, processes
        self.checkpoint_seconds = checkpoint_seconds
        self.observe = observe if processes.rank == 0 else ignore
        self.wrong: list[int] | None = None
        self.metrics: dict[str, float] = {}

    def train(self, root: Path, device: str, start: Path | None) -> dict[str, Any]:
        """The training to its end; what is written as the result.

        Args:
            root: where the data sets are.
            device: where to compute.
            start: the folder of the finished training whose weights it begins with, if any.
        """
        weights = None if start is None else _final_weights(start)
        self.processes.first(lambda: self.note_start(device))
        with torch.random.fork_rng():
            try:
                trainer = Trainer(
                    self.cell, self.folder, root, torch.device(device), self.processes, weights
                )
                try:
                    ending = self._ending(trainer)
                finally:
                    if trainer.monitor is not None:
                        trainer.monitor.close()
            except OutOfTime:
                self.log("out of time")
                raise
            except Exception:
                self.log(traceback.format_exc())
                raise
        return self.finish(trainer, ending)

    def finish(self, trainer: Trainer, ending: Mapping[str, Any]) -> dict[str, Any]:
        """Write the result, and say what is in it.

        Args:
            trainer: at its end.
            ending: how that ended, see :meth:`ending`.
        """
        problem = trainer.problem
        facts = {**problem.facts, "steps_per_epoch": trainer.steps}
        if trainer.not_analyzed is not None:
            facts["not_analyzed"] = trainer.not_analyzed
        result = {
            "schema": SCHEMA,
            **ending,
            "baseline": problem.baseline,
            "facts": {**facts, "invariant_weights": len(trainer.views)},
            **_judged(self.cell, problem),
            "weights": digest(self.processes.weights(problem.model)),
            "metrics_sha256": trainer.metrics_digest,
        }

        def write() -> dict[str, Any]:
            _write_json(self.folder / RESULT, seal_json(result))
            self.log(f"finished: {result['status']}")
            return read_sealed_json(self.folder / RESULT)

        return self.processes.first(write)

    def _ending(self, trainer: Trainer) -> dict[str, Any]:
        """Train, and say how that ended."""
        resumed = trainer.restore()
        where = f"epoch {trainer.epoch}, step {trainer.step}"
        self.log(f"resumed after {where}" if resumed else "started")
        self.observe(Started(self.cell, trainer.monitor))
        try:
            self._epochs(trainer)
            if not self.metrics:  # it was killed between the last checkpoint and the result
                self._test(trainer)
        except Diverged as error:
            return self.failed(trainer, error)
        return self.ended()

    def failed(self, trainer: Trainer, error: Diverged) -> dict[str, Any]:
        """The ending of a training that diverged."""
        return {
            "status": "failed",
            "error": str(error),
            "epoch": trainer.epoch + (trainer.step > 0),
            "step": trainer.done,
        }

    def ended(self) -> dict[str, Any]:
        """The ending of a training that came to its end, by its last test."""
        ending: dict[str, Any] = {"status": "ok", "metrics": self.metrics}
        if self.wrong is not None:
            ending["wrong"] = self.wrong
        return ending

    def _epochs(self, trainer: Trainer) -> None:
        """The training, from wherever the trainer stands, to its end or that of a step."""
        with _interrupts_deferred(self.processes) as interrupted:
            self._steps(trainer, interrupted)

    def _steps(self, trainer: Trainer, interrupted: Callable[[], bool]) -> None:
        training = trainer.training
        if trainer.written == 0:
            self.record(trainer, tested=True)
        begin = shown = saved = time.monotonic()
        first = trainer.done
        while trainer.epoch < training.epochs:
            batches = trainer.stream()
            while trainer.step < trainer.steps:
                trainer.take(batches)
                now = time.monotonic()
                if now - shown > _PROGRESS_SECONDS:
                    shown = now
                    left = (now - begin) / (trainer.done - first)
                    left *= trainer.total_steps - trainer.done
                    share = trainer.done / trainer.total_steps
                    growth = trainer.growth if self.processes.kind is None else None
                    fresh = (trainer.done - first) / trainer.total_steps
                    self.observe(Progress(self.cell, share, fresh, trainer.loss, growth, left))
                stop, late = interrupted(), time.time() >= self.until
                if trainer.step < trainer.steps and (stop or late or self._due(saved)):
                    trainer.save()
                    saved = time.monotonic()
                    if stop:
                        raise KeyboardInterrupt
                    if late:
                        raise OutOfTime
            trainer.end_epoch()
            last = trainer.epoch == training.epochs
            self.record(trainer, tested=last or trainer.epoch % training.evaluate_every == 0)
            trainer.start_epoch()
            if last or self._due(saved):
                trainer.save()
                saved = time.monotonic()

    def _due(self, saved: float) -> bool:
        """Whether it is long since the last checkpoint; all processes say the same."""
        late = time.monotonic() - saved > self.checkpoint_seconds
        return float(self.processes.mean(torch.tensor(float(late)))) > 0

    def _test(self, trainer: Trainer) -> None:
        if trainer.monitor is not None:
            trainer.monitor.fetch()
        evaluation = trainer.problem.evaluate()
        self.metrics, self.wrong = evaluation.metrics, evaluation.wrong
        if not all(map(math.isfinite, self.metrics.values())):
            raise Diverged(f"the test gave {self.metrics}")

    def record(self, trainer: Trainer, tested: bool) -> None:
        """Write down what is known after an epoch."""
        if tested:
            self._test(trainer)
        line = trainer.line(self.metrics if tested else {})
        trainer.record(line)
        times = {} if trainer.epoch == 0 else trainer.times.summary()
        if times:
            self.processes.first(lambda: self._times({"epoch": trainer.epoch, **times}))
        self.observe(Measured(self.cell, line, times, self.wrong if tested else None))

    def _times(self, line: dict[str, Any]) -> None:
        """How fast it went, apart from the metrics because no two runs agree in it."""
        path = self.folder / "times.jsonl"
        with named(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def note_start(self, device: str) -> None:
        starts = self.folder / "environment.json"
        try:
            begun = json.loads(starts.read_text(encoding="utf-8")) if starts.exists() else []
        except ValueError as error:
            raise Damaged(starts, str(error)) from None
        with_what = {**environment(torch.device(device).type), "processes": self.processes.size}
        _write_json(starts, [*begun, {"started": now(), **with_what}])

    def log(self, text: str) -> None:
        """A line with the time, for a person; the first process writes them."""
        path = self.folder / "log.txt"
        if self.processes.rank == 0:
            with named(path), path.open("a", encoding="utf-8") as file:
                file.write(f"{now()}  pid {os.getpid()}  {text}\n")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
