"""Sums of products over slices, from which steps that are a·w + b·u follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.optim.projection import retraction
from normwise.optim.step import scalar_dtype

__all__ = [
    "GG",
    "SHUT",
    "UU",
    "WG",
    "WU",
    "WW",
    "channel_sums",
    "cosine",
    "divisor",
    "retraction_from_sums",
    "shrunk",
]

# Sums over a slice: ⟨w, u⟩, ‖w‖², then for the gate ⟨w, g⟩, ‖g‖², or for a fixed norm ⟨w, u⟩, ‖u‖².
WU, WW, WG, GG, SHUT = range(5)
UU = GG

# Sums are taken of pieces of this many entries, whose copies in float64 stay in a CPU's cache.
_SUMMED_ENTRIES = {"cpu": 1 << 16, "cuda": 1 << 24}


def channel_sums(tensors: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Inner products of some tensors channel by channel, safe for norms from 1e-30 to 1e30.

    Args:
        tensors: batches of shape ``(members, channels, ...)``.
        pairs: which tensor is multiplied by which.

    Returns:
        Shape ``(channels, members, pairs)``, in float64 where the device has it.
    """
    first = tensors[0]
    entries = _SUMMED_ENTRIES.get(first.device.type, 1 << 20)
    channels = max(1, entries // max(1, first[:, :1].numel()))
    sums = []
    for pieces in zip(*(torch.split(t, channels, 1) for t in tensors), strict=True):
        wide = [piece.flatten(2).to(scalar_dtype(first.device)) for piece in pieces]
        sums.append(torch.stack([(wide[i] * wide[j]).sum(2).T for i, j in pairs], 2))
    return torch.cat(sums)


def divisor(t: Tensor) -> Tensor:
    """``t``, but where it is zero, a divisor that makes zero of zero."""
    return torch.where(t == 0, 1, t)


def cosine(sums: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """|⟨g, w⟩| / (max(‖w‖, eps)·max(‖g‖, eps))."""
    guard = max(eps, torch.finfo(dtype).tiny)
    norms = sums[..., WW : GG + 1 : GG - WW].sqrt().clamp_min(guard)
    return sums[..., WG].abs() / norms[..., 0] / norms[..., 1]


def shrunk(sums: Tensor, eps: float) -> Tensor:
    """⟨w, u⟩/(‖w‖ + eps)²: the multiple of w that the official code subtracts."""
    return sums[..., WU] / divisor((sums[..., WW].sqrt() + eps).square())


def retraction_from_sums(sums: Tensor, step_size: float | Tensor) -> Tensor:
    """‖w‖/‖w − σu‖ of slices whose u has lost its radial part; 0 for a slice that is zero."""
    tangential = (sums[:, UU] - sums[:, WU].square() / divisor(sums[:, WW])).clamp_min(0)
    norm = sums[:, WW].sqrt()
    return retraction(norm, torch.hypot(norm, step_size * tangential.sqrt()))
