"""How plans on a CUDA device keep their tables there and start Triton's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from itertools import chain
from operator import or_
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

__all__ = ["DTYPES", "Launcher", "are_aligned"]

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Launcher:
    """The state of a plan on a device, and what has been compiled for it; nothing waits.

    Args:
        device: where.
        size: the entries of the state, a table of int64.
        first: the first of those that the host sends.
    """

    def __init__(self, device: torch.device, size: int, first: int) -> None:
        self.device = device
        self.state = torch.zeros(size, dtype=torch.int64, device=device)
        self._first = first
        self._sent: Sequence[int] = []
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []
        self._seed: int | None = None
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def here(self) -> AbstractContextManager[None]:
        """The device, current for launches."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def on_device(self, value: float | Tensor | None) -> Tensor | None:
        """A tensor that is to be read on the device; None for what the host knows."""
        if not isinstance(value, Tensor) or value.device.type == "cpu" != self.device.type:
            return None
        return value.to(self.device, non_blocking=True)

    def seed(self, stochastic_rounding: bool) -> int:
        """Where the random numbers of this plan begin, once they are needed."""
        if stochastic_rounding and self._seed is None:
            self._seed = int(torch.randint(2**31 - 1, ()))
        return self._seed or 0

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        *,
        warps: int,
        specialized_on: tuple[Any, ...],
    ) -> None:
        """Launch a kernel, the second time without asking Triton which of its forms to take.

        That is most of the host's time of a launch.

        Args:
            kernel: it.
            programs: how many of it.
            arguments: its first ones.
            constants: those that follow, in the order of its signature.
            warps: of each program.
            specialized_on: what of arguments and constants differs between launches.
        """
        grid, key = (programs, 1, 1), (kernel, *specialized_on)
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = kernel[grid](*arguments, **constants, num_warps=warps)
        else:
            compiled[grid](*arguments, *constants.values())

    def send(self, entries: Sequence[int]) -> None:
        """Bring addresses and numbers to the device unless they are there already.

        A CUDA graph that is replayed reads the host's memory again. So the buffer of a copy that is
        captured is kept for good, and must exist before; every capture copies, for steps may come
        between; and after one every step does, for replays may.
        """
        target = self.state[self._first : self._first + len(entries)]
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if entries == self._sent and not capturing and not self._captured:
            return
        self._sent = entries
        if self.device.type != "cuda":
            target.copy_(torch.tensor(entries))
        elif capturing:
            if self._spare is None:
                raise RuntimeError(
                    "take a step with these parameters before each capture of one in a CUDA graph"
                )
            target.copy_(self._spare.copy_(torch.tensor(entries)), non_blocking=True)
            self._captured.append(self._spare)
            self._spare = None
        else:
            if self._spare is None:
                self._spare = torch.empty(len(entries), dtype=torch.int64, pin_memory=True)
            target.copy_(torch.tensor(entries).pin_memory(), non_blocking=True)


def are_aligned(*addresses: Sequence[int]) -> bool:
    """Whether all addresses are multiples of 16 bytes, as kernels for aligned rows need."""
    return reduce(or_, chain.from_iterable(addresses), 0) % 16 == 0
