"""Pictures of what a monitor has seen: one figure, or panels as inline SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from normwise.monitor.history import History, Trajectory
from normwise.updates import Update

__all__ = ["PANELS", "draw", "panels"]

_INK, _MUTED, _GRID = "#1b1e23", "#666d78", "#e4e6ea"
# More names than these would be too small to read beside a heat map.
_NAMED = 40


def draw(monitor: History) -> Any:
    """A figure of all panels.

    Raises:
        ImportError: without matplotlib.
        ValueError: if nothing has been measured yet.
    """
    figure = _figure((13.0, 4.6 + _heat_height(monitor)))
    _check(monitor)
    top, bottom = figure.subfigures(2, 1, height_ratios=(4.6, _heat_height(monitor)))
    axes = top.subplots(1, 3)
    for ax, panel in zip(axes, (norms, effective_lrs, equilibrium), strict=True):
        panel(ax, monitor)
    angles(bottom.subplots(), monitor)
    return figure


def panels(monitor: History) -> dict[str, str]:
    """Each panel as an ``<svg>`` element, to put into a page.

    Raises:
        ImportError: without matplotlib.
        ValueError: if nothing has been measured yet.
    """
    _check(monitor)
    found = {}
    for name, panel in PANELS.items():
        figure = _figure((8.0, _heat_height(monitor)) if name == "angles" else (6.0, 4.4))
        panel(figure.subplots(), monitor)
        buffer = io.StringIO()
        # Without a date the same measurements give the same text.
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
        found[name] = text[text.index("<svg") :]
    return found


def norms(ax: Any, monitor: History) -> None:
    """The norm of each layer over time."""
    _lines(ax, monitor, "norm")
    _title(ax, "Norm", "geometric mean over a layer's slices")


def effective_lrs(ax: Any, monitor: History) -> None:
    """The effective learning rate of each layer over time."""
    _lines(ax, monitor, "effective_lr")
    norm = "‖w‖²" if monitor.update is Update.GRADIENT else "‖w‖"
    _title(ax, "Effective learning rate", f"η/{norm}, geometric mean over a layer's slices")


def angles(ax: Any, monitor: History) -> None:
    """A heat map of angular updates: layers × time."""
    from matplotlib.colors import LogNorm

    steps, values = monitor.series("angular_update")
    shown = values.T.clamp(min=1e-12).numpy()
    shown[~(values.T > 0).numpy()] = math.nan
    edges = [steps[0], *steps[1:], 2 * steps[-1] - (steps[-2] if len(steps) > 1 else 0)]
    image = ax.pcolormesh(
        edges, range(len(monitor.layers) + 1), shown, norm=LogNorm(), cmap="viridis"
    )
    ax.invert_yaxis()
    if len(monitor.layers) <= _NAMED:
        ax.set_yticks([i + 0.5 for i in range(len(monitor.layers))], monitor.layers, fontsize=7)
    else:
        ax.set_ylabel("layers, in the model's order", color=_MUTED)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("step", color=_MUTED)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.set_title("rad", fontsize=8, color=_MUTED)
    _title(ax, "Angle that a step turns a layer by", "root mean square over its slices")


def equilibrium(ax: Any, monitor: History) -> None:
    """Measured over predicted angle and norm of each layer, over the last quarter of the run."""
    from_step = len(monitor.measurements) * 3 // 4
    rows = range(len(monitor.layers))
    drawn = False
    for name, colour, marker in (("angular_update", "#0072b2", "o"), ("norm", "#d55e00", "D")):
        measured = monitor.series(name)[1][from_step:]
        predicted = monitor.series(f"predicted_{name}")[1][from_step:]
        ratio = (measured / predicted).nanmean(0)
        if ratio.isfinite().any():
            drawn = True
            label = {"angular_update": "angle", "norm": "norm"}[name]
            ax.plot(
                ratio.tolist(), rows, marker, color=colour, label=label, markersize=5, alpha=0.8
            )
    _title(ax, "Measured ÷ predicted equilibrium", "last quarter of the run; band: ±10%")
    if not drawn:
        text = "no equilibrium is known for\nthis optimizer or weight decay"
        ax.text(0.5, 0.5, text, ha="center", va="center", color=_MUTED, transform=ax.transAxes)
        ax.set_axis_off()
        return
    _plain(ax)
    ax.axvspan(0.9, 1.1, color="#0072b2", alpha=0.08, linewidth=0)
    ax.axvline(1, color=_MUTED, linewidth=0.8)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, 0.5), max(high, 2.0))
    ticks = [
        t for t in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100) if low <= t <= high or 0.5 <= t <= 2
    ]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks([])
    ax.set_ylabel("layers, the first on top", color=_MUTED)
    ax.legend(frameon=False, labelcolor=_INK)


PANELS = {
    "norms": norms,
    "effective_lrs": effective_lrs,
    "angles": angles,
    "equilibrium": equilibrium,
}


def _lines(ax: Any, monitor: History, name: str) -> None:
    """One line a layer, the first layers dark and the last light."""
    from matplotlib import colormaps

    steps, values = monitor.series(name)
    count = len(monitor.layers)
    for i, layer in enumerate(monitor.layers):
        colour = colormaps["viridis"](0.92 * i / max(count - 1, 1))
        label = layer if i in (0, count - 1) else None
        ax.plot(steps, _finite(values[:, i]), color=colour, linewidth=1.5, label=label)
    _log(ax)
    ax.set_xlabel("step", color=_MUTED)
    _plain(ax)
    ax.legend(frameon=False, labelcolor=_INK, fontsize=8)


def _finite(t: Tensor) -> list[float]:
    return [v if math.isfinite(v) and v > 0 else math.nan for v in t.tolist()]


def _title(ax: Any, title: str, note: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=20)
    ax.text(0, 1.025, note, transform=ax.transAxes, fontsize=8.5, color=_MUTED)


def _log(ax: Any) -> None:
    """A logarithmic axis with plain numbers at powers of ten, or closer where those are few."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    few = MaxNLocator(nbins=5)
    powers = LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,))
    ax.yaxis.set_major_locator(few if high / low < 5 else powers)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")


def _plain(ax: Any) -> None:
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#b9bec7")
    ax.tick_params(which="both", colors=_MUTED, length=0)


def _heat_height(monitor: History) -> float:
    return 1.5 + 0.16 * min(max(len(monitor.layers), 6), _NAMED)


def _check(monitor: History) -> None:
    if not monitor.measurements:
        raise ValueError("nothing has been measured yet; call monitor.fetch() after some steps")


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib; install it with `pip install normwise[lab]`"
        ) from error
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_plan(trajectories: Sequence[Trajectory], schedule: str) -> Any:
    """The expected norms and angles of a plan, over its steps.

    Args:
        trajectories: one line each.
        schedule: of the learning rate, ``"constant"`` or ``"cosine"``.

    Raises:
        ImportError: without matplotlib.
        ValueError: where no closed form of the norms is known.
    """
    from matplotlib import colormaps

    if not any(t.norms for t in trajectories):
        raise ValueError("there is no picture: no closed form of the norms is known")
    figure = _figure((11.0, 4.4))
    left, right = figure.subplots(1, 2)
    count = len(trajectories)
    for i, row in enumerate(trajectories):
        colour = colormaps["viridis"](0.92 * i / max(count - 1, 1))
        label = row.name if i in (0, count - 1) else None
        left.plot(row.norms, color=colour, linewidth=1.6, label=label)
        right.plot([a or math.nan for a in row.angles], color=colour, linewidth=1.6, label=label)
        if math.isfinite(row.settled_norm):
            left.axhline(row.settled_norm, color=colour, linewidth=0.8, linestyle=(0, (1, 3)))
    angle = next((t.settled_angle for t in trajectories if t.settled_angle > 0), None)
    if angle is not None:
        right.axhline(angle, color=_MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
    constant = schedule == "constant"
    note = "dotted: equilibrium" + ("" if constant else " at the highest learning rate")
    _title(left, "Expected norm", note)
    _title(right, "Expected angle that a step turns a slice by", f"radians; {note}")
    for ax in (left, right):
        _log(ax)
        ax.set_xlabel("step", color=_MUTED)
        _plain(ax)
    # A cosine ends at 0, which would leave no room for the rest.
    top = right.get_ylim()[1]
    right.set_ylim(max(right.get_ylim()[0], top / 1e4), top)
    if count > 1:
        left.legend(frameon=False, labelcolor=_INK, fontsize=8)
    return figure
