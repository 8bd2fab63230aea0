"""A figure of a report: the share of each kind, the parameters, and the families that link them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from normwise.figures import Axis, Dots, Figure, Link, Links, Series
from normwise.invariance.row import Kind
from normwise.invariance.symmetry import Symmetry

__all__ = ["COLOURS", "figure"]

COLOURS: dict[str, str] = {
    "invariant": "blue",
    "joint": "green",
    "balanced": "ochre",
    "none": "orange",
    "not looked for": "violet",
    "no effect": "grey",
    "unused": "strong-line",
}

# Rows of more could neither be read nor painted in a file of ordinary size.
_MOST_ROWS = 240


def figure(
    parameters: Sequence[tuple[str, int, str, str]],
    families: Sequence[Symmetry],
    kinds: Mapping[Kind, str],
) -> Figure:
    """The share of each kind, and the parameters with their views and the families between them.

    Args:
        parameters: name, entries, kind and verdict of each, in the order in which they are shown.
        families: those of several terms are drawn as links; views stand beside the names.
        kinds: what each kind means, in the order in which they are shown.
    """
    total = max(sum(entries for _, entries, _, _ in parameters), 1)
    sums = {kind: sum(n for _, n, own, _ in parameters if own == kind) for kind in kinds}
    present = [kind for kind in kinds if sums[kind]]
    shares = Dots(
        "Share of all entries",
        "",
        Axis("%", holds=(0.0, 100.0)),
        tuple(kinds[kind] for kind in present),
        (
            Series(
                "",
                tuple(100 * sums[kind] / total for kind in present),
                colours=tuple(COLOURS[kind] for kind in present),
            ),
        ),
        bars=True,
    )
    return Figure("", (shares, _links(parameters, families)), columns=1, width=900)


def _links(parameters: Sequence[tuple[str, int, str, str]], families: Sequence[Symmetry]) -> Links:
    shown = parameters[:_MOST_ROWS]
    rows = {name: row for row, (name, *_) in enumerate(shown)}
    links = []
    for family in families:
        if family.is_view:
            continue
        up, down = (
            tuple(
                rows[name]
                for name in dict.fromkeys(
                    t.parameter for t in family.terms if (t.exponent > 0) == positive
                )
                if name in rows
            )
            for positive in (True, False)
        )
        if up or down:
            links.append(Link(up, down, f"{family.units}"))
    note = "numbers count the units that can be scaled one by one"
    if len(shown) < len(parameters):
        note += f"; the first {len(shown)} of {len(parameters)} parameters"
    return Links(
        "Parameters, their verdicts, and the families in which scale can be traded",
        note,
        tuple(rows),
        tuple((verdict, COLOURS[kind]) for _, _, kind, verdict in shown),
        tuple(links),
        "multiplied by c",
        "by 1/c",
        "parts by c, parts by 1/c" if any(set(ln.full) & set(ln.hollow) for ln in links) else "",
    )
