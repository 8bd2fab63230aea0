"""What the norms, angles and effective learning rates of a run will be, before it is run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from normwise.geometry import View, norms
from normwise.monitor.history import Trajectory
from normwise.theory import (
    Update,
    adamw_angle,
    adamw_equilibrium,
    adamw_norms,
    adamw_schedule_limit,
    adamw_time_to_equilibrium,
    effective_lr,
    lion_equilibrium_angle,
    norm_range,
    sgd_angle,
    sgd_equilibrium,
    sgd_norms,
    sgd_schedule_limit,
    sgd_time_to_equilibrium,
    steps_to_norm,
)

__all__ = ["Plan", "PlanRow", "Settings", "Weights", "plan", "weights_of"]

OptimizerName = Literal["sgd", "adamw", "lion"]


@dataclass(frozen=True)
class Settings:
    """How a run will be trained.

    Args:
        optimizer: ``"sgd"`` (torch's, L2 in the buffer), ``"adamw"`` or ``"lion"``.
        lr: η, at its highest.
        weight_decay: λ.
        steps: of the run.
        momentum: of SGD (default: 0).
        betas: of AdamW and Lion (default: (0.9, 0.999)).
        schedule: ``"constant"`` or ``"cosine"``, which ends at 0 (default: ``"constant"``).
        gradient: √E‖g̃‖², the RMS norm of a slice's gradient at weight norm 1, on which only SGD
            depends; a monitor's ``scaled_gradient`` measures it (default: 1).
        dtype: whose range must hold (default: float32).
    """

    optimizer: OptimizerName
    lr: float
    weight_decay: float
    steps: int
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "cosine"] = "constant"
    gradient: float = 1.0
    dtype: torch.dtype = torch.float32

    def lrs(self) -> list[float]:
        """The learning rate of each step."""
        if self.schedule == "constant":
            return [self.lr] * self.steps
        return [self.lr * (1 + math.cos(math.pi * t / self.steps)) / 2 for t in range(self.steps)]


@dataclass(frozen=True)
class Weights:
    """Scale-invariant slices that are alike.

    Args:
        name: of the weight.
        slices: how many.
        entries: of each.
        norm: of each, before training.
    """

    name: str
    slices: int
    entries: int
    norm: float


@dataclass(frozen=True)
class PlanRow:
    """What to expect of one weight; NaN where no closed form is known.

    Attributes:
        weights: which.
        norm: at equilibrium at the highest learning rate; infinity without decay.
        angle: RMS angle a step at equilibrium, in radians.
        settles: steps until the norm is within 10% of the equilibrium.
        final_norm: after the last step.
        effective_lr: before the first step, and at equilibrium.
    """

    weights: Weights
    norm: float
    angle: float
    settles: float
    final_norm: float
    effective_lr: tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """What to expect of a run. ``str(plan)`` is a table and what follows from it."""

    settings: Settings
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        header: tuple[str, ...] = (
            "weight",
            "slices",
            "entries",
            "norm",
            "settles at",
            "within 10% after",
            "angle a step",
            "at the end",
            "effective lr, first → settled",
        )
        table = [header]
        for row in self.rows:
            w = row.weights
            table.append(
                (
                    w.name,
                    str(w.slices),
                    str(w.entries),
                    _number(w.norm),
                    _number(row.norm),
                    "–" if math.isnan(row.settles) else _steps(row.settles),
                    "–" if math.isnan(row.angle) else f"{row.angle:.2e} rad",
                    _number(row.final_norm),
                    " → ".join(map(_number, row.effective_lr)),
                )
            )
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.insert(1, "─" * max(map(len, lines)))
        return "\n".join([*lines, "", *self.notes])

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON data: numbers that are not finite become null."""
        content: Any = {
            "settings": {**asdict(self.settings), "dtype": str(self.settings.dtype)[6:]},
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
        }
        return dict(_finite(content))

    def plot(self, path: str | Path) -> None:
        """Draw the norms and the angles over the run.

        Raises:
            ImportError: without matplotlib.
        """
        from normwise.monitor.plots import draw_plan

        draw_plan([self._trajectory(row) for row in self.rows], self.settings.schedule).savefig(
            path
        )

    def _trajectory(self, row: PlanRow) -> Trajectory:
        norms_, angles = self.trajectory(row.weights)
        return Trajectory(row.weights.name, tuple(norms_), tuple(angles), row.norm, row.angle)

    def trajectory(self, weights: Weights) -> tuple[list[float], list[float]]:
        """The expected norm and RMS angle of one weight before each step; empty for Lion."""
        s = self.settings
        lrs = s.lrs()
        square = s.gradient**2
        if s.optimizer == "sgd":
            found = sgd_norms(lrs, s.weight_decay, square, weights.norm, s.momentum)
            angles = [
                sgd_angle(lr, k, square, s.momentum) for lr, k in zip(lrs, found, strict=False)
            ]
        elif s.optimizer == "adamw":
            found = adamw_norms(lrs, s.weight_decay, weights.entries, weights.norm)
            angles = [
                adamw_angle(lr, k, weights.entries, s.betas[0])
                for lr, k in zip(lrs, found, strict=False)
            ]
        else:
            return [], []
        return found[:-1], angles


def plan(settings: Settings, weights: Sequence[Weights]) -> Plan:
    """Predict norms, angles and effective learning rates ([ROT] arXiv 2305.17212, and ours).

    Args:
        settings: how the run will be trained.
        weights: what will be trained: scale-invariant weights alone.

    Raises:
        ValueError: for settings out of range, or beyond where the closed forms hold.
    """
    s = settings
    if s.steps < 1:
        raise ValueError(f"Invalid steps: {s.steps}; must be 1 or more")
    rows = tuple(_row(s, w) for w in weights)
    return Plan(s, rows, tuple(_notes(s, rows)))


def weights_of(model: nn.Module, views: Mapping[str, View]) -> list[Weights]:
    """The scale-invariant weights of a model, each with the geometric mean of its slices' norms.

    Args:
        model: the model.
        views: of the parameters by name, as ``report.views()``.
    """
    params = dict(model.named_parameters())
    found = []
    for name, view in views.items():
        p = params[name].detach()
        values = norms(p, view)
        alive = values[values > 0].double()
        if p.ndim > 1 and len(alive):
            norm = float(alive.log().mean().exp())
            found.append(Weights(name, len(values), p.numel() // len(values), norm))
    return found


def _row(s: Settings, w: Weights) -> PlanRow:
    update = Update.GRADIENT if s.optimizer == "sgd" else Update.NORMALIZED
    before = effective_lr(s.lr, w.norm, update)
    trajectory = Plan(s, (), ()).trajectory(w)[0]
    final = trajectory[-1] if trajectory else math.nan
    if s.weight_decay == 0:
        if s.optimizer == "lion":
            final = math.nan
        return PlanRow(w, math.inf, 0.0, math.nan, final, (before, 0.0))
    if s.optimizer == "lion":
        angle = lion_equilibrium_angle(s.lr, s.weight_decay, s.betas)
        return PlanRow(w, math.nan, angle, math.nan, math.nan, (before, math.nan))
    if s.optimizer == "sgd":
        settled = sgd_equilibrium(s.lr, s.weight_decay, s.gradient**2, s.momentum)
        time = sgd_time_to_equilibrium(s.lr, s.weight_decay, w.norm / settled.norm, s.momentum)
    else:
        settled = adamw_equilibrium(s.lr, s.weight_decay, w.entries, s.betas[0])
        time = adamw_time_to_equilibrium(s.lr, s.weight_decay, w.norm / settled.norm)
    after = effective_lr(s.lr, settled.norm, update)
    return PlanRow(w, settled.norm, settled.angle, time, final, (before, after))


def _notes(s: Settings, rows: Sequence[PlanRow]) -> list[str]:
    notes = []
    if s.weight_decay == 0:
        notes.append(
            "Without weight decay the norms grow for as long as there is a gradient, and the "
            "effective learning rate falls towards 0."
        )
    else:
        late = sum(row.settles > s.steps for row in rows)
        if s.optimizer != "lion":
            notes.append(
                f"Within the {s.steps:,} steps {len(rows) - late} of {len(rows)} settle, even at "
                "the highest learning rate; for the others the norm at the start counts to the end."
                if late
                else f"All settle within the {s.steps:,} steps, at the highest learning rate: the "
                "norm at the start is forgotten, and lr·weight_decay alone sets the angle a step."
            )
        decay = s.lr * s.weight_decay / (1 - s.momentum if s.optimizer == "sgd" else 1)
        dtype = str(s.dtype).removeprefix("torch.")
        gone = min(
            (steps_to_norm(r.weights.norm, norm_range(s.dtype)[0], 1 - decay) for r in rows),
            default=math.inf,
        )
        notes.append(
            f"A slice without a gradient loses {decay:.2%} of its norm a step; 1/‖w‖ passes "
            f"{dtype}'s range after {gone:,.0f} steps."
        )
        if s.optimizer != "lion":
            fits = (
                sgd_schedule_limit(s.lr, s.weight_decay, s.momentum, s.dtype)
                if s.optimizer == "sgd"
                else adamw_schedule_limit(s.lr, s.weight_decay, s.dtype)
            )
            notes.append(
                "A run without decay and with growing learning rates (normwise.theory."
                f"{s.optimizer}_without_decay) takes the same directions; {dtype} holds it for "
                f"{fits:,} steps at this learning rate."
            )
    if s.optimizer == "sgd":
        notes.append(
            f"Norms are for gradients of RMS norm {s.gradient:g} at weight norm 1 (--gradient); "
            "they go with its square root. Angles do not depend on it."
        )
    elif s.optimizer == "adamw":
        notes.append("Norms are for gradients in which noise rules, so that updates are of size 1.")
    else:
        notes.append("No closed form of the norm is known for Lion.")
    return notes


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "grows" if math.isinf(value) else f"{value:.3g}"


def _steps(value: float) -> str:
    return f"{math.ceil(value):,} steps"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
