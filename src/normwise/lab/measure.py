"""What the lab measures of a network's scale-invariant weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.geometry import View, at_least_float32, norms, unit
from normwise.lab.models import InvariantWeight

__all__ = ["angles", "geometric_mean_norm", "mean_angle"]


def geometric_mean_norm(weights: Sequence[InvariantWeight]) -> float:
    """The geometric mean of the norms of all slices of all ``weights``, each slice counting once.

    With it, the growth of the mean is the mean of the growths, and so for any power of a norm.
    """
    with torch.no_grad():
        every = torch.cat([norms(w.weight, w.view) for w in weights])
    return float(every.double().log().mean().exp())


def angles(before: Tensor, after: Tensor, view: View) -> Tensor:
    """The angle by which each slice turned, in radians, shape ``(slices,)``.

    Kahan's formula, 2·atan2(‖a − b‖, ‖a + b‖) for directions a and b: the arc cosine of their inner
    product has no correct digit left for angles below 1e-4 in float32.
    """
    a, _ = unit(view.slices(at_least_float32(before)))
    b, _ = unit(view.slices(at_least_float32(after)))
    return 2 * torch.atan2(norms(a - b, View.channel()), norms(a + b, View.channel()))


def mean_angle(before: Sequence[Tensor], weights: Sequence[InvariantWeight]) -> float:
    """The mean over all slices of the angle between ``before`` and ``weights``, in radians."""
    with torch.no_grad():
        every = [
            angles(old, new.weight, new.view) for old, new in zip(before, weights, strict=True)
        ]
    return float(torch.cat(every).double().mean())
