"""How much two sets of features depend on each other, and ReBias's loss, which lowers it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["hsic", "rebias_loss"]


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """How much two sets of features depend on each other: the unbiased estimate of HSIC.

    Song et al., JMLR 13 (2012), Eq. 4, with the kernel exp(−‖a − b‖²/2). Its mean over draws is 0
    where they are independent, so it can be negative. The published ReBias subtracts the diagonal
    from every row of a kernel's matrix where the formula removes it; this follows the formula.

    Args:
        x: features, shape ``(N, D)``, N ≥ 4.
        y: the other features of the same examples, shape ``(N, E)``.
    """
    n = len(x)
    k, m = _kernel(x), _kernel(y)
    together = (k * m).sum()
    apart = k.sum() * m.sum() / ((n - 1) * (n - 2))
    along = (k.sum(0) * m.sum(0)).sum() * 2 / (n - 2)
    return (together + apart - along) / (n * (n - 3))


def rebias_loss(
    logits: Tensor,
    features: Tensor,
    biased_logits: Tensor,
    biased_features: Tensor,
    labels: Tensor,
    penalty: float,
) -> Tensor:
    """The sum of what two networks f and g lower; each gets the gradient of its own part alone.

    ReBias, arXiv 1910.02806: f lowers its cross entropy + λ·HSIC(f, g), and g, which sees little,
    its cross entropy − λ·HSIC(f, g), both at once.

    Args:
        logits: of f, shape ``(N, classes)``.
        features: of f, shape ``(N, D)``.
        biased_logits: of g, shape ``(N, classes)``.
        biased_features: of g, shape ``(N, E)``.
        labels: shape ``(N,)``.
        penalty: λ.

    Returns:
        A scalar, in nats but for the penalty.
    """
    learned = F.cross_entropy(logits, labels) + F.cross_entropy(biased_logits, labels)
    of_f = hsic(features, biased_features.detach())
    return learned + penalty * (of_f - hsic(features.detach(), biased_features))


def _kernel(x: Tensor) -> Tensor:
    """exp(−d²/2) of all pairs, with a diagonal of zeros."""
    squares = x.square().sum(1)
    distances = squares[:, None] + squares[None] - 2 * x @ x.T
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return torch.exp(-distances.clamp(min=0) / 2).masked_fill(itself, 0.0)
