"""What the options of a parameter group mean for norms, and where they will settle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.theory import (
    Update,
    adamw_equilibrium,
    lion_equilibrium_angle,
    sgd_equilibrium,
)

__all__ = ["UpdateRule", "rule_of", "update_of"]

# Names, not classes: those of other packages, and of the floor beside this one, count too.
_GRADIENT = frozenset({"SGD", "SGDP", "SGDW", "ASGD"})


@dataclass(frozen=True)
class UpdateRule:
    """How one parameter group updates weights, as far as it is known.

    Attributes:
        kind: ``"sgd"`` (torch's, L2 in the buffer), ``"adamw"``, ``"lion"``, or ``"other"``, of
            which no equilibrium is known.
        update: on what the length of an update depends.
        weight_decay: λ.
        momentum: μ of SGD, else 0.
        betas: of the others, else zeros.
    """

    kind: str
    update: Update
    weight_decay: float
    momentum: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)

    @property
    def decay_per_lr(self) -> float:
        """By which share decay alone shortens a weight in a step, over η; NaN if not known."""
        if self.kind == "sgd":
            return self.weight_decay / (1 - self.momentum)
        return math.nan if self.kind == "other" and self.weight_decay else self.weight_decay

    def equilibrium(self, lr: float, gradient_square: float, entries: int) -> tuple[float, float]:
        """The norm and the RMS angle a step that the theory predicts; NaN where it does not.

        Args:
            lr: η.
            gradient_square: E‖g̃‖², the mean squared norm of the gradient at weight norm 1.
            entries: of a slice.
        """
        if not (lr > 0 and self.weight_decay > 0):
            return math.nan, math.nan
        try:
            if self.kind == "sgd":
                known = gradient_square > 0 and math.isfinite(gradient_square)
                found = sgd_equilibrium(
                    lr, self.weight_decay, gradient_square if known else 1.0, self.momentum
                )
                return found.norm if known else math.nan, found.angle
            if self.kind == "adamw":
                found = adamw_equilibrium(lr, self.weight_decay, entries, self.betas[0])
                return found.norm, found.angle
            if self.kind == "lion":
                return math.nan, lion_equilibrium_angle(lr, self.weight_decay, self.betas)
        except ValueError:  # beyond where an equilibrium exists
            pass
        return math.nan, math.nan


def update_of(optimizer: Optimizer) -> Update:
    """Whether the updates of ``optimizer`` are as long as gradients, or normalized.

    SGD, SGDP, SGDW, ASGD, and their subclasses, are the former; every other is taken as normalized.
    """
    names = {cls.__name__ for cls in type(_innermost(optimizer)).__mro__}
    return Update.GRADIENT if names & _GRADIENT else Update.NORMALIZED


def rule_of(optimizer: Optimizer, group: dict[str, Any], update: Update) -> UpdateRule:
    """What is known of one group's updates; ``update`` as of :func:`update_of`, or the user's."""
    decay = group.get("weight_decay", 0.0)
    # A decay on the device is not read, since that would wait for it.
    decay = math.nan if isinstance(decay, Tensor) else float(decay)
    kind = "other"
    momentum = float(group.get("momentum", 0.0))
    betas = group.get("betas", (0.0, 0.0))
    if type(optimizer) is torch.optim.SGD:
        if not group.get("nesterov") and not group.get("dampening"):
            kind = "sgd"
    elif isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay"):
        kind = "adamw" if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) else "other"
    elif type(optimizer).__name__ == "Lion":
        kind = "lion"
    if kind != "sgd" and any(isinstance(beta, Tensor) for beta in betas):
        kind = "other"
    return UpdateRule(kind, update, decay, momentum if kind == "sgd" else 0.0, tuple(betas[:2]))


def _innermost(optimizer: Optimizer) -> Optimizer:
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
