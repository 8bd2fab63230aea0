"""What the norm, the angle and the effective learning rate of one weight will be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from normwise.plan.settings import Settings, Weights
from normwise.theory import (
    angle_at,
    effective_lr,
    equilibrium_of,
    norm_trajectory,
    time_to_equilibrium,
)

__all__ = ["PlanRow", "forecast", "trajectory"]


@dataclass(frozen=True)
class PlanRow:
    """What to expect of one weight; NaN where no closed form is known.

    Attributes:
        weights: which.
        norm: at equilibrium at the highest learning rate; infinity without decay.
        angle: RMS angle per step at equilibrium, in radians.
        settles: steps until the norm is within 10% of the equilibrium, at the highest learning
            rate; 0 if it starts there.
        final_norm: after the last step.
        effective_lr: before the first step, and at equilibrium.
        remembered: by which share a start at twice the norm would raise ``final_norm``.
    """

    weights: Weights
    norm: float
    angle: float
    settles: float
    final_norm: float
    effective_lr: tuple[float, float]
    remembered: float


def forecast(s: Settings, w: Weights) -> PlanRow:
    """What to expect of a weight, by :mod:`normwise.theory.equilibrium`.

    Args:
        s: how it will be trained.
        w: the weight.
    """
    known = w.known(s)
    rule = w.rule(s)
    settled = equilibrium_of(rule, **known)
    if rule.update.is_relative:
        return PlanRow(w, w.norm, settled.angle, 0.0, w.norm, (s.lr, s.lr), 1.0)
    lrs, decay, power = s.lrs(), float(rule.shrink_per_lr), 2 * rule.update.exponent
    final = norm_trajectory(rule, lrs, w.norm, **known)[-1]
    left = math.prod(1 - lr * decay for lr in lrs) ** power
    twice = 1 + left * (2**power - 1) * (w.norm / final) ** power
    return PlanRow(
        w,
        settled.norm,
        settled.angle,
        math.nan
        if not math.isfinite(settled.norm)
        else time_to_equilibrium(rule, w.norm / settled.norm),
        final,
        (
            effective_lr(s.lr, w.norm, rule.update),
            0.0 if math.isinf(settled.norm) else effective_lr(s.lr, settled.norm, rule.update),
        ),
        twice ** (1 / power) - 1,
    )


def trajectory(s: Settings, w: Weights) -> tuple[list[float], list[float]]:
    """The expected norm and RMS angle of a weight before each step.

    Empty where no closed form of the norm is known, as for Lion.

    Args:
        s: how it will be trained.
        w: the weight.
    """
    lrs, known = s.lrs(), w.known(s)
    rule = w.rule(s)
    found = norm_trajectory(rule, lrs, w.norm, **known)
    if math.isnan(found[-1]):
        return [], []
    angles = [
        angle_at(replace(rule, lr=lr), norm, **known) for lr, norm in zip(lrs, found, strict=False)
    ]
    return found[:-1], angles
