"""Sums of products over slices, from which steps that are a·w + b·u follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.optim.step import scalar_dtype

__all__ = ["channel_sums", "divisor"]

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
