"""Everything that decides the outcome of a comparison."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from normwise.lab.contenders import CONTENDERS, Family
from normwise.lab.errors import UsageError, nearest
from normwise.lab.tasks import TASKS

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What to train, how long, and with which hyperparameters.

    The defaults are those of the papers (AdamP, section 4 and appendix), with the learning rate
    divided by 10 after 30, 60 and 90% of the epochs. Biases and BatchNorm's parameters are never
    decayed, under any optimizer.

    Args:
        task: a name in ``TASKS``.
        optimizers: names in ``CONTENDERS``, each once.
        seeds: how many; they are 0, 1, 2, …
        epochs: passes over the training data.
        batch_size: examples a step; an incomplete last batch is left out.
        lr_sgd: initial learning rate of SGD and SGDP (default: 0.1).
        lr_adam: initial learning rate of AdamW and AdamP (default: 1e-3).
        weight_decay_sgd: coupled (L2) in SGD, decoupled in SGDP (default: 1e-4).
        weight_decay_adam: decoupled (default: 1e-2).
        momentum: of SGD and SGDP (default: 0.9).
        betas: of AdamW and AdamP (default: (0.9, 0.999)).
        eps: of AdamW and AdamP, and SGDP's guard against zero norms (default: 1e-8).
        delta: threshold of the cosine gate of SGDP and AdamP (default: 0.1).
        wd_ratio: factor on the decay of projected weights (default: 0.1).
        lr_drops: percent of the epochs after which the learning rate drops (default: 30, 60, 90).
        lr_factor: factor on the learning rate at each drop (default: 0.1).
        parallel: ``"ddp"`` or ``"fsdp"``, on the processes of torchrun (default: one process).

    Raises:
        UsageError: for a value that is not allowed.
    """

    task: str
    optimizers: tuple[str, ...]
    seeds: int
    epochs: int
    batch_size: int
    lr_sgd: float = 0.1
    lr_adam: float = 1e-3
    weight_decay_sgd: float = 1e-4
    weight_decay_adam: float = 1e-2
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    delta: float = 0.1
    wd_ratio: float = 0.1
    lr_drops: tuple[int, ...] = (30, 60, 90)
    lr_factor: float = 0.1
    parallel: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UsageError(f"unknown task {self.task!r}: {nearest(self.task, TASKS)}")
        if not self.optimizers:
            raise UsageError(f"no optimizer given: (choose from {', '.join(CONTENDERS)})")
        for name in self.optimizers:
            if name not in CONTENDERS:
                raise UsageError(f"unknown optimizer {name!r}: {nearest(name, CONTENDERS)}")
            if self.optimizers.count(name) > 1:
                raise UsageError(f"optimizer {name!r} is listed twice; list each once")
        for option in ("seeds", "epochs", "batch_size"):
            if getattr(self, option) < 1:
                raise UsageError(
                    f"--{option.replace('_', '-')} {getattr(self, option)} is not allowed: "
                    "must be a whole number, 1 or more"
                )
        for option in ("lr_sgd", "lr_adam"):
            value = getattr(self, option)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(
                    f"--{option.replace('_', '-')} {value} is not allowed: "
                    "must be a finite number greater than 0"
                )

    def lr(self, family: Family, epoch: int) -> float:
        """The learning rate that ``family`` uses in an epoch, counted from 1; epoch 0 is as 1."""
        initial = self.lr_sgd if family is Family.SGD else self.lr_adam
        return initial * self.lr_factor ** sum(epoch > after for after in self.drop_epochs())

    def drop_epochs(self) -> list[int]:
        """The epochs after which the learning rate drops and training goes on."""
        after = (-(-percent * self.epochs // 100) for percent in self.lr_drops)
        return [epoch for epoch in after if epoch < self.epochs]

    def command(self) -> str:
        """A command that repeats this comparison, whatever the defaults of later versions."""
        program, parallel = "normwise", ""
        if self.parallel:
            processes = os.environ.get("WORLD_SIZE", "1")
            program = f"torchrun --nproc-per-node {processes} -m normwise"
            parallel = f" --parallel {self.parallel}"
        return (
            f"{program} compare --task {self.task} --optimizers {','.join(self.optimizers)} "
            f"--seeds {self.seeds} --epochs {self.epochs} --batch-size {self.batch_size} "
            f"--lr-sgd {self.lr_sgd} --lr-adam {self.lr_adam}{parallel}"
        )
