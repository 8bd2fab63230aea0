"""The two-dimensional toy: its charts, and its numbers beside the ones that the paper prints."""

from __future__ import annotations

from collections.abc import Mapping

from normwise.figures import Axis, Line, Lines, Plane, Spacing, marks
from normwise.figures.tables import Cell, Column, Row, Table
from normwise.lab.toy import PRINTED, START, Path2D, Printed, loss_at_angle

__all__ = ["toy_loss", "toy_norm", "toy_plane", "toy_table"]

_BASELINES = {"momentum"}


def _toy_lines(trajectories: Mapping[str, Path2D], quantity: str) -> tuple[Line, ...]:
    found = []
    for name, (colour, dash) in marks(trajectories, _BASELINES).items():
        t = trajectories[name]
        if quantity == "path":
            x, y = zip(*t.points, strict=True)
        else:
            y = t.norms if quantity == "norm" else t.losses
            x = tuple(range(len(y)))
        found.append(Line(name, t.label, x, y, colour=colour, dash=dash))
    return tuple(found)


def toy_plane(trajectories: Mapping[str, Path2D]) -> Plane:
    """The paths of the toy's weight over the loss, which is the same along every ray."""
    return Plane(
        "Paths of w",
        "shaded: high loss, the same along a ray; the goal is straight down",
        _toy_lines(trajectories, "path"),
        left=-1.5,
        right=2.75,
        bottom=-3.1,
        top=1.35,
        shade=lambda angle: loss_at_angle(angle) / 4,
        rings=tuple((float(r), f"‖w‖ = {r}") for r in (1, 2, 3)),
        points=((*START, "start"),),
    )


def toy_norm(trajectories: Mapping[str, Path2D]) -> Lines:
    """The norms of the toy's weight by step."""
    lines = _toy_lines(trajectories, "norm")
    return Lines("Norm", "", Axis("step", Spacing.TIGHT), Axis("‖w‖", holds=(0.0,)), lines)


def toy_loss(trajectories: Mapping[str, Path2D]) -> Lines:
    """The toy's losses by step."""
    lines = _toy_lines(trajectories, "loss")
    steps, loss = Axis("step", Spacing.TIGHT), Axis("loss, log scale", Spacing.LOG)
    return Lines("Loss", "", steps, loss, lines)


def toy_table(trajectories: Mapping[str, Path2D]) -> Table:
    """Our numbers with the printed ones beside them: a row for each method."""
    printed = {(p.quantity, p.step, p.method): p for p in PRINTED}
    shown = list(dict.fromkeys((p.quantity, p.step) for p in PRINTED))
    columns = (
        Column("method", words=True),
        *(
            Column(quantity, f"{'after' if quantity == 'norm' else 'before'} step {step}")
            for quantity, step in shown
        ),
    )
    rows = tuple(
        Row(
            (
                trajectories[name].label,
                *(
                    _cell(trajectories[name], quantity, step, printed.get((quantity, step, name)))
                    for quantity, step in shown
                ),
            ),
            colour=colour,
            dashed=bool(dash),
        )
        for name, (colour, dash) in marks(trajectories, _BASELINES).items()
    )
    return Table(columns, rows)


def _cell(trajectory: Path2D, quantity: str, step: int, printed: Printed | None) -> Cell:
    if printed is None:
        value = (trajectory.losses if quantity == "loss" else trajectory.norms)[step]
        return Cell(f"{value:.4f}", "not printed")
    return Cell(printed.rounded(trajectory), f"paper {printed.text}")
