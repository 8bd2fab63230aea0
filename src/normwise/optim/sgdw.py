"""SGDW (Loshchilov & Hutter, arXiv 1711.05101, Algorithm 1)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normwise.optim._base import (
    NormwiseOptimizer,
    by_device_and_dtype,
    check_momentum,
    new_moment,
    sgd_updates,
    take_step_,
    use_foreach,
    working,
)
from normwise.optim.kernels import Fused, SGDRule, Step, use_fused
from normwise.updates import Update, UpdateRule, decoupled

__all__ = ["SGDW", "sgdw"]


class SGDW(NormwiseOptimizer):
    r"""SGD with momentum and decoupled weight decay.

    .. math::
        m \leftarrow \mu m + (1 - \text{dampening})\,\eta\, g, \qquad
        w \leftarrow (1 - \eta\lambda)\, w - m

    This is Algorithm 1 of the paper under every schedule s of the learning rate, for its
    sα is our η and its sλ is our ηλ: divide the paper's λ by its α. The learning rate enters the
    buffer, so a step keeps the size it had when its gradient came.

    ``variant="official"`` is the authors' code, and the convention of ``torch.optim.SGD``: the
    buffer holds gradients and the learning rate of the day multiplies all of it,
    :math:`w \leftarrow (1 - \eta\lambda) w - \eta m`. While η is constant the two are equal; when
    a schedule lowers it, this one at once makes small what is left of the large steps.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: learning rate η, a number or a one-element tensor (default: 1e-3).
        momentum: μ, at least 0 and below 1 (default: 0).
        dampening: what the gradient is dampened by on its way into the buffer (default: 0).
        weight_decay: decoupled decay λ, times the learning rate (default: 0).
        nesterov: use Nesterov momentum; needs momentum and no dampening (default: False).
        variant: an option of parameter groups, ``"paper"`` or ``"official"`` (default:
            ``"paper"``).
        stochastic_rounding: round bfloat16 and float16 weights up or down at random, so that small
            steps count on average; arithmetic and state are float32 in any case (default: False).
        foreach: use the multi-tensor step (default: where torch would).
        fused: take the step of all weights in compiled kernels; it needs the extra
            ``normwise[cpu]``, for CUDA devices ``normwise[cuda]`` (default: where that is installed
            and the group is large enough).
        maximize: ascend instead of descend (default: False).
        differentiable: let autograd pass through the step (default: False).

    Raises:
        ValueError: for an option out of its range, or an unknown option of a group.
        RuntimeError: in :meth:`step`, for a sparse gradient.
    """

    _state_keys = ("momentum_buffer",)
    _torch_decay_is_decoupled = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        variant: Literal["paper", "official"] = "paper",
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "variant": variant,
            "stochastic_rounding": stochastic_rounding,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_momentum(group)
        if group["variant"] not in ("paper", "official"):
            raise ValueError(
                f"Invalid variant: {group['variant']!r}; must be 'paper' or 'official'"
            )

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": new_moment(p)} if group["momentum"] != 0 else {}

    def update_rule(self, group: dict[str, Any], p: Tensor | None = None) -> UpdateRule:
        """What a step does to the weights of a group, for :func:`normwise.describe`."""
        return UpdateRule(
            type(self).__name__,
            Update.GRADIENT,
            group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            scale=1.0,
            takes_tensor=True,
            **decoupled(group),
        )

    def _adapt_state(self, saved: dict[str, Any], states: list[dict[str, Any]]) -> None:
        # A buffer of torch.optim.SGD holds gradients; the paper's holds them times their lr.
        if "variant" not in saved and self.defaults["variant"] == "paper":
            for state in states:
                if "momentum_buffer" in state:
                    state["momentum_buffer"] = state["momentum_buffer"] * saved["lr"]

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        finish: Callable[..., None] = take_step_,
    ) -> None:
        sgdw(
            params,
            grads,
            [state["momentum_buffer"] if group["momentum"] else None for state in states],
            foreach=use_foreach(group, params),
            fused=self._fused(group) if use_fused(group, params) else None,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            variant=group["variant"],
            stochastic_rounding=group["stochastic_rounding"],
            maximize=group["maximize"],
        )


def sgdw(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    foreach: bool,
    fused: Fused | None = None,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float | Tensor,
    nesterov: bool,
    variant: str = "paper",
    stochastic_rounding: bool = False,
    maximize: bool = False,
) -> None:
    """Functional form of one step of :class:`SGDW`, in place on parameters and buffers.

    A buffer of ``None`` stands for a momentum of 0. With ``fused``, which remembers the plans of
    these parameters, the fused step is taken.
    """
    step = _multi_tensor_sgdw if foreach else _single_tensor_sgdw
    if fused is not None:
        step = functools.partial(_fused_sgdw, fused)
    step(
        params,
        grads,
        momentum_buffers,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        variant=variant,
        stochastic_rounding=stochastic_rounding,
        maximize=maximize,
    )


def _single_tensor_sgdw(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float | Tensor,
    nesterov: bool,
    variant: str,
    stochastic_rounding: bool,
    maximize: bool,
) -> None:
    for param, raw_grad, momentum_buffer in zip(params, grads, momentum_buffers, strict=True):
        weight, grad = working(param), working(raw_grad)
        if maximize:
            grad = -grad
        if variant == "paper":
            grad = grad * lr

        updates = sgd_updates(
            [grad],
            None if momentum_buffer is None else [working(momentum_buffer)],
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            foreach=False,
        )
        take_step_(
            [param],
            [weight],
            updates,
            [grad],
            [1.0 if variant == "paper" else lr],
            view=None,
            delta=0.0,
            eps=0.0,
            decay_lr=lr,
            weight_decay=weight_decay,
            wd_ratio=1.0,
            norm="free",
            stochastic_rounding=stochastic_rounding,
            foreach=False,
        )


def _multi_tensor_sgdw(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float | Tensor,
    nesterov: bool,
    variant: str,
    stochastic_rounding: bool,
    maximize: bool,
) -> None:
    buffered = [buffer for buffer in momentum_buffers if buffer is not None]
    for group in by_device_and_dtype(params, grads, *([buffered] if buffered else [])):
        weights, gs, *buffers = ([working(t) for t in tensors] for tensors in group)
        if maximize:
            gs = list(torch._foreach_neg(gs))
        if variant == "paper":
            gs = list(torch._foreach_mul(gs, lr))

        updates = sgd_updates(
            gs,
            buffers[0] if buffers else None,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            foreach=True,
        )
        take_step_(
            group[0],
            weights,
            updates,
            gs,
            [1.0 if variant == "paper" else lr] * len(updates),
            view=None,
            delta=0.0,
            eps=0.0,
            decay_lr=lr,
            weight_decay=weight_decay,
            wd_ratio=1.0,
            norm="free",
            stochastic_rounding=stochastic_rounding,
            foreach=True,
        )


def _fused_sgdw(
    fused: Fused,
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float | Tensor,
    nesterov: bool,
    variant: str,
    stochastic_rounding: bool,
    maximize: bool,
) -> None:
    buffered = [buffer for buffer in momentum_buffers if buffer is not None]
    step = Step(
        SGDRule(momentum, dampening, nesterov, lr_in_buffer=variant == "paper"),
        lr,
        weight_decay,
        maximize=maximize,
        stochastic_rounding=stochastic_rounding,
    )
    if left := fused.step_(
        params, grads, buffered or None, None, None, step, view=None, norm="free"
    ):
        _multi_tensor_sgdw(
            [params[i] for i in left],
            [grads[i] for i in left],
            [momentum_buffers[i] for i in left],
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            variant=variant,
            stochastic_rounding=stochastic_rounding,
            maximize=maximize,
        )
