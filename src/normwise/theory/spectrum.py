"""What the singular values of a weight say, most of it in numbers that ignore the weight's scale.

A weight counts as the matrix of its first dimension against all others. [TSCNC] is arXiv
2503.20454.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normwise.geometry import View, at_least_float32, unit

__all__ = [
    "condition_number",
    "effective_rank",
    "log_spread",
    "mean_absolute_cosine",
    "mean_cosine",
    "spectral_flatness_penalty",
    "stable_rank",
]


def condition_number(w: Tensor) -> Tensor:
    """κ, the largest singular value over the smallest; infinite where that is 0.

    Args:
        w: the weight, of two dimensions or more.

    Returns:
        A number, 1 or more, that does not change with the scale of ``w``.
    """
    s = _singular_values(w)
    return s[0] / s[-1]


def log_spread(w: Tensor) -> Tensor:
    """The variance of the logarithms of the singular values: 0 if and only if κ = 1.

    Args:
        w: the weight, of two dimensions or more, of full rank; else the result is infinite or NaN.

    Returns:
        A number, 0 or more, that does not change with the scale of ``w``. With k singular values,
        log²κ/(2k) ≤ it ≤ log²κ/4.
    """
    return _singular_values(w).log().var(correction=0)


def spectral_flatness_penalty(w: Tensor) -> Tensor:
    r"""log(‖W‖²/k) − (1/k)·log det(WWᵀ) of the smaller Gram matrix: 0 if and only if κ = 1.

    The logarithm of the arithmetic over the geometric mean of the k squared singular values, so 0
    or more, and the same for c·W. By one ``slogdet`` instead of singular values, for use in a loss.
    It stands in place of [TSCNC]'s (log(10⁻⁵ + det(WᵀW/m)))², which fixes the product of the
    singular values, that is the scale, and does not see κ at all.

    Args:
        w: the weight, of two dimensions or more, of full rank; else the result is infinite.

    Returns:
        A number, 0 or more; it can be differentiated.

    Source: ours, by the inequality of arithmetic and geometric means.
    """
    matrix, _ = unit(_matrix(w).unsqueeze(0))  # of norm 1, whose Gram matrix does not underflow
    m = matrix.squeeze(0)
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    k = gram.shape[0]
    penalty: Tensor = -math.log(k) - torch.linalg.slogdet(gram).logabsdet / k
    return penalty


def stable_rank(w: Tensor) -> Tensor:
    """‖W‖²/σ₁², from 1 to the rank, 0 for a zero weight; it ignores the scale of ``w``.

    Args:
        w: the weight, of two dimensions or more.

    Returns:
        A 0-dim tensor.
    """
    s = _singular_values(w)
    ratio: Tensor = (s / torch.where(s[0] > 0, s[0], 1)).square().sum()
    return ratio


def effective_rank(w: Tensor) -> Tensor:
    """The exponential of the entropy of σᵢ/Σσ, from 1 to the rank; it ignores the scale.

    Args:
        w: the weight, of two dimensions or more, not zero.

    Returns:
        A 0-dim tensor.
    """
    s = _singular_values(w)
    p = s / s.sum()
    rank: Tensor = torch.special.entr(p).sum().exp()
    return rank


def mean_cosine(w: Tensor, view: View) -> Tensor:
    r"""The mean of the cosines of all pairs of slices, in one pass over the weight.

    .. math::
        \frac{\|\sum_i \hat w_i\|^2 - n}{n^2 - n}

    for n slices of d entries in O(nd), since the squared norm of the sum of unit vectors is the sum
    of all cosines. Zero slices are left out.

    Args:
        w: the weight.
        view: its slices; two or more that are not zero, else the result is NaN.

    Returns:
        A number from −1/(n − 1) to 1.

    Source: the identity is known; as a measure of anisotropy, arXiv 2401.12143.
    """
    directions, norms = unit(view.slices(at_least_float32(w)))
    n = (norms > 0).sum()
    return (directions.sum(0).square().sum() - n) / (n * n - n)


def mean_absolute_cosine(w: Tensor, view: View) -> Tensor:
    """The mean of |cos| over all pairs of slices: how redundant they are, in O(n²d).

    Args:
        w: the weight.
        view: its slices; two or more that are not zero, else the result is NaN.

    Returns:
        A number from 0, where slices are orthogonal, to 1, where they are parallel.

    Source: arXiv 2302.14335, there of class tokens.
    """
    directions, norms = unit(view.slices(at_least_float32(w)))
    flat = directions.flatten(1)
    n = (norms > 0).sum()
    return ((flat @ flat.T).abs().sum() - n) / (n * n - n)


def _matrix(w: Tensor) -> Tensor:
    if w.ndim < 2:
        raise ValueError(f"a weight of shape {tuple(w.shape)}; must have 2 dimensions or more")
    return at_least_float32(w).flatten(1)


def _singular_values(w: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(_matrix(w))
    return values
