"""Rescalings that change the function on purpose: one operation on slices, and what sets it.

The rows of a classifier belong to its classes. Their norms say how readily a class is chosen, and
grow with the number of its examples; the methods here set them anew.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from normwise.balancing.apply import after_every
from normwise.geometry import View, norms

__all__ = [
    "MaxNorm",
    "adjust_logits",
    "align_rows",
    "class_balanced_weights",
    "rescale_rows",
    "simplex_etf",
    "tau_normalize",
]

_ROWS = View.channel(0)


@torch.no_grad()
def rescale_rows(
    weight: Tensor, factors: Tensor, bias: Tensor | None = None, *, view: View = _ROWS
) -> Tensor:
    """Multiply each row of a weight by its factor, in place.

    Args:
        weight: shape ``(rows, …)``.
        factors: shape ``(rows,)``.
        bias: shape ``(rows,)``, multiplied too; then logits are multiplied by the factors
            (default: none).
        view: other slices than rows (default: rows).

    Returns:
        ``weight``.

    Raises:
        ValueError: if there is not one factor for each slice.
    """
    slices = view.slices(weight)
    if factors.shape != (len(slices),):
        raise ValueError(
            f"Invalid factors: shape {tuple(factors.shape)}; must be ({len(slices)},), one for "
            f"each slice of a weight of shape {tuple(weight.shape)}"
        )
    slices.mul_(factors.to(weight).reshape(-1, *[1] * (slices.ndim - 1)))
    if bias is not None:
        bias.mul_(factors.to(bias))
    return weight


def tau_normalize(weight: Tensor, tau: float = 1.0) -> Tensor:
    """w_c ← w_c / ‖w_c‖^τ, in place: norms become ‖w_c‖^(1−τ); zero rows stay.

    Args:
        weight: the classifier's weight; its bias is left alone.
        tau: 0 changes nothing, 1 makes unit rows, more than 1 reverses the order of their norms
            (default: 1).

    Returns:
        ``weight``.

    Source: 1910.09217, equation 7.
    """
    length = norms(weight.detach(), _ROWS)
    return rescale_rows(weight, torch.where(length > 0, length**-tau, 1))


def align_rows(weight: Tensor, new: Collection[int] | slice, bias: Tensor | None = None) -> Tensor:
    """Weight Aligning: scale the rows of new classes to the mean norm of those of the old ones.

    w_c ← γ w_c for the new classes, with γ = mean_old‖w_c‖ / mean_new‖w_c‖.

    Args:
        weight: the classifier's weight, changed in place.
        new: the rows of the new classes.
        bias: to be scaled alike, so that logits are multiplied by γ (default: left alone).

    Returns:
        ``weight``.

    Raises:
        ValueError: if the new rows are all, none, or zero.

    Source: 1911.07053, equations 4 and 5.
    """
    is_new = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    is_new[new if isinstance(new, slice) else torch.as_tensor(list(new), dtype=torch.long)] = True
    if is_new.all() or not is_new.any():
        raise ValueError(
            f"Invalid new: {int(is_new.sum())} of {len(weight)} rows; must be some and not all"
        )
    length = norms(weight.detach(), _ROWS)
    old_mean, new_mean = length[~is_new].mean(), length[is_new].mean()
    if not new_mean > 0:
        raise ValueError("Invalid new: the rows of the new classes are all zero")
    return rescale_rows(weight, torch.where(is_new, old_mean / new_mean, 1), bias)


def adjust_logits(weight: Tensor, priors: Tensor, tau: float, bias: Tensor | None = None) -> Tensor:
    """Multiplicative logit adjustment: logits_c ← p_c^(−τ) logits_c, put into the weights in place.

    Args:
        weight: the classifier's weight.
        priors: p, the share of each class in the training set, all positive.
        tau: τ.
        bias: the classifier's bias, if it has one; without it logits are not scaled as a whole.

    Returns:
        ``weight``.

    Raises:
        ValueError: if a share is not positive.

    Source: 2305.16573, section 5.
    """
    if not (priors > 0).all():
        raise ValueError(f"Invalid priors: the least is {float(priors.min())}; must be positive")
    return rescale_rows(weight, priors.to(torch.float64) ** -tau, bias)


def class_balanced_weights(counts: Sequence[int] | Tensor, beta: float = 0.9999) -> Tensor:
    """Weights of classes in a loss, α_c ∝ (1 − β) / (1 − β^n_c), which sum to their number.

    Args:
        counts: n_c, the number of examples of each class, 1 or more.
        beta: β, from 0 (all alike) to below 1 (default: 0.9999).

    Returns:
        α, shape ``(classes,)``.

    Raises:
        ValueError: for an empty class or a β out of range.

    Source: 1901.05555, equation 6.
    """
    n = torch.as_tensor(counts, dtype=torch.float64)
    if not (n >= 1).all():
        raise ValueError(f"Invalid counts: the least is {float(n.min()):g}; must be 1 or more")
    if not 0 <= beta < 1:
        raise ValueError(f"Invalid beta: {beta}; must be at least 0 and below 1")
    # 1 − β^n keeps its digits where β^n is close to 1.
    weights = (1 - beta) / -torch.expm1(n * math.log(beta)) if beta else torch.ones_like(n)
    return weights * len(n) / weights.sum()


def simplex_etf(classes: int, features: int, *, generator: torch.Generator | None = None) -> Tensor:
    """The weight of a fixed classifier whose rows are a simplex: unit, and as far apart as can be.

    √(K/(K−1)) (I − 11ᵀ/K) Uᵀ, with K classes and a random U of orthonormal columns; the cosine of
    any two rows is −1/(K−1).

    Args:
        classes: K, 2 or more.
        features: at least K.
        generator: of U (default: torch's own).

    Returns:
        Shape ``(classes, features)``, in the default dtype.

    Raises:
        ValueError: for fewer than two classes or fewer features than classes.

    Source: 2305.16573, section 5.
    """
    if not 2 <= classes <= features:
        raise ValueError(
            f"Invalid sizes: {classes} classes, {features} features; must be 2 or more classes, "
            "and as many features or more"
        )
    normal = torch.randn(features, classes, dtype=torch.float64, generator=generator)
    u, _ = torch.linalg.qr(normal)
    centered = torch.eye(classes, dtype=torch.float64) - 1 / classes
    weight: Tensor = math.sqrt(classes / (classes - 1)) * centered @ u.T
    return weight.to(torch.get_default_dtype())


class MaxNorm:
    """Rows no longer than a radius: w_c ← min(1, δ/‖w_c‖) w_c, by hand or after every step.

    Args:
        radii: δ for each weight.

    Raises:
        ValueError: if a radius is not positive.

    Source: 2203.14197, section 4.2. There it is applied at the end of every epoch.
    """

    def __init__(self, radii: Mapping[Tensor, float]) -> None:
        for weight, radius in radii.items():
            if not radius > 0:
                raise ValueError(
                    f"Invalid radius: {radius} for a weight of shape {tuple(weight.shape)}; "
                    "must be positive"
                )
        self.radii = dict(radii)

    @classmethod
    def from_norms(cls, weights: Iterable[Tensor], share: float = 0.1) -> MaxNorm:
        """Radii as the paper's code sets them: δ = min‖w_c‖ + share · (max‖w_c‖ − min‖w_c‖).

        Args:
            weights: at the start of the second stage.
            share: 0 caps all rows at the shortest, 1 none (default: 0.1).

        Returns:
            A constraint with these radii.
        """
        radii = {}
        for weight in weights:
            length = norms(weight.detach(), _ROWS)
            radii[weight] = float(length.min() + share * (length.max() - length.min()))
        return cls(radii)

    def project_(self) -> None:
        """Shorten every row that is longer than its radius; directions stay."""
        for weight, radius in self.radii.items():
            length = norms(weight.detach(), _ROWS)
            rescale_rows(weight, torch.where(length > radius, radius / length, 1))

    def attach(self, optimizer: Optimizer, *, every: int = 1) -> RemovableHandle:
        """Project after every so many steps of an optimizer.

        Args:
            optimizer: any.
            every: steps from one projection to the next; the steps of an epoch for the paper's own
                (default: 1).

        Returns:
            A handle whose ``remove()`` detaches it.

        Raises:
            ValueError: if ``every`` is not positive.
        """
        return after_every(optimizer, every, lambda _: self.project_())
