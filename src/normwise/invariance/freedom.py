"""The ledger: how much scale freedom is lost where norms are fixed, and where gains give it back.

A set F of slices whose norms are fixed takes away as many degrees of freedom as it has slices. Of
these the symmetries had ``rank`` to spare: directions in which the norms of F move independently
while the function stays. What is left, |F| − rank, are products of norms on which the function
depends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normwise.figures.tables import Table
from normwise.geometry import View
from normwise.invariance.symmetry import Slices, Symmetry, Term

__all__ = ["Freedom", "LostProduct", "ledger"]

Verdict = Literal["fix", "fix with a gain", "leave"]

# Exponents are small rationals; anything smaller is rounding of the elimination.
_SMALL = 1e-8


@dataclass(frozen=True)
class LostProduct:
    """A product of norms on which the function depends, and which fixed norms take from it.

    Args:
        powers: the power of each weight's norm in the product, by parameter. A gain on any one of
            them gives the freedom back.
        slices: how many such products there are, one for each slice.
    """

    powers: dict[str, float]
    slices: int = 1

    def __str__(self) -> str:
        up = " · ".join(_norm(name, power) for name, power in self.powers.items() if power > 0)
        down = [_norm(name, -power) for name, power in self.powers.items() if power < 0]
        ratio = up + (f" / ({' · '.join(down)})" if down else "")
        several = f" ({self.slices} slices)" if self.slices > 1 else ""
        where = "it" if len(self.powers) == 1 else "any one of them"
        return f"{ratio}{several}: a gain on {where} gives it back"


def _norm(name: str, power: float) -> str:
    return f"‖{name}‖" if power == 1 else f"‖{name}‖^{power:g}"


@dataclass(frozen=True)
class Freedom:
    """What it costs to fix a set of norms. ``str(freedom)`` is a table.

    Args:
        fixed: the view in which each parameter's norms are fixed, by name.
        slices: the number of norms fixed.
        symmetries: how many of them the symmetries can bring to any value, the function unchanged.
        losses: the products of norms that the function loses.
        verdicts: for each parameter: ``"fix"`` at no loss, ``"fix with a gain"`` (of the parameters
            that share a loss the last used is named), or ``"leave"`` (not among the fixed).
    """

    fixed: dict[str, View]
    slices: int
    symmetries: int
    losses: tuple[LostProduct, ...]
    verdicts: dict[str, Verdict]

    @property
    def lost(self) -> int:
        """The number of scale degrees of freedom that the fixed norms take from the function."""
        return self.slices - self.symmetries

    def __str__(self) -> str:
        lines = [
            f"{self.slices} norms fixed, {self.symmetries} of them free by symmetry: "
            f"{self.lost} scale degrees of freedom lost"
        ]
        lines += [f"  {loss}" for loss in self.losses]
        rows = (
            (name, verdict, str(self.fixed.get(name, "")))
            for name, verdict in self.verdicts.items()
        )
        table = Table.of(("parameter", "verdict", "view"), rows)
        return "\n".join([*lines, "", str(table)])


def ledger(
    symmetries: Sequence[Symmetry],
    shapes: Mapping[str, tuple[int, ...]],
    fixed: Mapping[str, View],
    own: Mapping[str, View],
) -> Freedom:
    """Count what fixing these norms costs.

    A family acts on a fixed slice only as a whole: units that one fixed slice holds together move
    together, so that no inequality between norms is taken for freedom.

    Args:
        symmetries: of the network.
        shapes: of its parameters, in the order of their use.
        fixed: the view in which each parameter's norms are to be fixed.
        own: the views in which parameters are scale-invariant by themselves.
    """
    free = {name for name, view in fixed.items() if _is_coarser(view, own.get(name))}
    counts = {name: Slices.of_view(view, shapes[name]).count for name, view in fixed.items()}
    held = {name: view for name, view in fixed.items() if name not in free}
    moves = _moves(symmetries, shapes, held)
    rows = [(name, i) for name in held for i in range(counts[name])]
    reached = torch.cat([moves[name] for name in held] or [torch.zeros(0, 0, dtype=torch.float64)])
    losses, dependent = _losses(rows, reached)
    slices = sum(counts.values())
    gains = {rows[i][0] for i in dependent}
    verdicts: dict[str, Verdict] = {
        name: "leave" if name not in fixed else "fix with a gain" if name in gains else "fix"
        for name in shapes
    }
    return Freedom(dict(fixed), slices, slices - len(dependent), losses, verdicts)


def _is_coarser(view: View, own: View | None) -> bool:
    """Whether slices of ``view`` consist of slices that are invariant by themselves."""
    if own is None:
        return False
    same = own.kind == "channel" and own.dim == view.dim
    return (
        view in (own, View.layer())
        or same
        or (view.dim == own.dim and own.count % view.count == 0 and view.kind == own.kind)
    )


def _moves(
    symmetries: Sequence[Symmetry], shapes: Mapping[str, tuple[int, ...]], held: Mapping[str, View]
) -> dict[str, Tensor]:
    """How log norms of the held slices move along symmetries that scale each as a whole.

    Returns:
        For each parameter a matrix (its slices, independent symmetries).
    """
    columns: list[list[tuple[Term, Tensor]]] = []
    for symmetry in symmetries:
        terms = [term for term in symmetry.terms if term.parameter in held]
        if terms:
            columns += [[(term, units) for term in terms] for units in _tied(symmetry, held)]
    exponents: dict[str, dict[tuple[int, ...], Tensor]] = {name: {} for name in held}
    for j, column in enumerate(columns):
        for term, units in column:
            indices = term.slices.indices()[units].flatten()
            total = 1
            for d in term.slices.dims:
                total *= term.shape[d] if term.shape else 1
            matrix = exponents[term.parameter].setdefault(
                term.slices.dims, torch.zeros(total, len(columns), dtype=torch.float64)
            )
            matrix[indices, j] += term.exponent
    constraints, moved = [], {}
    for name, view in held.items():
        slices = Slices.of_view(view, shapes[name])
        moved[name] = torch.zeros(slices.count, len(columns), dtype=torch.float64)
        along = Slices.whole(shapes[name]).dims if view.kind == "layer" else (view.dim,)
        for dims, matrix in exponents[name].items():
            if dims == along or dims == slices.dims:
                groups = matrix[slices.indices()]
            else:
                groups = matrix.unsqueeze(0)
            # Within a slice all indices must move alike.
            constraints.append((groups[:, 1:] - groups[:, :1]).flatten(0, 1))
            moved[name] += groups[:, 0]
    if constraints and columns:
        system = torch.cat(constraints)
        if len(system) > len(columns):  # as many equations as a vocabulary has rows
            system = torch.linalg.qr(system, mode="r").R
        _, values, rows = torch.linalg.svd(system, full_matrices=True)
        rank = int((values > _SMALL * max(float(values.max()), 1.0)).sum()) if len(values) else 0
        basis = rows[rank:].T
        moved = {name: matrix @ basis for name, matrix in moved.items()}
    return moved


def _tied(symmetry: Symmetry, held: Mapping[str, View]) -> Iterator[Tensor]:
    """The units of a family, in the groups that one held slice keeps together."""
    units = torch.arange(symmetry.units)
    labels = units.clone()
    for term in symmetry.terms:
        view = held.get(term.parameter)
        if view is None:
            continue
        slices = Slices.of_view(view, term.shape)
        if slices.dims != term.slices.dims or view.kind == "layer":
            labels = torch.zeros_like(labels)
            break
        owner = torch.zeros(slices.indices().numel(), dtype=torch.long)
        owner[slices.indices()] = torch.arange(slices.count).unsqueeze(1)
        mine = owner[term.slices.indices()]
        for i in units.tolist():
            near = torch.isin(mine, mine[i]).any(1)
            labels[torch.isin(labels, labels[near])] = labels[near].min()
    for label in sorted(set(labels.tolist())):
        yield units[labels == label]


def _losses(
    rows: list[tuple[str, int]], reached: Tensor
) -> tuple[tuple[LostProduct, ...], list[int]]:
    """The products that no symmetry moves, and for each the row that is dependent by it."""
    chosen: list[int] = []
    dependent: list[int] = []
    products: dict[tuple[tuple[str, float], ...], int] = {}
    for i in range(len(rows)):
        basis = reached[chosen]
        target = reached[i]
        if chosen:
            solved = torch.linalg.lstsq(basis.T, target.unsqueeze(1), driver="gelsd").solution[:, 0]
            rest = target - solved @ basis
        else:
            solved, rest = target.new_zeros(0), target
        if torch.linalg.vector_norm(rest) > 1e-6 * max(
            float(torch.linalg.vector_norm(target)), 1e-6
        ):
            chosen.append(i)
            continue
        dependent.append(i)
        # The dependent slice's own power is 1, so that it stands above the line.
        powers = {rows[i][0]: 1.0}
        for j, a in zip(chosen, solved.tolist(), strict=True):
            if abs(a) > 1e-6:
                powers[rows[j][0]] = powers.get(rows[j][0], 0.0) + round(-a, 6)
        key = tuple(sorted(powers.items()))
        products[key] = products.get(key, 0) + 1
    order = {name: k for k, (name, _) in enumerate(rows)}
    losses = tuple(
        LostProduct(dict(sorted(key, key=lambda item: order[item[0]])), count)
        for key, count in products.items()
    )
    return losses, dependent
