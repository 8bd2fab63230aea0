"""Curves of a comparison as PNG pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from normwise.lab.palette import STYLES, TOY_STYLES
from normwise.lab.summary import curve
from normwise.lab.toy import OPTIMUM, START, Trajectory

__all__ = ["PLOTS", "draw_toy"]

Records = list[dict[str, Any]]
Run = dict[str, Any]
_INK, _MUTED = "#1b1e23", "#666d78"


def _figure(panels: int, title: str, run: Run) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(2.2 + 5.0 * panels, 4.4), dpi=160, layout="constrained")
    mark = "" if run["status"] == "complete" else f" ({run['status']})"
    figure.suptitle(title + mark, x=0.012, ha="left", fontsize=13, fontweight="bold", color=_INK)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.set_xlabel("epoch", color=_MUTED)
        ax.grid(axis="y", color="#e4e6ea", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color("#b9bec7")
        ax.tick_params(which="both", colors=_MUTED, length=0)
        for epoch in run["settings"]["drop_epochs"]:
            ax.axvline(epoch, color="#b9bec7", linewidth=0.8, linestyle=(0, (1, 3)))
    return figure, axes


def _lines(ax: Axes, records: Records, run: Run, quantity: str) -> None:
    """Mean over seeds as a line, least to greatest as a band."""
    for name, label in ((method["name"], method["label"]) for method in run["methods"]):
        data = curve(records, name, quantity, run["settings"]["epochs"])
        if not data.epochs:
            continue
        style = STYLES[name]
        ax.plot(
            data.epochs,
            data.mean,
            color=style.light,
            linestyle=(0, style.dash) if style.dash else "-",
            linewidth=2,
            label=label,
        )
        ax.fill_between(
            data.epochs, data.low, data.high, color=style.light, alpha=0.15, linewidth=0
        )


def _has_lines(ax: Axes) -> bool:
    """Whether any optimizer has been drawn."""
    return bool(ax.get_legend_handles_labels()[0])


def _subtitle(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=10, color=_MUTED)


def _png(figure: Figure, axes: Sequence[Axes]) -> bytes:
    if _has_lines(axes[0]):
        axes[0].legend(frameon=False, labelcolor=_INK)
    else:
        axes[0].text(0.5, 0.5, "no finished epoch", ha="center", transform=axes[0].transAxes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def norms(run: Run, records: Records) -> bytes:
    """How the norms of the scale-invariant weights grew."""
    figure, axes = _figure(1, "Norm of the scale-invariant weights", run)
    _subtitle(axes[0], "norm ÷ its value at the start, mean and range over seeds")
    _lines(axes[0], records, run, "norm_growth")
    return _png(figure, axes)


def effective_lr(run: Run, records: Records) -> bytes:
    """The effective learning rate, with the schedule and without."""
    figure, axes = _figure(2, "Effective learning rate", run)
    _subtitle(axes[0], "with the schedule: η/‖w‖² (SGD, SGDP), η/‖w‖ (AdamW, AdamP)")
    _lines(axes[0], records, run, "effective_lr")
    if _has_lines(axes[0]):
        axes[0].set_yscale("log")
    _subtitle(axes[1], "norms' share alone: 1/‖w‖² or 1/‖w‖ ÷ its value at the start")
    _lines(axes[1], records, run, "relative_effective_lr")
    axes[1].set_ylim(bottom=0)
    return _png(figure, axes)


def accuracy(run: Run, records: Records) -> bytes:
    """Test accuracy on an axis that is stretched towards 100%, where optimizers differ."""
    figure, axes = _figure(1, "Test accuracy", run)
    _subtitle(axes[0], "percent, axis stretched towards 100; mean and range over seeds")
    ax = axes[0]
    _lines(ax, records, run, "test_accuracy")
    # Beyond 99.99% the stretch would never end; a perfect score is drawn there.
    ax.set_yscale(
        "function",
        functions=(
            lambda a: -np.log10(1 - np.clip(a, 0, 0.9999)),
            lambda s: 1 - 10.0 ** -np.asarray(s, dtype=float),
        ),
    )
    ax.set_yticks([0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999])
    top = max((r["test_accuracy"] for r in records if r["status"] == "ok"), default=0.9)
    ax.set_ylim(0, min(0.9995, 1 - 0.7 * (1 - top)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda a, _: f"{100 * a:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    return _png(figure, axes)


PLOTS: dict[str, Callable[[Run, Records], bytes]] = {
    "norms.png": norms,
    "effective_lr.png": effective_lr,
    "accuracy.png": accuracy,
}


def draw_toy(courses: Mapping[str, Trajectory], format: str) -> bytes:
    """The toy's three paths over its loss, and their norms and losses step by step."""
    figure = Figure(figsize=(12, 4.6), dpi=160, layout="constrained")
    figure.suptitle(
        "The same directions are equally good at any norm; momentum inflates it all the same",
        x=0.012,
        ha="left",
        fontsize=13,
        fontweight="bold",
        color=_INK,
    )
    plane, length, value = figure.subplots(1, 3, width_ratios=[1, 1.1, 1.1])
    reach = 1.12 * max(abs(c) for course in courses.values() for p in course.points for c in p)
    angle = np.linspace(-np.pi, np.pi, 721)
    levels = (1 - (OPTIMUM[0] * np.cos(angle) + OPTIMUM[1] * np.sin(angle))) ** 2
    radius = np.array([0, 2 * reach])
    plane.pcolormesh(
        np.outer(radius, np.cos(angle)),
        np.outer(radius, np.sin(angle)),
        np.vstack([levels, levels]),
        cmap="Greys",
        vmin=0,
        vmax=9,
        shading="gouraud",
        rasterized=True,
    )
    for method, course in courses.items():
        style = TOY_STYLES[method]
        line: dict[str, Any] = {
            "color": style.light,
            "linestyle": (0, style.dash) if style.dash else "-",
            "linewidth": 2,
            "label": course.label,
        }
        plane.plot(*zip(*course.points, strict=True), **line)
        plane.plot(*course.points[-1], "o", color=style.light, markersize=5)
        length.plot(course.norms, **line)
        value.plot(course.losses, **line)
    plane.plot(*START, "o", color=_INK, markersize=4)
    plane.annotate("start", START, (8, 4), textcoords="offset points", color=_INK)
    plane.annotate(
        "", (0, -0.9 * reach), (0, -0.55 * reach), arrowprops={"arrowstyle": "->", "color": _MUTED}
    )
    plane.annotate("w*", (0, -0.72 * reach), (6, 0), textcoords="offset points", color=_MUTED)
    plane.set(xlim=(-reach / 3, reach), ylim=(-reach, reach * 0.55), aspect="equal")
    for ax, title in (
        (plane, "path of w; dark is high loss; same loss along a ray"),
        (length, "‖w‖ by step"),
        (value, "loss by step"),
    ):
        _subtitle(ax, title)
        ax.tick_params(which="both", colors=_MUTED, length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
    value.set_yscale("log")
    length.legend(frameon=False, labelcolor=_INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format)
    return buffer.getvalue()
