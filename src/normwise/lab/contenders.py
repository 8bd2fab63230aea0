"""The optimizers that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from normwise.optim import SGDP, AdamP
from normwise.theory import Update, effective_lr

if TYPE_CHECKING:
    from normwise.lab.settings import Settings

__all__ = ["CONTENDERS", "Contender", "Family"]

ParamGroups = list[dict[str, Any]]


class Family(Enum):
    """How an update's length depends on the scale of the weights."""

    SGD = "sgd"
    ADAM = "adam"

    def effective_lr(self, lr: float, norm: float) -> float:
        """How fast the direction of a scale-invariant weight of this norm moves."""
        return effective_lr(lr, norm, self.update)

    @property
    def update(self) -> Update:
        """How the update of this family depends on the scale of the weights."""
        return Update.GRADIENT if self is Family.SGD else Update.NORMALIZED

    @property
    def exponent(self) -> int:
        """The power of the norm in the effective learning rate: 2 or 1."""
        return self.update.exponent


@dataclass(frozen=True)
class Contender:
    """One optimizer of a comparison.

    Args:
        name: what the user writes.
        label: what a reader sees.
        family: which effective learning rate applies.
        baseline: for one that projects, the name of the same optimizer without the projection.
        build: makes the optimizer from parameter groups and the settings.
    """

    name: str
    label: str
    family: Family
    baseline: str | None
    build: Callable[[ParamGroups, Settings], Optimizer]


def _sgd(groups: ParamGroups, s: Settings) -> Optimizer:
    return torch.optim.SGD(groups, lr=s.lr_sgd, momentum=s.momentum)


def _sgdp(groups: ParamGroups, s: Settings) -> Optimizer:
    return SGDP(
        groups, lr=s.lr_sgd, momentum=s.momentum, eps=s.eps, delta=s.delta, wd_ratio=s.wd_ratio
    )


def _adamw(groups: ParamGroups, s: Settings) -> Optimizer:
    return torch.optim.AdamW(groups, lr=s.lr_adam, betas=s.betas, eps=s.eps)


def _adamp(groups: ParamGroups, s: Settings) -> Optimizer:
    return AdamP(groups, lr=s.lr_adam, betas=s.betas, eps=s.eps, delta=s.delta, wd_ratio=s.wd_ratio)


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("sgd", "SGD", Family.SGD, None, _sgd),
        Contender("sgdp", "SGDP", Family.SGD, "sgd", _sgdp),
        Contender("adamw", "AdamW", Family.ADAM, None, _adamw),
        Contender("adamp", "AdamP", Family.ADAM, "adamw", _adamp),
    )
}
