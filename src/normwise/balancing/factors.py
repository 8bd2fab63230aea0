"""Least mass of products of factors: LoRA's pairs, and canonical polyadic tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.balancing.rows import rescale_rows
from normwise.geometry import View, norms

__all__ = ["balance_factors", "balance_lora"]


def balance_factors(factors: Sequence[Tensor], dims: Sequence[int] | None = None) -> list[Tensor]:
    """Give each component the same norm in all factors, in place; the product stays the same.

    The components of a tensor Σ_r a_r ⊗ b_r ⊗ … can be scaled by numbers whose product is 1. Their
    Σ‖·‖² is least where all norms of a component are their geometric mean.

    Args:
        factors: matrices with one index over the components; two or more.
        dims: the dimension of each factor that runs over the components (default: 1 for all).
            LoRA's pair is ``balance_factors([A, B], dims=[0, 1])``.

    Returns:
        The logarithms of what each factor's components were multiplied by. Components that are
        zero in a factor stay as they are.

    Raises:
        ValueError: if the factors do not have the same number of components.
    """
    dims = [1] * len(factors) if dims is None else list(dims)
    counts = [f.shape[d] for f, d in zip(factors, dims, strict=True)]
    if len(counts) < 2 or len(set(counts)) > 1:
        raise ValueError(
            f"Invalid factors: {counts} components; must be two factors or more with the same "
            "number"
        )
    logs = torch.stack(
        [
            norms(f.detach().double(), View.channel(d)).log()
            for f, d in zip(factors, dims, strict=True)
        ]
    )
    shifts = logs.mean(0) - logs
    shifts = torch.where(logs.isfinite().all(0), shifts, 0)
    for f, d, shift in zip(factors, dims, shifts, strict=True):
        rescale_rows(f, shift.exp(), view=View.channel(d))
    return list(shifts)


@torch.no_grad()
def balance_lora(a: Tensor, b: Tensor) -> float:
    """Give a LoRA pair the least mass at which its product stays B·A, in place.

    Not only can each rank be scaled: any invertible R turns (A, B) into (R⁻¹A, BR). Over all of
    them ½(‖A‖² + ‖B‖²) is least, and the sum of the singular values of BA, where AAᵀ = BᵀB. The
    two factors come from the singular value decomposition, BA = UΣVᵀ, A = Σ^½Vᵀ, B = UΣ^½, found
    through thin decompositions: BA itself is never formed.

    An optimizer's state does not follow a rotation of the ranks; balance before training, or after,
    or use :func:`balance_factors`, which only scales.

    Args:
        a: shape ``(rank, in)``.
        b: shape ``(out, rank)``.

    Returns:
        The mass ‖A‖² + ‖B‖² afterwards.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise ValueError(
            f"Invalid pair: A of shape {tuple(a.shape)}, B of {tuple(b.shape)}; must be "
            "(rank, in) and (out, rank)"
        )
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    rank, kept = len(a), len(s)
    root = s.sqrt()
    # Where the rank is larger than the matrix, the ranks left over are zero.
    a.zero_()[:kept] = (root.unsqueeze(1) * (vt @ qa.T)).to(a)
    b.zero_()[:, :kept] = ((qb @ u) * root).to(b)
    assert kept <= rank
    return float(a.double().square().sum() + b.double().square().sum())
