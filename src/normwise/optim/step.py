"""What a step does with the directions of an algorithm: project, decay, descend, retract.

An algorithm makes an update of each gradient, and a step size. From there all of them go on alike:
an :class:`Ending` takes both, at once (:data:`AT_ONCE`) or when ranks have exchanged their sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from normwise.geometry import at_least_float32, computing_dtype
from normwise.optim.projection import ViewOption, norms_by_slice, project_, retract_

Tensors = list[Tensor] | tuple[Tensor, ...]


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
    """The options of one step of a group, built once for all of its weights.

    Args:
        rule: how directions are made of gradients and moments.
        lr, weight_decay: numbers or 0-dim tensors.
        decay_scale: a weight decays by 1 − decay_scale·lr·weight_decay (default: 1).
        wd_ratio: a factor on the decay of projected weights (default: 1).
        eps: added to Adam's denominator; the guard of the gate (default: 0).
        delta: the threshold of the gate (default: 0).
        view: ``"auto"``, a :class:`normwise.View`, or None (default: None).
        norm: ``"free"`` or ``"fixed"`` (default: ``"free"``).
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
    view: ViewOption = None
    norm: str = "free"
    maximize: bool = False
    stochastic_rounding: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @classmethod
    def of(
        cls,
        group: Mapping[str, Any],
        rule: AdamRule | SGDRule,
        *,
        decay_scale: float = 1.0,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Step:
        """The step that the options of a parameter group ask for.

        A weight whose norm is fixed is not decayed: it would only turn the step size up.
        """
        norm = group.get("norm", "free")
        return cls(
            rule,
            _scheduled(group["lr"]),
            _scheduled(group["weight_decay"]),
            decay_scale,
            0.0 if norm == "fixed" else group.get("wd_ratio", 1.0),
            group.get("eps", 0.0),
            group.get("delta", 0.0),
            group.get("view"),
            norm,
            group["maximize"],
            group["stochastic_rounding"],
            grad_scale,
            found_inf,
        )


class SummedPlan(Protocol):
    """A fused step that has made its sums, and waits to be ended."""

    def finish_(self, params: Sequence[Tensor]) -> None:
        """Decide by the sums, and write what is not yet written."""


class Ending(Protocol):
    """What ends a step when directions are made: at once, or after an exchange between ranks."""

    @property
    def split(self) -> bool:
        """Whether the slices of a :class:`normwise.View` are pieces of slices on several ranks."""

    def may_be_fused(self, params: Sequence[Tensor]) -> bool:
        """Whether it can end a fused step of these."""

    def end_(
        self,
        params: Tensors,
        weights: Tensors,
        updates: Tensors,
        grads: Tensors,
        step_sizes: Sequence[float | Tensor],
        step: Step,
        *,
        foreach: bool,
    ) -> None:
        """End the step of some weights; see :func:`take_step_`."""

    def end_plan_(self, plan: Any, params: Sequence[Tensor]) -> None:
        """End a fused step, a :class:`SummedPlan`."""


def take_step_(
    params: Tensors,
    weights: Tensors,
    updates: Tensors,
    grads: Tensors,
    step_sizes: Sequence[float | Tensor],
    step: Step,
    *,
    foreach: bool,
) -> None:
    """Project the updates, decay the weights, subtract, retract: where every optimizer ends.

    Args:
        params: what is stepped.
        weights, grads: parameters and gradients as :func:`for_computing` gives them.
        updates: the directions, of the shapes of ``weights``; they are overwritten.
        step_sizes: what each of them is multiplied by.
        step: the options.
        foreach: whether to take all of them at a time.
    """
    views = [step.view if p.ndim > 1 else None for p in params]
    radii = norms_by_slice(weights, views) if step.norm == "fixed" else None
    projected = project_(updates, weights, grads, views, delta=step.delta, eps=step.eps)
    descend_(weights, updates, projected, step_sizes, step, foreach=foreach)
    if radii is not None:
        retract_(weights, views, radii)
    round_back_(params, weights, step.stochastic_rounding)


class _AtOnce:
    """Ends a step where it is."""

    split = False
    end_ = staticmethod(take_step_)

    def may_be_fused(self, params: Sequence[Tensor]) -> bool:
        return True

    def end_plan_(self, plan: SummedPlan, params: Sequence[Tensor]) -> None:
        plan.finish_(params)


AT_ONCE: Ending = _AtOnce()


@dataclass(frozen=True)
class Part:
    """Weights that take the same step, with what belongs to them.

    Attributes:
        params, grads: weights and gradients.
        states: a list for each tensor of their state; None stands for a moment that is not kept.
        step: the options.
        group: the parameter group that the weights are of.
        ending: what ends the step.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: tuple[list[Any], ...]
    step: Step
    group: Mapping[str, Any]
    ending: Ending

    @property
    def tensors(self) -> tuple[list[Any], ...]:
        """Weights, gradients and states, as functional forms take them."""
        return (self.params, self.grads, *self.states)

    def only(self, members: Sequence[int]) -> Part:
        """The same of some of the weights."""
        params, grads, *states = ([tensors[i] for i in members] for tensors in self.tensors)
        return Part(params, grads, tuple(states), self.step, self.group, self.ending)


def descend_(
    weights: Tensors,
    updates: Tensors,
    projected: Sequence[Tensor | bool],
    step_sizes: Sequence[float | Tensor],
    step: Step,
    *,
    foreach: bool,
) -> None:
    """Decay the weights, less where projected, and subtract step size × update."""
    if is_nonzero(step.weight_decay):
        scale_(weights, decay_factors(projected, step), foreach)
    scale_(updates, step_sizes, foreach)
    if foreach:
        torch._foreach_sub_(weights, updates)
    else:
        for weight, update in zip(weights, updates, strict=True):
            weight.sub_(update)


def decay_factors(projected: Sequence[Tensor | bool], step: Step) -> list[float | Tensor]:
    """1 − η·λ·ratio for each weight, where ratio is ``wd_ratio`` if it was projected, else 1."""
    decay = step.lr * step.decay_scale * step.weight_decay
    gates = [gate for gate in projected if isinstance(gate, Tensor)]
    gated: Iterator[Tensor] = iter(())
    if gates:
        open_ = torch.stack(gates).to(scalar_dtype(gates[0].device))
        gated = iter((1 - decay * (1 + (step.wd_ratio - 1) * open_)).unbind())
    return [
        next(gated) if isinstance(gate, Tensor) else 1 - decay * (step.wd_ratio if gate else 1)
        for gate in projected
    ]


def scale_(tensors: Sequence[Tensor], factors: Sequence[float | Tensor], foreach: bool) -> None:
    """Multiply each tensor by its factor."""
    if not foreach:
        for t, factor in zip(tensors, factors, strict=True):
            t.mul_(factor)
        return
    numbers = {i: factor for i, factor in enumerate(factors) if not isinstance(factor, Tensor)}
    scalars = {i: factor for i, factor in enumerate(factors) if isinstance(factor, Tensor)}
    if numbers:
        torch._foreach_mul_([tensors[i] for i in numbers], list(numbers.values()))
    if scalars:
        torch._foreach_mul_([tensors[i] for i in scalars], list(scalars.values()))


def round_back_(params: Tensors, weights: Tensors, stochastic_rounding: bool) -> None:
    """Put weights that are float32 copies back into parameters of half precision."""
    for p, weight in zip(params, weights, strict=True):
        if computing_dtype(p.dtype) != p.dtype:
            p.copy_(round_stochastically(weight, p.dtype) if stochastic_rounding else weight)


def round_stochastically(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 up or down to bfloat16 or float16, so that the expectation is ``w``.

    A random number below the last bit that is kept is added to the bits that are dropped. The
    subnormal numbers of float16 have a fixed spacing of 2⁻²⁴ and are rounded to its multiples.
    """
    kept = 10 if dtype == torch.float16 else 7
    dropped = 23 - kept
    bits = w.view(torch.int32)
    noise = torch.randint_like(bits, 1 << dropped)
    rounded = ((bits + noise) & -(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:
        spacing = 2.0**-24
        subnormal = torch.floor(w / spacing + torch.rand_like(w)) * spacing
        rounded = torch.where(w.abs() < torch.finfo(dtype).tiny, subnormal, rounded)
    return torch.where(torch.isfinite(w), rounded, w).to(dtype)


def real_alias(t: Tensor) -> Tensor:
    """``t`` itself, or for a complex tensor its real and imaginary parts in a last dimension."""
    return torch.view_as_real(t) if torch.is_complex(t) else t


def for_computing(t: Tensor) -> Tensor:
    """``t`` as a real tensor in float32 or better: an alias, or a copy for half precision."""
    return at_least_float32(real_alias(t))


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a step's 0-dim factors are computed: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_nonzero(value: float | Tensor) -> bool:
    """Whether an option does anything; of a tensor that is taken for granted, not looked up."""
    return isinstance(value, Tensor) or value != 0


def by_device_and_dtype(*lists: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Split parallel lists of tensors by the device and dtype of those in the first."""
    grouped = Optimizer._group_tensors_by_device_and_dtype([list(tensors) for tensors in lists])
    for same, _ in grouped.values():
        yield [[t for t in tensors if t is not None] for tensors in same]


def _scheduled(value: float | Tensor) -> float | Tensor:
    """An option that changes from step to step, in the form that arithmetic wants: 0-dim.

    Compilers are handed a tensor: torch's inductor keeps the first value of a Python float that it
    has made dynamic in fused foreach kernels (pytorch#194976 is one such report).
    """
    if isinstance(value, Tensor):
        return value.squeeze()
    if torch.compiler.is_compiling() and value != 0:
        return torch.full((), value, dtype=torch.float64)
    return value
