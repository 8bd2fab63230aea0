"""What a drawing is made of, before it is written as SVG or painted: shapes in pixels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

__all__ = [
    "Circle",
    "Drawing",
    "Group",
    "Label",
    "Polyline",
    "Shape",
    "shortened",
    "text_width",
    "wrapped",
]


@dataclass(frozen=True)
class Polyline:
    """A line, or an area if it has a ``fill``; colours are names, empty for none."""

    points: tuple[tuple[float, float], ...]
    stroke: str = ""
    fill: str = ""
    width: float = 1.0
    dash: tuple[float, ...] = ()
    opacity: float = 1.0
    crisp: bool = False


@dataclass(frozen=True)
class Circle:
    """A disk."""

    x: float
    y: float
    radius: float
    fill: str


@dataclass(frozen=True)
class Label:
    """A line of text from, around or up to ``x``, on the baseline ``y``.

    Args:
        anchor: ``"start"``, ``"middle"`` or ``"end"``.
        whole: the text before it was shortened; empty if it was not.
    """

    x: float
    y: float
    text: str
    fill: str = "muted"
    size: float = 12.0
    anchor: str = "start"
    bold: bool = False
    whole: str = ""


@dataclass(frozen=True)
class Group:
    """Shapes that are switched on and off together."""

    series: str
    shapes: tuple[Shape, ...]


Shape = Polyline | Circle | Label | Group


@dataclass(frozen=True)
class Drawing:
    """Shapes on a ground.

    Args:
        hover: what a page shows under the pointer; None for nothing.
    """

    width: float
    height: float
    title: str
    shapes: tuple[Shape, ...]
    hover: dict[str, Any] | None = field(default=None, compare=False)


def moved(shape: Shape, dx: float, dy: float) -> Shape:
    """The shape elsewhere."""
    if isinstance(shape, Polyline):
        return replace(shape, points=tuple((x + dx, y + dy) for x, y in shape.points))
    if isinstance(shape, Group):
        return replace(shape, shapes=tuple(moved(s, dx, dy) for s in shape.shapes))
    return replace(shape, x=shape.x + dx, y=shape.y + dy)


_NARROW, _WIDE = frozenset("iljtfrI.,:;'|!()[]·- "), frozenset("mwMWQO@%—×≥")


def text_width(text: str, size: float = 12.0, bold: bool = False) -> float:
    """About how wide a text is in pixels, and no less, in the sans serif of common systems."""

    def ems(c: str) -> float:
        if c in _NARROW:
            return 0.4
        return 0.95 if c in _WIDE else 0.7 if c.isupper() else 0.63

    return sum(map(ems, text)) * size * (1.14 if bold else 1.0)


def shortened(text: str, width: float, size: float = 12.0, bold: bool = False) -> str:
    """The text with so much of its middle left out that it fits."""
    if text_width(text, size, bold) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        found = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        if text_width(found, size, bold) <= width:
            return found
    return "…"


def wrapped(text: str, width: float, size: float = 12.0, bold: bool = False) -> list[str]:
    """The text in lines that fit."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size, bold) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
