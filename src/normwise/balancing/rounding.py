"""Weights rounded to few bits, for measuring: symmetric, uniform, by row or by tensor."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from normwise.geometry import View, at_least_float32
from normwise.invariance import Report

__all__ = ["round_weight", "rounded"]


def round_weight(weight: Tensor, bits: int, view: View | str = "channel") -> Tensor:
    """The nearest weight whose slices are each a step size times whole numbers of so many bits.

    The step is max|w| / (2^(bits−1) − 1), so the whole numbers are symmetric around 0.

    Args:
        weight: any floating tensor.
        bits: 2 or more.
        view: what shares a step size: ``"channel"`` is by row, ``"layer"`` by tensor (default:
            ``"channel"``).

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: for fewer than 2 bits, or a view that does not fit.
    """
    if bits < 2:
        raise ValueError(f"Invalid bits: {bits}; must be 2 or more")
    view = View.parse(view) if isinstance(view, str) else view
    levels = 2 ** (bits - 1) - 1
    rounded = at_least_float32(weight.detach()).clone()
    slices = view.slices(rounded)
    step = slices.abs().amax(tuple(range(1, slices.ndim)), keepdim=True) / levels
    slices.copy_(torch.where(step > 0, (slices / step).round() * step, slices))
    return rounded.to(weight.dtype)


def rounded(model: nn.Module, report: Report, bits: int, view: View | str = "channel") -> nn.Module:
    """A copy of a model with every matrix rounded by :func:`round_weight`, vectors as they are.

    Args:
        model: any.
        report: of the model: which of its parameters are matrices.
        bits: of a number, 2 or more.
        view: whose slices have a scale of their own (default: ``"channel"``).

    Returns:
        A deep copy; the model stays as it is.
    """
    duplicate = copy.deepcopy(model)
    params = dict(duplicate.named_parameters())
    with torch.no_grad():
        for row in report:
            if not row.is_vector:
                p = params[row.name]
                p.copy_(round_weight(p, bits, view))
    return duplicate
