"""Plans that turn what a wrapped optimizer did into steps on spheres; see ``_displaced_numba``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from normwise.cpu_kernels import CACHE_LINE, run_on_threads
from normwise.optim.kernels import _displaced_numba as k
from normwise.optim.kernels._cpu_numba import (
    INNER_1,
    OUTER_0,
    PARALLEL_ENTRIES,
    SLICE_0,
    SLICE_1,
    SLOT,
    TENSOR,
)
from normwise.optim.kernels._layout import memory_layout
from normwise.optim.kernels.cpu import Table, _chunks
from normwise.optim.motion import Form, KernelStep, Outcome, resolution

__all__ = ["DisplacedPlan"]

_PATHS = {"free": k.FREE, "fixed": k.FIXED, "retract": k.RETRACT, "geodesic": k.GEODESIC}
# Slices longer than a chunk are looked at twice: the second time soon, out of a cache.
_ENTRIES_A_ROUND = 1 << 20
_RESULTS = {Outcome.MOVED: k.MOVED, Outcome.FROM_ZERO: k.FROM_ZERO, Outcome.IN_PLACE: k.IN_PLACE}


class DisplacedPlan:
    """The work list of some weights on the CPU.

    Args:
        weights: dense tensors of one dtype, none empty.
        forms: of each.
    """

    def __init__(self, weights: Sequence[Tensor], forms: Sequence[Form]) -> None:
        dtype = weights[0].dtype
        self._tensors = np.zeros((len(weights), 16), np.int64)
        self._options = np.zeros((len(weights), 8))
        self._groups = np.array([form.group for form in forms])
        self._noise = resolution(torch.finfo(dtype).eps, torch.float64)
        tables, slots, count, radii = [], 0, 0, 0
        for t, (w, form) in enumerate(zip(weights, forms, strict=True)):
            layout = memory_layout(w, form.view)
            assert layout is not None
            outer, slices, inner = layout
            whole, bounds = _chunks(*layout, 1, False)
            table = np.zeros((len(bounds[0]), 8), np.int64)
            table[:, TENSOR] = t
            table[:, OUTER_0 : INNER_1 + 1] = np.stack(bounds, 1)
            totals = slots
            if not whole:
                slots += slices
            widths = table[:, SLICE_1] - table[:, SLICE_0]
            table[:, SLOT] = slots + np.cumsum(widths) - widths
            slots += int(widths.sum())
            ends = (count, count + len(table))
            row = (outer, slices, inner, whole, totals, radii, *ends, _PATHS[form.path])
            self._tensors[t, k.OUTER : k.RESULT + 1] = (*row, _RESULTS[form.outcome])
            count += len(table)
            radii += slices
            tables.append(table)
        self._chunks = np.concatenate(tables)
        self._sums = np.zeros((slots, k.SUM_COLUMNS))
        self._radii = torch.ones(radii, dtype=torch.float64)
        self._radius_table = self._radii.numpy()
        self._entries = sum(w.numel() for w in weights)
        self._rounds = _rounds(self._tensors)
        self._task, self._decide = k.kernels(dtype)
        self._block = np.zeros(16, np.int64)
        for entry, array in (
            (k.TENSORS, self._tensors),
            (k.OPTIONS, self._options),
            (k.SUMS, self._sums),
            (k.RADIUS, self._radius_table),
        ):
            self._block[entry] = array.ctypes.data
        self._counter = np.zeros(0, np.int64)

    def step_(
        self,
        weights: Sequence[Tensor],
        before: Sequence[Tensor],
        rows: Sequence[KernelStep],
        radii: Sequence[Tensor] | None,
        *,
        stochastic_rounding: bool,
    ) -> None:
        """Put each slice where it belongs.

        Args:
            weights: what the wrapped optimizer has written, w + d or d; it becomes the result, or 0
                where that is put in the place of w.
            before: the weights w before its step, of the same strides.
            rows: what the step of each group is made of.
            radii: of the slices of each weight, for the paths that have any.
            stochastic_rounding: of half-precision weights; not to be had here.
        """
        assert not stochastic_rounding
        self._tensors[:, k.BEFORE] = [w.data_ptr() for w in before]
        self._tensors[:, k.AFTER] = [w.data_ptr() for w in weights]
        self._options[:] = np.array([self._row(row) for row in rows])[self._groups]
        if radii is not None:
            self._radii.copy_(torch.cat(list(radii)))
        threads = torch.get_num_threads() if self._entries > PARALLEL_ENTRIES else 1
        if len(self._counter) == 0 or self._block[k.THREADS] != threads:
            self._counter = np.zeros((threads + 1) * CACHE_LINE // 8, np.int64)
            self._block[k.COUNTER], self._block[k.THREADS] = self._counter.ctypes.data, threads
        tables = (self._tensors, self._chunks, self._options, self._sums, self._radius_table)
        for first, last in self._rounds:
            chunks = slice(self._tensors[first, k.FIRST], self._tensors[last - 1, k.LAST])
            self._block[k.CHUNKS] = self._chunks[chunks].ctypes.data
            self._block[k.N_CHUNKS] = chunks.stop - chunks.start
            self._pass(1, threads)
            if not self._tensors[first:last, k.WHOLE].all():
                self._decide(*tables, first, last)
                self._pass(2, threads)

    def _row(self, row: KernelStep) -> list[float]:
        """A row of the table of options."""
        options, lr = [0.0] * 8, float(row.lr)  # no wait: on the CPU
        options[k.KEEP], options[k.FLOOR] = float(row.keep), row.floor
        options[k.LR], options[k.COS], options[k.SIN] = lr, math.cos(lr), math.sin(lr)
        options[k.NOISE], options[k.IS_RELATIVE] = self._noise, float(row.is_relative)
        return options

    def _pass(self, number: int, threads: int) -> None:
        self._block[k.PASS] = number
        self._counter[:] = 0
        run_on_threads(self._task.address, self._block.ctypes.data, threads)


def _rounds(tensors: Table) -> list[tuple[int, int]]:
    """Which tensors are gone over together, first and last: as many as one look is enough for."""
    rounds = []
    first = entries = 0
    for t, row in enumerate(tensors):
        if row[k.WHOLE] and not entries:
            continue
        entries += int(row[k.OUTER] * row[k.SLICES] * row[k.INNER])
        if entries >= _ENTRIES_A_ROUND:
            rounds.append((first, t + 1))
            first, entries = t + 1, 0
    return [*rounds, (first, len(tensors))] if first < len(tensors) else rounds
