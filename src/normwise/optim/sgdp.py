"""SGDP (Heo et al., arXiv 2006.08217, Algorithm 1)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from normwise.optim.joint import Symmetries
from normwise.optim.projection import ViewOption
from normwise.optim.sgd import MomentumOptimizer
from normwise.optim.state_dicts import StateForm
from normwise.optim.step import SGDRule

__all__ = ["SGDP"]


class SGDP(MomentumOptimizer):
    r"""SGD with momentum, without the growth of the norm of scale-invariant weights.

    With p the momentum buffer, μ the momentum and ŵ the slices' directions, a step is

    .. math::
        p \leftarrow \mu p + (1 - \text{dampening})\, g, \qquad
        w \leftarrow \Bigl(1 - \frac{\eta\lambda\rho}{1 - \mu}\Bigr) w
            - \eta\,(p - \hat w \langle \hat w, p \rangle)

    where the projection is on and ρ = ``wd_ratio``; elsewhere it is SGD with the same decoupled
    decay and ρ = 1. The buffer is never projected: the official code without Nesterov does so by
    aliasing, the paper does not. Dampening counts from the first step on. Weights with fewer than
    two dimensions are never projected. A complex weight counts as a real one with a last dimension
    of 2, as in torch.optim.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: learning rate η, a number or a one-element tensor (default: 1e-3).
        momentum: μ, at least 0 and below 1 (default: 0).
        dampening: what the gradient is dampened by on its way into the buffer (default: 0).
        weight_decay: decoupled decay λ, times lr/(1 − μ): what L2 of the same λ comes to over the
            life of a gradient in the buffer (default: 0).
        nesterov: use Nesterov momentum; needs momentum and no dampening (default: False).
        eps: in ``"auto"`` the guard of the official code's cosines and norms (default: 1e-8).
        delta: threshold of the ``"auto"`` gate (default: 0.1).
        wd_ratio: ρ, the factor on the decay of projected weights (default: 0.1).
        view: an option of parameter groups: ``"auto"`` (the paper's gate), a
            :class:`normwise.View` or its spelling, or ``None``: SGDW. See
            :class:`normwise.AdamP` (default: ``"auto"``).
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
        differentiable: let autograd pass through the step; the gate itself is a constant
            (default: False).

    Raises:
        ValueError: for an option out of its range, an unknown option of a group, or a view that
            does not fit a weight.
        RuntimeError: in :meth:`step`, for a sparse gradient.
    """

    _form = StateForm(
        "SGDP",
        ("momentum_buffer",),
        torch_decay_is_decoupled=False,
        aliases={"momentum": "momentum_buffer"},  # the official code's
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        view: ViewOption | str = "auto",
        norm: Literal["free", "fixed"] = "free",
        symmetries: Symmetries | None = None,
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
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "view": view,
            "norm": norm,
            "stochastic_rounding": stochastic_rounding,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, symmetries)

    def _rule(self, group: dict[str, Any]) -> tuple[SGDRule, float]:
        momentum = group["momentum"]
        rule = SGDRule(momentum, group["dampening"], group["nesterov"])
        return rule, 1 / (1 - momentum)
