"""Pictures of a comparison and of the two-dimensional toy."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from normwise.figures import Figure, document, matplotlib_figure, png
from normwise.lab.report.curves import Comparison
from normwise.lab.report.toy import toy_loss, toy_norm, toy_plane
from normwise.lab.toy import Path2D

__all__ = ["PLOTS", "draw_toy"]

Records = Sequence[Mapping[str, Any]]


def _plot(*quantities: str) -> Callable[[Mapping[str, Any], Records], bytes]:
    def draw(run: Mapping[str, Any], records: Records) -> bytes:
        comparison = Comparison(run, records)
        charts = tuple(replace(comparison.chart(q), note="") for q in quantities)
        mark = "" if run["status"] == "complete" else f" ({run['status']})"
        note = f"{run['task']['title']}{mark}: mean and range over seeds"
        width = 800 if len(charts) == 1 else 1180
        return png(Figure("", charts, note=note, width=width))

    return draw


PLOTS: dict[str, Callable[[Mapping[str, Any], Records], bytes]] = {
    "norms.png": _plot("norm_growth"),
    "effective_lr.png": _plot("effective_lr", "relative_effective_lr"),
    "accuracy.png": _plot("test_accuracy"),
}
"""From a ``run.json`` and its records to the bytes of a PNG file, by the file's name."""


def draw_toy(trajectories: Mapping[str, Path2D], format: str) -> bytes:
    """The toy's paths over its loss, and norms and losses step by step, as a file's bytes.

    Args:
        trajectories: as :func:`normwise.lab.toy.trajectories` gives them.
        format: ``"svg"``, ``"png"`` or ``"pdf"``.
    """
    figure = Figure(
        "The same directions are equally good at any norm; momentum inflates it all the same",
        (toy_plane(trajectories), toy_norm(trajectories), toy_loss(trajectories)),
        width=1440,
    )
    if format == "svg":
        return document(figure).encode()
    buffer = io.BytesIO()
    matplotlib_figure(figure).savefig(buffer, format=format)
    return buffer.getvalue()
