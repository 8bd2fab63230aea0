"""What weight decay does to each group of an optimizer: :func:`explain`.

Equilibria are those of scale-invariant weights, see :func:`normwise.theory.equilibrium_of`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.checks import check_optimizer, check_report
from normwise.decay.attached import label
from normwise.decay.epsilon_shifted import AttachedRegularizer
from normwise.decay.policies import AttachedPolicy, Cautious
from normwise.figures.tables import Column, Table, paragraph
from normwise.geometry import View, norms
from normwise.protocols import AnalysisReport
from normwise.theory import equilibrium_of
from normwise.updates import Coupling, Update, UpdateRule, attached_to, rule_of

__all__ = ["Explanation", "GroupDecay", "explain"]


@dataclass(frozen=True)
class GroupDecay:
    """The decay of one parameter group at its present learning rate.

    ``None`` stands for what is not known.

    Attributes:
        label: the group's number, and its name if it has one.
        entries: of all its parameters.
        rule: what decays it: the optimizer, or a policy.
        coupling: ``"L2"`` or ``"decoupled"``.
        weight_decay: λ in torch's convention, which the learning rate multiplies; SGDP's own is
            divided by 1 − momentum.
        per_step: ηλ, the papers' λ: the part of a weight that the term takes in a step, before
            momentum repeats it or moments divide it.
        half_life: the steps in which a weight without a gradient loses half; infinite without
            decay.
        norm: the smallest and the largest equilibrium norm of the slices of its weights.
        rms: the root mean square of an entry in equilibrium, where that is the same for all.
        angle: the root mean square of the angle that a step turns a slice by, in radians.
    """

    label: str
    entries: int
    rule: str
    coupling: Coupling | None
    weight_decay: float | None
    per_step: float | None
    half_life: float | None
    norm: tuple[float, float] | None = None
    rms: float | None = None
    angle: float | None = None


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str()`` is a table.

    Attributes:
        groups: one row for each parameter group.
        notes: what a reader must know beside the rows.
    """

    groups: tuple[GroupDecay, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        notes = (paragraph(f"note: {note}") for note in self.notes)
        return "\n".join([str(Table.of(_COLUMNS, map(_cells, self.groups))), *notes])


_COLUMNS = (
    "group",
    Column("entries"),
    "decay",
    Column("λ", "torch"),
    Column("η·λ"),
    Column("half-life", "steps"),
    Column("norm →"),
    Column("rms →"),
    Column("angle", "per step"),
)
_unknown = "not known"


def _cells(g: GroupDecay) -> tuple[str, ...]:
    if g.per_step == 0:
        return g.label, f"{g.entries:,}", "none", "0", "0", *"––––"
    norm = _unknown
    if g.norm is not None:
        least, most = g.norm
        norm = f"{least:.3g} … {most:.3g}" if most > 1.005 * least else f"{least:.3g}"
    return (
        g.label,
        f"{g.entries:,}",
        f"{g.rule}, {g.coupling.value}" if g.coupling else g.rule,
        _number(g.weight_decay),
        _number(g.per_step),
        _unknown if g.half_life is None else f"{g.half_life:,.0f}",
        norm,
        _number(g.rms),
        _unknown if g.angle is None else f"{math.degrees(g.angle):.3g}°",
    )


def _number(value: float | None) -> str:
    return _unknown if value is None else f"{value:.3g}"


def explain(optimizer: Optimizer, report: AnalysisReport | None = None) -> Explanation:
    """Say what decay each group has, in both conventions, and where it leads.

    Norms and angles are those at which scale-invariant weights settle if the learning rate stays.
    For SGD and its kin they need E‖g̃‖², the mean square of the gradient at norm 1. It is estimated
    from the present gradients, one batch: call it after ``backward()`` and before ``zero_grad()``.

    Args:
        optimizer: any torch optimizer; policies that are attached to it count.
        report: of :func:`normwise.analyze`: equilibria are then of the weights that it finds
            scale-invariant, slice by slice. Default: of all weights of two dimensions or more, as
            if each were scale-invariant as a whole.

    Returns:
        An object to print. It says "not known" where no closed form is.
    """
    check_optimizer(optimizer)
    views = None
    if report is not None:
        check_report(report)
        views = {p: view for p, view in report.parameter_views().items() if p.ndim > 1}
    rules = [rule_of(optimizer, group).converted(float) for group in optimizer.param_groups]
    rows = [
        _row(optimizer, i, group, rule, views)
        for i, (group, rule) in enumerate(zip(optimizer.param_groups, rules, strict=True))
    ]
    shifted = {
        row.label
        for row, group in zip(rows, optimizer.param_groups, strict=True)
        for other in attached_to(optimizer)
        if isinstance(other, AttachedRegularizer) and set(other.params) & set(group["params"])
    }
    notes = [
        "norm, rms and angle: of scale-invariant weights, at the present learning rate; "
        + (
            "taking every matrix for one slice that is scale-invariant (give a report to know)"
            if views is None
            else "of those that the report finds, slice by slice"
        )
    ]
    policies = [o.policy for o in attached_to(optimizer) if isinstance(o, AttachedPolicy)]
    if any(isinstance(policy, Cautious) for policy in policies):
        notes.append("cautious decay skips entries, so that η·λ is an upper bound")
    if any(rule.is_projected is None for rule in rules):
        notes.append("where AdamP's or SGDP's gate holds, the decay is wd_ratio times what is said")
    if shifted:
        notes.append(f"EpsilonShiftedL2 decays weights of {', '.join(sorted(shifted))} too")
    return Explanation(tuple(rows), tuple(notes))


def _row(
    optimizer: Optimizer,
    index: int,
    group: dict[str, Any],
    rule: UpdateRule,
    views: Mapping[nn.Parameter, View] | None,
) -> GroupDecay:
    coupling = rule.coupling if rule.coupling in (Coupling.L2, Coupling.DECOUPLED) else None
    norm = rms = angle = None
    if rule.decay_per_step != 0:
        norm, rms, angle = _settled(optimizer, group, views)
    return GroupDecay(
        label(optimizer, index),
        sum(p.numel() for p in group["params"]),
        rule.changed_by[-1] if rule.changed_by else "optimizer",
        coupling,
        _known(rule.weight_decay),
        _known(rule.decay_per_step),
        _half_life(rule),
        norm,
        rms,
        angle,
    )


def _known(value: float | Tensor) -> float | None:
    return None if math.isnan(value) else float(value)


def _half_life(rule: UpdateRule) -> float | None:
    """Steps in which a weight without a gradient halves. Without one a gate stays shut."""
    rule = rule.with_gate(False)
    if rule.decay_per_step == 0:
        return math.inf
    if rule.coupling is Coupling.DECOUPLED:
        kept = 1 - rule.shrink
        return math.log(0.5) / math.log(kept) if 0 < kept < 1 else None
    is_sgd = rule.update is Update.GRADIENT and not math.isnan(rule.scale)
    if rule.coupling is not Coupling.L2 or not is_sgd or rule.nesterov or rule.view is not None:
        return None  # moments divide what is left by its own size
    # w and its buffer: the larger root of α² − (1 + γ − ηλ(1 − dampening))α + γ = 0.
    gamma = rule.momentum
    middle = 1 + gamma - rule.decay_per_step * (1 - rule.dampening)
    square = middle**2 - 4 * gamma
    root = (middle + math.sqrt(square)) / 2 if square >= 0 else math.sqrt(gamma)
    return math.log(0.5) / math.log(root) if 0 < root < 1 else None


def _settled(
    optimizer: Optimizer, group: dict[str, Any], views: Mapping[nn.Parameter, View] | None
) -> tuple[tuple[float, float] | None, float | None, float | None]:
    """The range of equilibrium norms of a group's slices, the rms of entries, and the angle."""
    lengths, roots, angles = [], set(), set()
    for p in group["params"]:
        view = View.layer() if views is None and p.ndim > 1 else (views or {}).get(p)
        if view is None:
            continue
        rule = rule_of(optimizer, group, p).converted(float)
        if views is not None:  # it is scale-invariant, for which the gate holds
            rule = rule.with_gate(True)
        slices = view.slices(p.detach())
        entries = slices.numel() // len(slices)
        for square in _gradient_squares(p, view):
            try:
                found = equilibrium_of(rule, gradient_square=square, entries=entries, shape=p.shape)
            except ValueError:  # beyond where one exists
                return None, None, None
            if math.isfinite(found.norm):
                lengths.append(found.norm)
                roots.add(round(found.norm / math.sqrt(entries), 12))
            angles.add(_known(found.angle))
    norm = (min(lengths), max(lengths)) if lengths else None
    rms = roots.pop() if len(roots) == 1 else None
    return norm, rms, angles.pop() if len(angles) == 1 else None


@torch.no_grad()
def _gradient_squares(p: Tensor, view: View) -> list[float]:
    """‖g̃‖² of each slice from the present gradient: (‖g‖‖w‖)²; NaN where there is none."""
    if p.grad is None:
        return [math.nan]
    products = (norms(p, view) * norms(p.grad, view)).square()
    return [square or math.nan for square in products.tolist()]
