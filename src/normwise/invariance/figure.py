"""A figure of a network's parameters, coloured by kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from normwise.figures import Axis, Dots, Figure, Series, Spacing, save

__all__ = ["draw"]

_COLOURS = {
    "invariant": "blue",
    "joint": "green",
    "balanced": "ochre",
    "none": "orange",
    "not looked for": "violet",
    "no effect": "grey",
    "unused": "strong-line",
}


def draw(
    parameters: Sequence[tuple[str, int, str]], kinds: Sequence[tuple[str, str]], path: str | Path
) -> None:
    """Write a figure: the share of each kind, and the size of every parameter.

    Args:
        parameters: name, entries and kind of each, in the model's order.
        kinds: each kind and what it means, in the order in which they are shown.
        path: a file whose suffix says the format.

    Raises:
        ImportError: without matplotlib, but for ``.svg``.
    """
    total = max(sum(entries for _, entries, _ in parameters), 1)
    sums = {kind: sum(n for _, n, own in parameters if own == kind) for kind, _ in kinds}
    present = [(kind, meaning) for kind, meaning in kinds if sums[kind]]
    percent = tuple(100 * sums[kind] / total for kind, _ in present)
    shares = Dots(
        "Share of all entries",
        "",
        Axis("%", holds=(0.0, 100.0)),
        tuple(meaning for _, meaning in present),
        (Series("", percent, colours=tuple(_COLOURS[kind] for kind, _ in present)),),
        bars=True,
    )
    sizes = Dots(
        "Entries of each parameter",
        "",
        Axis("entries, log scale", Spacing.LOG, holds=(1.0,)),
        tuple(name for name, _, _ in parameters),
        (
            Series(
                "",
                tuple(float(entries) for _, entries, _ in parameters),
                colours=tuple(_COLOURS[kind] for _, _, kind in parameters),
            ),
        ),
        bars=True,
    )
    save(Figure("", (shares, sizes), columns=1, width=860), path)
