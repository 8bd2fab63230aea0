"""Training one network under one optimizer with one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.lab.contenders import Contender, Family
from normwise.lab.measure import geometric_mean_norm, mean_angle
from normwise.lab.models import InvariantWeight, LabModel
from normwise.lab.parallel import ALONE, Processes, gathered
from normwise.lab.settings import Settings
from normwise.lab.tasks import Data, Task

__all__ = ["Diverged", "EpochRecord", "train"]

# Called with the network and its optimizer before the first step.
Watch = Callable[[LabModel, Optimizer], None]

# Angles are measured at every fifth step of an epoch, the first included: often enough for a mean,
# rare enough not to be noticed.
_ANGLE_EVERY = 5


class Diverged(ArithmeticError):
    """The loss or the weights became infinite or not a number.

    Args:
        what: what became what.
        epoch: in which epoch, counted from 1.
        step: at which step of the run, counted from 1.
    """

    def __init__(self, what: str, epoch: int, step: int) -> None:
        super().__init__(f"{what} at step {step}, in epoch {epoch}")
        self.epoch = epoch
        self.step = step


@dataclass(frozen=True)
class EpochRecord:
    """What is known after an epoch; epoch 0 is the network before its first step.

    Args:
        optimizer: its name.
        seed: of the initial weights and of the order of the examples.
        epoch: how many are finished.
        step: how many steps have been taken in this run.
        lr: the learning rate η used in this epoch.
        train_loss: mean cross-entropy over the steps of this epoch, in nats; none at epoch 0.
        test_accuracy: on the test set after this epoch, from 0 to 1.
        test_errors: after the last epoch, which test examples were classified wrongly.
        norm: geometric mean of the norms of the scale-invariant slices.
        norm_growth: ``norm`` over its value at epoch 0.
        effective_lr: η/norm² or η/norm, as the optimizer's family requires.
        relative_effective_lr: the same without the schedule, over its value at epoch 0.
        angular_update: mean angle that a slice turns in a step, in radians; none at epoch 0.
        step_ms: median time of a whole training step in milliseconds; none at epoch 0.
        optimizer_ms: median time of the optimizer's part of it; none at epoch 0.
    """

    optimizer: str
    seed: int
    epoch: int
    step: int
    lr: float
    train_loss: float | None
    test_accuracy: float
    test_errors: list[int] | None
    norm: float
    norm_growth: float
    effective_lr: float
    relative_effective_lr: float
    angular_update: float | None
    step_ms: float | None
    optimizer_ms: float | None


def train(
    task: Task,
    data: Data,
    contender: Contender,
    settings: Settings,
    seed: int,
    processes: Processes = ALONE,
    watch: Watch | None = None,
) -> Iterator[EpochRecord]:
    """Train once and yield a record at the start and after every epoch.

    Two optimizers with the same seed start from the same weights and see the same batches. Of
    several processes each takes an equal part of a batch, and its BatchNorm sees only that part.

    Raises:
        Diverged: as soon as the loss of a batch is not finite, or a norm at the end of an epoch is
            not finite or zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.model(data)
    order = torch.Generator().manual_seed(seed)
    parallel = processes.distribute(model)
    optimizer = contender.build(_param_groups(model, contender, settings), settings)
    family = contender.family
    if watch is not None:
        watch(model, optimizer)

    def weights() -> list[InvariantWeight]:
        return [gathered(w) for w in model.invariant_weights()]

    start = geometric_mean_norm(weights())
    steps = 0

    def record(epoch: int, **measured: Any) -> EpochRecord:
        norm = geometric_mean_norm(weights())
        if not 0 < norm < math.inf:
            raise Diverged(f"the norm of the weights became {norm}", epoch, steps)
        lr = settings.lr(family, epoch)
        errors = _errors(parallel, data.test_inputs, data.test_targets)
        return EpochRecord(
            optimizer=contender.name,
            seed=seed,
            epoch=epoch,
            step=steps,
            lr=lr,
            test_accuracy=1 - len(errors) / len(data.test_targets),
            test_errors=errors if epoch == settings.epochs else None,
            norm=norm,
            norm_growth=norm / start,
            effective_lr=family.effective_lr(lr, norm),
            relative_effective_lr=(start / norm) ** family.exponent,
            **measured,
        )

    yield record(0, train_loss=None, angular_update=None, step_ms=None, optimizer_ms=None)
    for epoch in range(1, settings.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr(family, epoch)
        losses: list[float] = []
        turned: list[float] = []
        step_ms: list[float] = []
        optimizer_ms: list[float] = []
        parallel.train()
        examples = torch.randperm(len(data.train_targets), generator=order)
        for batch in range(len(examples) // settings.batch_size):
            chosen = examples[batch * settings.batch_size : (batch + 1) * settings.batch_size]
            before = (
                [w.weight.detach().clone() for w in weights()] if batch % _ANGLE_EVERY == 0 else []
            )
            loss, whole, own = _step(
                parallel,
                optimizer,
                data.train_inputs,
                data.train_targets,
                processes.share(chosen),
            )
            loss = float(processes.mean(torch.tensor(loss, dtype=torch.float64)))
            steps += 1
            if not math.isfinite(loss):
                raise Diverged(f"the training loss became {loss}", epoch, steps)
            losses.append(loss)
            step_ms.append(whole)
            optimizer_ms.append(own)
            if before:
                turned.append(mean_angle(before, weights()))
        yield record(
            epoch,
            train_loss=sum(losses) / len(losses),
            angular_update=sum(turned) / len(turned),
            step_ms=median(step_ms),
            optimizer_ms=median(optimizer_ms),
        )


def _param_groups(
    model: LabModel, contender: Contender, settings: Settings
) -> list[dict[str, Any]]:
    """Weights with decay; biases and the normalization layers' parameters without."""
    decay = (
        settings.weight_decay_sgd if contender.family is Family.SGD else settings.weight_decay_adam
    )
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _step(
    model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor, chosen: Tensor
) -> tuple[float, float, float]:
    """One step: the loss before it, its time, and the optimizer's share, in milliseconds."""
    begin = time.perf_counter()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen])
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
    middle = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    return float(loss.detach()), 1e3 * (end - begin), 1e3 * (end - middle)


def _errors(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[int]:
    """The indices of the ``inputs`` that the model classifies wrongly."""
    model.eval()
    with torch.no_grad():
        wrong: list[int] = (model(inputs).argmax(1) != targets).nonzero().flatten().tolist()
    return wrong
