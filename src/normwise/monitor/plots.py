"""Charts of what a monitor has measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    nth_of,
    piece,
    short_names,
)
from normwise.figures.layout import natural_height
from normwise.monitor.history import History
from normwise.updates import Update

__all__ = ["charts", "panels", "picture"]

_STEP = Axis("step", Spacing.TIGHT)
# More columns of a heat map than these would be finer than a screen's pixels.
_COLUMNS = 240


def charts(history: History) -> dict[str, Chart]:
    """What a monitor has measured: norms, effective learning rates, angles, beside the expected.

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
        **({"expected": _expected(history)} if history.knows_invariance else {}),
    }


def picture(history: History) -> Figure:
    """All charts together.

    Raises:
        ValueError: if nothing has been measured yet.
    """
    return Figure("", tuple(charts(history).values()), columns=2, width=1040)


def panels(history: History) -> dict[str, str]:
    """Each chart as ``<svg>`` elements to put into a page, all equally high; see ``piece``.

    A chart without anything to show is left out.

    Raises:
        ValueError: if nothing has been measured yet.
    """
    shown = {name: chart for name, chart in charts(history).items() if not chart.empty}
    height = max((natural_height(chart, 540) for chart in shown.values()), default=0.0)
    return {name: piece(chart, height) for name, chart in shown.items()}


def _over_steps(history: History, quantity: str, title: str, note: str) -> Lines:
    """One line a layer, in the colours of their order."""
    steps, values = history.series(quantity)
    lines = tuple(
        Line(
            layer,
            name,
            tuple(map(float, steps)),
            tuple(_above(values[:, k].tolist(), 0.0)),
            colour=nth_of(k, len(history.layers)),
        )
        for k, (layer, name) in enumerate(
            zip(history.layers, short_names(history.layers), strict=True)
        )
    )
    return Lines(title, note, _STEP, Axis(f"{title.lower()}, log scale", Spacing.LOG), lines)


def _angles(history: History) -> Heat:
    steps, values = history.series("angular_update")
    every = max(1, -(-len(steps) // _COLUMNS))
    steps, values = steps[::every], values[::every]
    return Heat(
        "Angle per step",
        "by which a step turns a layer, root mean square over its slices",
        short_names(history.layers),
        tuple(f"{step:,}" for step in steps),
        tuple(tuple(_above(row, 0.0)) for row in values.T.tolist()),
        "step",
        "rad",
        Spacing.LOG,
    )


def _expected(history: History) -> Dots:
    """Measured over expected angle and norm of each layer, over the last quarter of the run."""
    first = len(history.measurements) * 3 // 4

    def ratio(name: str) -> tuple[float, ...]:
        def late(quantity: str) -> Tensor:
            return history.series(quantity)[1][first:]

        return tuple((late(name) / late(f"expected_{name}")).nanmean(0).tolist())

    return Dots(
        "Measured ÷ expected",
        "norm: from the first measurement on, at the rates since; angle: at the norm; last quarter",
        Axis("measured ÷ expected, log scale", Spacing.LOG, holds=(0.5, 2.0)),
        short_names(history.layers),
        (
            Series("angle", ratio("angular_update"), colours=("blue",)),
            Series("norm", ratio("norm"), colours=("orange",)),
        ),
        reference=1.0,
        band=(0.9, 1.1),
    )


def _above(values: Sequence[float], least: float) -> list[float]:
    return [v if math.isfinite(v) and v > least else math.nan for v in values]
