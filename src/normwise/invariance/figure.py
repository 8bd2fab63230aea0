"""A figure of a network's parameters, coloured by kind."""

from __future__ import annotations

from pathlib import Path

from normwise.invariance.report import KINDS, Kind, Report

__all__ = ["draw"]

# Told apart also by readers who do not see red and green (Okabe and Ito).
COLOURS: dict[Kind, str] = {
    "invariant": "#0072B2",
    "joint": "#56B4E9",
    "balanced": "#E69F00",
    "none": "#D55E00",
    "not looked for": "#CC79A7",
    "no effect": "#999999",
    "unused": "#DDDDDD",
}


# More names than these would be too small to read.
_NAMED = 160


def draw(report: Report, path: str | Path) -> None:
    """Write a figure: the size of every parameter, and the share of each kind.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(
            "drawing a report needs matplotlib; install it with `pip install normwise[lab]`"
        ) from error

    count = len(report)
    named = count <= _NAMED
    height = 0.14 * count if named else 0.05 * count
    figure = Figure(figsize=(9.0, min(max(2.0, height), 30.0) + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    shares, sizes = figure.subplots(2, 1, height_ratios=(0.3, min(max(2.0, height), 30.0)))

    colours = [COLOURS[row.kind] for row in report]
    sizes.barh(range(count), [row.entries for row in report], color=colours, height=0.85)
    sizes.set_xscale("log")
    sizes.set_ylim(count - 0.4, -0.6)
    sizes.set_xlabel("entries")
    if named:
        sizes.set_yticks(range(count), [row.name for row in report], fontsize=7)
    else:
        sizes.set_ylabel("parameters, in the model's order")
    for side in ("top", "right"):
        sizes.spines[side].set_visible(False)

    left = 0.0
    present: list[Kind] = [kind for kind in KINDS if any(row.kind == kind for row in report)]
    for kind in present:
        share = report.share(kind)
        shares.barh(0, share, left=left, color=COLOURS[kind], height=1)
        if share > 0.06:
            middle = left + share / 2
            shares.text(middle, 0, f"{share:.0%}", ha="center", va="center", fontsize=8)
        left += share
    shares.set_xlim(0, 1)
    shares.set_yticks([])
    shares.set_xlabel("share of all entries")
    shares.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for side in ("top", "right", "left"):
        shares.spines[side].set_visible(False)

    handles = [
        Patch(
            color=COLOURS[kind], label=f"{kind}: {KINDS[kind]}" if kind != "none" else KINDS[kind]
        )
        for kind in present
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
