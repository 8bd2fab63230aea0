"""Charts of what a monitor has measured and of what a plan expects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from normwise.figures import (
    Axis,
    Chart,
    Dots,
    Figure,
    Heat,
    Line,
    Lines,
    Series,
    Spacing,
    matplotlib_figure,
    piece,
    ramp,
)
from normwise.figures.layout import natural_height
from normwise.monitor.history import History, Trajectory
from normwise.updates import Update

__all__ = ["charts", "draw", "draw_plan", "panels"]

_STEP = Axis("step", Spacing.TIGHT)
# More columns of a heat map than these would be finer than a screen's pixels.
_COLUMNS = 240


def charts(history: History) -> dict[str, Chart]:
    """What a monitor has measured: norms, effective learning rates, angles, and equilibrium.

    Raises:
        ValueError: if nothing has been measured yet.
    """
    if not history.measurements:
        raise ValueError("nothing has been measured yet; call monitor.fetch() after some steps")
    power = "‖w‖²" if history.update is Update.GRADIENT else "‖w‖"
    return {
        "norms": _over_steps(history, "norm", "Norm", "geometric mean over a layer's slices"),
        "effective_lrs": _over_steps(
            history,
            "effective_lr",
            "Effective learning rate",
            f"η/{power}, geometric mean over a layer's slices",
        ),
        "angles": _angles(history),
        "equilibrium": _equilibrium(history),
    }


def draw(history: History) -> Any:
    """All charts as one matplotlib figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: if nothing has been measured yet.
    """
    return matplotlib_figure(Figure("", tuple(charts(history).values()), columns=2, width=1280))


def panels(history: History) -> dict[str, str]:
    """Each chart as ``<svg>`` elements to put into a page, all equally high; see ``piece``.

    A chart without anything to show is left out.

    Raises:
        ValueError: if nothing has been measured yet.
    """
    shown = {name: chart for name, chart in charts(history).items() if not chart.empty}
    height = max((natural_height(chart, 540) for chart in shown.values()), default=0.0)
    return {name: piece(chart, height) for name, chart in shown.items()}


def draw_plan(trajectories: Sequence[Trajectory], schedule: str) -> Any:
    """The expected norms and angles of a plan over its steps, as a matplotlib figure.

    Args:
        trajectories: one line each.
        schedule: of the learning rate, ``"constant"`` or ``"cosine"``.

    Raises:
        ImportError: without matplotlib.
        ValueError: where no closed form of the norms is known.
    """
    if not any(t.norms for t in trajectories):
        raise ValueError("there is no picture: no closed form of the norms is known")
    names = _short(t.name for t in trajectories)
    note = "dotted: equilibrium" + ("" if schedule == "constant" else " at the highest lr")

    def lines(values: Sequence[Sequence[float]], levels: Sequence[float]) -> tuple[Line, ...]:
        return tuple(
            Line(t.name, name, *_thinned(own), colour=_nth(k, len(names)), level=level)
            for k, (t, name, own, level) in enumerate(
                zip(trajectories, names, values, map(_finite_level, levels), strict=True)
            )
        )

    # A cosine ends at 0, which would leave no room for the rest.
    angles = [_above(t.angles, max(t.angles, default=0.0) / 1e4) for t in trajectories]
    return matplotlib_figure(
        Figure(
            "",
            (
                Lines(
                    "Expected norm",
                    note,
                    _STEP,
                    Axis("norm, log scale", Spacing.LOG),
                    lines([t.norms for t in trajectories], [t.settled_norm for t in trajectories]),
                ),
                Lines(
                    "Expected angle per step",
                    note,
                    _STEP,
                    Axis("radians, log scale", Spacing.LOG),
                    lines(angles, [t.settled_angle for t in trajectories]),
                ),
            ),
            width=1180,
        )
    )


def _over_steps(history: History, quantity: str, title: str, note: str) -> Lines:
    """One line a layer, in the colours of their order."""
    steps, values = history.series(quantity)
    lines = tuple(
        Line(
            layer,
            name,
            tuple(map(float, steps)),
            tuple(_above(values[:, k].tolist(), 0.0)),
            colour=_nth(k, len(history.layers)),
        )
        for k, (layer, name) in enumerate(zip(history.layers, _short(history.layers), strict=True))
    )
    return Lines(title, note, _STEP, Axis(f"{title.lower()}, log scale", Spacing.LOG), lines)


def _angles(history: History) -> Heat:
    steps, values = history.series("angular_update")
    every = max(1, -(-len(steps) // _COLUMNS))
    steps, values = steps[::every], values[::every]
    return Heat(
        "Angle per step",
        "by which a step turns a layer, root mean square over its slices",
        _short(history.layers),
        tuple(f"{step:,}" for step in steps),
        tuple(tuple(_above(row, 0.0)) for row in values.T.tolist()),
        "step",
        "rad",
        Spacing.LOG,
    )


def _equilibrium(history: History) -> Dots:
    """Measured over predicted angle and norm of each layer, over the last quarter of the run."""
    first = len(history.measurements) * 3 // 4

    def ratio(name: str) -> tuple[float, ...]:
        def late(quantity: str) -> Tensor:
            return history.series(quantity)[1][first:]

        return tuple((late(name) / late(f"predicted_{name}")).nanmean(0).tolist())

    return Dots(
        "Measured ÷ predicted equilibrium",
        "over the last quarter of the run; band: ±10%",
        Axis("measured ÷ predicted, log scale", Spacing.LOG, holds=(0.5, 2.0)),
        _short(history.layers),
        (
            Series("angle", ratio("angular_update"), colours=("blue",)),
            Series("norm", ratio("norm"), colours=("orange",)),
        ),
        reference=1.0,
        band=(0.9, 1.1),
    )


def _short(names: Iterable[str]) -> tuple[str, ...]:
    """Names of weights without the ending that all have; numbers alone would say too little."""
    cut = (name.replace(".parametrizations.weight.original", ".weight") for name in names)
    return tuple(
        name if name.removesuffix(".weight").isdigit() else name.removesuffix(".weight")
        for name in cut
    )


def _nth(place: int, count: int) -> str:
    return ramp("order", place / max(count - 1, 1))


def _above(values: Sequence[float], least: float) -> list[float]:
    return [v if math.isfinite(v) and v > least else math.nan for v in values]


def _finite_level(value: float) -> float | None:
    return value if math.isfinite(value) and value > 0 else None


def _thinned(values: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """At most some 500 steps and values: a line needs no more points than it has pixels."""
    every = max(1, len(values) // 500)
    kept = sorted({*range(0, len(values), every), len(values) - 1} if values else ())
    return tuple(map(float, kept)), tuple(values[k] for k in kept)
