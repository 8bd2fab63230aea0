"""Charts of sweeps: the metric over the swept setting, or as shades over two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

from normwise.figures import Axis, Chart, Heat, Line, Lines, Spacing, marks, nth_of
from normwise.figures.tables import Column, Row, Table
from normwise.lab.running.export import sweep_cells, sweep_head

if TYPE_CHECKING:
    from normwise.lab.running.results import Entry
    from normwise.lab.running.sweeps import Sweep

__all__ = ["sweep_charts", "sweep_table"]

# Points are drawn that are at most this many times as far from the best as the median point: those
# beyond would flatten the rest.
_FAR = 2.5
# From this ratio of the largest to the smallest value on, an axis is logarithmic.
_WIDE = 4
_NUMBERS = ("seeds", "mean ± sd", "over the first row's", "regret")


def sweep_table(found: Sequence[Sweep]) -> Table:
    """The best point of each sweep, and its regret.

    Args:
        found: the sweeps of one recipe at one scale.
    """
    columns = [Column(title, words=title not in _NUMBERS) for title in sweep_head(found)]
    return Table(tuple(columns), tuple(Row(sweep_cells(s)[: len(columns)]) for s in found))


def sweep_charts(found: Sequence[Sweep]) -> list[Chart]:
    """A chart for each method with a line for each row; of a single row one with all methods.

    Where two settings are swept there are shades, a chart for each method and row. Of more than two
    nothing is drawn.

    Args:
        found: the sweeps of one recipe at one scale.
    """
    charts: list[Chart] = [_heat(sweep, found) for sweep in found if len(sweep.keys) == 2]
    curves = [sweep for sweep in found if len(sweep.keys) == 1]
    if not curves:
        return charts
    limit = _limit(curves)
    if len({sweep.row for sweep in curves}) == 1:
        named = marks(sweep.method for sweep in curves)
        by_key: dict[str, list[tuple[Sweep, str, str]]] = {}
        for sweep in curves:
            entry = (sweep, sweep.label, named[sweep.method][0])
            by_key.setdefault(sweep.keys[0], []).append(entry)
        return charts + [_lines(curves[0].row, lines, limit) for lines in by_key.values()]
    for method in dict.fromkeys(sweep.method for sweep in curves):
        own = [sweep for sweep in curves if sweep.method == method]
        lines = [(s, s.row, nth_of(place, len(own))) for place, s in enumerate(own)]
        charts.append(_lines(own[0].label, lines, limit))
    return charts


def _mean(entry: Entry) -> float:
    """The mean over seeds, not a number where one diverged."""
    return fmean(entry.values.values()) if entry.values and not entry.failed else math.nan


def _limit(found: Sequence[Sweep]) -> tuple[float, float]:
    """The least and the greatest mean that are drawn: one of them is the best."""
    means = [mean for s in found for e in s.entries if math.isfinite(mean := _mean(e))]
    if not means:
        return -math.inf, math.inf
    higher = found[0].metric.higher_is_better
    best = max(means) if higher else min(means)
    far = best + _FAR * (median(means) - best)
    return (far, best) if higher else (best, far)


def _axis(sweep: Sweep) -> Axis:
    metric = sweep.metric
    unit = f", {metric.unit}" if metric.unit else ""
    return Axis(f"{metric.title}{unit}", text=lambda v: f"{v:.{metric.digits}f}")


def _lines(
    title: str, drawn: Sequence[tuple[Sweep, str, str]], limit: tuple[float, float]
) -> Lines:
    """Means over seeds over the swept setting, with the range of the seeds."""
    lines = []
    for sweep, name, colour in drawn:
        shown = [e for e in sweep.entries if limit[0] <= _mean(e) <= limit[1]]
        several = any(len(e.values) > 1 for e in shown)
        band = [list(e.values.values()) for e in shown] if several else []
        lines.append(
            Line(
                name,
                name,
                tuple(e.point[0][1] for e in shown),
                tuple(map(_mean, shown)),
                tuple(map(min, band)),
                tuple(map(max, band)),
                colour,
            )
        )
    values = [x for line in lines for x in line.x]
    wide = bool(values) and min(values) > 0 and max(values) >= _WIDE * min(values)
    label = drawn[0][0].keys[0]
    x = Axis(f"{label}, log scale", Spacing.LOG) if wide else Axis(label)
    return Lines(title, "", x, _axis(drawn[0][0]), tuple(lines))


def _heat(sweep: Sweep, found: Sequence[Sweep]) -> Heat:
    """Means over seeds as shades: the first setting from bottom to top, the second across."""
    metric = sweep.metric
    (down, across) = sweep.keys
    means = {entry.point: _mean(entry) for entry in sweep.entries}
    rows, columns = (sorted({p[k][1] for p in means}, reverse=k == 0) for k in (0, 1))
    low, high = _limit([s for s in found if len(s.keys) == 2 and s.row == sweep.row])
    values = [[means.get(((down, a), (across, b)), math.nan) for b in columns] for a in rows]
    best = dict(sweep.best.point)
    several = len({s.row for s in found}) > 1
    return Heat(
        f"{sweep.label}, {sweep.row}" if several else sweep.label,
        "",
        tuple(f"{value:g}" for value in rows),
        tuple(f"{value:g}" for value in columns),
        tuple(map(tuple, values)),
        f"{across}; rows: {down}",
        metric.unit,
        text=lambda value: f"{value:.{min(metric.digits, 1)}f}",
        least=low if math.isfinite(low) else None,
        most=high if math.isfinite(high) else None,
        outlined=(rows.index(best[down]), columns.index(best[across])),
    )
