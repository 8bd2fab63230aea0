"""Charts, described once as plain data and drawn as PNG, PDF, SVG or pieces of a page; tables."""

from normwise.figures.charts import (
    Axis,
    Chart,
    Dots,
    Figure,
    Heat,
    Line,
    Lines,
    Link,
    Links,
    Plane,
    Series,
    short_names,
)
from normwise.figures.palette import COLOURS, DASHED, HUES, Colour, css, marks, nth_of, ramp
from normwise.figures.raster import matplotlib_figure, png, save
from normwise.figures.scales import Spacing
from normwise.figures.svg import document, piece

__all__ = [
    "COLOURS",
    "DASHED",
    "HUES",
    "Axis",
    "Chart",
    "Colour",
    "Dots",
    "Figure",
    "Heat",
    "Line",
    "Lines",
    "Link",
    "Links",
    "Plane",
    "Series",
    "Spacing",
    "css",
    "document",
    "marks",
    "matplotlib_figure",
    "nth_of",
    "piece",
    "png",
    "ramp",
    "save",
    "short_names",
]
