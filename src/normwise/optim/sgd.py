"""Momentum buffers, which SGDP and SGDW share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise.optim._base import NormwiseOptimizer, new_moment
from normwise.optim.step import AT_ONCE, Ending, SGDRule, Step, by_device_and_dtype, for_computing

__all__ = ["MomentumOptimizer", "sgd"]


def sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    step: Step,
    *,
    foreach: bool,
    ending: Ending = AT_ONCE,
) -> None:
    """Functional form of one step of SGDP and SGDW, in place on parameters and buffers.

    Args:
        params, grads: weights and gradients.
        momentum_buffers: one each; all None for a momentum of 0.
        step: the options, with an :class:`SGDRule`.
        foreach: whether to take the multi-tensor step.
        ending: what ends the step (default: at once).
    """
    function = _multi_tensor_sgd if foreach else _single_tensor_sgd
    function(params, grads, momentum_buffers, step, ending)


def _single_tensor_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    step: Step,
    ending: Ending,
) -> None:
    rule = step.rule
    assert isinstance(rule, SGDRule)
    for param, raw_grad, momentum_buffer in zip(params, grads, momentum_buffers, strict=True):
        weight, grad = for_computing(param), for_computing(raw_grad)
        if step.maximize:
            grad = -grad
        if rule.lr_in_buffer:
            grad = grad * step.lr

        update = grad * (1 - rule.dampening)
        if momentum_buffer is not None:
            p = for_computing(momentum_buffer)
            p.mul_(rule.momentum).add_(grad, alpha=1 - rule.dampening)
            # Never the buffer itself, which a projection of the update would change.
            update = grad + rule.momentum * p if rule.nesterov else p.clone()

        step_size = 1.0 if rule.lr_in_buffer else step.lr
        ending.end_([param], [weight], [update], [grad], [step_size], step, foreach=False)


def _multi_tensor_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    step: Step,
    ending: Ending,
) -> None:
    rule = step.rule
    assert isinstance(rule, SGDRule)
    buffered = [buffer for buffer in momentum_buffers if buffer is not None]
    for group in by_device_and_dtype(params, grads, *([buffered] if buffered else [])):
        weights, gs, *buffers = ([for_computing(t) for t in tensors] for tensors in group)
        if step.maximize:
            gs = list(torch._foreach_neg(gs))
        if rule.lr_in_buffer:
            gs = list(torch._foreach_mul(gs, step.lr))

        if buffers:
            torch._foreach_mul_(buffers[0], rule.momentum)
            torch._foreach_add_(buffers[0], gs, alpha=1 - rule.dampening)
            if rule.nesterov:
                updates = list(torch._foreach_add(gs, buffers[0], alpha=rule.momentum))
            else:
                updates = [buffer.clone() for buffer in buffers[0]]
        else:
            updates = list(torch._foreach_mul(gs, 1 - rule.dampening))

        step_sizes = [1.0 if rule.lr_in_buffer else step.lr] * len(updates)
        ending.end_(group[0], weights, updates, gs, step_sizes, step, foreach=True)


class MomentumOptimizer(NormwiseOptimizer):
    """Base of :class:`normwise.SGDP` and :class:`normwise.SGDW`; not for direct use."""

    _functional = staticmethod(sgd)

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": new_moment(p)} if group["momentum"] != 0 else {}
