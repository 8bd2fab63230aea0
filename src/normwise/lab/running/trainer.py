"""The state of one training: what a step does to it, what is measured, what a checkpoint holds.

Why resuming is exact: what a step draws depends on the seed and the number of the step alone (each
step seeds its generators anew), the learning rate depends on the number of the step alone, and the
rest of the state (weights, buffers, the optimizer's moments, sums over the epoch so far) is in the
checkpoint. No generator's state and no place in a stream has to be kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor, nn

from normwise.geometry import View, norms
from normwise.lab.correction import correct_for_norms
from normwise.lab.errors import Damaged, UsageError
from normwise.lab.parallel import Processes, whole
from normwise.lab.recipes.schema import RecipeCell
from normwise.lab.running.invariant import Analyzed, invariant_views
from normwise.lab.running.prepare import (
    decay_within_window,
    decayed_lrs,
    make_optimizer,
    normalize_weights,
    scale_invariant_weights,
)
from normwise.lab.running.pretrained import load_pretrained
from normwise.lab.store import METRICS, append, named, read_sealed, seal, write_atomically
from normwise.lab.tasks.kinds import kind
from normwise.monitor import Measurement, Monitor, Trigger
from normwise.perturb import AWP
from normwise.updates import describe

__all__ = ["CHECKPOINT", "Diverged", "Trainer", "digest"]

CHECKPOINT = "checkpoint.pt"
# Whether the loss is still finite is asked this often: asking waits for the device.
_CHECK_EVERY = 20
# Angles are measured at most at every fifth step.
_MEASURE_EVERY = 5


class Diverged(ArithmeticError):
    """The loss or the weights became infinite or not a number."""


@dataclass(frozen=True)
class _WithinEpochs(Trigger):
    """The last step of each epoch, and every few steps before it."""

    steps: int
    every: int

    def __call__(self, step: int) -> bool:
        return -step % self.steps % self.every == 0


@dataclass
class Times:
    """How long the steps of an epoch took, in seconds, and what of it went where."""

    steps: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | None]:
        """Medians in milliseconds, and the share of time that was spent waiting for batches."""
        total = sum(self.steps)
        return {
            "steps": len(self.steps),
            "steps_per_second": round(len(self.steps) / total, 3) if total else None,
            "data_share": round(sum(self.batches) / total, 4) if total else None,
            "step_ms": 1e3 * median(self.steps) if self.steps else None,
            "optimizer_ms": 1e3 * median(self.optimizer) if self.optimizer else None,
        }


class Trainer:
    """A problem, its optimizer, and how far the training is.

    Args:
        cell: what to train.
        folder: of the cell.
        root: where the data sets are.
        device: where to compute.
        processes: those that train it together.
        start: weights and buffers to begin with (default: drawn ones).
        analyzed: which weights are scale-invariant, where that is known of such a network
            (default: it is analyzed).

    Attributes:
        analyzed: which weights are scale-invariant.
        steps: of an epoch.
        epoch, step: how many epochs are finished, and how many steps of the next.
        monitor: of the scale-invariant weights; none where there are none, or where weights are
            sharded.
    """

    def __init__(
        self,
        cell: RecipeCell,
        folder: Path,
        root: Path,
        device: torch.device,
        processes: Processes,
        start: Mapping[str, Tensor] | None = None,
        analyzed: Analyzed | None = None,
    ) -> None:
        self.cell, self.folder, self.training = cell, folder, cell.training
        self.processes, self.device = processes, device
        torch.manual_seed(_seed("start", cell.seed))
        self.problem = kind(cell.task).build(cell.options, root, device)
        if processes.kind is not None and not self.problem.divisible:
            raise UsageError(
                f"task {cell.task!r} is not allowed with --parallel: its loss is not the mean of "
                "those of a batch's parts, or it remembers batches; train it in one process"
            )
        if start is None:
            load_pretrained(self.problem.model, self.training, root)
        normalize_weights(self.problem.model, self.training)
        if start is not None:
            self.problem.start_from(start)
        if self.training.batch_size > self.problem.examples:
            raise UsageError(
                f"batch_size {self.training.batch_size} is not allowed: there are "
                f"{self.problem.examples} training examples"
            )
        self.steps = len(self.batches(1))
        if analyzed is None:
            with torch.random.fork_rng():
                analyzed = invariant_views(self.problem, self.training.batch_size)
        self.analyzed = analyzed
        self.views, self.not_analyzed, _ = analyzed
        model = self.problem.model
        if self.training.initial_scale != 1:
            scale_invariant_weights(model, self.views, self.training.initial_scale, start is None)
        self.problem.model = processes.distribute(model)
        params = dict(model.named_parameters())
        self._invariant = [(params[name], view) for name, view in self.views.items()]
        own = self.problem.make_optimizer(self.training)
        self.optimizer = own or make_optimizer(
            self.problem.model, self.training, dict(self._invariant), analyzed.report
        )
        groups = self.optimizer.param_groups
        self._lrs = [self.training.lr if own is None else float(g["lr"]) for g in groups]
        decay_within_window(self.optimizer, self.training, self.total_steps)
        if self.training.norm_correction != "none":
            correct_for_norms(self.optimizer, dict(self._invariant), self.training.norm_correction)
        self._awp = self._perturbation()
        self._decayed_lrs = decayed_lrs(self.training, self.total_steps)
        self.exponent = describe(self.optimizer)[0].update.exponent
        self.monitor = self._watch(model) if self.views and processes.kind != "fsdp" else None
        if self.monitor is not None:
            self.problem.attend(self.optimizer, self.monitor, self.views)
        self._start_norm = self._norms()[0]
        self.epoch, self.step, self.written = 0, 0, 0
        self._metrics = hashlib.sha256()
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._angles = [0.0, 0]
        self.times = Times()

    @property
    def total_steps(self) -> int:
        """Steps from the first to the last epoch."""
        return self.training.epochs * self.steps

    @property
    def done(self) -> int:
        """Steps that have been taken."""
        return self.epoch * self.steps + self.step

    @property
    def loss(self) -> float:
        """The mean training loss of the epoch so far; this waits for the device."""
        return float(self._total) / max(self.step, 1)

    def _perturbation(self) -> AWP | None:
        """What perturbs the weights for each step; none where γ is 0."""
        gamma = self.training.awp_gamma
        if gamma == 0:
            return None
        slices = self.training.awp_view == "slices"
        views = dict(self._invariant) if slices else View.layer()
        return AWP(self.problem.model, self.optimizer, gamma=gamma, views=views)

    def _perturbed(self, batch: Any) -> AbstractContextManager[None]:
        """Inside, the weights are those at which the step is taken."""
        if self._awp is None:
            return nullcontext()
        return self._awp.perturbed(lambda: self._loss(batch))

    def _loss(self, batch: Any) -> Tensor:
        low = self.training.autocast == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            return self.problem.loss(batch)

    @property
    def growth(self) -> float | None:
        """The norm of the scale-invariant weights over that at the start, as in the metrics."""
        norm, start = self._norms()[0], self._start_norm
        return None if norm is None or start is None else norm / start

    def _watch(self, model: nn.Module) -> Monitor:
        every = max(_MEASURE_EVERY, math.ceil(self.total_steps / self.problem.measured))
        return Monitor(
            model,
            self.optimizer,
            self.views,
            every=_WithinEpochs(self.steps, every),
            writers=[self._add_angle],
            alarms=lambda alarm: None,  # they stand in the report
            fetch_every=1,
        )

    def _add_angle(self, measured: Measurement) -> None:
        """Add the mean angle over all slices to those of the epoch."""
        self._angles[0] += float(measured.of_slices("angular_update").double().nanmean())
        self._angles[1] += 1

    def batches(self, epoch: int) -> Tensor:
        """The examples of each step of an epoch, shape ``(steps, batch_size)``, on the host."""
        draw = torch.Generator().manual_seed(_seed("order", self.cell.seed, epoch))
        return self.problem.batches(self.training.batch_size, draw)

    def stream(self) -> Iterator[Any]:
        """The batches of what is left of this epoch, each drawn from its step's own generator."""
        draws = self.draws(self.done, (self.epoch + 1) * self.steps)
        return self.problem.stream(self.batches(self.epoch)[self.step :], draws)

    def draws(self, start: int, stop: int) -> Iterator[Generator]:
        """For each of these steps, counted from the first of the training, what it draws from."""
        for number in range(start, stop):
            yield torch.Generator().manual_seed(_seed("batch", self.cell.seed, number))

    def take(self, batches: Iterator[Any]) -> None:
        """One step."""
        begin = time.perf_counter()
        number = self.done
        factor = self.training.factor(number, self.total_steps)
        for group, lr in zip(self.optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * factor
        self.optimizer.param_groups[0]["lr"] = self._decayed_lrs[number]
        # Dropout, and whatever else draws from the global generator: each process for its part.
        rank = self.processes.rank
        torch.manual_seed(_seed("layers", self.cell.seed, number, *([rank] if rank else [])))
        batch = self.processes.share(next(batches))
        made = time.perf_counter()
        self.problem.model.train()
        low = self.training.autocast == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            batch = self.problem.prepared(batch)
        with self._perturbed(batch):
            self.optimizer.zero_grad()
            loss = self._loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
            if self.training.clip is not None:
                nn.utils.clip_grad_norm_(self.problem.model.parameters(), self.training.clip)
            descent = time.perf_counter()
            self.optimizer.step()
            descended = time.perf_counter()
        self._total += self.processes.mean(loss.detach())
        self.step += 1
        if self.step % _CHECK_EVERY == 0 or self.step == self.steps:
            self._check()
        self.times.steps.append(time.perf_counter() - begin)
        self.times.batches.append(made - begin)
        self.times.optimizer.append(descended - descent)

    def _check(self) -> None:
        if not math.isfinite(float(self._total)):
            raise Diverged(
                f"the training loss is not finite by step {self.step} of epoch {self.epoch + 1}"
            )

    def end_epoch(self) -> None:
        """Count the epoch as finished; the task may change its model now."""
        self.problem.end_epoch()
        self.epoch, self.step = self.epoch + 1, 0

    def line(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """What is known after an epoch; epoch 0 is before the first step."""
        if self.monitor is not None:
            self.monitor.fetch()
        (norm, smallest), start = self._norms(), self._start_norm
        if norm is not None and not 0 < norm < math.inf:
            raise Diverged(f"the norm of the weights became {norm} in epoch {self.epoch}")
        lrs = self._decayed_lrs or [self.training.lr]
        lr = lrs[max(self.done - 1, 0)]
        angle, count = self._angles
        of_norms = None if norm is None or start is None else (start / norm) ** self.exponent
        return {
            "epoch": self.epoch,
            "step": self.done,
            "lr": lr,
            "train_loss": None if self.epoch == 0 else float(self._total) / self.steps,
            "norm": norm,
            "smallest_norm": smallest,
            "norm_growth": None if norm is None or start is None else norm / start,
            "effective_lr": None if norm is None else lr / norm**self.exponent,
            "relative_effective_lr": of_norms,
            "angular_update": angle / count if count else None,
            **metrics,
        }

    @torch.no_grad()
    def _norms(self) -> tuple[float | None, float | None]:
        """Of the norms of all scale-invariant slices the geometric mean, and the smallest.

        Each slice counts once. With the geometric mean, the growth of the mean is the mean of the
        growths, and so for any power of a norm. A slice of zeros is left out. None where nothing is
        scale-invariant.
        """
        if not self._invariant:
            return None, None
        every = torch.cat([norms(whole(p), view) for p, view in self._invariant]).double()
        every = every[every != 0]
        if not len(every):
            return 0.0, 0.0
        return float(every.log().mean().exp()), float(every.min())

    def start_epoch(self) -> None:
        """Forget the sums over the last epoch."""
        self._total, self._angles, self.times = torch.zeros_like(self._total), [0.0, 0], Times()

    def record(self, line: Mapping[str, Any]) -> None:
        """Add a line to the metrics, on the disk before the checkpoint that counts it."""
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        self.processes.first(lambda: append(self.folder / METRICS, content))
        self.written += len(content)
        self._metrics.update(content)

    @property
    def metrics_digest(self) -> str:
        """The SHA-256 of the metrics so far."""
        return self._metrics.hexdigest()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.monitor is not None:
            self.monitor.fetch()
        state = {
            **self.processes.state(self.problem.model, self.optimizer),
            "epoch": self.epoch,
            "step": self.step,
            "total": self._total,
            "angles": list(self._angles),
            "written": self.written,
            "metrics": self.metrics_digest,
        }

        def write() -> None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomically(self.folder / CHECKPOINT, seal(buffer.getvalue()))

        self.processes.first(write)

    def restore(self) -> bool:
        """Load the checkpoint, if there is one, and drop metrics written after it.

        Raises:
            Damaged: if it, or what the metrics held when it was written, is not what was written.
        """
        path, metrics = self.folder / CHECKPOINT, self.folder / METRICS
        resumed = self.processes.first(path.exists)
        if resumed:
            try:
                content = io.BytesIO(read_sealed(path))
                state = torch.load(content, map_location="cpu", weights_only=True)
                self.processes.restore(self.problem.model, self.optimizer, state)
                self.epoch, self.step = int(state["epoch"]), int(state["step"])
                self._total, self._angles = state["total"].to(self.device), state["angles"]
                self.written, expected = int(state["written"]), state["metrics"]
            except UsageError:
                raise
            except Exception as error:
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                raise Damaged(path, text) from None
            if self.monitor is not None:
                self.monitor.load_state_dict({"step": self.done, "seen": []})
            before = self.processes.first(
                lambda: metrics.read_bytes()[: self.written] if metrics.exists() else b""
            )
            self._metrics.update(before)
            if self.metrics_digest != expected:
                raise Damaged(metrics, "its checksum differs")

        def cut() -> None:
            with named(metrics), metrics.open("ab") as file:
                file.truncate(self.written)

        self.processes.first(cut)
        return resumed


def _seed(*of: object) -> int:
    """A seed from names and numbers; torch's generators take 32 bits of it."""
    digest = hashlib.blake2b("/".join(map(str, of)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def digest(state: Mapping[str, Tensor]) -> str:
    """A fingerprint of all weights and buffers."""
    fingerprint = hashlib.sha256()
    for name, value in state.items():
        fingerprint.update(name.encode())
        fingerprint.update(value.detach().cpu().contiguous().numpy().tobytes())
    return fingerprint.hexdigest()
