"""Several cells at once on one CUDA device, each step a replayed CUDA graph.

A small network's step is hundreds of kernels of a few microseconds each: one process spends its
time starting them, and several processes take turns at the device. Here a step is captured once,
what it draws is laid out on the device for a whole epoch ahead, and the steps of several cells run
side by side on streams of their own. A step draws what :class:`~normwise.lab.running.trainer
.Trainer` draws; sums are in another order, for optimizers take their fused steps.

What is given up: angles are not measured, and a cell that is cut off begins anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normwise.lab.augment import draw_flips, draw_shifts, flipped, shifted
from normwise.lab.data.sources import HeldImages
from normwise.lab.errors import Damaged, UsageError
from normwise.lab.optimizers import parse
from normwise.lab.parallel import ALONE
from normwise.lab.recipes.schema import RecipeCell
from normwise.lab.running.cell import CellStart, entered
from normwise.lab.running.events import Finished, Observer
from normwise.lab.running.invariant import Analyzed
from normwise.lab.running.trainer import CHECKPOINT, Diverged, Trainer
from normwise.lab.tasks.classification import Classification, ClassificationOptions

__all__ = ["check_graphs", "run_as_graphs"]

_AUGMENTATIONS = ("crop", "flip")
_WARM_UPS = 3


def check_graphs(cells: Sequence[RecipeCell]) -> None:
    """Raise ``UsageError`` for a cell whose step cannot be captured."""
    for cell in cells:
        training, options = cell.training, cell.options
        known = cell.task == "classification" and isinstance(options, ClassificationOptions)
        augment = options.augment if isinstance(options, ClassificationOptions) else ()
        of_folder = getattr(options, "data", "").startswith("folder:")
        for reason, holds in {
            f"task {cell.task!r}": not known,
            f"data {getattr(options, 'data', '')!r}": of_folder,
            f"augment {list(augment)}": not set(augment) <= set(_AUGMENTATIONS),
            f"optimizer {training.optimizer!r}": bool(parse(training.optimizer).decays),
            f"coupling {training.coupling!r}": training.coupling != "own",
            f"decay_window {list(training.decay_window)}": training.decay_window != (0.0, 1.0),
            f"norm_correction {training.norm_correction!r}": training.norm_correction != "none",
            f"awp_gamma {training.awp_gamma}": training.awp_gamma != 0,
            "a method that starts from another": cell.start is not None,
        }.items():
            if holds:
                raise UsageError(
                    f"{reason} is not allowed with --executor graphs, which takes plain training "
                    "of classifiers on sets that are held on the device, augmented by crop and "
                    "flip; train it with --executor local"
                )


class GraphTrainer(Trainer):
    """A training whose step is one CUDA graph; on another device it is not captured.

    Args:
        cell, folder, root, device, analyzed: as of :class:`Trainer`.
    """

    def __init__(
        self,
        cell: RecipeCell,
        folder: Path,
        root: Path,
        device: torch.device,
        analyzed: Analyzed | None = None,
    ) -> None:
        super().__init__(cell, folder, root, device, ALONE, analyzed=analyzed)
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None
        problem = self.problem
        assert isinstance(problem, Classification)
        assert isinstance(problem.data, HeldImages)
        self._images, self._augment = problem.data, problem.options.augment
        size = self.training.batch_size
        self._order = torch.zeros(self.steps, size, dtype=torch.int64, device=device)
        self._shifts = torch.zeros(self.steps, 2, size, dtype=torch.int64, device=device)
        self._flips = torch.zeros(self.steps, size, dtype=torch.bool, device=device)
        # The number of the step, in its epoch and in all.
        self._place = torch.zeros(2, dtype=torch.int64, device=device)
        self._targets = torch.eye(problem.classes, device=device)
        factors = (self.training.factor(n, self.total_steps) for n in range(self.total_steps))
        lrs = [self.training.lr * factor for factor in factors]
        self._schedule = torch.tensor(lrs, dtype=torch.float64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped
            self._lr = torch.tensor(self.training.lr, device=device)
            for group in self.optimizer.param_groups:
                group |= {"lr": self._lr, "fused": True, "foreach": None, "capturable": True}

    def on_its_stream(self) -> AbstractContextManager[Any]:
        """Inside, what is computed comes after this training's steps."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the steps of the next epoch draw, on the host: examples, shifts, mirrored ones."""
        size = self.training.batch_size
        shifts, flips = [], []
        draw_of = {
            "crop": lambda draw: shifts.append(draw_shifts(size, draw)),
            "flip": lambda draw: flips.append(draw_flips(size, draw)),
        }
        for draw in self.draws(self.done, self.done + self.steps):
            for name in self._augment:
                draw_of[name](draw)
        of_crop, of_flip = (torch.stack(d) if d else torch.empty(0) for d in (shifts, flips))
        return self.batches(self.epoch), of_crop, of_flip

    def lay_out(self, order: Tensor, shifts: Tensor, flips: Tensor) -> None:
        """Bring what an epoch draws to the device."""
        with self.on_its_stream():
            for there, drawn in (
                (self._order, order),
                (self._shifts, shifts),
                (self._flips, flips),
            ):
                if len(drawn):
                    there.copy_(drawn)
            self._place[0].zero_()

    def capture(self) -> None:
        """Capture the step; nothing is trained by it."""
        if self._stream is None:
            return
        before = {name: t.clone() for name, t in self.problem.model.state_dict().items()}
        self._stream.wait_stream(torch.cuda.current_stream())
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        with self.on_its_stream():
            for _ in range(_WARM_UPS):
                self._step()
        self._stream.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._step()
        torch.backends.cudnn.benchmark = benchmark
        # Buffers and moments of zeros begin as those that are not there yet.
        with self.on_its_stream(), torch.no_grad():
            for name, t in self.problem.model.state_dict().items():
                t.copy_(before[name])
            for state in self.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()
            self._place.zero_()
            self._total.zero_()
        self._stream.synchronize()

    def go_on(self) -> None:
        """Start one step."""
        if self._graph is None:
            self._step()
        else:
            with self.on_its_stream():
                self._graph.replay()
        self.step += 1

    def _of_step(self, table: Tensor, place: int = 0) -> Tensor:
        return table.index_select(0, self._place[place : place + 1])[0]

    def _step(self) -> None:
        """All of a step, by what lies on the device alone."""
        lr = self._of_step(self._schedule, 1)
        if self._stream is not None:
            self._lr.copy_(lr)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = float(lr)
        chosen = self._of_step(self._order)
        x = self._images.standardized(self._images.train[chosen])
        for name in self._augment:
            if name == "crop":
                x = shifted(x, self._of_step(self._shifts))
            else:
                x = flipped(x, self._of_step(self._flips))
        if self._stream is not None and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)  # as its convolutions compute
        self.problem.model.train()
        self.optimizer.zero_grad()
        loss = self._loss((x, self._targets[self._images.train_labels[chosen]]))
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        if self.training.clip is not None:
            nn.utils.clip_grad_norm_(self.problem.model.parameters(), self.training.clip)
        self.optimizer.step()
        self._total += loss.detach()
        self._place += 1

    def line(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """As of :class:`Trainer`."""
        with self.on_its_stream():
            self._check()
            return super().line(metrics)

    def start_epoch(self) -> None:
        """As of :class:`Trainer`; the graph knows the place of the sum."""
        with self.on_its_stream():
            self._total.zero_()


class _Run(CellStart):
    """A cell that is trained beside others.

    Args:
        cell: what to train.
        folder: its own, which is held.
        root: where the data sets are.
        device: where to compute.
        observe: called with what happens.
        analyzed: of networks of earlier cells, by their settings; this cell's is added.
    """

    def __init__(
        self,
        cell: RecipeCell,
        folder: Path,
        root: Path,
        device: str,
        observe: Observer,
        analyzed: dict[Any, Analyzed],
    ) -> None:
        super().__init__(cell, folder, ALONE, math.inf, observe, math.inf)
        (folder / CHECKPOINT).unlink(missing_ok=True)
        self.note_start(device)
        self.log("started, as CUDA graphs")
        alike = _network(cell)
        with torch.random.fork_rng():
            self.trainer = GraphTrainer(
                cell, folder, root, torch.device(device), analyzed.get(alike)
            )
        analyzed[alike] = self.trainer.analyzed
        self.trainer.restore()
        self.diverged: Diverged | None = None
        self.measure()
        self.trainer.lay_out(*self.trainer.drawn())
        self.trainer.capture()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train."""
        return self.diverged is not None or self.trainer.epoch == self.cell.training.epochs

    def measure(self) -> None:
        """Write down what is known after an epoch."""
        trainer, training = self.trainer, self.cell.training
        due = trainer.epoch % training.evaluate_every == 0 or trainer.epoch == training.epochs
        try:
            with trainer.on_its_stream():
                self.record(trainer, tested=due)
        except Diverged as error:
            self.diverged = error

    def end(self) -> dict[str, Any]:
        """Write the last checkpoint and the result."""
        trainer = self.trainer
        with trainer.on_its_stream():
            trainer.save()
            failed = self.diverged and self.failed(trainer, self.diverged)
            return self.finish(trainer, failed or self.ended())


def _network(cell: RecipeCell) -> tuple[object, ...]:
    """What decides which weights of a cell's network are scale-invariant."""
    fields = asdict(cell.training).items()
    shaping = [(k, v) for k, v in fields if k.startswith(("normaliz", "gain", "pretrained"))]
    return cell.task, cell.options, repr(shaping)


def _epoch(runs: Sequence[_Run]) -> None:
    """One epoch of several trainings, step by step in turn."""
    trainers = [run.trainer for run in runs]
    for _ in range(trainers[0].steps):
        for trainer in trainers:
            trainer.go_on()
    for trainer in trainers:
        trainer.end_epoch()
    # The host draws while the device still computes; what it draws is used if there is a next one.
    drawn = [trainer.drawn() for trainer in trainers]
    for run, draws in zip(runs, drawn, strict=True):
        run.measure()
        run.trainer.start_epoch()
        run.trainer.lay_out(*draws)


def run_as_graphs(
    cells: Sequence[RecipeCell],
    out: Path,
    root: Path,
    *,
    jobs: int,
    device: str,
    observe: Observer,
    until: float = math.inf,
) -> list[dict[str, Any]]:
    """Train cells that are not finished, several at once; as of ``executors.run_cells``.

    Raises:
        UsageError: as of :func:`check_graphs`.
    """
    check_graphs(cells)
    results: dict[str, dict[str, Any]] = {}
    analyzed: dict[Any, Analyzed] = {}
    for first in range(0, len(cells), jobs):
        with ExitStack() as held:
            runs: list[_Run] = []
            for cell in cells[first : first + jobs]:
                how = {"executor": "graphs"}
                try:
                    result = held.enter_context(entered(cell, out, root, device, how=how))
                except Damaged as error:
                    results[cell.folder] = {"status": "skipped", "error": str(error)}
                    continue
                if result is not None:
                    results[cell.folder] = result
                elif time.time() >= until:
                    results[cell.folder] = {"status": "unfinished"}
                else:
                    folder = out / cell.folder
                    runs.append(_Run(cell, folder, root, device, observe, analyzed))
            active = runs
            while active and time.time() < until:
                by_length: dict[int, list[_Run]] = {}
                for run in active:
                    by_length.setdefault(run.trainer.steps, []).append(run)
                for alike in by_length.values():
                    _epoch(alike)
                active = [run for run in active if not run.is_over]
            for run in runs:
                result = run.end() if run.is_over else {"status": "unfinished"}
                results[run.cell.folder] = result
        for cell in cells[first : first + jobs]:
            observe(Finished(cell, results[cell.folder]))
    return [results[cell.folder] for cell in cells]
