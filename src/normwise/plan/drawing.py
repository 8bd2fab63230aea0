"""The norms and angles that a plan expects, as charts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normwise.figures import Axis, Figure, Line, Lines, Spacing, nth_of, short_names
from normwise.plan.forecast import PlanRow, trajectory
from normwise.plan.settings import Settings

__all__ = ["figure"]

_STEP = Axis("step", Spacing.TIGHT)


def figure(s: Settings, rows: Sequence[PlanRow]) -> Figure:
    """The expected norms and angles over a run, a line for each weight.

    Args:
        s: how the run will be trained.
        rows: what to expect of its weights.

    Raises:
        ValueError: where no closed form of the norms is known.
    """
    norms, angles = zip(*(trajectory(s, row.weights) for row in rows), strict=True)
    if not any(norms):
        raise ValueError("there is no picture: no closed form of the norms is known")
    names = [row.weights.name for row in rows]
    note = "dotted: equilibrium" + ("" if s.schedule == "constant" else " at the highest lr")

    def chart(
        title: str, unit: str, values: Sequence[Sequence[float]], levels: Sequence[float]
    ) -> Lines:
        lines = (
            Line(name, short, *_thinned(own), colour=nth_of(k, len(names)), level=_level(level))
            for k, (name, short, own, level) in enumerate(
                zip(names, short_names(names), values, levels, strict=True)
            )
        )
        return Lines(title, note, _STEP, Axis(f"{unit}, log scale", Spacing.LOG), tuple(lines))

    return Figure(
        "",
        (
            chart("Expected norm", "norm", norms, [row.norm for row in rows]),
            chart(
                "Expected angle per step",
                "radians",
                [_seen(own) for own in angles],
                [row.angle for row in rows],
            ),
        ),
        width=1180,
    )


def _seen(angles: Sequence[float]) -> list[float]:
    """Without the end of a cosine at 0, which would leave no room for the rest."""
    least = max(angles, default=0.0) / 1e4
    return [v if v > least else math.nan for v in angles]


def _level(value: float) -> float | None:
    return value if math.isfinite(value) and value > 0 else None


def _thinned(values: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """At most some 500 steps and values: a line needs no more points than it has pixels."""
    every = max(1, len(values) // 500)
    kept = sorted({*range(0, len(values), every), len(values) - 1} if values else ())
    return tuple(map(float, kept)), tuple(values[k] for k in kept)
