"""A figure of matplotlib's that Jupyter shows; only ``raster`` imports this, where it draws."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["Canvas"]


class Canvas(Figure):
    """One that is not pyplot's, so it belongs to no window and shows itself in a notebook.

    Args:
        width: in inches.
        height: in inches.
        facecolor: of the ground.
    """

    def __init__(self, width: float, height: float, facecolor: str) -> None:
        super().__init__(figsize=(width, height), dpi=192, facecolor=facecolor)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
