"""The two-dimensional toy as inline SVG."""

from __future__ import annotations

import math
from html import escape

from normwise.lab.palette import TOY_STYLES
from normwise.lab.toy import PRINTED, START, Printed, Trajectory, loss_at_angle

__all__ = ["picture", "table"]

_SCALE = 88.0
_LEFT, _RIGHT, _TOP, _BOTTOM = -1.5, 2.75, 1.35, -3.1
_SECTORS = 180


def picture(courses: dict[str, Trajectory]) -> str:
    """The paths of the three methods over the loss, which is the same along every ray."""
    width, height = (_RIGHT - _LEFT) * _SCALE, (_TOP - _BOTTOM) * _SCALE
    parts = [
        f'<svg class="toy" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        'aria-label="Paths of a weight of two entries under three methods">',
        "<title>Paths of a weight of two entries under three methods</title>",
        f'<clipPath id="plane"><rect width="{width:.0f}" height="{height:.0f}" rx="8"/></clipPath>',
        '<g clip-path="url(#plane)">',
    ]
    step = 2 * math.pi / _SECTORS
    for k in range(_SECTORS):
        edges = [_place(9 * math.cos(a), 9 * math.sin(a)) for a in (k * step, (k + 1) * step)]
        opacity = 0.42 * loss_at_angle((k + 0.5) * step) / 4
        points = " ".join([_place(0, 0), *edges])
        parts.append(f'<polygon class="loss" points="{points}" fill-opacity="{opacity:.3f}"/>')
    parts.append("</g>")
    for radius in (1, 2, 3):
        x, y = _place(0, 0).split(",")
        parts.append(
            f'<circle class="ring" cx="{x}" cy="{y}" r="{radius * _SCALE:.0f}" '
            'clip-path="url(#plane)"/>'
        )
        x, y = _place(0, -radius).split(",")
        parts.append(
            f'<text class="tick" x="{float(x) - 8:.1f}" y="{float(y) - 5:.1f}" '
            f'text-anchor="end">‖w‖ = {radius}</text>'
        )
    for method, course in courses.items():
        path = " ".join(_place(*point) for point in course.points)
        dash = " ".join(f"{2.4 * d:g}" for d in TOY_STYLES[method].dash)
        dotted = f' stroke-dasharray="{dash}"' if dash else ""
        x, y = _place(*course.points[-1]).split(",")
        parts.append(
            f'<g class="t-{method}"><polyline class="mean" points="{path}"{dotted}/>'
            f'<circle class="end" cx="{x}" cy="{y}" r="4.5"/></g>'
        )
    x, y = _place(*START).split(",")
    goal_x, goal_y = _place(0, -2.36).split(",")
    parts.append(
        f'<circle class="start" cx="{x}" cy="{y}" r="4.5"/>'
        f'<text class="name" x="{float(x) - 10:.1f}" y="{float(y) + 4:.1f}" text-anchor="end">'
        f'start</text><path class="goal" fill="none" d="M{goal_x} {goal_y}v24m-5 -6l5 6l5 -6"/>'
        f'<text class="name" x="{float(goal_x) + 10:.1f}" y="{float(goal_y) + 14:.1f}">goal</text>'
        "</svg>"
    )
    return "".join(parts)


def table(courses: dict[str, Trajectory]) -> str:
    """Our numbers with the printed ones under them: a column for each method."""
    head = "".join(
        f'<th scope="col"><span class="key t-{method}"></span>{escape(course.label)}</th>'
        for method, course in courses.items()
    )
    printed = {(p.quantity, p.step, p.method): p for p in PRINTED}
    body = ""
    for quantity, step in dict.fromkeys((p.quantity, p.step) for p in PRINTED):
        cells = "".join(
            _cell(course, quantity, step, printed.get((quantity, step, method)))
            for method, course in courses.items()
        )
        name = f"norm after {step} steps" if quantity == "norm" else f"loss before step {step}"
        body += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(course: Trajectory, quantity: str, step: int, printed: Printed | None) -> str:
    if printed is None:
        value = (course.losses if quantity == "loss" else course.norms)[step]
        return f"<td>{value:.4f}<small>not printed</small></td>"
    return f"<td>{printed.rounded(course)}<small>paper {printed.text}</small></td>"


def _place(x: float, y: float) -> str:
    return f"{(x - _LEFT) * _SCALE:.1f},{(_TOP - y) * _SCALE:.1f}"
