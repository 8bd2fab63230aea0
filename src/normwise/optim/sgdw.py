"""SGDW (Loshchilov & Hutter, arXiv 1711.05101, Algorithm 1)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from normwise.optim.sgd import MomentumOptimizer
from normwise.optim.state_dicts import StateForm
from normwise.optim.step import SGDRule

__all__ = ["SGDW"]


class SGDW(MomentumOptimizer):
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

    _form = StateForm("SGDW", ("momentum_buffer",), torch_decay_is_decoupled=False)

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

    def _rule(self, group: dict[str, Any]) -> tuple[SGDRule, float]:
        in_buffer = group["variant"] == "paper"
        return SGDRule(group["momentum"], group["dampening"], group["nesterov"], in_buffer), 1.0

    def _adapt_state(self, saved: dict[str, Any], states: list[dict[str, Any]]) -> None:
        # A buffer of torch.optim.SGD holds gradients; the paper's holds them times their lr.
        if "variant" not in saved and self.defaults["variant"] == "paper":
            for state in states:
                if "momentum_buffer" in state:
                    state["momentum_buffer"] = state["momentum_buffer"] * saved["lr"]
