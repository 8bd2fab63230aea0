"""Plans of fused steps on the CPU, and the threads that run them; the kernel is ``_cpu_numba``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from normwise.geometry import computing_dtype
from normwise.optim.kernels import AdamRule, Step
from normwise.optim.kernels import _cpu_numba as k
from normwise.optim.kernels._layout import memory_layout, mode, slicing
from normwise.optim.projection import ViewOption

if TYPE_CHECKING:
    from normwise.optim.kernels import Later

Table = np.ndarray[Any, Any]


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """``GOMP_parallel`` of the OpenMP library that torch runs on, if it has one.

    Threads of our own would compete with torch's, which spin for milliseconds after an operator.
    """
    for library in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / library
        if path.exists():
            try:
                start = ctypes.CDLL(str(path)).GOMP_parallel
            except (OSError, AttributeError):
                return None
            start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            start.restype = None
            return start
    return None


# ctypes lets go of the interpreter's lock during either call.
_DIRECTLY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _run(dtype: torch.dtype, block: Table, threads: int) -> None:
    task, start = k.entry(dtype), _openmp()
    if threads > 1 and start is not None:
        start(task.address, block.ctypes.data, threads, 0)
    else:
        _DIRECTLY(task.address)(block.ctypes.data)


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


class Plan:
    """The work list of one list of tensors, and what a step remembers for the next one.

    Args:
        params: dense CPU tensors of one dtype, none empty.
        view: as in :func:`normwise.optim.projection.project_`.
        norm: ``"free"`` or ``"fixed"``.
        split: whether the slices are pieces of slices that lie on several ranks (default: False).
    """

    def __init__(
        self, params: Sequence[Tensor], view: ViewOption, norm: str, *, split: bool = False
    ) -> None:
        self.dtype = params[0].dtype
        self.split, self.gated = split, view == "auto"
        self.tensors = np.zeros((len(params), 16), np.int64)
        self.factors = np.zeros((len(params), 8))
        tables = []
        slots = n_chunks = 0
        for t, p in enumerate(params):
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
            self.tensors[t, k.OUTER :] = (
                outer,
                slices,
                inner,
                kind,
                n_chunks,
                n_chunks + len(table),
                totals,
                whole,
                k.SHUT,
                k.SHUT,
                0,
                0,
            )
            n_chunks += len(table)
            tables.append(table)
        self.entries = sum(p.numel() for p in params)
        self.chunks = np.concatenate(tables)
        self.sums = np.zeros((slots, 4))
        self.chunk_sums = np.zeros((n_chunks, 8))
        self.options = np.zeros(16)
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
        for entry, array in pointed_to.items():
            self.block[entry] = array.ctypes.data
        self.block[k.N_CHUNKS] = n_chunks
        self._pieces: list[Tensor] = []
        if split:
            all_four = self.gated or norm == "fixed"
            exchanged = torch.from_numpy(self.sums[:, : (k.GG if all_four else k.WW) + 1])
            for first, slices in self.tensors[:, [k.TOTALS, k.SLICES]].tolist():
                self._pieces.append(exchanged.narrow(0, first, slices))
        self._last: Table | None = None
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
        firsts: Sequence[Tensor] | None,
        seconds: Sequence[Tensor] | None,
        counts: Sequence[Tensor] | None,
        step: Step,
        later: Later | None = None,
    ) -> None:
        """Update moments, step counts and weights, in place.

        Args:
            params, grads: of the forms that the plan was made for.
            firsts: first moments or momentum buffers; None for a momentum of 0.
            seconds, counts: second moments and step counts; None for SGD.
            step: what kind of step to take.
            later: if the weights are shards, what is told when the sums of this rank are there; the
                step ends with :meth:`finish_`, until when the tensors must be kept.
        """
        for column, tensors in ((k.W, params), (k.G, grads), (k.M, firsts), (k.V, seconds)):
            self.tensors[:, column] = 0 if tensors is None else list(map(Tensor.data_ptr, tensors))
        lr, weight_decay = float(step.lr), float(step.weight_decay)  # no wait: on the CPU
        decay = lr * step.decay_scale * weight_decay
        self.factors[:, k.DECAY] = 1 - decay
        self.factors[:, k.DECAY_PROJECTED] = 1 - decay * step.wd_ratio
        options, rule = self.options, step.rule
        options[k.GRAD] = -1 if step.maximize else 1
        options[k.EPS], options[k.GATE] = step.eps, step.delta
        options[k.GUARD] = max(step.eps, torch.finfo(computing_dtype(self.dtype)).tiny)
        if isinstance(rule, AdamRule):
            assert counts is not None
            t = np.empty(len(counts))
            k.count_steps(np.array(list(map(Tensor.data_ptr, counts))), t)
            self.factors[:, k.STEP] = lr / (1 - rule.beta1**t)
            self.factors[:, k.DENOMINATOR] = 1 / np.sqrt(1 - rule.beta2**t)
            options[k.M_ADD] = 1 - rule.beta1
            options[k.V_KEEP], options[k.V_ADD] = rule.beta2, 1 - rule.beta2
            options[k.LOOK_AHEAD] = (1 - rule.beta1) * rule.nesterov
        else:
            self.factors[:, k.STEP] = 1 if rule.lr_in_buffer else lr
            if rule.lr_in_buffer:
                options[k.GRAD] *= lr
            options[k.M_KEEP], options[k.M_ADD] = rule.momentum, 1 - rule.dampening
            options[k.LOOK_AHEAD] = rule.nesterov
        self.block[k.RULE] = k.SGD if seconds is None else k.ADAM
        threads = torch.get_num_threads() if self.entries > k.PARALLEL_ENTRIES else 1
        if len(self.scratch) < threads * k.LONGEST:
            self.scratch = np.empty(threads * k.LONGEST)
            self.block[k.SCRATCH] = self.scratch.ctypes.data
            self.counter = np.zeros((threads + 1) * k.CACHE_LINE // 8, np.int64)
            self.block[k.COUNTER] = self.counter.ctypes.data
        if self.split and self.gated:
            self.tensors[:, k.MODE] = k.AUTO  # in the first pass
        self._pass(1, threads)
        if later is None:
            self.finish_(params)
        else:
            later.defer_(self, params)

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
        return float(self.options[k.GATE]), float(self.options[k.EPS])

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

    def totals(self) -> Table:
        """What this rank knows of the gate of each weight in ``"auto"``, all of whose channels are
        whole: ⟨w, u⟩, ‖w‖², ⟨w, g⟩, ‖g‖², and whether a channel shuts it; shape ``(weights, 5)``.
        """
        self._decide()
        sums = np.add.reduceat(self.chunk_sums[:, : k.GG + 1], self.tensors[:, k.FIRST])
        shut = (sums[:, k.GG] > 0) & (self.tensors[:, k.DECISION] != k.BY_CHANNEL)
        return np.concatenate([sums, shut[:, None]], 1)

    def replace_totals(self, totals: Table, entries: Sequence[int]) -> None:
        """Let the gate decide by the totals of whole weights, of which these are the entries."""
        first = self.tensors[:, k.FIRST]
        self.chunk_sums[:, : k.GG + 1] = 0
        self.chunk_sums[first, : k.GG + 1] = totals[:, : k.GG + 1]
        self.chunk_sums[first[totals[:, k.GG + 1] > 0], k.OPEN] = 0
        # The layer's threshold is delta/√entries; the kernel knows the entries of the shard.
        here = self.tensors[:, k.OUTER : k.INNER + 1].prod(1)
        self.chunk_sums[first, k.WG] *= np.sqrt(np.array(entries) / here)

    def finish_(self, params: Sequence[Tensor]) -> None:
        """Decide, and take the second pass over what needs it."""
        if self._may_revisit:
            if self.split or self._decide():
                self._pass(2, int(self.block[k.THREADS]))
            self._guess()
        torch.autograd.graph.increment_version(params)

    def _decide(self) -> bool:
        again: bool = k.decide(
            self.tensors, self.chunks, self.factors, self.sums, self.chunk_sums, self.options
        )
        return again

    def _guess(self) -> None:
        """Expect the last decision in the next step, if it was made twice or is the first.

        A random gradient passes the layer gate now and then; that says nothing of the next.
        """
        decisions = self.tensors[:, k.DECISION]
        expected = (
            decisions
            if self._last is None
            else np.where(decisions == self._last, decisions, self.tensors[:, k.GUESS])
        )
        self.tensors[:, k.GUESS] = expected
        self._last = decisions.copy()

    def _pass(self, number: int, threads: int) -> None:
        self.block[k.PASS], self.block[k.THREADS] = number, threads
        self.counter[:] = 0
        _run(self.dtype, self.block, threads)
