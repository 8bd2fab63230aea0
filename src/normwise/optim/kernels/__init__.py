"""Fused steps: one launch for all tensors of a device and dtype, the projection included.

``cpu`` is compiled by Numba, ``cuda`` by Triton; ``stock`` does without a compiler, by torch's own
fused kernels on the CPU. Each has a plan of its own, imported when a step needs it. ``displaced``
and ``displaced_cuda`` are for what a wrapped optimizer did.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from normwise.geometry import computing_dtype, lie_alike
from normwise.optim.kernels._layout import memory_layout, slicing
from normwise.optim.motion import Form
from normwise.optim.step import AT_ONCE, AdamRule, Part, SGDRule, Step

__all__ = [
    "AdamRule",
    "FusedPlans",
    "SGDRule",
    "Step",
    "check_available",
    "displaced_plan",
    "moves_displaced",
    "takes_scaler",
    "takes_split",
    "use_fused",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """Kernels for a kind of device: what compiles them, and what they take."""

    module: str
    plan: str
    compiler: str
    extra: str
    dtypes: tuple[torch.dtype, ...]
    # For fewer entries, as of a toy, loading a compiler does not pay: it takes a second.
    worthwhile_entries: int
    stochastic_rounding: bool
    # Whether they divide gradients by a GradScaler's scale, and skip steps, so that none waits.
    takes_scaler: bool
    # Whether one plan takes the weights of several groups, each with options of its own.
    takes_groups: bool
    # Whether slices may lie on several ranks, whose sums are exchanged before the step ends.
    takes_split: bool
    # Whether Adam's Nesterov momentum, and learning rates within buffers, are to be had.
    takes_every_rule: bool = True
    # The module and the plan for what a wrapped optimizer did, if there is one.
    displaced: tuple[str, str] | None = None


_WIDE = (torch.float32, torch.float64, torch.bfloat16)
_BACKENDS = {
    "cpu": Backend(
        "cpu",
        "CPUPlan",
        "numba",
        "cpu",
        _WIDE,
        1 << 10,
        stochastic_rounding=False,
        takes_scaler=False,
        takes_groups=True,
        takes_split=True,
        displaced=("displaced", "DisplacedPlan"),
    ),
    "cuda": Backend(
        "cuda",
        "CUDAPlan",
        "triton",
        "cuda",
        (*_WIDE, torch.float16),
        0,
        stochastic_rounding=True,
        takes_scaler=True,
        takes_groups=False,
        takes_split=True,
        displaced=("displaced_cuda", "DisplacedCUDAPlan"),
    ),
}
# What takes a step where the compiler is not installed.
_STOCK = {
    "cpu": Backend(
        "stock",
        "StockPlan",
        "torch",
        "cpu",
        (torch.float32, torch.float64),
        0,
        stochastic_rounding=False,
        takes_scaler=False,
        takes_groups=True,
        takes_split=False,
        takes_every_rule=False,
    )
}
# Plans of so many sets of weights are kept, for what alternates, such as frozen and thawed layers.
KEPT_PLANS = 8
# Memory that is there lies above, nearly always: below, a tensor's storage may be gone.
LOWEST_ADDRESS = 1 << 32


# From so many entries on a slower step is worth a warning.
_LARGE = 1 << 20


def _backend(device: str) -> Backend | None:
    """What takes fused steps on a kind of device."""
    backend = _BACKENDS.get(device)
    if backend is not None and not _is_installed(backend.compiler):
        return _STOCK.get(device)
    return backend


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


def use_fused(
    group: Mapping[str, Any], params: Sequence[Tensor], others: Sequence[Tensor] = ()
) -> bool:
    """Whether to take the fused step: as asked for, else where it fits and pays.

    Args:
        group: the options.
        params: the weights that take the step.
        others: what is stepped with them, for whether it pays (default: none).
    """
    if torch.compiler.is_compiling():
        return False  # inductor fuses the multi-tensor step itself
    if group["fused"] is not None:
        return bool(group["fused"])
    if group["foreach"] is not None or group["differentiable"]:
        return False
    device = params[0].device.type
    backend, best = _backend(device), _BACKENDS.get(device)
    if best is None or (group["stochastic_rounding"] and not (backend or best).stochastic_rounding):
        return False
    every = (*params, *others)
    if not _have_entries(every, (backend or best).worthwhile_entries):
        return False
    if not all(
        type(p) in _PLAIN_TYPES and p.dtype in best.dtypes and p.device.type == device
        for p in params
    ):
        return False
    if backend is not best:
        _say_once(
            f"optimizer steps on {device} are faster with {best.compiler.capitalize()}: "
            f'pip install "normwise[{best.extra}]"; taking a plain step',
            logging.WARNING if _have_entries(every, _LARGE) else logging.INFO,
        )
    return backend is not None and all(p.dtype in backend.dtypes for p in params)


def _have_entries(params: Sequence[Tensor], least: int) -> bool:
    total = 0
    for p in params:
        total += p.numel()
        if total >= least:
            return True
    return total >= least


def takes_scaler(p: Tensor) -> bool:
    """Whether the kernels for a parameter do what a GradScaler leaves to a fused step."""
    backend = _backend(p.device.type)
    return backend is not None and backend.takes_scaler


def takes_split(p: Tensor) -> bool:
    """Whether the kernels for a parameter wait for sums of slices that lie on several ranks."""
    backend = _backend(p.device.type)
    return backend is not None and backend.takes_split


def moves_displaced(device: str) -> bool:
    """Whether there are kernels on a kind of device for what a wrapped optimizer did."""
    backend = _backend(device)
    return backend is not None and backend.displaced is not None


def displaced_plan(weights: Sequence[Tensor], forms: Sequence[Form]) -> Any:
    """A plan for what a wrapped optimizer did; as of ``displaced.DisplacedPlan``."""
    backend = _backend(weights[0].device.type)
    assert backend is not None
    assert backend.displaced is not None
    module, plan = backend.displaced
    return getattr(importlib.import_module(f"{__name__}.{module}"), plan)(weights, forms)


@functools.cache
def _is_installed(compiler: str) -> bool:
    return importlib.util.find_spec(compiler) is not None


@functools.cache
def _say_once(message: str, level: int = logging.INFO) -> None:
    logger.log(level, message)


def _is_usual(rule: AdamRule | SGDRule) -> bool:
    """Whether torch's fused kernels make these directions."""
    return not (rule.nesterov if isinstance(rule, AdamRule) else rule.lr_in_buffer)


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor is what it seems: strided memory, no subclass, no fake."""
    return (
        type(t) in _PLAIN_TYPES and t.layout == torch.strided and not t.is_conj() and not t.is_neg()
    )


class FusedPlans:
    """The plans of one set of weights: made in the first step, kept while they fit.

    A plan holds a work list, a few sums for each slice, and the last decisions of the gate; no
    tensor of the optimizer's. Nothing of it belongs into a state dict.
    """

    def __init__(self) -> None:
        self._seen: object = None
        self._planned: list[_Planned] = []
        self._known: dict[object, list[_Planned]] = {}

    def step_(self, parts: Sequence[Part]) -> list[tuple[Part, list[int]]]:
        """Take the step of all tensors that the kernels can take, in place.

        Args:
            parts: weights of one optimizer, all with the same ending.

        Returns:
            What is left, and which of each part: not dense, a gradient in another memory format,
            another dtype, a subclass of Tensor.

        Raises:
            RuntimeError: if the memory of a tensor is gone.
        """
        params, grads, *states = (
            list(chain.from_iterable(lists))
            for lists in zip(*(p.tensors for p in parts), strict=True)
        )
        self._look(parts, params, grads, states)
        ending = parts[0].ending
        left: list[tuple[Part, list[int]]] = []
        for planned in self._planned:
            if planned.plan is None:
                left.append((parts[planned.parts[0]], planned.within))
                continue
            members = planned.members
            tensors = [
                lists if len(members) == len(params) else [lists[i] for i in members]
                for lists in (params, grads, *states)
            ]
            # A momentum of 0 has no buffers.
            moments = [lists if _any_of(lists) else None for lists in tensors[2:]]
            options: dict[str, Any] = {} if ending is AT_ONCE else {"ending": ending}
            planned.plan.step_(
                *tensors[:2],
                *moments,
                *(None for _ in range(3 - len(moments))),
                [parts[i].step for i in planned.parts]
                if planned.takes_groups
                else parts[planned.parts[0]].step,
                **options,
            )
        return [(part, members) for part, members in left if _unscaled_(part, members)]

    def _look(
        self,
        parts: Sequence[Part],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Tensor | None]],
    ) -> None:
        """Remake the plans unless the tensors are as they were.

        What may change from step to step is looked at in every step: about 2 µs a weight.
        """
        kept = [t for tensors in (params, *states) for t in tensors if t is not None]
        every = [*kept, *grads]
        seen = None
        if _PLAIN_TYPES.issuperset(map(type, every)):
            forms = [(len(p.params), p.step.view, p.step.norm, p.ending.split) for p in parts]
            seen = (
                forms,
                list(map(Tensor.data_ptr, kept)),
                list(map(Tensor.stride, every)),
                list(map(Tensor.size, every)),
                [t.dtype for t in every],
                list(map(Tensor.is_neg, every)),
            )
            there = min(map(Tensor.data_ptr, grads), default=LOWEST_ADDRESS) >= LOWEST_ADDRESS
            if seen == self._seen and there:
                return
        self._seen = None
        for t in every:
            _check_memory(t)

        by_kind: dict[Any, list[tuple[int, int, int]]] = {}
        place = 0
        for number, part in enumerate(parts):
            for i, (p, grad, *moments) in enumerate(zip(*part.tensors, strict=True)):
                takes = _takes(p, grad, moments, part)
                backend = _backend(p.device.type)
                if not takes or (p.numel() == 0 and len(moments) == 3):
                    # An empty weight has nothing but a step count.
                    by_kind.setdefault((None, number), []).append((place, number, i))
                elif p.numel() > 0:
                    assert backend is not None
                    group = None if backend.takes_groups else number
                    kind = (p.device, p.dtype, group)
                    by_kind.setdefault(kind, []).append((place, number, i))
                place += 1
        key = (
            tuple((p.step.view, p.step.norm, p.ending.split) for p in parts),
            tuple((p.shape, p.stride()) for p in params),
            tuple((kind, tuple(members)) for kind, members in by_kind.items()),
        )
        if key not in self._known:
            if len(self._known) >= KEPT_PLANS:
                del self._known[next(iter(self._known))]
            self._known[key] = [
                _plan(kind, members, parts, params) for kind, members in by_kind.items()
            ]
            left = sum(
                params[place].numel() > 0
                for kind, members in by_kind.items()
                for place, _, _ in members
                if kind[0] is None
            )
            if left:
                _say_once(f"{left} of {len(params)} weights do not fit the fused step")
        self._planned = self._known[key]
        # A step count that was brought to its weight's device lies elsewhere from now on.
        self._seen = None if seen is None else (seen[0], [t.data_ptr() for t in kept], *seen[2:])


@dataclass(frozen=True)
class _Planned:
    """Weights for one plan, or for none.

    Attributes:
        plan: what steps them; None for what the kernels do not take.
        members: which of all weights they are.
        within: which of their part, if there is but one.
        parts: the parts that they are of.
        takes_groups: whether the plan takes a step for each of these.
    """

    plan: Any
    members: list[int]
    within: list[int]
    parts: list[int]
    takes_groups: bool


def _plan(
    kind: Any,
    members: Sequence[tuple[int, int, int]],
    parts: Sequence[Part],
    params: Sequence[Tensor],
) -> _Planned:
    places, numbers, within = (list(column) for column in zip(*members, strict=True))
    of_parts = list(dict.fromkeys(numbers))
    if kind[0] is None:
        return _Planned(None, places, within, of_parts, takes_groups=False)
    weights = [params[i] for i in places]
    backend = _backend(weights[0].device.type)
    assert backend is not None
    make = getattr(importlib.import_module(f"{__name__}.{backend.module}"), backend.plan)
    if backend.takes_groups:
        groups = [of_parts.index(number) for number in numbers]
        steps = [parts[i].step for i in of_parts]
        plan = make(weights, steps, groups, split=parts[0].ending.split)
    else:
        step = parts[of_parts[0]].step
        split = parts[of_parts[0]].ending.split
        plan = make(weights, step.view, step.norm, split=split)
    return _Planned(plan, places, within, of_parts, backend.takes_groups)


def _any_of(tensors: Sequence[Tensor | None]) -> bool:
    return any(t is not None for t in tensors)


def _unscaled_(part: Part, members: Sequence[int]) -> bool:
    """Do for weights that are left what a GradScaler asks for; return whether to step them."""
    if part.step.found_inf is not None:
        if part.step.found_inf.item():  # these few wait for the device
            return False
        if part.step.grad_scale is not None:
            torch._foreach_div_([part.grads[i] for i in members], part.step.grad_scale)
    return True


def _check_memory(t: Tensor) -> None:
    """Raise RuntimeError for a tensor of which nothing is in memory, as torch's fused steps do."""
    if type(t) not in _PLAIN_TYPES or t.layout != torch.strided or t.numel() == 0:
        return
    if t.device.type not in _BACKENDS:
        return
    if t._is_zerotensor() or t.untyped_storage().data_ptr() == 0:
        raise RuntimeError(
            f"a tensor of shape {tuple(t.shape)} that a fused step needs has no memory: its "
            "storage was resized to 0, or it is an immutable ZeroTensor; give it its memory back, "
            "or a clone in its place"
        )


def _takes(p: Tensor, grad: Tensor, states: Sequence[Tensor | None], part: Part) -> bool:
    """Whether the kernels can take a weight. Its step count is brought to its device."""
    backend = _backend(p.device.type)
    if backend is None or p.dtype not in backend.dtypes:
        return False
    if not (backend.takes_every_rule or _is_usual(part.step.rule)):
        return False
    moments = [m for m in states[:2] if m is not None]
    if not all(_is_plain(t) and t.device == p.device for t in (p, grad, *moments)):
        return False
    if len(states) == 3:
        count = states[2]
        if count is None or not _is_plain(count) or count.dtype != torch.float32:
            return False
        if count.device != p.device:
            count.data = count.data.to(p.device)  # once: in place, as Module.to does it
    alike = all(lie_alike(t, p) for t in (grad, *moments))
    dtypes = grad.dtype == p.dtype and all(m.dtype == computing_dtype(p.dtype) for m in moments)
    if p.numel() == 0:
        return True
    return alike and dtypes and memory_layout(p, slicing(p, part.step.view)) is not None
