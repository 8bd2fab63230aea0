"""AdamP (Heo et al., arXiv 2006.08217, Algorithm 2)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normwise.optim._base import NormwiseOptimizer, new_moment, new_step
from normwise.optim.joint import Symmetries
from normwise.optim.projection import ViewOption
from normwise.optim.state_dicts import StateForm
from normwise.optim.step import (
    AT_ONCE,
    AdamRule,
    Ending,
    Step,
    by_device_and_dtype,
    for_computing,
    scalar_dtype,
)

__all__ = ["AdamP", "adamp"]


def adamp(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    step: Step,
    *,
    foreach: bool,
    ending: Ending = AT_ONCE,
) -> None:
    """Functional form of one step of :class:`AdamP`, in place on parameters and state.

    Args:
        params, grads: weights and gradients.
        exp_avgs, exp_avg_sqs, state_steps: the moments, and how many steps they are of.
        step: the options, with an :class:`AdamRule`.
        foreach: whether to take the multi-tensor step.
        ending: what ends the step (default: at once).
    """
    function = _multi_tensor_adamp if foreach else _single_tensor_adamp
    function(params, grads, exp_avgs, exp_avg_sqs, state_steps, step, ending)


def _single_tensor_adamp(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    step: Step,
    ending: Ending,
) -> None:
    rule = step.rule
    assert isinstance(rule, AdamRule)
    for param, raw_grad, exp_avg, exp_avg_sq, step_t in zip(
        params, grads, exp_avgs, exp_avg_sqs, state_steps, strict=True
    ):
        weight, grad = for_computing(param), for_computing(raw_grad)
        m, v = for_computing(exp_avg), for_computing(exp_avg_sq)
        if step.maximize:
            grad = -grad

        step_t += 1
        t = step_t.to(scalar_dtype(step_t.device))
        bias_correction1 = 1 - rule.beta1**t
        bias_correction2 = 1 - rule.beta2**t

        m.lerp_(grad, 1 - rule.beta1)
        v.mul_(rule.beta2).addcmul_(grad, grad, value=1 - rule.beta2)
        denom = (v.sqrt() / bias_correction2.sqrt()).add_(step.eps)
        # Autograd is given a copy: it must not see the moment change in the next step.
        direction = m.clone() if torch.is_grad_enabled() else m
        update = (m.lerp(grad, 1 - rule.beta1) if rule.nesterov else direction) / denom

        step_size = step.lr / bias_correction1
        ending.end_([param], [weight], [update], [grad], [step_size], step, foreach=False)


def _multi_tensor_adamp(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    step: Step,
    ending: Ending,
) -> None:
    rule = step.rule
    assert isinstance(rule, AdamRule)
    lists = (params, grads, exp_avgs, exp_avg_sqs, state_steps)
    for group in by_device_and_dtype(*lists):
        weights, gs, ms, vs = ([for_computing(t) for t in tensors] for tensors in group[:4])
        steps = group[4]
        if step.maximize:
            gs = list(torch._foreach_neg(gs))

        torch._foreach_add_(steps, 1)
        t = torch.stack(steps)
        if isinstance(step.lr, Tensor) and t.device.type == "cpu":
            t = t.to(step.lr.device, non_blocking=True)
        t = t.to(scalar_dtype(t.device))
        bias_correction1 = 1 - rule.beta1**t
        bias_correction2 = 1 - rule.beta2**t

        torch._foreach_lerp_(ms, gs, 1 - rule.beta1)
        torch._foreach_mul_(vs, rule.beta2)
        torch._foreach_addcmul_(vs, gs, gs, 1 - rule.beta2)
        denoms = torch._foreach_sqrt(vs)
        torch._foreach_div_(denoms, bias_correction2.sqrt().unbind())
        torch._foreach_add_(denoms, step.eps)
        directions = torch._foreach_lerp(ms, gs, 1 - rule.beta1) if rule.nesterov else ms
        updates = torch._foreach_div(directions, denoms)
        del denoms, directions

        step_sizes = (step.lr / bias_correction1).unbind()
        ending.end_(group[0], weights, updates, gs, step_sizes, step, foreach=True)


class AdamP(NormwiseOptimizer):
    r"""AdamW without the growth of the norm of scale-invariant weights.

    With u the bias-corrected direction of Adam and ŵ the slices' directions, a step is

    .. math::
        w \leftarrow (1 - \eta\lambda\rho)\, w - \eta\,(u - \hat w \langle \hat w, u \rangle)

    where the projection is on and ρ = ``wd_ratio``; elsewhere it is torch's AdamW. The momentum
    buffer is never projected. Weights with fewer than two dimensions are never projected. A complex
    weight counts as a real one with a last dimension of 2, as in torch.optim: its norm is that of
    its moduli, and what is removed is the change of scale, not of phase.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: learning rate η, a number or a one-element tensor (default: 1e-3).
        betas: decay rates of the moments of the gradient and of its square (default: (0.9, 0.999)).
        eps: added to the denominator after bias correction; in ``"auto"`` also the guard of the
            official code's cosines and norms (default: 1e-8).
        weight_decay: decoupled decay λ, times the learning rate as in ``torch.optim.AdamW``
            (default: 0).
        delta: threshold of the ``"auto"`` gate (default: 0.1).
        wd_ratio: ρ, the factor on the decay of projected weights (default: 0.1).
        nesterov: use Nesterov momentum, as the official code does (default: False).
        view: an option of parameter groups. ``"auto"`` is the paper's cosine gate, channel view
            first, then layer view. A :class:`normwise.View`, or its spelling such as
            ``"blocks(8)"``, always projects in that view. ``None`` never projects: AdamW
            (default: ``"auto"``).
        norm: an option of parameter groups. ``"fixed"`` puts each slice back on the norm it had
            before the step, so that only directions are trained; it needs a :class:`normwise.View`
            and takes the place of decay (default: ``"free"``).
        symmetries: a report of :func:`normwise.analyze`, or some of its ``symmetries`` if
            parameters are named: steps lose their part along each of them, over all its weights
            at once, see :func:`normwise.tangential` (default: None).
        stochastic_rounding: round bfloat16 and float16 weights up or down at random, so that small
            steps count on average; arithmetic and state are float32 in any case (default: False).
        foreach: use the multi-tensor step (default: where torch would).
        fused: take the step of all weights in compiled kernels; it needs the extra
            ``normwise[cpu]``, for CUDA devices ``normwise[cuda]`` (default: where that is installed
            and the group is large enough).
        maximize: ascend instead of descend (default: False).
        capturable: keep the step count on the parameter's device, for CUDA graphs
            (default: False).
        differentiable: let autograd pass through the step; the gate itself is a constant
            (default: False).

    Raises:
        ValueError: for an option out of its range, an unknown option of a group, or a view that
            does not fit a weight.
        RuntimeError: in :meth:`step`, for a sparse gradient.
    """

    _form = StateForm("AdamP", ("exp_avg", "exp_avg_sq", "step"), torch_decay_is_decoupled=True)
    _functional = staticmethod(adamp)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        view: ViewOption | str = "auto",
        norm: Literal["free", "fixed"] = "free",
        symmetries: Symmetries | None = None,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "view": view,
            "norm": norm,
            "stochastic_rounding": stochastic_rounding,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, symmetries)

    def _rule(self, group: dict[str, Any]) -> tuple[AdamRule, float]:
        beta1, beta2 = group["betas"]
        return AdamRule(beta1, beta2, group["nesterov"]), 1.0

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {
            "step": new_step(p, group["capturable"]),
            "exp_avg": new_moment(p),
            "exp_avg_sq": new_moment(p),
        }
