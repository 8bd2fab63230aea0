"""Line charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from normwise.lab.summary import Curve

__all__ = ["Frame", "Line", "Scale", "linear", "logarithmic", "stretched_to_one", "svg", "tooltip"]

WIDTH, HEIGHT = 560, 330
LEFT, TOP, BOTTOM = 58, 30, 40
# A label stands so far right of the curves, and has about this width a character.
GAP, CHARACTER = 15, 8
_LABEL_HEIGHT = 15


@dataclass(frozen=True)
class Scale:
    """An axis: where a value lies between 0 and 1, and which values have a tick.

    Args:
        place: from a value to its place.
        ticks: values and their texts.
    """

    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Line:
    """A curve with its name and label, and the lengths of its dashes; none for a solid line."""

    name: str
    label: str
    curve: Curve
    dash: tuple[float, ...] = ()


def linear(values: Sequence[float], zero: bool = False) -> Scale:
    """An even axis around ``values`` with round ticks, from zero if so wanted."""
    low, high = min(values), max(values)
    if zero:
        low = min(low, 0.0)
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = _round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    bottom, top = first * step, last * step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    texts = tuple((k * step, f"{k * step:.{digits}f}") for k in range(first, last + 1))
    return Scale(lambda v: (v - bottom) / (top - bottom), texts)


def _round_step(step: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(m for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def logarithmic(values: Sequence[float]) -> Scale:
    """A logarithmic axis; a zero is drawn at the least positive value."""
    positive = [v for v in values if v > 0] or [1.0]
    floor = min(positive)
    low, high = math.log10(floor), math.log10(max(positive))
    bottom, top = math.floor(low * 3 + 1e-9) / 3, math.ceil(high * 3 - 1e-9) / 3
    if top - bottom < 1:
        bottom, top = bottom - 0.35, top + 0.35
    marks = (1, 2, 5) if top - bottom < 2.2 else (1,)
    decades = range(math.floor(bottom), math.ceil(top) + 1)
    every = max(1, math.ceil((top - bottom) / 7))
    ticks = [
        m * 10.0**d
        for d in decades
        for m in marks
        if d % every == 0 and bottom - 1e-9 <= math.log10(m * 10.0**d) <= top + 1e-9
    ]
    texts = tuple((t, power_text(t)) for t in ticks)
    return Scale(lambda v: (math.log10(v if v > 0 else floor) - bottom) / (top - bottom), texts)


def power_text(value: float) -> str:
    """``0.01`` and ``50`` as they are, ``2×10⁻⁵`` for what is smaller or larger."""
    exponent = math.floor(math.log10(value) + 1e-9)
    if -2 <= exponent <= 3:
        return f"{value:g}"
    mantissa = round(value / 10.0**exponent)
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}" if mantissa == 1 else f"{mantissa}×10{digits}"


def stretched_to_one(values: Sequence[float]) -> Scale:
    """Shares from 0 to 1 on an axis −log₁₀(1 − v), stretched where good optimizers differ."""
    # Beyond this the stretch would never end; a perfect score is drawn there.
    most = 0.9999

    def stretch(v: float) -> float:
        return -math.log10(1 - min(max(v, 0.0), most))

    top = max(stretch(max(values)) + 0.15, stretch(0.5))
    marks = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999)
    texts = tuple((m, f"{100 * m:g}") for m in marks if stretch(m) <= top)
    return Scale(lambda v: stretch(v) / top, texts)


class Frame:
    """Where epochs and values lie in a chart.

    Args:
        lines: what is drawn; those without an epoch are left out.
        scale: makes the vertical axis from all values.
    """

    def __init__(self, lines: Sequence[Line], scale: Callable[[Sequence[float]], Scale]) -> None:
        self.lines = [line for line in lines if line.curve.epochs]
        longest = max((len(line.label) for line in self.lines), default=0)
        self.right = WIDTH - GAP - CHARACTER * max(longest, 7)
        curves = [line.curve for line in self.lines]
        self.first = min((c.epochs[0] for c in curves), default=0)
        self.last = max((c.epochs[-1] for c in curves), default=0)
        self.axis = scale([v for c in curves for v in (*c.low, *c.high)] or [0.0, 1.0])

    def x(self, epoch: float) -> float:
        """The horizontal place of an epoch."""
        span = (self.last - self.first) or 1
        return LEFT + (epoch - self.first) / span * (self.right - LEFT)

    def y(self, value: float) -> float:
        """The vertical place of a value."""
        share = min(max(self.axis.place(value), 0.0), 1.0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def svg(title: str, frame: Frame, y_label: str, drops: Sequence[int]) -> str:
    """The chart; a note in its place if there is nothing to draw.

    Args:
        title: for those who cannot see it.
        frame: the lines and where they lie.
        y_label: what the vertical axis shows, with the unit.
        drops: epochs after which the learning rate drops.
    """
    if not frame.lines:
        return '<p class="empty">No finished epoch to draw.</p>'
    x, y, first, last = frame.x, frame.y, frame.first, frame.last
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f'<text class="y-label" x="{LEFT - 44}" y="14">{escape(y_label)}</text>',
    ]
    for value, text in frame.axis.ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{frame.right}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/><text class="tick" x="{LEFT - 8}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{escape(text)}</text>'
        )
    parts += [
        f'<line class="drop" x1="{x(drop):.1f}" x2="{x(drop):.1f}" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}"/>'
        for drop in drops
        if first <= drop <= last
    ]
    parts += [
        f'<text class="tick" x="{x(epoch):.1f}" y="{HEIGHT - BOTTOM + 18}" '
        f'text-anchor="middle">{epoch}</text>'
        for epoch in _epoch_ticks(first, last)
    ]
    parts.append(
        f'<text class="tick" x="{(LEFT + frame.right) / 2}" y="{HEIGHT - 4}" '
        'text-anchor="middle">epoch</text>'
    )
    labels = _apart([y(line.curve.mean[-1]) for line in frame.lines], TOP, HEIGHT - BOTTOM)
    parts += [_drawn(line, frame, at) for line, at in zip(frame.lines, labels, strict=True)]
    parts.append(
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
    )
    return "".join(parts)


def _drawn(line: Line, frame: Frame, at: float) -> str:
    """Band, mean and label of one optimizer."""
    c, x, y = line.curve, frame.x, frame.y
    mean = " ".join(f"{x(e):.1f},{y(v):.1f}" for e, v in zip(c.epochs, c.mean, strict=True))
    there = [f"{x(e):.1f},{y(v):.1f}" for e, v in zip(c.epochs, c.high, strict=True)]
    back = [f"{x(e):.1f},{y(v):.1f}" for e, v in zip(c.epochs, c.low, strict=True)]
    dash = " ".join(f"{2.4 * d:g}" for d in line.dash)
    dotted = f' stroke-dasharray="{dash}"' if dash else ""
    end_x, end_y = x(c.epochs[-1]), y(c.mean[-1])
    band = f'<polygon class="band" points="{" ".join(there + back[::-1])}"/>' if c.seeds > 1 else ""
    leader = (
        f'<path class="leader" d="M{end_x + 3:.1f} {end_y:.1f}L{frame.right + GAP - 3} {at:.1f}"/>'
        if abs(at - end_y) > 2
        else ""
    )
    return (
        f'<g data-optimizer="{line.name}" class="o-{line.name}">{band}'
        f'<polyline class="mean" points="{mean}"{dotted}/>'
        f'<circle class="end" cx="{end_x:.1f}" cy="{end_y:.1f}" r="3"/>{leader}'
        f'<text class="name" x="{frame.right + GAP}" y="{at + 4:.1f}">{escape(line.label)}</text>'
        "</g>"
    )


def tooltip(frame: Frame, text: Callable[[float], str]) -> dict[str, Any]:
    """What the page's script needs to show values under the pointer: texts and places."""

    def described(mean: float, low: float, high: float, seeds: int) -> str:
        return text(mean) if seeds < 2 else f"{text(mean)} ({text(low)} – {text(high)})"

    return {
        "width": WIDTH,
        "left": LEFT,
        "right": frame.right,
        "first": frame.first,
        "last": frame.last,
        "lines": [
            {
                "name": line.name,
                "label": line.label,
                "epochs": line.curve.epochs,
                "y": [round(frame.y(v), 1) for v in line.curve.mean],
                "text": [
                    described(m, lo, hi, line.curve.seeds)
                    for m, lo, hi in zip(
                        line.curve.mean, line.curve.low, line.curve.high, strict=True
                    )
                ],
            }
            for line in frame.lines
        ],
    }


def _epoch_ticks(first: int, last: int) -> list[int]:
    step = max(1, int(_round_step(max(last - first, 1) / 6)))
    return list(range(-(-first // step) * step, last + 1, step))


def _apart(places: Sequence[float], top: float, bottom: float) -> list[float]:
    """``places``, moved as little as need be for labels not to overlap, in their order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    for _ in range(50):
        for i, (above, below) in enumerate(pairwise(moved)):
            if below - above < _LABEL_HEIGHT:
                middle = (above + below) / 2
                moved[i], moved[i + 1] = middle - _LABEL_HEIGHT / 2, middle + _LABEL_HEIGHT / 2
    shift = max(0.0, top - moved[0]) - max(0.0, moved[-1] - bottom)
    result = [0.0] * len(places)
    for i, place in zip(order, moved, strict=True):
        result[i] = place + shift
    return result
