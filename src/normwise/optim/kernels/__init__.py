"""Fused steps: one launch for all tensors of a dtype, the projection included.

``cpu`` is compiled by Numba. Neither is imported before a step needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normwise.geometry import View, computing_dtype
from normwise.optim.projection import ViewOption

if TYPE_CHECKING:
    from normwise.optim.kernels.cpu import Plan

__all__ = ["AdamRule", "Fused", "SGDRule", "check_available", "use_fused"]

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Below this many entries a step takes microseconds anyhow, and loading a compiler does not pay.
_WORTHWHILE_ENTRIES = 1 << 17


@dataclass(frozen=True)
class AdamRule:
    """The direction m̂/(√v̂ + eps), as AdamP has it; ``step_sizes`` bring the factor 1/(1 − β1^t)."""

    beta1: float
    beta2: float
    eps: float
    nesterov: bool


@dataclass(frozen=True)
class SGDRule:
    """The direction p, or g + μp for Nesterov, with the buffer p ← μp + (1 − dampening)g."""

    momentum: float
    dampening: float
    nesterov: bool


def check_available(params: Sequence[Tensor]) -> None:
    """Raise unless ``fused=True`` can be honoured for parameters on these devices.

    Raises:
        ImportError: if the compiler is not installed; the message names the extra to install.
        RuntimeError: if there are no kernels for a device.
    """
    for p in params:
        if p.device.type != "cpu":
            raise RuntimeError(
                "`fused=True` requires all the params to be on the CPU, but one of shape "
                f"{tuple(p.shape)} is on {p.device}; use foreach=True there"
            )
    if not _has_numba():
        raise ImportError(
            '`fused=True` needs Numba on the CPU; install it with: pip install "normwise[cpu]"'
        )


def use_fused(group: dict[str, Any], params: Sequence[Tensor]) -> bool:
    """Whether to take the fused step: as asked for, else where it fits and pays."""
    if torch.compiler.is_compiling():
        return False  # inductor fuses the multi-tensor step itself
    if group["fused"] is not None:
        return bool(group["fused"])
    if group["foreach"] is not None or group["differentiable"] or group["stochastic_rounding"]:
        return False
    if sum(p.numel() for p in params) < _WORTHWHILE_ENTRIES:
        return False
    if not all(_is_plain(p) and p.dtype in _DTYPES for p in params):
        return False
    if not _has_numba():
        _say_once(
            "optimizer steps on the CPU are several times faster with Numba: pip install "
            '"normwise[cpu]"; taking the single-tensor step'
        )
        return False
    return True


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor is what it seems: strided memory of the CPU, no subclass, no fake."""
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and not t.is_conj()
        and not t.is_neg()
    )


class Fused:
    """The plans of one list of parameters: made in the first step, kept while they fit.

    A plan holds the work list, a scratch buffer of one chunk a thread, a few sums for each slice,
    and the last decisions of the gate. Nothing of it belongs into a state dict.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._seen: object = None
        self._parts: list[tuple[Plan | None, list[int]]] = []

    def parts(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        steps: Sequence[Tensor] = (),
        *,
        view: ViewOption,
        norm: str,
    ) -> Iterator[tuple[Plan | None, list[int]]]:
        """Split the tensors by dtype: a plan and the indices that it is for.

        A plan of ``None`` is for tensors that the kernels cannot take: not dense, a gradient in
        another memory format, another dtype or device, a subclass of Tensor.
        """
        # What changes from step to step, looked at cheaply: about 0.5 µs a parameter.
        seen = (
            view,
            norm,
            list(map(type, params)),
            list(map(type, grads)),
            [(g.shape, g.stride(), g.dtype) for g in grads],
            [p.shape for p in params],
        )
        plain = {Tensor, torch.nn.Parameter}
        if plain.issuperset(seen[2]) and plain.issuperset(seen[3]):
            addresses = [t.data_ptr() for ts in (params, *moments, steps) for t in ts]
            if self._seen == (seen, addresses):
                return iter(self._parts)
            self._seen = (seen, addresses)
        else:
            self._seen = None
        self._look(params, grads, moments, steps, view, norm)
        return iter(self._parts)

    def _look(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        steps: Sequence[Tensor],
        view: ViewOption,
        norm: str,
    ) -> None:
        by_dtype: dict[torch.dtype | None, list[int]] = {}
        for i, p in enumerate(params):
            step = steps[i] if steps else None
            takes = _takes(p, grads[i], [tensors[i] for tensors in moments], step, view)
            if takes and p.numel() == 0:
                if step is not None:
                    by_dtype.setdefault(None, []).append(i)
                continue
            by_dtype.setdefault(p.dtype if takes else None, []).append(i)
        key = (view, norm, [(p.shape, p.stride()) for p in params], by_dtype)
        if key == self._key:
            return
        from normwise.optim.kernels.cpu import Plan

        self._key = key
        self._parts = [
            (None if dtype is None else Plan([params[i] for i in members], view, norm), members)
            for dtype, members in by_dtype.items()
        ]
        left = sum(params[i].numel() > 0 for i in by_dtype.get(None, ()))
        if left:
            _say_once(f"{left} of {len(params)} weights do not fit the fused step")


def _takes(
    p: Tensor, grad: Tensor, moments: list[Tensor], step: Tensor | None, view: ViewOption
) -> bool:
    from normwise.optim.kernels.cpu import memory_layout

    if p.dtype not in _DTYPES or not all(_is_plain(t) for t in (p, grad, *moments)):
        return False
    if step is not None and (step.dtype != torch.float32 or not _is_plain(step)):
        return False
    alike = all(t.stride() == p.stride() and t.shape == p.shape for t in (grad, *moments))
    dtypes = grad.dtype == p.dtype and all(m.dtype == computing_dtype(p.dtype) for m in moments)
    slicing = view if isinstance(view, View) else View.channel()
    if p.ndim < 2:
        slicing = View.layer()
    return p.numel() == 0 or (alike and dtypes and memory_layout(p, slicing) is not None)
