"""Plans of fused steps on the CPU; the kernel is ``_cpu_numba``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normwise.cpu_kernels import CACHE_LINE, run_on_threads
from normwise.geometry import computing_dtype
from normwise.optim.kernels import _cpu_numba as k
from normwise.optim.kernels._layout import memory_layout, mode, slicing
from normwise.optim.step import AT_ONCE, AdamRule, Ending, SGDRule, Step

Table = np.ndarray[Any, Any]


_MODES = {"free": k.FREE, "explicit": k.EXPLICIT, "fixed": k.FIXED, "auto": k.AUTO}


def _chunks(
    outer: int, slices: int, inner: int, mode: int, split: bool
) -> tuple[bool, list[Table]]:
    """Whether one pass ends a chunk, and the bounds of chunks: outer, slice and inner ranges.

    It does if slices stay whole, and are not themselves pieces of slices ``split`` over ranks.
    """
    entries = outer * inner
    uncut = entries <= k.LONGEST and mode != k.FREE
    if uncut:
        per_chunk = (outer, max(1, k.TYPICAL // entries), inner)
    elif outer == 1 or inner >= k.TYPICAL:
        per_chunk = (1, 1, k.TYPICAL)
    else:
        width = min(slices, max(1, 512 // inner))
        per_chunk = (max(1, k.TYPICAL // (width * inner)), width, inner)
    starts = np.meshgrid(
        *(np.arange(0, n, k) for n, k in zip((outer, slices, inner), per_chunk, strict=True)),
        indexing="ij",
    )
    bounds = []
    for start, n, width in zip(starts, (outer, slices, inner), per_chunk, strict=True):
        bounds += [start.ravel(), np.minimum(start.ravel() + width, n)]
    return uncut and not split, bounds


class CPUPlan:
    """The work list of one list of tensors, and what a step remembers for the next one.

    Args:
        params: dense CPU tensors of one dtype, none empty.
        steps: the options of some groups; of them only the views and norms matter here.
        groups: for each tensor, which of these are its.
        split: whether the slices are pieces of slices that lie on several ranks; then there is but
            one group (default: False).
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        steps: Sequence[Step],
        groups: Sequence[int],
        *,
        split: bool = False,
    ) -> None:
        self.dtype = params[0].dtype
        self.split, self.gated = split, steps[0].view == "auto"
        self.tensors = np.zeros((len(params), k.TENSOR_COLUMNS), np.int64)
        self.factors = np.zeros((len(params), 8))
        tables = []
        slots = n_chunks = 0
        for t, (p, group) in enumerate(zip(params, groups, strict=True)):
            view, norm = steps[group].view, steps[group].norm
            kind = _MODES[mode(p, view, norm)]
            layout = memory_layout(p, slicing(p, view))
            assert layout is not None
            outer, slices, inner = layout
            whole, bounds = _chunks(outer, slices, inner, kind, split)
            table = np.zeros((len(bounds[0]), 8), np.int64)
            table[:, k.TENSOR] = t
            table[:, k.OUTER_0 : k.INNER_1 + 1] = np.stack(bounds, 1)
            totals = slots
            if kind != k.FREE:
                if not whole:
                    slots += slices
                widths = table[:, k.SLICE_1] - table[:, k.SLICE_0]
                table[:, k.SLOT] = slots + np.cumsum(widths) - widths
                slots += int(widths.sum())
            self.tensors[t, k.OUTER : k.REVISIT] = (
                outer,
                slices,
                inner,
                kind,
                n_chunks,
                n_chunks + len(table),
                totals,
                whole,
                group,
                k.SHUT,
                k.NONE,
                k.NONE,
            )
            n_chunks += len(table)
            tables.append(table)
        self.entries = sum(p.numel() for p in params)
        self.chunks = np.concatenate(tables)
        self.sums = np.zeros((slots, 4))
        self.chunk_sums = np.zeros((n_chunks, 8))
        self.options = np.zeros((len(steps), 16))
        self.counter = np.zeros(0, np.int64)
        self.scratch = np.zeros(0)
        self.block = np.zeros(16, np.int64)
        pointed_to: dict[int, Table] = {
            k.TENSORS: self.tensors,
            k.CHUNKS: self.chunks,
            k.FACTORS: self.factors,
            k.SUMS: self.sums,
            k.CHUNK_SUMS: self.chunk_sums,
            k.OPTIONS: self.options,
        }
        # What the tables were filled from in the last step.
        self._addresses: dict[int, list[int]] = {}
        self._steps: list[Step] = []
        self._kernels = k.kernels(self.dtype)
        for entry, array in pointed_to.items():
            self.block[entry] = array.ctypes.data
        self.block[k.N_CHUNKS] = n_chunks
        self._block_at = self.block.ctypes.data
        self._pieces: list[Tensor] = []
        if split:
            all_four = self.gated or steps[0].norm == "fixed"
            exchanged = torch.from_numpy(self.sums[:, : (k.GG if all_four else k.WW) + 1])
            for first, slices in self.tensors[:, [k.TOTALS, k.SLICES]].tolist():
                self._pieces.append(exchanged.narrow(0, first, slices))
        self._may_revisit = bool(
            (
                (self.tensors[:, k.MODE] == k.AUTO)
                | ((self.tensors[:, k.MODE] != k.FREE) & (self.tensors[:, k.WHOLE] == 0))
            ).any()
        )

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor | None] | None,
        exp_avg_sqs: Sequence[Tensor] | None,
        state_steps: Sequence[Tensor] | None,
        steps: Sequence[Step],
        ending: Ending = AT_ONCE,
    ) -> None:
        """Update moments, step counts and weights, in place.

        Args:
            params, grads: of the forms that the plan was made for.
            exp_avgs: first moments or momentum buffers; None for a momentum of 0.
            exp_avg_sqs, state_steps: second moments and step counts; None for SGD.
            steps: what kind of step each group takes.
            ending: what is told when the sums of this rank are there; the step ends with
                :meth:`finish_`, until when the tensors must be kept.
        """
        for column, tensors in enumerate((params, grads, exp_avgs, exp_avg_sqs, state_steps)):
            if tensors is not None:
                addresses = [0 if t is None else t.data_ptr() for t in tensors]
                if addresses != self._addresses.get(column):
                    self.tensors[:, column] = self._addresses[column] = addresses
        self._set_options(steps)
        is_adam = exp_avg_sqs is not None
        self._kernels.prepare(self.tensors, self.factors, self.options, is_adam)
        self.block[k.RULE] = k.ADAM if is_adam else k.SGD
        threads = torch.get_num_threads() if self.entries > k.PARALLEL_ENTRIES else 1
        if len(self.scratch) < threads * k.LONGEST:
            self.scratch = np.empty(threads * k.LONGEST)
            self.block[k.SCRATCH] = self.scratch.ctypes.data
            self.counter = np.zeros((threads + 1) * CACHE_LINE // 8, np.int64)
            self.block[k.COUNTER] = self.counter.ctypes.data
        if self.split and self.gated:
            self.tensors[:, k.MODE] = k.AUTO  # in the first pass
        self._pass(1, threads)
        ending.end_plan_(self, params)

    def _set_options(self, steps: Sequence[Step]) -> None:
        """Fill in the table of options, unless it is the last step's: that takes microseconds."""
        numbers = [x for step in steps for x in (step.lr, step.weight_decay)]
        if any(isinstance(x, Tensor) for x in numbers):
            self._steps = []  # what is in a tensor may change unseen
        elif steps == self._steps:
            return
        else:
            self._steps = list(steps)
        self.options[:] = [_options(step, self.dtype) for step in steps]

    def sum_pieces(self) -> list[Tensor]:
        """Of each weight whose slices are split ⟨w, u⟩, ‖w‖² of the pieces here, in ``"auto"`` also
        ⟨w, g⟩, ‖g‖², and if norms are fixed ⟨w, u⟩, ‖u‖²; shape ``(slices, 2 or 4)``.

        The step ends with what these tensors hold when :meth:`finish_` is called.
        """
        self._decide()
        return self._pieces

    @property
    def gate(self) -> tuple[float, float]:
        """The step's ``delta`` and ``eps``."""
        return float(self.options[0, k.GATE]), float(self.options[0, k.EPS])

    def replace_gate(self, coefficients: Sequence[Tensor], opened: Tensor) -> None:
        """Let what was decided in ``"auto"`` end the step of weights whose slices are split.

        Args:
            coefficients: for each weight the multiple of each of its slices to subtract.
            opened: whether each weight is projected, on which its decay depends.
        """
        for piece, coefficient in zip(self._pieces, coefficients, strict=True):
            piece[:, k.WU], piece[:, k.WW] = coefficient, 1
        shut = ~opened.numpy()
        self.factors[shut, k.DECAY_PROJECTED] = self.factors[shut, k.DECAY]
        self.tensors[:, k.MODE] = k.EXPLICIT  # in the second pass

    def totals(self) -> Tensor:
        """What this rank knows of the gate of each weight in ``"auto"``, all of whose channels are
        whole: ⟨w, u⟩, ‖w‖², ⟨w, g⟩, ‖g‖², and whether a channel shuts it; shape ``(weights, 5)``.
        """
        self._decide()
        sums = np.add.reduceat(self.chunk_sums[:, : k.GG + 1], self.tensors[:, k.FIRST])
        shut = (sums[:, k.GG] > 0) & (self.tensors[:, k.DECISION] != k.BY_CHANNEL)
        return torch.from_numpy(np.concatenate([sums, shut[:, None]], 1))

    def replace_totals(self, totals: Tensor, entries: Sequence[int]) -> None:
        """Let the gate decide by the totals of whole weights, of which these are the entries."""
        first, found = self.tensors[:, k.FIRST], totals.numpy()
        self.chunk_sums[:, : k.GG + 1] = 0
        self.chunk_sums[first, : k.GG + 1] = found[:, : k.GG + 1]
        self.chunk_sums[first[found[:, k.GG + 1] > 0], k.OPEN] = 0
        # The layer's threshold is delta/√entries; the kernel knows the entries of the shard.
        here = self.tensors[:, k.OUTER : k.INNER + 1].prod(1)
        self.chunk_sums[first, k.WG] *= np.sqrt(np.array(entries) / here)

    def finish_(self, params: Sequence[Tensor]) -> None:
        """Decide, and take the second pass over what needs it."""
        if self._may_revisit and (self.split or self._decide()):
            self._pass(2, int(self.block[k.THREADS]))
        torch.autograd.graph.increment_version(params)

    def _decide(self) -> bool:
        return self._kernels.decide(
            self.tensors, self.chunks, self.factors, self.sums, self.chunk_sums, self.options
        )

    def _pass(self, number: int, threads: int) -> None:
        self.block[k.PASS], self.block[k.THREADS] = number, threads
        self.counter[:] = 0
        run_on_threads(self._kernels.take_chunks, self._block_at, threads)


def _options(step: Step, dtype: torch.dtype) -> list[float]:
    """A row of the table of options."""
    lr, weight_decay = float(step.lr), float(step.weight_decay)  # no wait: on the CPU
    row = [0.0] * 16
    row[k.GRAD] = -1.0 if step.maximize else 1.0
    row[k.EPS], row[k.GATE] = step.eps, step.delta
    row[k.GUARD] = max(step.eps, torch.finfo(computing_dtype(dtype)).tiny)
    row[k.LR], row[k.DECAY_BY] = lr, lr * step.decay_scale * weight_decay
    row[k.WD_RATIO] = step.wd_ratio
    rule = step.rule
    if isinstance(rule, AdamRule):
        row[k.BETA1], row[k.BETA2] = rule.beta1, rule.beta2
        row[k.M_ADD] = 1 - rule.beta1
        row[k.V_KEEP], row[k.V_ADD] = rule.beta2, 1 - rule.beta2
        row[k.LOOK_AHEAD] = (1 - rule.beta1) * rule.nesterov
    elif isinstance(rule, SGDRule):
        if rule.lr_in_buffer:
            row[k.LR] = 1.0
            row[k.GRAD] *= lr
        row[k.M_KEEP], row[k.M_ADD] = rule.momentum, 1 - rule.dampening
        row[k.LOOK_AHEAD] = rule.nesterov
    return row
