"""Fused steps: one launch for all tensors of a device and dtype, the projection included.

``cpu`` is compiled by Numba, ``cuda`` by Triton; both have a ``Plan`` of the same form. Neither is
imported before a step needs it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normwise.geometry import computing_dtype
from normwise.optim.kernels._layout import memory_layout, slicing
from normwise.optim.projection import ViewOption

if TYPE_CHECKING:
    from normwise.optim.kernels import cpu, cuda

    Plan = cpu.Plan | cuda.Plan

__all__ = [
    "AdamRule",
    "Fused",
    "Later",
    "SGDRule",
    "Step",
    "check_available",
    "takes_scaler",
    "use_fused",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """Kernels for a kind of device: what compiles them, and what they take."""

    module: str
    compiler: str
    extra: str
    dtypes: tuple[torch.dtype, ...]
    # For fewer entries, as of a toy, loading a compiler does not pay: it takes a second.
    worthwhile_entries: int
    stochastic_rounding: bool
    # Whether they divide gradients by a GradScaler's scale, and skip steps, so that none waits.
    takes_scaler: bool


_WIDE = (torch.float32, torch.float64, torch.bfloat16)
_BACKENDS = {
    "cpu": Backend(
        "cpu", "numba", "cpu", _WIDE, 1 << 10, stochastic_rounding=False, takes_scaler=False
    ),
    "cuda": Backend(
        "cuda",
        "triton",
        "cuda",
        (*_WIDE, torch.float16),
        0,
        stochastic_rounding=True,
        takes_scaler=True,
    ),
}


@dataclass(frozen=True)
class AdamRule:
    """The direction m̂/(√v̂ + eps); the step size is lr/(1 − β1^t)."""

    beta1: float
    beta2: float
    nesterov: bool


@dataclass(frozen=True)
class SGDRule:
    """The direction p, or g + μp for Nesterov, with the buffer p ← μp + (1 − dampening)g.

    With ``lr_in_buffer`` gradients enter it times the learning rate, and the step size is 1.
    """

    momentum: float
    dampening: float
    nesterov: bool
    lr_in_buffer: bool = False


@dataclass(frozen=True)
class Step:
    """What one step does.

    Args:
        rule: how directions are made of gradients and moments.
        lr, weight_decay: numbers or 0-dim tensors.
        decay_scale: a weight decays by 1 − decay_scale·lr·weight_decay (default: 1).
        wd_ratio: a factor on the decay of projected weights (default: 1).
        eps: added to Adam's denominator; the guard of the gate (default: 0).
        delta: the threshold of the gate (default: 0).
        maximize: ascend instead of descend (default: False).
        stochastic_rounding: of half-precision weights (default: False).
        grad_scale: what the gradients are to be divided by first (default: None, for 1).
        found_inf: nonzero if the step is to be skipped (default: None, for 0).
    """

    rule: AdamRule | SGDRule
    lr: float | Tensor
    weight_decay: float | Tensor
    decay_scale: float = 1.0
    wd_ratio: float = 1.0
    eps: float = 0.0
    delta: float = 0.0
    maximize: bool = False
    stochastic_rounding: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Later(ABC):
    """Ends the step of shards, on the CPU, when ranks have exchanged their sums."""

    @property
    @abstractmethod
    def split(self) -> bool:
        """Whether the slices of a :class:`View` are pieces of slices that lie on several ranks."""

    @abstractmethod
    def defer_(self, plan: cpu.Plan, params: Sequence[Tensor]) -> None:
        """Called when the sums of this rank are there: :meth:`cpu.Plan.finish_` will follow."""


def check_available(params: Sequence[Tensor], *, stochastic_rounding: bool = False) -> None:
    """Raise unless ``fused=True`` can be honoured for parameters on these devices.

    Raises:
        ImportError: if the compiler is not installed; the message names the extra to install.
        RuntimeError: if there are no kernels for a device, or they do not round stochastically.
    """
    for p in params:
        backend = _BACKENDS.get(p.device.type)
        if backend is None:
            raise RuntimeError(
                "`fused=True` requires all the params to be on the CPU or a CUDA device, but one "
                f"of shape {tuple(p.shape)} is on {p.device}; use foreach=True there"
            )
        if stochastic_rounding and not backend.stochastic_rounding:
            raise RuntimeError(
                "`fused` and `stochastic_rounding` cannot be `True` together for a parameter on "
                f"{p.device}; on CUDA devices they can"
            )
        if not _is_installed(backend.compiler):
            raise ImportError(
                f"`fused=True` needs {backend.compiler.capitalize()} for a parameter on "
                f'{p.device}; install it with: pip install "normwise[{backend.extra}]"'
            )


def use_fused(group: dict[str, Any], params: Sequence[Tensor]) -> bool:
    """Whether to take the fused step: as asked for, else where it fits and pays."""
    if torch.compiler.is_compiling():
        return False  # inductor fuses the multi-tensor step itself
    if group["fused"] is not None:
        return bool(group["fused"])
    if group["foreach"] is not None or group["differentiable"]:
        return False
    device = params[0].device.type
    backend = _BACKENDS.get(device)
    if backend is None or (group["stochastic_rounding"] and not backend.stochastic_rounding):
        return False
    if sum(p.numel() for p in params) < backend.worthwhile_entries:
        return False
    if not all(_is_plain(p) and p.device.type == device for p in params):
        return False
    if not all(p.dtype in backend.dtypes for p in params):
        return False
    if not _is_installed(backend.compiler):
        _say_once(
            f"optimizer steps on {device} are faster with {backend.compiler.capitalize()}: "
            f'pip install "normwise[{backend.extra}]"; taking the plain step'
        )
        return False
    return True


def takes_scaler(p: Tensor) -> bool:
    """Whether the kernels for a parameter do what a GradScaler leaves to a fused step."""
    backend = _BACKENDS.get(p.device.type)
    return backend is not None and backend.takes_scaler


@functools.cache
def _is_installed(compiler: str) -> bool:
    return importlib.util.find_spec(compiler) is not None


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor is what it seems: strided memory, no subclass, no fake."""
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.layout == torch.strided
        and not t.is_conj()
        and not t.is_neg()
    )


class Fused:
    """The plans of one list of parameters: made in the first step, kept while they fit.

    A plan holds a work list, a few sums for each slice, and the last decisions of the gate. Nothing
    of it belongs into a state dict.
    """

    def __init__(self) -> None:
        # What a GradScaler leaves to the step.
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._key: object = None
        self._seen: object = None
        self._parts: list[tuple[Plan | None, list[int]]] = []

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        firsts: Sequence[Tensor] | None,
        seconds: Sequence[Tensor] | None,
        counts: Sequence[Tensor] | None,
        step: Step,
        *,
        view: ViewOption,
        norm: str,
        later: Later | None = None,
    ) -> list[int]:
        """Take the step of all tensors that the kernels can take, in place.

        Args:
            params, grads: weights and gradients.
            firsts: first moments or momentum buffers; None for a momentum of 0.
            seconds, counts: second moments and step counts; None for SGD.
            step: what kind of step to take.
            view, norm: options of the group.
            later: what ends the step of shards on the CPU (default: None, for the kernel itself).

        Returns:
            The indices of those that are left: not dense, a gradient in another memory format,
            another dtype, a subclass of Tensor.
        """
        others = [[] if tensors is None else tensors for tensors in (firsts, seconds, counts)]
        self._look(params, grads, others, view, norm, later is not None and later.split)
        if self.found_inf is not None:
            step = replace(step, grad_scale=self.grad_scale, found_inf=self.found_inf)
        left: list[int] = []
        for plan, members in self._parts:
            if plan is None:
                left = members
                continue
            options: dict[str, Any] = {} if later is None else {"later": later}
            plan.step_(
                [params[i] for i in members],
                [grads[i] for i in members],
                None if firsts is None else [firsts[i] for i in members],
                None if seconds is None else [seconds[i] for i in members],
                None if counts is None else [counts[i] for i in members],
                step,
                **options,
            )
        if left and self.found_inf is not None:
            if self.found_inf.item():  # these few wait for the device
                return []
            if self.grad_scale is not None:
                torch._foreach_div_([grads[i] for i in left], self.grad_scale)
        return left

    def _look(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        others: Sequence[Sequence[Tensor]],
        view: ViewOption,
        norm: str,
        split: bool,
    ) -> None:
        """Remake the plans unless the tensors are as they were."""
        # What changes from step to step, looked at cheaply: about 0.5 µs a parameter.
        types = set(map(type, params)) | set(map(type, grads))
        seen = None
        if types <= {Tensor, torch.nn.Parameter}:
            forms = [(g.shape, g.stride(), g.dtype) for g in grads]
            shapes = [p.shape for p in params]
            addresses = [t.data_ptr() for tensors in (params, *others) for t in tensors]
            seen = (view, norm, split, forms, shapes, addresses)
            if seen == self._seen:
                return
        self._seen = seen

        by_kind: dict[tuple[torch.device, torch.dtype] | None, list[int]] = {}
        for i, p in enumerate(params):
            first, second, count = (tensors[i] if tensors else None for tensors in others)
            takes = _takes(p, grads[i], first, second, count, view)
            # An empty weight has nothing but a step count.
            if not takes or (p.numel() == 0 and others[-1]):
                by_kind.setdefault(None, []).append(i)
            elif p.numel() > 0:
                by_kind.setdefault((p.device, p.dtype), []).append(i)
        key = (view, norm, split, [(p.shape, p.stride()) for p in params], by_kind)
        if key == self._key:
            return
        self._key = key
        self._parts = [
            (
                None
                if kind is None
                else _new_plan([params[i] for i in members], view, norm, split),
                members,
            )
            for kind, members in by_kind.items()
        ]
        left = sum(params[i].numel() > 0 for i in by_kind.get(None, ()))
        if left:
            _say_once(f"{left} of {len(params)} weights do not fit the fused step")


def _new_plan(params: Sequence[Tensor], view: ViewOption, norm: str, split: bool) -> Plan:
    backend = _BACKENDS[params[0].device.type]
    module: Any = importlib.import_module(f"{__name__}.{backend.module}")
    options: dict[str, Any] = {"split": True} if split else {}
    plan: Plan = module.Plan(params, view, norm, **options)
    return plan


def _takes(
    p: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    count: Tensor | None,
    view: ViewOption,
) -> bool:
    """Whether the kernels can take a weight. Its step count is brought to its device."""
    moments = [m for m in (first, second) if m is not None]
    backend = _BACKENDS.get(p.device.type)
    if backend is None or p.dtype not in backend.dtypes:
        return False
    if not all(_is_plain(t) and t.device == p.device for t in (p, grad, *moments)):
        return False
    if count is not None:
        if not _is_plain(count) or count.dtype != torch.float32:
            return False
        if count.device != p.device:
            count.data = count.data.to(p.device)  # once: in place, as Module.to does it
    alike = all(t.stride() == p.stride() and t.shape == p.shape for t in (grad, *moments))
    dtypes = grad.dtype == p.dtype and all(m.dtype == computing_dtype(p.dtype) for m in moments)
    return p.numel() == 0 or (alike and dtypes and memory_layout(p, slicing(p, view)) is not None)
