"""AdamP (Heo et al., arXiv 2006.08217, Algorithm 2)."""

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
    check_number,
    new_moment,
    new_step,
    scalar_dtype,
    take_step_,
    use_foreach,
    working,
)
from normwise.optim.kernels import AdamRule, Fused, Later, Step, use_fused
from normwise.optim.projection import ViewOption
from normwise.updates import Update, UpdateRule, decoupled

__all__ = ["AdamP", "adamp"]


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

    _state_keys = ("step", "exp_avg", "exp_avg_sq")
    _torch_decay_is_decoupled = True

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
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for i, beta in enumerate(group["betas"]):
            check_number(f"beta parameter at index {i}", beta, below=1)

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {
            "step": new_step(p, group["capturable"]),
            "exp_avg": new_moment(p),
            "exp_avg_sq": new_moment(p),
        }

    def update_rule(self, group: dict[str, Any], p: Tensor | None = None) -> UpdateRule:
        """What a step does to the weights of a group, for :func:`normwise.describe`."""
        return UpdateRule(
            type(self).__name__,
            Update.NORMALIZED,
            group["lr"],
            momentum=group["betas"][0],
            betas=tuple(group["betas"]),
            nesterov=group["nesterov"],
            scale=1.0,
            takes_tensor=True,
            view=group["view"],
            wd_ratio=group["wd_ratio"],
            delta=group["delta"],
            norm=group["norm"],
            **decoupled(group),
        )

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        finish: Callable[..., None] = take_step_,
    ) -> None:
        adamp(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            foreach=use_foreach(group, params),
            fused=self._fused(group) if use_fused(group, params) else None,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            delta=group["delta"],
            wd_ratio=group["wd_ratio"],
            nesterov=group["nesterov"],
            view=group["view"],
            norm=group["norm"],
            stochastic_rounding=group["stochastic_rounding"],
            maximize=group["maximize"],
            finish=finish,
        )


def adamp(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    foreach: bool,
    fused: Fused | None = None,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Tensor,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    view: ViewOption,
    norm: str = "free",
    stochastic_rounding: bool = False,
    maximize: bool = False,
    finish: Callable[..., None] = take_step_,
) -> None:
    """Functional form of one step of :class:`AdamP`, in place on parameters and state.

    With ``fused``, which remembers the plans of these parameters, the fused step is taken;
    otherwise ``finish`` ends the step once the moments and the updates are made.
    """
    step = functools.partial(
        _multi_tensor_adamp if foreach else _single_tensor_adamp, finish=finish
    )
    if fused is not None:
        step = functools.partial(_fused_adamp, fused, finish=finish)
    step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        state_steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        delta=delta,
        wd_ratio=wd_ratio,
        nesterov=nesterov,
        view=view,
        norm=norm,
        stochastic_rounding=stochastic_rounding,
        maximize=maximize,
    )


def _single_tensor_adamp(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Tensor,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    view: ViewOption,
    norm: str = "free",
    stochastic_rounding: bool = False,
    maximize: bool = False,
    finish: Callable[..., None] = take_step_,
) -> None:
    for param, raw_grad, exp_avg, exp_avg_sq, step_t in zip(
        params, grads, exp_avgs, exp_avg_sqs, state_steps, strict=True
    ):
        weight, grad = working(param), working(raw_grad)
        m, v = working(exp_avg), working(exp_avg_sq)
        if maximize:
            grad = -grad

        step_t += 1
        step = step_t.to(scalar_dtype(step_t.device))
        bias_correction1 = 1 - beta1**step
        bias_correction2 = 1 - beta2**step

        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denom = (v.sqrt() / bias_correction2.sqrt()).add_(eps)
        # Autograd is given a copy: it must not see the moment change in the next step.
        direction = m.clone() if torch.is_grad_enabled() else m
        update = (m.lerp(grad, 1 - beta1) if nesterov else direction) / denom

        finish(
            [param],
            [weight],
            [update],
            [grad],
            [lr / bias_correction1],
            view=view,
            delta=delta,
            eps=eps,
            decay_lr=lr,
            weight_decay=weight_decay,
            wd_ratio=wd_ratio,
            norm=norm,
            stochastic_rounding=stochastic_rounding,
            foreach=False,
        )


def _multi_tensor_adamp(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Tensor,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    view: ViewOption,
    norm: str = "free",
    stochastic_rounding: bool = False,
    maximize: bool = False,
    finish: Callable[..., None] = take_step_,
) -> None:
    lists = (params, grads, exp_avgs, exp_avg_sqs, state_steps)
    for group in by_device_and_dtype(*lists):
        weights, gs, ms, vs = ([working(t) for t in tensors] for tensors in group[:4])
        steps = group[4]
        if maximize:
            gs = list(torch._foreach_neg(gs))

        torch._foreach_add_(steps, 1)
        step = torch.stack(steps)
        step = step.to(scalar_dtype(step.device))
        bias_correction1 = 1 - beta1**step
        bias_correction2 = 1 - beta2**step

        torch._foreach_lerp_(ms, gs, 1 - beta1)
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, gs, gs, 1 - beta2)
        denoms = torch._foreach_sqrt(vs)
        torch._foreach_div_(denoms, bias_correction2.sqrt().unbind())
        torch._foreach_add_(denoms, eps)
        directions = torch._foreach_lerp(ms, gs, 1 - beta1) if nesterov else ms
        updates = torch._foreach_div(directions, denoms)
        del denoms, directions

        finish(
            group[0],
            weights,
            updates,
            gs,
            (lr / bias_correction1).unbind(),
            view=view,
            delta=delta,
            eps=eps,
            decay_lr=lr,
            weight_decay=weight_decay,
            wd_ratio=wd_ratio,
            norm=norm,
            stochastic_rounding=stochastic_rounding,
            foreach=True,
        )


def _fused_adamp(
    fused: Fused,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Tensor,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    view: ViewOption,
    norm: str = "free",
    stochastic_rounding: bool = False,
    maximize: bool = False,
    finish: Callable[..., None] = take_step_,
) -> None:
    lists = (params, grads, exp_avgs, exp_avg_sqs, state_steps)
    step = Step(
        AdamRule(beta1, beta2, nesterov),
        lr,
        weight_decay,
        wd_ratio=wd_ratio if norm == "free" else 0.0,
        eps=eps,
        delta=delta,
        maximize=maximize,
        stochastic_rounding=stochastic_rounding,
    )
    if left := fused.step_(
        *lists, step, view=view, norm=norm, later=finish if isinstance(finish, Later) else None
    ):
        _multi_tensor_adamp(
            *([tensors[i] for i in left] for tensors in lists),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            delta=delta,
            wd_ratio=wd_ratio,
            nesterov=nesterov,
            view=view,
            norm=norm,
            stochastic_rounding=stochastic_rounding,
            maximize=maximize,
            finish=finish,
        )
