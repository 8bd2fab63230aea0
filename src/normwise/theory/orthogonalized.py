"""Updates whose singular values are brought near 1 (Muon): their length, and how alike they are.

The singular values of a noisy m×n matrix, m ≥ n, follow the Marchenko–Pastur law. Its orthogonal
polynomials have the recurrence coefficients 1, n/m, 1, n/m, … and diagonalize the correlation of
two matrices: if the entries of G and G' are Gaussian with correlation ρ, and f is an odd function
of singular values with coefficients f_k in those polynomials,

    ⟨f(G), f(G')⟩ = Σ_k f_k²ρ^k · ‖G‖²,

which for a sign, and n = 1, m = 1 in place of large ones, is (2/π)·arcsin ρ. (Ours; Mehler's
formula for the free Ornstein–Uhlenbeck semigroup.) For large square matrices the first coefficient
of the polar factor is (8/3π)² = 0.72, and for thin ones it tends to 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["mean_square_singular_value", "summed_overlaps"]

_NODES = 400  # of the quadrature; the step of a sign at 0 converges as one over it

NewtonSchulz = tuple[tuple[float, float, float], int] | tuple[()]


def mean_square_singular_value(shape: tuple[int, int], newton_schulz: NewtonSchulz = ()) -> float:
    """The mean square of the singular values of an orthogonalized update of a noisy gradient.

    Args:
        shape: of the matrix.
        newton_schulz: the coefficients of the quintic iteration and how often it is taken; empty
            for an exact polar factor, of which it is 1.
    """
    return float(_coefficients(*_sorted(shape), newton_schulz).square().sum())


def summed_overlaps(
    kernel: Sequence[float], shape: tuple[int, int], newton_schulz: NewtonSchulz = ()
) -> float:
    """K = Σ_k corr(u_t, u_{t−k}) over all k of both signs, of orthogonalized updates u.

    Args:
        kernel: c_k; the matrix that is orthogonalized is Σ c_k·g_{t−k}, of independent gradients.
        shape: of the matrix.
        newton_schulz: as of :func:`mean_square_singular_value`.
    """
    c = torch.tensor(list(kernel), dtype=torch.float64)
    spectrum = torch.fft.rfft(c, 2 * len(c))
    correlations = torch.fft.irfft(spectrum.abs().square(), 2 * len(c))[: len(c)]
    correlations = (correlations / correlations[0]).clamp(-1, 1)
    squares = _coefficients(*_sorted(shape), newton_schulz).square()
    overlap = torch.zeros_like(correlations)
    for square in squares.flip(0):  # Horner's rule
        overlap = overlap * correlations + square
    overlap = overlap / squares.sum()
    return float(1 + 2 * overlap[1:].sum())


def _sorted(shape: tuple[int, int]) -> tuple[int, int]:
    return max(shape), min(shape)


@functools.lru_cache(maxsize=256)
def _coefficients(rows: int, columns: int, newton_schulz: NewtonSchulz) -> Tensor:
    """f_k of the function that orthogonalizes, by Golub and Welsch's quadrature."""
    recurrence = torch.ones(_NODES - 1, dtype=torch.float64)
    recurrence[1::2] = columns / rows
    jacobi = torch.diag(recurrence.sqrt(), 1) + torch.diag(recurrence.sqrt(), -1)
    nodes, vectors = torch.linalg.eigh(jacobi)
    if newton_schulz:
        (a, b, c), count = newton_schulz
        values = nodes / columns**0.5  # divided by the Frobenius norm first
        for _ in range(count):
            values = a * values + b * values**3 + c * values**5
    else:
        values = nodes.sign()
    found: Tensor = vectors @ (values * vectors[0])
    return found
