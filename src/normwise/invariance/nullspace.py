"""Exponents that annul Euler products: what can be scaled together, as powers of one number.

If f(c^a₁·w₁, …, c^a_T·w_T) = f(w₁, …, w_T) for all c > 0, then Σ a_t ⟨w_t, g_t⟩ = 0 for every
upstream gradient: the exponents a are the null space of the matrix (draws × tensors) of Euler
products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.invariance.replica import TOLERANCE

__all__ = ["RowSpace", "null_space", "pivots", "sparse_basis"]

# Exponents are small rationals. Values this near to one are taken for it, and the relation is then
# tested with the rounded exponents.
_SNAP = 1e-4
_NEAR, _LARGEST = 1e-3, 16


class RowSpace:
    """The span of rows of Euler products, grown one row at a time.

    Args:
        products: the first rows, shape ``(draws, tensors)``; they also give the columns' scale.
    """

    def __init__(self, products: Tensor) -> None:
        tiny = torch.finfo(products.dtype).tiny
        self._scale = products.abs().amax(0).clamp_min(tiny)
        self._basis = products.new_zeros(0, products.shape[1])
        for row in products:
            self.add(row)

    def add(self, row: Tensor) -> bool:
        """Add a row; whether it was new, to half of float64's digits."""
        scaled = row / self._scale
        rest = scaled
        for _ in range(2):  # twice is enough for orthogonality
            rest = rest - self._basis.T @ (self._basis @ rest)
        length = torch.linalg.vector_norm(rest)
        if length <= TOLERANCE * torch.linalg.vector_norm(scaled):
            return False
        self._basis = torch.cat([self._basis, (rest / length).unsqueeze(0)])
        return True


def null_space(products: Tensor) -> Tensor:
    """An orthonormal basis of the exponents that annul every row of ``products``.

    Args:
        products: Euler products, shape ``(draws, tensors)``, that span all there are.

    Returns:
        Shape ``(tensors, dimension)``. It annuls the products with columns of norm 1 up to half of
        float64's digits.
    """
    scale = torch.linalg.vector_norm(products, dim=0).clamp_min(torch.finfo(products.dtype).tiny)
    _, values, rows = torch.linalg.svd(products / scale, full_matrices=True)
    rank = int((values > TOLERANCE * values.max()).sum())
    basis = rows[rank:].T / scale.unsqueeze(1)
    orthonormal: Tensor = torch.linalg.qr(basis / torch.linalg.vector_norm(basis, dim=0)).Q
    return orthonormal


def sparse_basis(
    products: Tensor, null: Tensor, known: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """A basis of the relations beside those known, with few and simple exponents.

    Eliminating with the tensors in a random order gives relations of minimal support (fundamental
    circuits). From many orders the cheapest independent ones are kept, and made cheaper by adding
    multiples of one another, and of those known before. The cost counts, in this order: the sum of
    |exponents|, negative exponents, the largest |exponent|; then, if all grow together, how early
    the tensors are used, so that of two that can stand for one another the one that writes last
    before the norm is named; else over how long a stretch of the network they are spread.

    Args:
        products: Euler products, shape ``(draws, tensors)``, tensors in the order of their use.
        null: an orthonormal basis of its null space, shape ``(tensors, dimension)``.
        known: relations that the basis need not repeat, independent of the null space given.
        generator: draws the orders.

    Returns:
        For each new relation its exponents, shape ``(tensors,)``, of which the smallest is ±1.
    """
    tensors, dimension = null.shape
    candidates: dict[tuple[float, ...], Tensor] = {}
    for _ in range(max(32, 2 * dimension) if dimension else 0):
        order = torch.randperm(tensors, generator=generator)
        for relation in _circuits(null, order):
            simple = _simplified(relation, products)
            if simple is not None:
                candidates[tuple(simple.tolist())] = simple
    new = _independent(sorted(candidates.values(), key=_cost), known)
    return sorted(_polished(new, known, products), key=lambda a: int(a.nonzero()[0]))


def pivots(relations: list[Tensor]) -> list[int]:
    """One tensor for each independent relation, without which the others can be looked for."""
    rows = torch.stack(relations).clone() if relations else torch.zeros(0, 0)
    found: list[int] = []
    for row in rows:
        at = int(row.abs().argmax())
        if row[at].abs() < _SNAP:
            continue
        found.append(at)
        row /= row[at].clone()
        for other in rows:
            if other is not row and other.data_ptr() != row.data_ptr():
                other -= other[at].clone() * row
    return found


def holds(relation: Tensor, products: Tensor) -> bool:
    """Whether Σ a_t ⟨w_t, g_t⟩ vanishes, to half of float64's digits of its smallest term.

    Of the smallest, or a tensor of small influence could join any relation.
    """
    terms = (products * relation)[:, relation != 0]
    smallest = torch.linalg.vector_norm(terms, dim=0).min()
    return bool(torch.linalg.vector_norm(terms.sum(1)) <= TOLERANCE * smallest)


def _circuits(null: Tensor, order: Tensor) -> list[Tensor]:
    """Reduced column echelon form of the null space, with pivots taken in this order."""
    reduced = null.clone()
    free = torch.ones(null.shape[1], dtype=torch.bool)
    for t in order.tolist():
        row = reduced[t].abs() * free
        pivot = int(row.argmax())
        if row[pivot] < _SNAP * reduced[:, pivot].abs().max():
            continue
        reduced[:, pivot] /= reduced[t, pivot].clone()
        others = reduced[t].clone()
        others[pivot] = 0
        reduced -= reduced[:, pivot : pivot + 1] * others
        free[pivot] = False
        if not free.any():
            break
    return list(reduced.T)


def _simplified(relation: Tensor, products: Tensor) -> Tensor | None:
    """The relation in whole and half exponents, the smallest 1; None if it does not hold then."""
    size = relation.abs()
    relation = torch.where(size > _SNAP * size.max(), relation, 0)
    relation = relation / relation.abs()[relation != 0].min()
    rounded = (2 * relation).round() / 2
    # Anything else is a sum of relations with the noise of tensors of small influence in it.
    if float((relation - rounded).abs().max()) > _NEAR or float(rounded.abs().max()) > _LARGEST:
        return None
    relation = rounded
    positive, negative = (relation > 0).sum(), (relation < 0).sum()
    first = relation[relation.nonzero()[0]]
    if negative > positive or (negative == positive and first < 0):
        relation = -relation
    return relation if holds(relation, products) else None


def _cost(relation: Tensor) -> tuple[float, ...]:
    at = relation.nonzero()
    negative = float((relation < 0).sum())
    return (
        round(float(relation.abs().sum()), 3),
        negative,
        float(relation.abs().max()),
        float(at[-1] - at[0]) if negative else 0.0,
        -float(at.sum()),
    )


def _independent(relations: list[Tensor], known: list[Tensor]) -> list[Tensor]:
    """The first of the relations that are linearly independent of those before them."""
    chosen: list[Tensor] = []
    directions: list[Tensor] = []
    for i, relation in enumerate([*known, *relations]):
        rest = relation / torch.linalg.vector_norm(relation)
        if directions:
            basis = torch.stack(directions)
            for _ in range(2):  # twice is enough for orthogonality
                rest = rest - basis.T @ (basis @ rest)
        length = torch.linalg.vector_norm(rest)
        if length > _SNAP:
            directions.append(rest / length)
            if i >= len(known):
                chosen.append(relation)
    return chosen


def _polished(relations: list[Tensor], known: list[Tensor], products: Tensor) -> list[Tensor]:
    """Replace relations by cheaper sums of themselves and a multiple of another."""
    relations = [*relations, *known]
    count = len(relations) - len(known)
    improved = True
    while improved:
        improved = False
        for i in range(count):
            for j, other in enumerate(relations):
                shared = (relations[i] != 0) & (other != 0)
                if i == j or not shared.any():
                    continue
                for factor in {*(relations[i] / other)[shared].tolist(), 1.0, -1.0}:
                    candidate = relations[i] - factor * other
                    if not candidate.any() or _cost(candidate) >= _cost(relations[i]):
                        continue
                    simple = _simplified(candidate, products)
                    if simple is not None and _cost(simple) < _cost(relations[i]):
                        relations[i] = simple
                        improved = True
    return relations[:count]
