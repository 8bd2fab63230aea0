"""Solving for the multiples of generators that symmetries take out of a displacement.

Families are split into some that share no entry with one another, D, whose part of the Gram matrix
G is diagonal, and the rest, C. Then x_C comes of the Schur complement G_CC − G_CD G_DD⁻¹ G_DC, of
the size of C alone, and x_D of a diagonal: as where one residual stream, a single unit, crosses the
thousands of units of the layers that write to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from normwise.optim.sums import divisor

__all__ = ["solve"]

# The largest system of equations, in entries.
_LARGEST = 1 << 24


def solve(
    squares: Sequence[Tensor],
    products: Sequence[Tensor],
    blocks: Mapping[tuple[int, int], Tensor],
    names: Sequence[str],
) -> list[Tensor]:
    """x of G x = b.

    Generators that depend on one another leave x open, but not Σ xᵤvᵤ: then a ridge of rounding's
    size makes G invertible, and steps of refinement take it out of the result.

    Args:
        squares: the diagonal of G, by family.
        products: b, by family.
        blocks: what G has beside, by pairs of families i ≤ j.
        names: of the families, for errors.

    Raises:
        ValueError: if the system is too large.
    """
    partners: dict[int, set[int]] = {i: set() for i in range(len(squares))}
    for i, j in blocks:
        partners[i].add(j)
        partners[j].add(i)
    x: list[Tensor] = [b / divisor(g) for b, g in zip(products, squares, strict=True)]
    for component in _components(partners):
        if partners[component[0]]:
            _solve_component_(x, component, squares, products, blocks, names)
    return x


def _components(partners: Mapping[int, set[int]]) -> list[list[int]]:
    """Families that hang together, however indirectly."""
    found, seen = [], set()
    for start in partners:
        if start in seen:
            continue
        component, waiting = [], [start]
        seen.add(start)
        while waiting:
            i = waiting.pop()
            component.append(i)
            waiting += partners[i] - seen
            seen |= partners[i]
        found.append(sorted(component))
    return found


def _solve_component_(
    x: list[Tensor],
    component: Sequence[int],
    squares: Sequence[Tensor],
    products: Sequence[Tensor],
    blocks: Mapping[tuple[int, int], Tensor],
    names: Sequence[str],
) -> None:
    """Solve for the families of one component, as :func:`solve` does for all."""
    # All generators scaled to length 1, so that no size hides another.
    unit = {i: 1 / divisor(squares[i].sqrt()) for i in component}
    right = {i: products[i] * unit[i] for i in component}
    scaled: dict[tuple[int, int], Tensor] = {}
    for (i, j), block in blocks.items():
        if i in unit:
            scaled[i, j] = unit[i].unsqueeze(1) * block * unit[j]
            scaled[j, i] = scaled[i, j].T

    alone: list[int] = []  # D: families that share nothing with one another nor with themselves
    for i in sorted(component, key=lambda i: -len(squares[i])):
        if not any((i, j) in scaled for j in (i, *alone)):
            alone.append(i)
    rest = [i for i in component if i not in alone]
    if not rest:
        return
    sizes = [len(squares[i]) for i in rest]
    total = sum(sizes)
    if total * (total + max(len(squares[i]) for i in component)) > _LARGEST:
        largest = max(rest, key=lambda i: len(squares[i]))
        raise ValueError(
            f"{total} units share entries with others, {len(squares[largest])} of them those of "
            f"{names[largest]}: too many to be solved for in every step; leave out families, so "
            "that fewer have rows and columns of one weight"
        )

    def row(i: int) -> Tensor:
        """What G has between a family and all of C."""
        none = squares[i].new_zeros
        return torch.cat(
            [scaled.get((i, j), none(len(squares[i]), len(squares[j]))) for j in rest], 1
        )

    rows = {i: row(i) for i in component}
    schur: Tensor = torch.eye(total).to(squares[0]) + torch.cat([rows[i] for i in rest])
    wanted = torch.cat([right[i] for i in rest])
    for i in alone:
        schur = schur - rows[i].T @ rows[i]
        wanted = wanted - rows[i].T @ right[i]
    ridge = 1e4 * torch.finfo(schur.dtype).eps * torch.eye(total).to(schur)
    factor, _ = torch.linalg.cholesky_ex(schur + ridge)
    solution = torch.zeros_like(wanted)
    for _ in range(3):
        residual = (wanted - schur @ solution).unsqueeze(1)
        solution = solution + torch.cholesky_solve(residual, factor).squeeze(1)
    for i, part in zip(rest, torch.split(solution, sizes), strict=True):
        x[i] = part * unit[i]
    for i in alone:
        x[i] = (right[i] - rows[i] @ solution) * unit[i]
