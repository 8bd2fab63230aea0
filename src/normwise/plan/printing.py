"""A plan as a person reads it: a table, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normwise.figures.tables import Column, Table
from normwise.plan.forecast import PlanRow
from normwise.plan.settings import Settings
from normwise.theory import adamw_schedule_limit, norm_range, sgd_schedule_limit, steps_to_norm
from normwise.updates import Coupling, Update, UpdateRule

__all__ = ["notes_of", "table_of"]

_COLUMNS = (
    "weight",
    Column("slices"),
    Column("entries"),
    Column("norm"),
    Column("settles", "at"),
    Column("within 10%", "after, steps"),
    Column("angle", "per step, rad"),
    Column("norm", "at the end"),
    Column("effective lr", "first → settled"),
)


def table_of(s: Settings, rows: Sequence[PlanRow]) -> Table:
    """The numbers of a plan.

    Args:
        s: how the run will be trained.
        rows: what to expect of its weights.
    """

    def cells(row: PlanRow) -> tuple[str, ...]:
        w = row.weights
        return (
            w.name,
            str(w.slices),
            str(w.entries),
            _number(w.norm),
            _number(row.norm),
            _settles(row.settles, s.steps),
            "–" if math.isnan(row.angle) else f"{row.angle:.2e}",
            _number(row.final_norm),
            " → ".join(map(_number, row.effective_lr)),
        )

    return Table.of(_COLUMNS, map(cells, rows))


def notes_of(s: Settings, rows: Sequence[PlanRow]) -> list[str]:
    """What follows from the numbers, in sentences.

    Args:
        s: how the run will be trained.
        rows: what to expect of its weights, at least one.
    """
    rule = rows[0].weights.rule(s)
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
    return f"{math.ceil(steps):,}" + (", beyond the run" if steps > run else "")


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "grows" if math.isinf(value) else f"{value:.3g}"
