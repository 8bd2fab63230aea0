"""Plans of fused steps on a CUDA device; the kernels are in ``_cuda_triton``."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from normwise.geometry import computing_dtype
from normwise.optim.kernels import AdamRule, SGDRule, Step
from normwise.optim.kernels import _cuda_triton as kernels
from normwise.optim.kernels._launching import DTYPES, Launcher, are_aligned
from normwise.optim.kernels._layout import memory_layout, mode, slicing
from normwise.optim.projection import ViewOption
from normwise.optim.step import AT_ONCE, Ending

# The kernels' constants as numbers.
k: Any = SimpleNamespace(
    **{name: x.value for name, x in vars(kernels).items() if isinstance(x, tl.constexpr)}
)

# Entries of a tile, 16 for each thread; slices up to 4 of them are the work of one program.
LOG_BLOCK = 12
BLOCKS_A_PROGRAM = 4
BLOCKS_A_RUN = 8
# In "auto" programs need more registers.
WARPS, WARPS_GATED = 8, 4
# What one program prepares, and adds up, at a time.
TENSORS_AT_A_TIME = 128
CHUNKS_AT_A_TIME = 1024

_HALF = (torch.bfloat16, torch.float16)
_MODES = {"free": k.FREE, "explicit": k.EXPLICIT, "fixed": k.FIXED, "auto": k.AUTO}


@dataclass(frozen=True, order=True)
class Tile:
    """A form of tiles: rows that each hold a slice, or as much of it as fits at a time.

    Args:
        rows: slices in a tile; 0 for weights without slices.
        columns: entries of each.
        looped: whether a slice is taken block by block.
        strided: whether a slice is not contiguous.
        aligned: whether all rows begin and end at multiples of 16 bytes.
    """

    rows: int
    columns: int
    looped: bool = False
    strided: bool = False
    aligned: bool = False

    @classmethod
    def of(cls, layout: tuple[int, int, int], free: bool, log_block: int) -> Tile:
        """The form for a weight.

        Args:
            layout: its shape (outer, slices, inner) in memory order.
            free: whether its slices do not matter.
            log_block: the base-2 logarithm of the entries of a tile.
        """
        outer, slices, inner = layout
        block, length = 1 << log_block, outer * inner
        if free:
            return cls(0, block, aligned=outer * slices * inner % k.ALIGNMENT == 0)
        if outer > 1 and slices > 1:
            # Places computed entry by entry need registers: less of them at a time.
            return cls(16, block // 64, looped=True, strided=True)
        aligned = length % k.ALIGNMENT == 0
        exponent = max(4, math.ceil(math.log2(length)))
        if exponent < 8 or not aligned:
            exponent += exponent % 2  # fewer forms to compile, of what is rarely much of a model
        if exponent > log_block:
            return cls(1, block, looped=True, aligned=aligned)
        return cls(block >> exponent, 1 << exponent, aligned=aligned)

    def chunks(self, tensor: int, slices: int, length: int, width: int) -> Tensor:
        """The rows of the table of chunks for a weight, ``width`` entries of a slice in each."""
        starts = torch.arange(0, slices, max(1, self.rows))
        begins = torch.arange(0, length, width)
        table = torch.zeros(len(starts), len(begins), k.CHUNK_COLUMNS, dtype=torch.int64)
        table[..., k.TENSOR] = tensor
        table[..., k.SLICE] = starts[:, None]
        table[..., k.BEGIN] = begins
        table[..., k.END] = (begins + width).clamp_max(length)
        return table.flatten(0, 1)


class CUDAPlan:
    """The work list of one list of tensors on one device, and what a step leaves for the next.

    All of it is on the device, so that a step waits for nothing and can be captured in a CUDA
    graph. The host sends addresses and numbers when they have changed.

    Args:
        params: dense tensors of one dtype on one device, none empty.
        view: as in :func:`normwise.optim.projection.project_`.
        norm: ``"free"`` or ``"fixed"``.
        log_block: the base-2 logarithm of the entries of a tile (default: 12).
        split: whether the slices are pieces of slices that lie on several ranks (default: False).
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        view: ViewOption,
        norm: str,
        log_block: int = LOG_BLOCK,
        *,
        split: bool = False,
    ) -> None:
        self.dtype, self.device = params[0].dtype, params[0].device
        self.log_block = log_block
        self.split, self.gated = split, view == "auto"
        block = 1 << log_block
        layouts = []
        for p in params:
            layout = memory_layout(p, slicing(p, view))
            assert layout is not None
            layouts.append((mode(p, view, norm), layout))
        tiles = [Tile.of(layout, kind == "free", log_block) for kind, layout in layouts]

        tensors = torch.zeros(len(params), k.TENSOR_COLUMNS, dtype=torch.int64)
        tensors[:, k.GUESS] = tensors[:, k.DECISION] = k.UNKNOWN
        chunks: dict[Tile, list[Tensor]] = {}
        runs = []
        n_chunks = slots = 0
        # The chunks of one form lie together, as one launch takes them.
        for t in sorted(range(len(params)), key=tiles.__getitem__):
            (kind, (outer, slices, inner)), tile = layouts[t], tiles[t]
            size, length = params[t].numel(), outer * inner
            pieces, width = 0, length
            if tile.rows == 1 and length > block * BLOCKS_A_PROGRAM:
                width = block * BLOCKS_A_PROGRAM
                pieces = math.ceil(length / width)
            if kind == "free":
                table = tile.chunks(t, 1, size, block)
            else:
                table = tile.chunks(t, slices, length, width)
            chunks.setdefault(tile, []).append(table)
            row = tensors[t]
            row[k.SLICES], row[k.INNER], row[k.LENGTH] = slices, inner, length
            row[k.MODE], row[k.PIECES], row[k.SLOT] = _MODES[kind], pieces, slots
            row[k.FIRST], row[k.LAST] = n_chunks, n_chunks + len(table)
            n_chunks += len(table)
            if kind == "auto" or pieces or split:
                # Most find nothing left to do: the fewer, the better.
                runs.append(Tile(0, block).chunks(t, 1, size, block * BLOCKS_A_RUN))
                slots += slices
        self.tensors = tensors.to(self.device)
        self.chunks = torch.cat([t for tables in chunks.values() for t in tables]).to(self.device)
        counts = [sum(map(len, tables)) for tables in chunks.values()]
        self.launches = list(zip(chunks, torch.split(self.chunks, counts), strict=True))
        self.runs = torch.cat(runs).to(self.device) if runs else None
        columns = k.SPLIT_SLICE_COLUMNS if split else k.SLICE_COLUMNS
        self.slices = torch.zeros(slots, columns, dtype=torch.int64, device=self.device)
        self._pieces: list[Tensor] = []
        if split:
            width = 4 if self.gated or norm == "fixed" else 2
            sums = self.slices.view(torch.float64)[:, k.SUMS : k.SUMS + width]
            for slot, n in tensors[:, [k.SLOT, k.SLICES]].tolist():
                self._pieces.append(sums.narrow(0, slot, n))
        size = k.ADDRESSES + len(params) * k.ADDRESS_COLUMNS
        self._launcher = Launcher(self.device, size, k.LR)
        self.state = self._launcher.state
        # All that launches are specialized on beside kernel and tile.
        self._how: tuple[Any, ...] = ()
        # What the end of a step needs of its beginning.
        self._step: Step
        self._parts_left = 0
        self._left: tuple[dict[str, Any], int]

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor] | None,
        exp_avg_sqs: Sequence[Tensor] | None,
        state_steps: Sequence[Tensor] | None,
        step: Step,
        ending: Ending = AT_ONCE,
    ) -> None:
        """Update moments, step counts and weights, in place; nothing waits for the device.

        Args:
            params, grads: of the forms that the plan was made for.
            exp_avgs: first moments or momentum buffers; None for a momentum of 0.
            exp_avg_sqs, state_steps: second moments and step counts; None for SGD.
            step: what kind of step to take.
            ending: what is told when the sums of this rank are there; the step ends with
                :meth:`finish_`, until when the tensors must be kept.
        """
        nowhere = [0] * len(params)
        columns = [
            nowhere if tensors is None else list(map(Tensor.data_ptr, tensors))
            for tensors in (params, grads, exp_avgs, exp_avg_sqs, state_steps)
        ]
        lr, weight_decay, scale, found_inf = (
            self._launcher.on_device(x)
            for x in (step.lr, step.weight_decay, step.grad_scale, step.found_inf)
        )
        numbers = _numbers(step, self.dtype, lr is None, weight_decay is None)
        self._launcher.send([*numbers, *chain.from_iterable(zip(*columns, strict=True))])
        flags = {
            k.ADAM: isinstance(step.rule, AdamRule),
            k.NESTEROV: step.rule.nesterov,
            k.BUFFERED: exp_avgs is not None,
            k.LR_IN_BUFFER: isinstance(step.rule, SGDRule) and step.rule.lr_in_buffer,
            k.SCALED: found_inf is not None,
            k.STOCHASTIC: step.stochastic_rounding and self.dtype in _HALF,
            k.GATED: self.gated,
            k.LR_ON_DEVICE: lr is not None,
            k.WEIGHT_DECAY_ON_DEVICE: weight_decay is not None,
            k.SPLIT: self.split,
        }
        how = sum(flag for flag, is_set in flags.items() if is_set)
        aligned = are_aligned(*columns[:4])
        seed = self._launcher.seed(step.stochastic_rounding)
        dtypes = {"dtype": DTYPES[self.dtype], "compute": DTYPES[computing_dtype(self.dtype)]}
        block = 1 << self.log_block
        pointers = [self.state if x is None else x for x in (lr, weight_decay, scale, found_inf)]
        self._how = (how, aligned, *((x.dtype, x.data_ptr() % 16) for x in pointers))
        with self._launcher.here():
            self._launch(
                kernels.prepare,
                math.ceil(len(params) / TENSORS_AT_A_TIME),
                (self.state, self.tensors, *pointers, len(params)),
                {"how": how, "block": TENSORS_AT_A_TIME},
            )
            for tile, chunks in self.launches:
                form = {"aligned": tile.aligned and aligned, "how": how, **dtypes}
                if tile.rows == 0:
                    self._launch(
                        kernels.flat_pass,
                        len(chunks),
                        (self.state, self.tensors, chunks, seed),
                        {"block": block, **form},
                        tile,
                    )
                    continue
                self._launch(
                    kernels.first_pass,
                    len(chunks),
                    (self.state, self.tensors, chunks, self.slices, seed),
                    {
                        "rows": tile.rows,
                        "columns": tile.columns,
                        "looped": tile.looped,
                        "strided": tile.strided,
                        **form,
                    },
                    tile,
                )
        self._step, self._parts_left = step, k.ADD_UP | k.DECIDE
        self._left = {"how": how, **dtypes, "block": block}, seed
        ending.end_plan_(self, params)

    def sum_pieces(self) -> list[Tensor]:
        """As of ``cpu.CPUPlan``: sums of the pieces of slices that are here."""
        with self._launcher.here():
            self._decide(k.ADD_UP)
        return self._pieces

    @property
    def gate(self) -> tuple[float, float]:
        """The step's ``delta`` and ``eps``."""
        return self._step.delta, self._step.eps

    def replace_gate(self, coefficients: Sequence[Tensor], opened: Tensor) -> None:
        """As of ``cpu.CPUPlan``: let what was decided in ``"auto"`` end the step."""
        for piece, coefficient in zip(self._pieces, coefficients, strict=True):
            piece[:, 0], piece[:, 1] = coefficient, 1
        numbers = self.tensors.view(torch.float64)
        decays = numbers[:, k.DECAY], numbers[:, k.DECAY_PROJECTED]
        numbers[:, k.DECAY_PROJECTED] = torch.where(opened, decays[1], decays[0])

    def totals(self) -> Tensor:
        """As of ``cpu.CPUPlan``: what this rank knows of the gate of each weight."""
        with self._launcher.here():
            self._decide(k.ADD_UP)
        return self.tensors.view(torch.float64)[:, k.TOTALS : k.TOTALS + 5].clone()

    def replace_totals(self, totals: Tensor, entries: Sequence[int]) -> None:
        """Let the gate decide by the totals of whole weights, of which these are the entries."""
        here = self.tensors[:, k.SLICES] * self.tensors[:, k.LENGTH]
        whole = torch.tensor(entries, dtype=torch.float64, device=self.device)
        numbers = self.tensors.view(torch.float64)[:, k.TOTALS : k.TOTALS + 5]
        numbers.copy_(totals)
        # The layer's threshold is delta/√entries; the kernel knows the entries of the shard.
        numbers[:, 2] *= (whole / here).sqrt()

    def finish_(self, params: Sequence[Tensor]) -> None:
        """Decide, and take the second pass over what needs it."""
        if self.runs is not None:
            with self._launcher.here():
                self._write_left(self.runs)
        torch.autograd.graph.increment_version(params)

    def _write_left(self, runs: Tensor) -> None:
        constants, seed = self._left
        if self.split:
            self._launch(
                kernels.finish,
                len(self.tensors),
                (self.state, self.tensors, self.slices),
                {"how": constants["how"], "block": CHUNKS_AT_A_TIME},
            )
        else:
            self._decide(self._parts_left)
        self._launch(
            kernels.second_pass,
            len(runs),
            (self.state, self.tensors, runs, self.slices, seed),
            constants,
        )

    def _decide(self, parts: int) -> None:
        self._parts_left &= ~parts
        self._launch(
            kernels.decide,
            len(self.tensors),
            (self.state, self.tensors, self.chunks, self.slices),
            {"how": self._left[0]["how"], "block": CHUNKS_AT_A_TIME, "parts": parts},
        )

    def _launch(
        self,
        kernel: Any,
        programs: int,
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        tile: Tile | None = None,
    ) -> None:
        """Launch a kernel; ``constants`` are in the order of its signature, after ``arguments``."""
        self._launcher.launch(
            kernel,
            programs,
            arguments,
            constants,
            warps=4 if kernel is kernels.prepare else WARPS_GATED if self.gated else WARPS,
            specialized_on=(tile, constants.get("parts"), *self._how),
        )


def _numbers(
    step: Step, dtype: torch.dtype, knows_lr: bool, knows_weight_decay: bool
) -> tuple[int, ...]:
    """The bits of the numbers from LR to GUARD; those that the host does not know are 0."""
    rule = step.rule
    if isinstance(rule, AdamRule):
        beta1, beta2 = rule.beta1, rule.beta2
        rates = [_log(beta1), _log(beta2), 0.0, 1 - beta1, beta2, 1 - beta2, 1 - beta1]
    else:
        rates = [0.0, 0.0, rule.momentum, 1 - rule.dampening, 0.0, 0.0, rule.momentum]
    numbers = [
        float(step.lr) if knows_lr else 0.0,
        float(step.weight_decay) if knows_weight_decay else 0.0,
        step.decay_scale,
        step.wd_ratio,
        -1.0 if step.maximize else 1.0,
        *rates,
        step.eps,
        step.delta,
        max(step.eps, torch.finfo(computing_dtype(dtype)).tiny),
    ]
    return struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers))


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
