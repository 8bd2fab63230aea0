"""Drawings as SVG: pieces of a page, and files of their own."""

from __future__ import annotations

import json
from html import escape

from normwise.figures.charts import Chart, Figure
from normwise.figures.layout import draw, draw_figure
from normwise.figures.palette import COLOURS
from normwise.figures.shapes import Circle, Drawing, Group, Label, Polyline, Shape

__all__ = ["document", "piece"]

_WIDE, _NARROW = 540.0, 330.0
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"


def piece(chart: Chart, height: float | None = None) -> str:
    """A chart as ``<svg>`` elements to put into a page, one for wide and one for narrow columns.

    The page shows one of the two by their classes ``wide`` and ``narrow``, and gives the colours by
    :func:`normwise.figures.css`; without it they are those for a light ground. What the pointer
    shows is in ``data-hover``. Empty charts give an empty text.

    Args:
        chart: what to draw.
        height: in pixels, of the wide form (default: what suits the chart).

    Returns:
        HTML; empty for an empty chart.
    """
    if chart.empty:
        return ""
    wide = draw(chart, _WIDE, height, titled=False)
    narrow = draw(chart, _NARROW, titled=False)
    return _element(wide, 'class="chart wide"') + _element(narrow, 'class="chart narrow"')


def document(figure: Figure) -> str:
    """A figure as an SVG file that follows the reader's light or dark system.

    Args:
        figure: what to draw.

    Returns:
        The text of the file.
    """
    drawing = draw_figure(figure)
    used = {c for shape in drawing.shapes for c in _colours(shape)}
    dark = "".join(
        f".f-{c}{{fill:{COLOURS[c].dark}}}.s-{c}{{stroke:{COLOURS[c].dark}}}" for c in sorted(used)
    )
    style = f"<style>@media (prefers-color-scheme:dark){{{dark}}}</style>"
    size = f'width="{drawing.width:.0f}" height="{drawing.height:.0f}"'
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        + _element(drawing, f'xmlns="http://www.w3.org/2000/svg" {size}', style + _ground(drawing))
        + "\n"
    )


def _ground(drawing: Drawing) -> str:
    return (
        f'<rect width="{drawing.width:.0f}" height="{drawing.height:.0f}" {_paint("f", "card")}/>'
    )


def _colours(shape: Shape) -> set[str]:
    if isinstance(shape, Group):
        return {c for inner in shape.shapes for c in _colours(inner)}
    own = {shape.fill, shape.stroke if isinstance(shape, Polyline) else ""}
    return (own | {"card"}) - {""}


def _element(drawing: Drawing, attributes: str, first: str = "") -> str:
    hover = ""
    if drawing.hover is not None:
        text = json.dumps(drawing.hover, ensure_ascii=False, separators=(",", ":"))
        hover = f' tabindex="0" data-hover="{escape(text)}"'
    title = escape(drawing.title)
    return (
        f'<svg {attributes} viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}" role="img" '
        f'aria-label="{title}" font-family="{_FONT}"{hover}>'
        f"{first}{''.join(map(_shape, drawing.shapes))}</svg>"
    )


def _paint(kind: str, colour: str) -> str:
    """A colour as the page's variable, and as itself where there is none."""
    name = "fill" if kind == "f" else "stroke"
    return f'class="{kind}-{colour}" {name}="{COLOURS[colour].light}"'


def _shape(shape: Shape) -> str:
    if isinstance(shape, Group):
        inside = "".join(map(_shape, shape.shapes))
        return f'<g data-series="{escape(shape.series)}">{inside}</g>'
    if isinstance(shape, Label):
        bold = ' font-weight="600"' if shape.bold else ""
        anchor = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
        whole = f"<title>{escape(shape.whole)}</title>" if shape.whole else ""
        return (
            f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size:g}"{anchor}{bold} '
            f"{_paint('f', shape.fill)}>{escape(shape.text)}{whole}</text>"
        )
    if isinstance(shape, Circle):
        place = f'cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{shape.radius:g}"'
        return f"<circle {place} {_paint('f', shape.fill)}/>"
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
    crisp = ' shape-rendering="crispEdges"' if shape.crisp else ""
    if shape.fill:
        faint = f' fill-opacity="{shape.opacity:g}"' if shape.opacity < 1 else ""
        return f'<polygon points="{points}" {_paint("f", shape.fill)}{faint}{crisp}/>'
    faint = f' stroke-opacity="{shape.opacity:g}"' if shape.opacity < 1 else ""
    dash = ""
    if shape.dash:
        lengths = " ".join(f"{d * shape.width:g}" for d in shape.dash)
        dash = f' stroke-dasharray="{lengths}"'
    return (
        f'<polyline points="{points}" fill="none" {_paint("s", shape.stroke)} '
        f'stroke-width="{shape.width:g}" stroke-linejoin="round"{dash}{faint}{crisp}/>'
    )
