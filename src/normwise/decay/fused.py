"""Decay of many weights in one pass over the memory, on the CPU where Numba is installed.

The multi-tensor operations of the policies do the same elsewhere, and are what this is tested
against.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from normwise.geometry import View, lie_alike, memory_layout

__all__ = ["Shift", "Spare", "take_", "takes"]

_DTYPES = (torch.float32, torch.float64)
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
# For less, as of a toy, loading a compiler does not pay.
_WORTHWHILE = 1 << 16
# Chunks of whole slices of about so many entries are shared out among threads.
_CHUNK = 1 << 14
# Below so many entries in all a second thread costs more than it saves.
_PARALLEL = 1 << 15


@dataclass(frozen=True)
class Shift:
    """Add factor·(W − ε·D) to a target, D being the direction of each slice of W.

    Args:
        source: W.
        target: W itself, or its gradient; of the strides of W.
        view: the slices.
        scale: whether D is W/‖W‖ or (W − m)/v.
        factor, eps: numbers.
    """

    source: Tensor
    target: Tensor
    view: View
    scale: Literal["norm", "std"]
    factor: float
    eps: float

    @property
    def run(self) -> int | None:
        """Entries of a slice, all in one run of memory; None if they are scattered."""
        if self.view.dim == 0 and self.source.is_contiguous():  # the same, sooner
            counts = {"layer": 1, "blocks": self.view.count, "channel": len(self.source)}
            return self.source.numel() // counts[self.view.kind]
        layout = memory_layout(self.source, self.view)
        return layout[2] if layout is not None and layout[0] == 1 else None


@dataclass(frozen=True)
class Spare:
    """Subtract factor·w₀ from a weight where it went towards zero or stayed.

    Args:
        source: w₀, before the step.
        target: the weight after it, of the same strides.
        factor: a number.
    """

    source: Tensor
    target: Tensor
    factor: float
    eps: float = 0.0

    @property
    def run(self) -> int | None:
        """1, as entries stand for themselves; None if they are not dense in memory."""
        dense = self.source.is_contiguous() or memory_layout(self.source, View.layer()) is not None
        return 1 if dense else None


def takes(work: Sequence[Shift | Spare]) -> bool:
    """Whether all of this can be done in one pass here."""
    if torch.compiler.is_compiling() or not work:
        return False
    tensors = [t for x in work for t in (x.source, x.target)]
    dtype = tensors[0].dtype
    plain = all(
        type(t) in _PLAIN_TYPES
        and t.device.type == "cpu"
        and t.dtype == dtype
        and t.layout == torch.strided
        and not t.is_neg()
        for t in tensors
    )
    return (
        plain
        and dtype in _DTYPES
        and sum(x.source.numel() for x in work) >= _WORTHWHILE
        and all(lie_alike(x.source, x.target) and x.run is not None for x in work)
        and all(x.source.numel() > 0 for x in work)
        and _is_installed()
    )


@torch.no_grad()
def take_(work: Sequence[Shift | Spare]) -> None:
    """Do all of it, which :func:`takes` must have allowed."""
    import numpy as np  # as Numba does

    from normwise.cpu_kernels import run_on_threads
    from normwise.decay import _cpu_numba as k

    kinds = {"norm": k.BY_NORM, "std": k.BY_STD}
    rows, numbers, first = [], [], 0
    for x in work:
        run = cast(int, x.run)
        slices, at_once = x.source.numel() // run, max(1, _CHUNK // run)
        kind = k.SPARE if isinstance(x, Spare) else kinds[x.scale]
        addresses = x.source.data_ptr(), x.target.data_ptr()
        rows.append((*addresses, slices, run, kind, at_once, first, 0))
        numbers.append((x.factor, x.eps))
        first += -(-slices // at_once)
    items, options = np.array(rows, np.int64), np.array(numbers, np.float64)
    counter, block = np.zeros(1, np.int64), np.zeros(8, np.int64)
    block[k.ITEMS], block[k.N_ITEMS], block[k.N_CHUNKS] = items.ctypes.data, len(items), first
    block[k.NUMBERS], block[k.COUNTER] = options.ctypes.data, counter.ctypes.data
    threads = torch.get_num_threads() if sum(x.source.numel() for x in work) > _PARALLEL else 1
    address = k.kernel(work[0].source.dtype).address
    run_on_threads(address, block.ctypes.data, threads)
    torch.autograd.graph.increment_version([x.target for x in work])


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("numba") is not None
