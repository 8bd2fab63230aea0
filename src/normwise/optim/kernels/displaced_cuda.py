"""Plans that turn what a wrapped optimizer did into other steps on a CUDA device.

The kernels are in ``_displaced_triton``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from normwise.geometry import computing_dtype
from normwise.optim.kernels import _displaced_triton as kernels
from normwise.optim.kernels._launching import DTYPES, Launcher, are_aligned
from normwise.optim.kernels._layout import memory_layout
from normwise.optim.kernels.cuda import (
    BLOCKS_A_PROGRAM,
    CHUNKS_AT_A_TIME,
    LOG_BLOCK,
    WARPS,
    Tile,
)
from normwise.optim.motion import Form, KernelStep, Outcome, resolution

__all__ = ["DisplacedCUDAPlan"]

# The kernels' constants as numbers.
k: Any = SimpleNamespace(
    **{name: x.value for name, x in vars(kernels).items() if isinstance(x, tl.constexpr)}
)
_PATHS = {"free": k.FREE, "fixed": k.FIXED, "retract": k.RETRACT, "geodesic": k.GEODESIC}
_OUTCOMES = {Outcome.MOVED: k.MOVED, Outcome.FROM_ZERO: k.FROM_ZERO, Outcome.IN_PLACE: k.IN_PLACE}
_HALF = (torch.bfloat16, torch.float16)


class DisplacedCUDAPlan:
    """The work list of some weights on one device; nothing of a step waits for it.

    Args:
        weights: dense tensors of one dtype, none empty.
        forms: of each; all of one path.
        log_block: the base-2 logarithm of the entries of a tile (default: 12).
    """

    def __init__(
        self, weights: Sequence[Tensor], forms: Sequence[Form], log_block: int = LOG_BLOCK
    ) -> None:
        self._dtype, self._path = weights[0].dtype, _PATHS[forms[0].path]
        self._noise = resolution(torch.finfo(self._dtype).eps, torch.float64)
        self._block = block = 1 << log_block
        layouts = []
        for w, form in zip(weights, forms, strict=True):
            layout = memory_layout(w, form.view)
            assert layout is not None
            layouts.append(layout)
        tiles = [Tile.of(layout, False, log_block) for layout in layouts]

        groups = max(form.group for form in forms) + 1
        numbers = k.ADDRESSES + len(weights) * k.ADDRESS_COLUMNS
        size = numbers + groups * k.NUMBER_COLUMNS
        tensors = torch.zeros(len(weights), k.TENSOR_COLUMNS, dtype=torch.int64)
        chunks: dict[Tile, list[Tensor]] = {}
        runs: dict[bool, list[Tensor]] = {}
        shared: list[Tensor] = []
        n_chunks = slots = 0
        # The chunks of one form lie together, as one launch takes them.
        for t in sorted(range(len(weights)), key=tiles.__getitem__):
            (outer, slices, inner), tile = layouts[t], tiles[t]
            length = width = outer * inner
            is_shared = tile.rows == 1 and length > block * BLOCKS_A_PROGRAM
            if is_shared:
                width = block * BLOCKS_A_PROGRAM
            table = tile.chunks(t, slices, length, width)
            chunks.setdefault(tile, []).append(table)
            row = tensors[t]
            row[k.SLICES], row[k.INNER], row[k.LENGTH] = slices, inner, length
            row[k.IS_SHARED], row[k.SLOT] = is_shared, slots
            row[k.NUMBERS] = numbers + forms[t].group * k.NUMBER_COLUMNS
            row[k.OUTCOME] = _OUTCOMES[forms[t].outcome]
            if is_shared:
                pieces = math.ceil(length / width)
                own = Tile(1, block).chunks(t, slices, 1, 1)
                own[:, k.BEGIN] = n_chunks + torch.arange(slices) * pieces
                own[:, k.END] = own[:, k.BEGIN] + pieces
                shared.append(own)
                runs.setdefault(tile.aligned, []).append(table)
                slots += slices
            n_chunks += len(table)
        device = weights[0].device
        self._tensors = tensors.to(device)
        self._chunks = torch.cat([t for of_tile in chunks.values() for t in of_tile]).to(device)
        counts = [sum(map(len, of_tile)) for of_tile in chunks.values()]
        self.launches = list(zip(chunks, torch.split(self._chunks, counts), strict=True))
        self._shared = torch.cat(shared).to(device) if shared else None
        self._runs = {key: torch.cat(of_key).flip(0).to(device) for key, of_key in runs.items()}
        self._slices = torch.zeros(slots, k.SLICE_COLUMNS, dtype=torch.int64, device=device)
        self._launcher = Launcher(device, size, k.ADDRESSES)
        of_groups = self._launcher.state[numbers:].view(torch.float64)
        self._numbers = of_groups.view(groups, k.NUMBER_COLUMNS)

    def step_(
        self,
        weights: Sequence[Tensor],
        before: Sequence[Tensor],
        rows: Sequence[KernelStep],
        radii: Sequence[Tensor] | None,
        *,
        stochastic_rounding: bool,
    ) -> None:
        """Put each slice where it belongs; as of ``displaced.DisplacedPlan``."""
        nowhere = [0] * len(weights)
        places = [w.data_ptr() for w in before], [w.data_ptr() for w in weights]
        # Kept until the launches are made; what comes after them on this stream waits for them.
        held = None if radii is None else [r.contiguous() for r in radii]
        columns = (*places, nowhere if held is None else [r.data_ptr() for r in held])
        numbers = list(chain.from_iterable(map(_numbers, rows)))
        bits = struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers))
        self._launcher.send([*chain.from_iterable(zip(*columns, strict=True)), *bits])
        for row, on_device in zip(rows, self._numbers, strict=True):
            self._send_what_the_device_knows(row, on_device)
        flags = {
            k.STOCHASTIC: stochastic_rounding and self._dtype in _HALF,
            k.RELATIVE: rows[0].is_relative,
            k.FLOORED: rows[0].floor != 0,
        }
        how = sum(flag for flag, is_set in flags.items() if is_set)
        if k.STOCHASTIC & how:
            self._launcher.state[k.NOISE].add_(1)
        self._launch_all(how, are_aligned(*places), self._launcher.seed(stochastic_rounding))

    def _send_what_the_device_knows(self, row: KernelStep, numbers: Tensor) -> None:
        """Copy numbers that are tensors, such as a learning rate, within the device."""
        if (keep := self._launcher.on_device(row.keep)) is not None:
            numbers[k.KEEP].copy_(keep.squeeze())
        if (lr := self._launcher.on_device(row.lr)) is not None:
            angle = lr.squeeze().double()
            numbers[k.LR : k.SIN + 1].copy_(torch.stack([angle, angle.cos(), angle.sin()]))

    def _launch_all(self, how: int, aligned: bool, seed: int) -> None:
        launcher = self._launcher
        dtype, compute = DTYPES[self._dtype], DTYPES[computing_dtype(self._dtype)]
        kind = {"noise": self._noise, "path": self._path, "how": how}
        dtypes = {"dtype": dtype, "compute": compute}
        with launcher.here():
            for tile, chunks in self.launches:
                form = {
                    "rows": tile.rows,
                    "columns": tile.columns,
                    "looped": tile.looped,
                    "strided": tile.strided,
                    "aligned": tile.aligned and aligned,
                }
                launcher.launch(
                    kernels.move,
                    len(chunks),
                    (launcher.state, self._tensors, chunks, seed),
                    {**form, **kind, **dtypes},
                    warps=WARPS,
                    specialized_on=(tile, how, aligned),
                )
            if self._shared is None:
                return
            launcher.launch(
                kernels.gather,
                len(self._shared),
                (launcher.state, self._tensors, self._chunks, self._shared, self._slices),
                {**kind, "compute": compute, "block": CHUNKS_AT_A_TIME},
                warps=WARPS,
                specialized_on=(how,),
            )
            for is_aligned, runs in self._runs.items():
                launcher.launch(
                    kernels.finish,
                    len(runs),
                    (launcher.state, self._tensors, runs, self._slices, seed),
                    {
                        "aligned": is_aligned and aligned,
                        "how": how,
                        **dtypes,
                        "block": self._block,
                    },
                    warps=WARPS,
                    specialized_on=(is_aligned, how, aligned),
                )


def _numbers(row: KernelStep) -> tuple[float, ...]:
    """Those of a group that the host knows, 0 for the others, in the order of the columns."""
    keep, lr = (
        0.0 if isinstance(x, Tensor) and x.device.type != "cpu" else float(x)
        for x in (row.keep, row.lr)
    )
    return keep, lr, math.cos(lr), math.sin(lr), row.floor
