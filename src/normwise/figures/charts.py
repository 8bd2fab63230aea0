"""What a chart shows, as plain data: every chart is described once and drawn in every form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from normwise.figures.scales import Spacing

__all__ = [
    "Axis",
    "Chart",
    "Dots",
    "Figure",
    "Heat",
    "Line",
    "Lines",
    "Link",
    "Links",
    "Plane",
    "Series",
    "short_names",
]


def _three_digits(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def short_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names of weights without the ending that all have; numbers alone would say too little.

    Args:
        names: of parameters.

    Returns:
        As many labels.
    """
    cut = (name.replace(".parametrizations.weight.original", ".weight") for name in names)
    return tuple(
        name if name.removesuffix(".weight").isdigit() else name.removesuffix(".weight")
        for name in cut
    )


@dataclass(frozen=True)
class Axis:
    """An axis.

    Args:
        label: what it shows, with the unit.
        spacing: of its values (default: even, with round ends).
        holds: values that it must hold, whatever is drawn (default: none).
        text: a value as a reader sees it under the pointer (default: three digits).
    """

    label: str
    spacing: Spacing = Spacing.LINEAR
    holds: tuple[float, ...] = ()
    text: Callable[[float], str] = _three_digits


@dataclass(frozen=True)
class Line:
    """A line with a band of uncertainty.

    Args:
        name: what it is switched on and off by.
        label: written at its end; empty for none.
        x: where it has values.
        y: the values; it is interrupted where one is not finite.
        low, high: the band; empty for none.
        colour: a name in :data:`normwise.figures.COLOURS`.
        dash: dashes and gaps in line widths; empty for a solid line.
        level: a value that it is expected to settle at, drawn dotted; None for none.
    """

    name: str
    label: str
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    colour: str = "blue"
    dash: tuple[float, ...] = ()
    level: float | None = None

    @property
    def drawn(self) -> bool:
        """Whether it has any finite value."""
        return any(map(math.isfinite, self.y))


@dataclass(frozen=True)
class Lines:
    """Lines over a common axis; ``rules`` are verticals, such as drops of a learning rate.

    Args:
        title: over the chart.
        note: under the title; empty for none.
        x: the axis that all share.
        y: the vertical axis.
        lines: what is drawn.
        rules: where verticals stand (default: none).
    """

    title: str
    note: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    rules: tuple[float, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(line.drawn for line in self.lines)


@dataclass(frozen=True)
class Series:
    """One value for each row of :class:`Dots`; NaN for none.

    Args:
        label: what a key says; empty for none.
        values: one a row.
        low, high: ends of intervals; empty for none.
        colours: one for all rows, or one a row.
    """

    label: str
    values: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    colours: tuple[str, ...] = ("blue",)

    def colour(self, row: int) -> str:
        """The colour of a row.

        Args:
            row: counted from 0.
        """
        return self.colours[row % len(self.colours)]


@dataclass(frozen=True)
class Dots:
    """Rows with names, and dots with intervals or bars beside them.

    Args:
        title: over the chart.
        note: under the title; empty for none.
        x: the axis that all rows share.
        rows: their names, from top to bottom.
        series: the values; more than one is told apart by a key.
        bars: whether a bar leads to each value from the left end of the axis.
        reference: a value with a line of its own; None for none.
        band: two values with a tint between them; None for none.
    """

    title: str
    note: str
    x: Axis
    rows: tuple[str, ...]
    series: tuple[Series, ...]
    bars: bool = False
    reference: float | None = None
    band: tuple[float, float] | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(math.isfinite(v) for s in self.series for v in s.values)


@dataclass(frozen=True)
class Heat:
    """A grid of values as shades.

    Args:
        title: over the chart.
        note: under the title; empty for none.
        rows: names, from top to bottom.
        columns: names, from left to right; only those that are not empty are written.
        values: of each row, NaN for none.
        x: what the columns are.
        unit: of the values.
        spacing: of the shades.
        text: what is written into a cell; None for nothing.
        least, most: what is beyond has the last shade; None for the values' own ends.
        outlined: a row and column to draw a frame around; None for none.
    """

    title: str
    note: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    x: str
    unit: str
    spacing: Spacing = Spacing.LINEAR
    text: Callable[[float], str] | None = None
    least: float | None = None
    most: float | None = None
    outlined: tuple[int, int] | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(math.isfinite(v) for row in self.values for v in row)


@dataclass(frozen=True)
class Plane:
    """Paths in two dimensions around an origin.

    Args:
        title: over the chart.
        note: under the title; empty for none.
        paths: lines whose ``x`` and ``y`` are coordinates.
        left, right, bottom, top: what is shown; the unit is as long in both directions.
        shade: from an angle in radians to the darkness of its ray, 0 to 1.
        rings: radii of circles around the origin, with their texts.
        points: places with names.
    """

    title: str
    note: str
    paths: tuple[Line, ...]
    left: float
    right: float
    bottom: float
    top: float
    shade: Callable[[float], float]
    rings: tuple[tuple[float, str], ...] = ()
    points: tuple[tuple[float, float, str], ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(path.drawn for path in self.paths)


@dataclass(frozen=True)
class Link:
    """What some rows of :class:`Links` have in common.

    Args:
        full: the rows with a full dot, counted from 0.
        hollow: those with a hollow one; a row that is in both has a ring with a dot in it.
        label: written beside its first dot; empty for none.
    """

    full: tuple[int, ...]
    hollow: tuple[int, ...] = ()
    label: str = ""

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last of its rows."""
        rows = (*self.full, *self.hollow)
        return min(rows), max(rows)


@dataclass(frozen=True)
class Links:
    """Rows with names, and verticals with dots that link them.

    Args:
        title: over the chart.
        note: under the title; empty for none.
        rows: their names, from top to bottom.
        marks: a short text beside each name, and its colour.
        links: what is linked; each has a lane of its own as long as it lasts.
        full, hollow, both: what the kinds of dots mean; empty for what does not occur.
    """

    title: str
    note: str
    rows: tuple[str, ...]
    marks: tuple[tuple[str, str], ...]
    links: tuple[Link, ...]
    full: str = ""
    hollow: str = ""
    both: str = ""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not self.rows


Chart = Lines | Dots | Heat | Plane | Links


@dataclass(frozen=True)
class Figure:
    """Charts side by side; those that are empty are left out.

    Args:
        title: over all; empty for none.
        charts: row by row.
        columns: how many charts beside each other (default: all).
        note: under the title.
        width: of the whole, in pixels at ordinary size (default: 560 a column).
    """

    title: str
    charts: tuple[Chart, ...]
    columns: int | None = None
    note: str = ""
    width: int | None = None
