"""What the norms, angles and effective learning rates of a run will be, before it is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.geometry import View, norms
from normwise.monitor.history import Trajectory
from normwise.optim import SGDP, SGDW, AdamP, sphere
from normwise.theory import (
    adamw_schedule_limit,
    angle_at,
    effective_lr,
    equilibrium_of,
    norm_range,
    norm_trajectory,
    sgd_schedule_limit,
    steps_to_norm,
    time_to_equilibrium,
)
from normwise.updates import Coupling, Update, UpdateRule, rule_of

__all__ = ["OPTIMIZERS", "Plan", "PlanRow", "Settings", "Weights", "plan", "weights_of"]


class Lion(Optimizer):
    """What :func:`normwise.describe` needs of Lion, which torch does not have."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)


def _of_sgd(kind: Callable[..., Optimizer]) -> Callable[[Tensor, Settings], Optimizer]:
    return lambda p, s: kind([p], lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)


def _of_adam(kind: Callable[..., Optimizer]) -> Callable[[Tensor, Settings], Optimizer]:
    return lambda p, s: kind([p], lr=s.lr, betas=s.betas, weight_decay=s.weight_decay)


# How a run's settings make each optimizer; what it does then, describe() knows.
OPTIMIZERS: dict[str, Callable[[Tensor, Settings], Optimizer]] = {
    "sgd": _of_sgd(torch.optim.SGD),
    "sgdw": _of_sgd(SGDW),
    "sgdp": _of_sgd(SGDP),
    "adamw": _of_adam(torch.optim.AdamW),
    "adamp": _of_adam(AdamP),
    "lion": _of_adam(Lion),
    "muon": lambda p, s: _muon([p], lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay),
    "sphere": lambda p, s: _sphere(p, s),
}


def _muon(params: Any, **options: Any) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no Muon; it came with torch 2.9")
    made: Optimizer = torch.optim.Muon(params, **options)
    return made


def _sphere(p: Tensor, s: Settings) -> Optimizer:
    if s.weight_decay:
        raise ValueError(f"norms on spheres do not decay, but weight_decay is {s.weight_decay}")
    # Any weight will do: what a relative step does depends on none.
    return sphere(torch.optim.SGD([torch.ones(1, 1)], lr=s.lr), View.layer())


@dataclass(frozen=True)
class Settings:
    """How a run will be trained.

    Args:
        optimizer: one of :data:`OPTIMIZERS`: ``"sgd"``, ``"sgdw"``, ``"sgdp"``, ``"adamw"``,
            ``"adamp"``, ``"lion"``, ``"muon"``, or ``"sphere"`` around any of them.
        lr: η, at its highest.
        weight_decay: λ, as the optimizer means it.
        steps: of the run.
        momentum: of SGD and its kin, and of Muon (default: 0).
        betas: of AdamW, AdamP and Lion (default: (0.9, 0.999)).
        schedule: ``"constant"`` or ``"cosine"``, which ends at 0 (default: ``"constant"``).
        gradient: √E‖g̃‖², the RMS norm of a slice's gradient at weight norm 1, on which only SGD
            and its kin depend; a monitor's ``scaled_gradient`` measures it (default: 1).
        dtype: whose range must hold (default: float32).
        wd_ratio: ρ of AdamP and SGDP, whose gate is taken to hold (default: 0.1, as theirs).
    """

    optimizer: str
    lr: float
    weight_decay: float
    steps: int
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "cosine"] = "constant"
    gradient: float = 1.0
    dtype: torch.dtype = torch.float32
    wd_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"Invalid optimizer: {self.optimizer!r}; must be one of {', '.join(OPTIMIZERS)}"
            )
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"Invalid schedule: {self.schedule!r}; must be 'constant' or 'cosine'")

    def lrs(self) -> list[float]:
        """The learning rate of each step."""
        if self.schedule == "constant":
            return [self.lr] * self.steps
        return [self.lr * (1 + math.cos(math.pi * t / self.steps)) / 2 for t in range(self.steps)]

    def rule(self, shape: Sequence[int]) -> UpdateRule:
        """What a step at the highest learning rate does to a scale-invariant weight.

        Args:
            shape: of the weight.
        """
        p = torch.empty(tuple(shape), device="meta")
        optimizer = OPTIMIZERS[self.optimizer](p, self)
        (group,) = optimizer.param_groups
        if "wd_ratio" in group:
            group["wd_ratio"] = self.wd_ratio
        (member,) = group["params"]
        return rule_of(optimizer, group, member).with_gate(True)


@dataclass(frozen=True)
class Weights:
    """Scale-invariant slices that are alike.

    Args:
        name: of the weight.
        slices: how many.
        entries: of each.
        norm: of each, before training.
        shape: of the weight (default: a square matrix of rows of so many entries).
    """

    name: str
    slices: int
    entries: int
    norm: float
    shape: tuple[int, ...] = ()

    def known(self, settings: Settings) -> dict[str, Any]:
        """What the closed forms need to know of these weights."""
        return {
            "gradient_square": settings.gradient**2,
            "entries": self.entries,
            "shape": self.shape or (self.entries, self.entries),
        }


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
            "angle per step",
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
                    _settles(row.settles, self.settings.steps),
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
        """The expected norm and RMS angle of one weight before each step.

        Empty where no closed form of the norm is known, as for Lion.
        """
        lrs, known = self.settings.lrs(), weights.known(self.settings)
        rule = self.settings.rule(known["shape"])
        found = norm_trajectory(rule, lrs, weights.norm, **known)
        if math.isnan(found[-1]):
            return [], []
        angles = [
            angle_at(replace(rule, lr=lr), norm, **known)
            for lr, norm in zip(lrs, found, strict=False)
        ]
        return found[:-1], angles


def plan(settings: Settings, weights: Sequence[Weights]) -> Plan:
    """Predict norms, angles and effective learning rates, by :mod:`normwise.theory.equilibrium`.

    Args:
        settings: how the run will be trained.
        weights: what will be trained: scale-invariant weights alone.

    Raises:
        ValueError: for settings out of range, or beyond where the closed forms hold; if there is
            no weight to plan for.
    """
    s = settings
    if s.steps < 1:
        raise ValueError(f"Invalid steps: {s.steps}; must be 1 or more")
    takes = [w for w in weights if s.optimizer != "muon" or len(w.shape) in (0, 2)]
    if not takes:
        raise ValueError(f"there is no weight to plan for that {s.optimizer} can train")
    rows = tuple(_row(s, w) for w in takes)
    notes = _notes(s, rows)
    if left := [w.name for w in weights if w not in takes]:
        notes.append(f"Muon takes matrices only, and not {', '.join(left)}.")
    return Plan(s, rows, tuple(notes))


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
            entries = p.numel() // len(values)
            found.append(Weights(name, len(values), entries, norm, tuple(p.shape)))
    return found


def _row(s: Settings, w: Weights) -> PlanRow:
    known = w.known(s)
    rule = s.rule(known["shape"])
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


def _notes(s: Settings, rows: Sequence[PlanRow]) -> list[str]:
    rule = s.rule(rows[0].weights.known(s)["shape"])
    notes = []
    if rule.update.is_relative:
        return [
            "Norms are fixed: the angle per step is the arctangent of the learning rate, whatever "
            "the norm, the gradient and the wrapped optimizer, and follows its schedule."
        ]
    if s.weight_decay == 0:
        notes.append(
            "Without weight decay the norms grow for as long as there is a gradient, and the "
            "effective learning rate falls towards 0."
        )
    else:
        if any(math.isfinite(row.norm) for row in rows):
            notes += _settling(s, rule, rows)
        shrink = float(rule.shrink)
        dtype = str(s.dtype).removeprefix("torch.")
        gone = min(steps_to_norm(r.weights.norm, norm_range(s.dtype)[0], 1 - shrink) for r in rows)
        notes.append(
            f"A slice without a gradient loses {_percent(shrink)} of its norm per "
            f"step; 1/‖w‖ passes {dtype}'s range after {gone:,.0f} steps."
        )
        notes += _schedule_note(s, rule)
    if rule.update is Update.GRADIENT:
        notes.append(
            f"Norms are for gradients of RMS norm {s.gradient:g} at weight norm 1 (--gradient); "
            "they go with its square root. Angles do not depend on it."
        )
    elif rule.update is Update.SIGN:
        notes.append("No closed form of the norm is known for Lion.")
    else:
        notes.append("Norms are for gradients in which noise rules, so that updates are of size 1.")
    return notes


def _settling(s: Settings, rule: UpdateRule, rows: Sequence[PlanRow]) -> list[str]:
    """Which norms settle within the run, and what is left of the start at its end."""
    late = [row for row in rows if row.settles > s.steps]
    notes = []
    if late:
        slowest = max(row.settles for row in late)
        how = ""
        if rule.is_projected and rule.wd_ratio < 1:
            how = f" (wd_ratio {rule.wd_ratio:g} makes that {1 / rule.wd_ratio:g} times as long)"
        notes.append(
            f"Not settled within the {s.steps:,} steps: {len(late)} of {len(rows)}, which would "
            f"take up to {math.ceil(slowest):,} at the highest learning rate{how}; until then "
            "norms and angles are not those at which they would settle."
        )
    elif any(row.settles for row in rows):
        notes.append(
            f"All are within 10% of where they settle after "
            f"{math.ceil(max(row.settles for row in rows)):,} of the {s.steps:,} steps, at the "
            "highest learning rate; from then on lr·weight_decay alone sets the angle per step."
        )
    else:
        notes.append(
            "All start within 10% of where they settle at the highest learning rate; there "
            "lr·weight_decay alone sets the angle per step."
        )
    most = max(row.remembered for row in rows)
    notes.append(
        "The norm at the start is forgotten by the end: twice the norm would end less than 1% "
        "higher."
        if most < 0.01
        else "The norm at the start counts to the end: twice the norm would end up to "
        f"{most:.0%} higher."
    )
    return notes


def _schedule_note(s: Settings, rule: UpdateRule) -> list[str]:
    """How long the run without decay that takes the same directions fits, where one is known."""
    dtype = str(s.dtype).removeprefix("torch.")
    if rule.is_projected:
        return []
    if rule.update is Update.GRADIENT and rule.coupling is Coupling.L2:
        name = "sgd_without_decay"
        fits = sgd_schedule_limit(s.lr, s.weight_decay, s.momentum, s.dtype)
    elif rule.update is Update.NORMALIZED:
        name = "adamw_without_decay"
        fits = adamw_schedule_limit(s.lr, s.weight_decay, s.dtype)
    else:
        return []
    return [
        "A run without decay and with growing learning rates (normwise.theory."
        f"{name}) takes the same directions; {dtype} holds it for {fits:,} steps at this learning "
        "rate."
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def _settles(steps: float, run: int) -> str:
    if math.isnan(steps):
        return "–"
    if steps == 0:
        return "from the start"
    return _steps(steps) + (", beyond the run" if steps > run else "")


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
