"""Drawings painted by matplotlib: PNG, PDF, and figures that Python can work with."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

from normwise.figures.charts import Figure
from normwise.figures.layout import draw_figure
from normwise.figures.palette import COLOURS
from normwise.figures.shapes import Circle, Group, Label, Shape
from normwise.figures.svg import document

__all__ = ["matplotlib_figure", "png", "save"]

# A drawing's pixel is 1/96 inch, as in a browser; matplotlib measures in points of 1/72.
_POINTS = 72 / 96


def matplotlib_figure(figure: Figure, ground: Literal["light", "dark"] = "light") -> Any:
    """A figure as one of matplotlib's.

    Args:
        figure: what to draw.
        ground: ``"light"`` or ``"dark"`` (default: light).

    Returns:
        A ``matplotlib.figure.Figure``, which a notebook shows.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from normwise.figures.canvas import Canvas
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib; install it with `pip install normwise[lab]`"
        ) from error
    drawing = draw_figure(figure)
    card = getattr(COLOURS["card"], ground)
    canvas = Canvas(drawing.width / 96, drawing.height / 96, facecolor=card)
    ax = canvas.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
    ax.axis("off")
    _paint(ax, drawing.shapes, ground)
    return canvas


def png(figure: Figure, ground: Literal["light", "dark"] = "light") -> bytes:
    """A figure as the bytes of a PNG file, two dots a pixel.

    Args:
        figure: what to draw.
        ground: ``"light"`` or ``"dark"`` (default: light).

    Returns:
        The content of the file.

    Raises:
        ImportError: without matplotlib.
    """
    buffer = io.BytesIO()
    matplotlib_figure(figure, ground).savefig(buffer, format="png")
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure into a file whose suffix says the format.

    ``.svg`` needs no matplotlib and follows the reader's light or dark system; ``.png``, ``.pdf``
    and what else matplotlib writes are for a light ground.

    Args:
        figure: what to draw.
        path: of the file.

    Raises:
        ImportError: without matplotlib.
    """
    path = Path(path)
    if path.suffix.lower() == ".svg":
        path.write_text(document(figure), encoding="utf-8")
    else:
        matplotlib_figure(figure).savefig(path)


def _paint(ax: Any, shapes: tuple[Shape, ...], ground: str) -> None:
    """Shapes in their order, each over those before it."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle as Disk
    from matplotlib.patches import Polygon

    def colour(name: str) -> str:
        return str(getattr(COLOURS[name], ground)) if name else "none"

    for shape in shapes:
        order = len(ax.get_children())
        if isinstance(shape, Group):
            _paint(ax, shape.shapes, ground)
        elif isinstance(shape, Label):
            ax.text(
                shape.x,
                shape.y,
                shape.text.replace("$", r"\$"),
                color=colour(shape.fill),
                fontsize=shape.size * _POINTS,
                ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor],
                va="baseline",
                fontweight="bold" if shape.bold else "normal",
                zorder=order,
            )
        elif isinstance(shape, Circle):
            place = (shape.x, shape.y)
            ax.add_patch(Disk(place, shape.radius, fc=colour(shape.fill), ec="none", zorder=order))
        elif shape.fill:
            tint = COLOURS[shape.fill]
            if shape.crisp:  # neighbours overlap by a pixel, which must not show
                tint = COLOURS["card"].towards(tint, shape.opacity)
            ax.add_patch(
                Polygon(
                    shape.points,
                    fc=getattr(tint, ground),
                    ec="none",
                    alpha=None if shape.crisp else shape.opacity,
                    antialiased=not shape.crisp,
                    zorder=order,
                )
            )
        else:
            ax.add_line(
                Line2D(
                    *zip(*shape.points, strict=True),
                    color=colour(shape.stroke),
                    linewidth=shape.width * _POINTS,
                    linestyle=(0, shape.dash) if shape.dash else "-",
                    alpha=shape.opacity,
                    solid_joinstyle="round",
                    zorder=order,
                )
            )
