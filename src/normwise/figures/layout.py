"""From a chart to a drawing: where everything lies, whatever it is drawn with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from normwise.figures.charts import Axis, Chart, Dots, Figure, Heat, Line, Lines, Link, Links, Plane
from normwise.figures.palette import HUES, ramp
from normwise.figures.scales import AxisScale, power_text
from normwise.figures.shapes import (
    Circle,
    Drawing,
    Group,
    Label,
    Polyline,
    Shape,
    moved,
    shortened,
    text_width,
    wrapped,
)

__all__ = ["apart", "draw", "draw_figure", "natural_height"]

Points = tuple[tuple[float, float], ...]

LABEL = 15.0
"""The least distance between two labels, in pixels."""

_NAMED = 30  # rows or lines; the names of more could not be read
_GAP = 14.0
_TOP, _BOTTOM = 26.0, 40.0
_KEY = 22.0
_ROW = 17.0


def apart(places: Sequence[float], top: float, bottom: float, gap: float = LABEL) -> list[float]:
    """``places`` moved as little as need be, in squares, to be ``gap`` apart and inside.

    Isotonic regression: each place less the room of those before it must not fall.

    Raises:
        ValueError: if there is no room for so many.
    """
    if (len(places) - 1) * gap > bottom - top + 1e-9:
        raise ValueError(f"{len(places)} labels do not fit between {top:g} and {bottom:g}")
    order = sorted(range(len(places)), key=lambda i: places[i])
    blocks: list[tuple[float, int]] = []  # means and sizes
    for k, i in enumerate(order):
        mean, size = places[i] - k * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        blocks.append((mean, size))
    last = bottom - (len(places) - 1) * gap
    moved_to = [min(max(mean, top), last) for mean, size in blocks for _ in range(size)]
    result = [0.0] * len(places)
    for k, i in enumerate(order):
        result[i] = moved_to[k] + k * gap
    return result


def natural_height(chart: Chart, width: float) -> float:
    """The height in pixels that suits a chart of this width, without its title."""
    if isinstance(chart, Lines):
        named = _named(chart.lines)
        return max(
            min(0.62 * width, 340.0), _TOP + _BOTTOM + LABEL * len(named), 210.0
        ) + _order_key(chart)
    if isinstance(chart, Links):
        return _KEY + _ROW * len(chart.rows) + 8
    if isinstance(chart, Dots | Heat):
        rows = len(chart.rows)
        each = _ROW + 11 if isinstance(chart, Heat) and chart.text else _ROW
        body = each * rows if rows <= _NAMED else max(_ROW * _NAMED, min(3.0 * rows, 900.0))
        key = _KEY if isinstance(chart, Heat) or len(chart.series) > 1 else 6.0
        return key + body + _BOTTOM
    return width * (chart.top - chart.bottom) / (chart.right - chart.left)


def draw(
    chart: Chart, width: float, height: float | None = None, *, titled: bool = True
) -> Drawing:
    """A chart as a drawing.

    Args:
        chart: what to draw, not empty.
        width: in pixels.
        height: of the chart without its title (default: what suits it).
        titled: whether title and note stand over it; a page may say them itself.
    """
    height = natural_height(chart, width) if height is None else height
    drawers = {Lines: _lines, Dots: _dots, Heat: _heat, Plane: _plane, Links: _links}
    shapes, hover = drawers[type(chart)](chart, width, height)  # type: ignore[operator]  # each takes its own kind
    if not titled:
        return Drawing(width, height, chart.title, tuple(shapes), hover)
    head = list(_head(chart.title, chart.note, width, 14))
    used = _head_height(chart.title, chart.note, width, 14)
    body = [moved(shape, 0, used) for shape in shapes]
    return Drawing(width, height + used, chart.title, (*head, *body))


def draw_figure(figure: Figure) -> Drawing:
    """All charts of a figure as one drawing; those of a row are equally high."""
    charts = [chart for chart in figure.charts if not chart.empty]
    columns = min(figure.columns or len(figure.charts), max(len(charts), 1))
    width = float(figure.width or 560 * columns)
    margin, gutter = 18.0, 30.0
    inner = width - 2 * margin
    shapes = [moved(s, margin, margin) for s in _head(figure.title, figure.note, inner, 17)]
    y = margin + _head_height(figure.title, figure.note, inner, 17)
    if not charts:
        shapes.append(Label(margin, y + 14, "Nothing to draw: no run came far enough.", size=13))
        y += 34
    cell = (inner - (columns - 1) * gutter) / columns
    for start in range(0, len(charts), columns):
        row = charts[start : start + columns]
        heads = max(_head_height(c.title, c.note, cell, 14) for c in row)
        tall = max(natural_height(c, cell) for c in row)
        for k, chart in enumerate(row):
            x = margin + k * (cell + gutter)
            shapes += [moved(s, x, y) for s in _head(chart.title, chart.note, cell, 14)]
            high = natural_height(chart, cell) if isinstance(chart, Plane) else tall
            inside = draw(chart, cell, high, titled=False).shapes
            shapes += [moved(s, x, y + heads) for s in inside]
        y += heads + tall + 22
    return Drawing(width, y - 22 + margin, figure.title, tuple(shapes))


def _head(title: str, note: str, width: float, size: float) -> Iterator[Label]:
    y = 0.0
    for line in wrapped(title, width, size, bold=True):
        y += size * 1.25
        yield Label(0, y, line, "ink", size, bold=True)
    for line in wrapped(note, width):
        y += 16
        yield Label(0, y, line)


def _head_height(title: str, note: str, width: float, size: float) -> float:
    lines = (
        len(wrapped(title, width, size, bold=True)) * size * 1.25 + len(wrapped(note, width)) * 16
    )
    return lines + 10 if lines else 0.0


# Links


def _links(chart: Links, width: float, height: float) -> tuple[list[Shape], None]:
    names = [shortened(name, 0.5 * width) for name in chart.rows]
    beside = 16 + max((text_width(name) for name in names), default=0.0)
    left = beside + 18 + max((text_width(text, 11) for text, _ in chart.marks), default=0.0)
    right, top = width - 8.0, _KEY
    step = (height - top - 8) / max(len(chart.rows), 1)
    lanes = _lanes(chart.links)
    pitch = min(34.0, (right - left) / (max(lanes, default=0) + 1))

    def y(row: int) -> float:
        return top + (row + 0.5) * step

    shapes: list[Shape] = []
    for row, (name, whole, (text, colour)) in enumerate(
        zip(names, chart.rows, chart.marks, strict=True)
    ):
        shapes.append(Polyline(((0, y(row) + 8.5), (right, y(row) + 8.5)), "line", crisp=True))
        shapes.append(Label(0, y(row) + 4, name, "ink", whole="" if name == whole else whole))
        shapes.append(Label(beside, y(row) + 4, text, colour, 11))
    hues = list(HUES)
    for number, (link, lane) in enumerate(zip(chart.links, lanes, strict=True)):
        x, colour = left + (lane + 0.5) * pitch, hues[number % len(hues)]
        first, last = link.span
        inside: list[Shape] = [Polyline(((x, y(first)), (x, y(last))), colour, width=2)]
        for row in sorted({*link.full, *link.hollow}):
            inside += _dot(x, y(row), colour, full=row in link.full, hollow=row in link.hollow)
        if pitch > 12 + text_width(link.label, 10):
            inside.append(Label(x + 6, y(first) + 3.5, link.label, size=10))
        shapes.append(Group(link.label, tuple(inside)))
    at = left
    kinds = ((chart.full, True, False), (chart.hollow, False, True), (chart.both, True, True))
    for text, full, hollow in kinds:
        if text:
            shapes += _dot(at + 5, 8, "muted", full=full, hollow=hollow)
            shapes.append(Label(at + 14, 12, text, "ink"))
            at += 34 + text_width(text)
    return shapes, None


def _dot(x: float, y: float, colour: str, *, full: bool, hollow: bool) -> list[Shape]:
    """A full dot, a hollow one, or a ring with a dot in it."""
    ring = [Circle(x, y, 4.2, colour)]
    if hollow:
        ring.append(Circle(x, y, 2.8 if full else 2.4, "card"))
    if hollow and full:
        ring.append(Circle(x, y, 1.5, colour))
    return list(ring)


def _lanes(links: Sequence[Link]) -> list[int]:
    """For each link the first lane in which none before it is in its way."""
    order = sorted(range(len(links)), key=lambda i: (links[i].span[0], -links[i].span[1]))
    ends: list[int] = []
    lanes = [0] * len(links)
    for i in order:
        first, last = links[i].span
        free = (lane for lane, end in enumerate(ends) if end < first)
        lanes[i] = next(free, len(ends))
        ends[lanes[i] : lanes[i] + 1] = [last]
    return lanes


# Lines


def _named(lines: Sequence[Line]) -> list[Line]:
    """The lines with a name at their ends: all that are drawn, or none where they are too many."""
    drawn = [line for line in lines if line.drawn and line.label]
    return drawn if len(drawn) <= _NAMED else []


def _order_key(chart: Lines) -> float:
    """The height of the strip that says which of too many lines come first."""
    return 20.0 if sum(line.drawn and bool(line.label) for line in chart.lines) > _NAMED else 0.0


def _lines(chart: Lines, width: float, height: float) -> tuple[list[Shape], dict[str, Any]]:
    lines = [line for line in chart.lines if line.drawn]
    named = _named(lines)
    room = 0.42 * width
    labels = [shortened(line.label, room, 13, bold=True) for line in named]
    right = width - (_GAP + max(text_width(t, 13, bold=True) for t in labels) if named else 10.0)
    height -= _order_key(chart)
    values = [
        v
        for line in lines
        for v in (*line.y, *line.low, *line.high, *([] if line.level is None else [line.level]))
    ]
    across = chart.x.spacing.scale([v for line in lines for v in line.x], 6 if width > 450 else 5)
    up = chart.y.spacing.scale([*values, *chart.y.holds], 5)
    left = 10 + max(text_width(text) for _, text in up.ticks)
    top, bottom = _TOP if chart.y.label else 8.0, height - _BOTTOM

    def x(value: float) -> float:
        return left + across.place(value) * (right - left)

    def y(value: float) -> float:
        return bottom - min(max(up.place(value), 0.0), 1.0) * (bottom - top)

    shapes: list[Shape] = [Label(0, 12, shortened(chart.y.label, width))]
    for value, text in up.ticks:
        at = y(value)
        shapes.append(Polyline(((left, at), (right, at)), "line", crisp=True))
        shapes.append(Label(left - 8, at + 4, text, anchor="end"))
    shapes += [
        Polyline(((x(rule), top), (x(rule), bottom)), "strong-line", dash=(1, 3))
        for rule in chart.rules
        if 0 <= across.place(rule) <= 1
    ]
    shapes += _under(chart.x, across, left, right, bottom)
    heights = apart([y(_end(line)[1]) for line in named], top, bottom)
    names = dict(zip(map(id, named), zip(heights, labels, strict=True), strict=True))
    for line in lines:
        drawn = [
            Polyline(part, line.colour, width=2.2, dash=line.dash) for part in _runs(line, x, y)
        ]
        inside: list[Shape] = []
        if line.low and line.low != line.high:
            there, back = (
                [(x(a), y(b)) for a, b in zip(line.x, edge, strict=True) if math.isfinite(b)]
                for edge in (line.high, line.low)
            )
            inside.append(Polyline((*there, *back[::-1]), fill=line.colour, opacity=0.14))
        if line.level is not None and math.isfinite(line.level):
            at = y(line.level)
            inside.append(Polyline(((left, at), (right, at)), line.colour, dash=(1, 3)))
        inside += drawn
        end_x, end_y = (f(v) for f, v in zip((x, y), _end(line), strict=True))
        if named or len(drawn) == 0 or all(len(part.points) < 2 for part in drawn):
            inside.append(Circle(end_x, end_y, 3, line.colour))
        if id(line) in names:
            at, text = names[id(line)]
            if abs(at - end_y) > 2 or right - end_x > 2:
                points = ((end_x + 4, end_y), (right + _GAP - 3, at))
                inside.append(Polyline(points, line.colour, opacity=0.45))
            whole = line.label if text != line.label else ""
            inside.append(
                Label(right + _GAP, at + 4.5, text, line.colour, 13, bold=True, whole=whole)
            )
        shapes.append(Group(line.name, tuple(inside)))
    if _order_key(chart):
        ends = [line.label for line in lines if line.label]
        shapes += _strip(ends[0], ends[-1], "order", left, right, height + 12)
    hover = {
        "top": round(top, 1),
        "bottom": round(bottom, 1),
        "axis": chart.x.label,
        "lines": [
            {
                "name": line.name,
                "label": line.label or line.name,
                "colour": line.colour,
                "points": [
                    [round(x(a), 1), round(y(b), 1), _plain(a), _hovered(chart.y, line, k)]
                    for k, (a, b) in enumerate(zip(line.x, line.y, strict=True))
                    if math.isfinite(b)
                ],
            }
            for line in lines
        ],
    }
    return shapes, hover


def _end(line: Line) -> tuple[float, float]:
    return next((a, b) for a, b in zip(line.x[::-1], line.y[::-1], strict=True) if math.isfinite(b))


def _runs(line: Line, x: Any, y: Any) -> list[Points]:
    """The points of a line, anew after each value that is not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(line.x, line.y, strict=True):
        if math.isfinite(b):
            runs[-1].append((x(a), y(b)))
        elif runs[-1]:
            runs.append([])
    return [tuple(run) for run in runs if len(run) > 1]


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


def _hovered(axis: Axis, line: Line, k: int) -> str:
    mean = axis.text(line.y[k])
    if not line.low or line.low == line.high or not math.isfinite(line.low[k]):
        return mean
    return f"{mean} ({axis.text(line.low[k])} – {axis.text(line.high[k])})"


def _under(axis: Axis, scale: AxisScale, left: float, right: float, y: float) -> list[Shape]:
    """Ticks and label of a horizontal axis; a tick without room for its text has none."""
    places = ((left + scale.place(value) * (right - left), text) for value, text in scale.ticks)
    shapes: list[Shape] = list(_with_room(places, y + 18, 6))
    label = shortened(axis.label, right + 8)
    half = text_width(label) / 2
    at = max(half, min((left + right) / 2, right + 8 - half))
    shapes.append(Label(at, y + 35, label, anchor="middle"))
    return shapes


def _with_room(
    places: Iterable[tuple[float, str]], y: float, gap: float, right: float = math.inf
) -> Iterator[Label]:
    """Texts around their places, from left to right; one that would touch the last is left out."""
    until = -math.inf
    for at, text in places:
        half = text_width(text) / 2
        if at - half >= until:
            yield Label(min(at, right - half), y, text, anchor="middle")
            until = at + half + gap


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def _strip(low: str, high: str, kind: str, left: float, right: float, y: float) -> list[Shape]:
    """A strip of a ramp's colours between two words."""
    length, x = 110.0, left
    words = shortened(low, (right - left - length) / 2 - 12)
    shapes: list[Shape] = [Label(x, y + 4, words)]
    x += text_width(words) + 8
    for k in range(12):
        box = _box(x + k * length / 12, y - 5, x + (k + 1) * length / 12, y + 5)
        shapes.append(Polyline(box, fill=ramp(kind, k / 11), crisp=True))
    words = shortened(high, max(right - x - length - 8, 40))
    shapes.append(Label(x + length + 8, y + 4, words))
    return shapes


# Rows


def _row_names(rows: Sequence[str], width: float) -> tuple[list[str], float]:
    """The names as far as they fit, and the room they take."""
    if len(rows) > _NAMED:
        return [], 8.0
    names = [shortened(row, 0.4 * width) for row in rows]
    return names, 10 + max((text_width(name) for name in names), default=0.0)


def _named_rows(
    rows: Sequence[str], names: Sequence[str], left: float, middle: Sequence[float]
) -> Iterator[Shape]:
    for row, name, y in zip(rows, names, middle, strict=False):
        whole = row if name != row else ""
        yield Label(left - 8, y + 4, name, "ink", anchor="end", whole=whole)


def _dots(chart: Dots, width: float, height: float) -> tuple[list[Shape], None]:
    names, left = _row_names(chart.rows, width)
    right = width - 14
    keyed = len(chart.series) > 1
    top, bottom = (_KEY if keyed else 6.0), height - _BOTTOM
    values = [v for s in chart.series for v in (*s.values, *s.low, *s.high)]
    holds = [*chart.x.holds, *([] if chart.reference is None else [chart.reference])]
    holds += chart.band or ()
    scale = chart.x.spacing.scale([*values, *holds], 5 if width > 450 else 3)

    def x(value: float) -> float:
        return left + min(max(scale.place(value), 0.0), 1.0) * (right - left)

    step = (bottom - top) / max(len(chart.rows), 1)
    middle = [top + (k + 0.5) * step for k in range(len(chart.rows))]
    shapes: list[Shape] = []
    if chart.band is not None:
        box = _box(x(chart.band[0]), top, x(chart.band[1]), bottom)
        shapes.append(Polyline(box, fill="muted", opacity=0.12))
    for value, _ in scale.ticks:
        shapes.append(Polyline(((x(value), top), (x(value), bottom)), "line", crisp=True))
    if chart.reference is not None:
        at = x(chart.reference)
        shapes.append(Polyline(((at, top), (at, bottom)), "muted", crisp=True))
    key_x = left
    for number, series in enumerate(chart.series):
        shift = (number - (len(chart.series) - 1) / 2) * min(step / 3, 6) if keyed else 0.0
        inside: list[Shape] = []
        for row, value in enumerate(series.values):
            if not math.isfinite(value):
                continue
            y, colour = middle[row] + shift, series.colour(row)
            if series.low and math.isfinite(series.low[row]):
                ends = ((x(series.low[row]), y), (x(series.high[row]), y))
                inside.append(Polyline(ends, colour, width=2, opacity=0.6))
            if chart.bars:
                half = min(step * 0.42, 6.0)
                inside.append(Polyline(_box(left, y - half, x(value), y + half), fill=colour))
            else:
                inside.append(Circle(x(value), y, min(4.0, max(step / 2.5, 1.5)), colour))
        shapes.append(Group(series.label, tuple(inside)))
        if keyed:
            shapes.append(Circle(key_x + 5, 8, 4, series.colour(0)))
            shapes.append(Label(key_x + 14, 12, series.label, "ink"))
            key_x += 34 + text_width(series.label)
    shapes += _under(chart.x, scale, left, right, bottom)
    shapes += _named_rows(chart.rows, names, left, middle)
    return shapes, None


def _heat(chart: Heat, width: float, height: float) -> tuple[list[Shape], None]:
    names, left = _row_names(chart.rows, width)
    right, top, bottom = width - 4, _KEY, height - _BOTTOM
    finite = [v for row in chart.values for v in row if math.isfinite(v)]
    if chart.spacing.name == "LOG":
        finite = [v for v in finite if v > 0] or [1.0]
    low = min(finite) if chart.least is None else chart.least
    high = max(finite) if chart.most is None else chart.most

    def share(value: float) -> float:
        if chart.spacing.name == "LOG":
            return math.log(max(value, low) / low) / (math.log(high / low) or 1.0)
        return (value - low) / ((high - low) or 1.0)

    columns = max(len(chart.columns), 1)
    across, down = (right - left) / columns, (bottom - top) / max(len(chart.rows), 1)
    shapes: list[Shape] = []
    for i, row in enumerate(chart.values):
        y = top + i * down
        # Cells of one shade side by side are one shape.
        shades = [ramp("heat", share(v)) if math.isfinite(v) else "" for v in row]
        starts = [0, *(j for j in range(1, len(row)) if shades[j] != shades[j - 1]), len(row)]
        for a, b in pairwise(starts):
            if shades[a]:
                box = _box(left + a * across, y, left + b * across, y + down)
                shapes.append(Polyline(box, fill=shades[a], crisp=True))
        if chart.text is not None:
            for j, value in enumerate(row):
                if math.isfinite(value):
                    at, fill = left + (j + 0.5) * across, "card" if share(value) > 0.5 else "ink"
                    shapes.append(
                        Label(at, y + down / 2 + 4, chart.text(value), fill, 11, "middle")
                    )
    if chart.outlined is not None:
        x0, y0 = left + chart.outlined[1] * across, top + chart.outlined[0] * down
        box = _box(x0, y0, x0 + across, y0 + down)
        shapes.append(Polyline((*box, box[0]), "orange", width=2.4))
    places = ((left + (j + 0.5) * across, name) for j, name in enumerate(chart.columns) if name)
    shapes += _with_room(places, bottom + 18, 24 if columns > 12 else 4, right)
    shapes.append(Label((left + right) / 2, bottom + 35, chart.x, anchor="middle"))
    say = chart.text or (lambda v: power_text(v) if v > 0 else f"{v:.2g}")
    unit = f" {chart.unit}" if chart.unit else ""
    least = "≤ " if chart.least is not None else ""
    shapes += _strip(f"{least}{say(low)}", f"{say(high)}{unit}", "heat", left, right, 9)
    shapes += _named_rows(
        chart.rows, names, left, [top + (k + 0.5) * down for k in range(len(chart.rows))]
    )
    if not names:
        shapes.append(Label(0, bottom + 35, f"{len(chart.rows)} rows, the first on top"))
    return shapes, None


def _plane(chart: Plane, width: float, height: float) -> tuple[list[Shape], None]:
    unit = width / (chart.right - chart.left)

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - chart.left) * unit, (chart.top - y) * unit

    def edge(angle: float) -> tuple[float, float]:
        """Where the ray at this angle leaves what is shown."""
        c, s = math.cos(angle), math.sin(angle)
        to_side = (chart.right if c > 0 else chart.left) / c if abs(c) > 1e-9 else math.inf
        to_end = (chart.top if s > 0 else chart.bottom) / s if abs(s) > 1e-9 else math.inf
        length = min(to_side, to_end)
        return place(length * c, length * s)

    corners = [
        math.atan2(y, x) for x in (chart.left, chart.right) for y in (chart.bottom, chart.top)
    ]
    angles = sorted([*(math.pi * k / 90 for k in range(-90, 91)), *corners])
    shapes: list[Shape] = [
        Polyline(
            (place(0, 0), edge(a), edge(b)),
            fill="muted",
            opacity=round(0.5 * chart.shade((a + b) / 2), 3),
            crisp=True,
        )
        for a, b in pairwise(angles)
    ]
    for radius, text in chart.rings:
        turn = [
            place(radius * math.cos(t), radius * math.sin(t))
            for t in (math.pi * k / 60 for k in range(-60, 61))
        ]
        part: list[tuple[float, float]] = []
        for point in [*turn, (-1.0, -1.0)]:
            if 0 <= point[0] <= width and 0 <= point[1] <= height:
                part.append(point)
            elif part:
                shapes.append(Polyline(tuple(part), "strong-line", dash=(2, 4)))
                part = []
        x, y = place(0, -radius)
        shapes.append(Label(x - 8, y - 5, text, anchor="end"))
    for path in chart.paths:
        points = tuple(place(x, y) for x, y in zip(path.x, path.y, strict=True))
        inside = (
            Polyline(points, path.colour, width=2.2, dash=path.dash),
            Circle(*points[-1], 4.5, path.colour),
        )
        shapes.append(Group(path.name, inside))
    for x, y, name in chart.points:
        at = place(x, y)
        shapes += [
            Circle(*at, 4.5, "ink"),
            Label(at[0] - 10, at[1] + 4, name, "ink", 13, "end", bold=True),
        ]
    return shapes, None
