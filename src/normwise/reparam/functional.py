"""Weight normalization, centered weight normalization, weight standardization: one function each.

Each acts on every slice of a view and takes the square root of ``mean square + eps²`` where the
paper divides by a root mean square. So value and gradient stay finite when a slice is zero or
constant; an ``eps`` added outside of the root leaves ``1/std`` in the gradient ([ES] Eq. 24).

[ES] is arXiv 1911.05920; weight normalization is arXiv 1602.07868, its centered form Huang et al.,
ICCV 2017, and weight standardization arXiv 1903.10520.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normwise.geometry import View, at_least_float32

__all__ = [
    "centered_weight_norm",
    "default_eps",
    "slice_scales",
    "weight_norm",
    "weight_standardization",
]


def default_eps(dtype: torch.dtype) -> float:
    """The guard of a root mean square, small enough to leave the invariance intact to rounding.

    A slice of root mean square v is invariant to its scale up to (eps/v)², and the gradient of a
    zero slice is that of the effective weight over ``eps``: 1e-12 in float64, 1e-8 in float32 and
    bfloat16, and 1e-3 in float16, whose largest number, 65504, lets no smaller one be divided by.
    """
    if dtype == torch.float64:
        return 1e-12
    return 1e-3 if dtype == torch.float16 else 1e-8


def weight_norm(
    w: Tensor, view: View, gain: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """g·W/‖W‖ for each slice.

    Args:
        w: the weight.
        view: how it splits into slices.
        gain: one number a slice, in any shape that has as many entries (default: 1).
        eps: guard of the root mean square of a slice (default: :func:`default_eps`).

    Returns:
        A tensor of the shape, dtype and memory format of ``w``.
    """
    eps = default_eps(w.dtype) if eps is None else eps
    rows, restore = _rows(w, view)
    wide = at_least_float32(rows)
    # A sum of squares is smooth at zero; the gradient of a norm is not.
    squares = torch.linalg.vecdot(wide, wide).add(rows.shape[1] * eps**2)
    scale = squares.rsqrt()
    if gain is not None:
        scale = scale * at_least_float32(gain.flatten())
    return restore((wide * scale.unsqueeze(1)).to(w.dtype))


def weight_standardization(
    w: Tensor, view: View, gain: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """g·(W − W̄)/std(W) for each slice, biased std. Arguments as for :func:`weight_norm`."""
    eps = default_eps(w.dtype) if eps is None else eps
    if w.numel() == 0:
        return w
    flat_gain = None if gain is None else gain.flatten()
    # One group a slice: torch's kernel standardizes and applies the gain in one pass each way, on
    # the CPU and on CUDA, in float32 for half types, and torch differentiates it twice.
    if w.is_contiguous() and view == View.channel():
        # The usual case in the fewest operations: around the kernel of a small weight, forward and
        # backward, they cost more than it does.
        out = torch.group_norm(w.view(1, w.shape[0], -1), w.shape[0], flat_gain, None, eps**2)
        return out.view(w.shape).to(w.dtype)
    rows, restore = _rows(w, view)
    out = torch.group_norm(rows.unsqueeze(0), rows.shape[0], flat_gain, None, eps**2)
    return restore(out.squeeze(0).to(w.dtype))


def centered_weight_norm(
    w: Tensor, view: View, gain: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """g·(W − W̄)/‖W − W̄‖ for each slice. Arguments as for :func:`weight_norm`."""
    slices = view.slices(w)
    # ‖W − W̄‖ = √n·std(W), so this is weight standardization with the gain g/√n.
    unit_gain = slices.new_ones(slices.shape[0]) if gain is None else gain.flatten()
    return weight_standardization(w, view, unit_gain / math.sqrt(math.prod(slices.shape[1:])), eps)


def slice_scales(w: Tensor, view: View, eps: float | None = None, *, centered: bool) -> Tensor:
    """The guarded root mean square of each slice, of W or of W − W̄; shape ``(slices,)``."""
    eps = default_eps(w.dtype) if eps is None else eps
    rows = at_least_float32(_rows(w, view)[0])
    if centered:
        rows = rows - rows.mean(1, keepdim=True)
    return rows.square().mean(1).add(eps**2).sqrt()


class _Restore:
    """Undo :func:`_rows`: from ``(slices, entries)`` in memory order back to the weight's shape."""

    def __init__(self, view: View, w: Tensor, order: tuple[int, ...], shape: torch.Size) -> None:
        self.view, self.ndim, self.order, self.shape = view, w.ndim, order, shape

    def __call__(self, rows: Tensor) -> Tensor:
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        slices = rows.view(self.shape).permute(inverse)
        if self.view.kind == "layer":
            return slices.squeeze(0)
        if self.ndim == 1 and self.view.kind == "channel":
            return slices.squeeze(1)
        if self.view.kind == "blocks":
            slices = slices.flatten(0, 1)
        return slices.movedim(0, self.view.dim)


def _rows(w: Tensor, view: View) -> tuple[Tensor, _Restore]:
    """The slices as ``(slices, entries)``, entries in the order of memory: no copy where possible.

    The order of the entries of a slice changes none of the formulas above.
    """
    slices = view.slices(w)
    inner = sorted(range(1, slices.ndim), key=lambda d: slices.stride()[d], reverse=True)
    order = (0, *inner)
    ordered = slices.permute(order)
    return ordered.reshape(ordered.shape[0], -1), _Restore(view, w, order, ordered.shape)
