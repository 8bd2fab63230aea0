"""The remedy of AdamP and SGDP around any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from normwise.geometry import View
from normwise.optim._base import (
    by_device_and_dtype,
    check_norm_option,
    check_number,
    working,
)
from normwise.optim.projection import ViewOption
from normwise.optim.sharded import Exchange
from normwise.optim.wrapping import Views, Wrapper, resolve_views
from normwise.sharding import local

__all__ = ["Tangential", "tangential"]


class Tangential(Wrapper):
    r"""An optimizer whose steps have lost their radial part, made by :func:`tangential`.

    It shares groups, state and defaults with the optimizer that it wraps, so schedulers, gradient
    scalers and checkpoints see the wrapped one: ``state_dict()`` is that one's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        views: Mapping[Tensor, View],
        *,
        wd_ratio: float,
        norm: Literal["free", "fixed"],
    ) -> None:
        super().__init__(optimizer, views)
        self._wd_ratio = wd_ratio
        self._norm = norm
        self._own |= {"_wd_ratio", "_norm"}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer step, then take the radial part out of what it did.

        Weights without a gradient are left alone, whatever the wrapped optimizer does to them.

        Args:
            closure: reevaluates the model, computes the gradients and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.
        """
        with torch.no_grad():
            before = {p: p.detach().clone() for p in self._views}
        with self._without_decay():
            loss = self.optimizer.step(closure)
        with torch.no_grad():
            exchange = Exchange(self.__dict__.setdefault("_layouts", {}))
            for group in self.param_groups:
                params = [p for p in group["params"] if p in before and p.grad is not None]
                views = [self._views[p] for p in params]
                for members, shards, view, finish in exchange.located(params, views):
                    olds = [local(before[params[i]]) for i in members]
                    self._remove_radial_part_(group, shards, olds, view, finish)
            exchange.finish_()
        return loss

    def _remove_radial_part_(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        before: list[Tensor],
        view: ViewOption,
        finish: Callable[..., None],
    ) -> None:
        for ps, olds in by_device_and_dtype(params, before):
            steps = torch._foreach_sub([working(w) for w in olds], [working(p) for p in ps])
            torch._foreach_copy_(ps, olds)
            finish(
                ps,
                [working(p) for p in ps],
                steps,
                steps,
                [1.0] * len(ps),
                view=view,
                delta=0.0,
                eps=0.0,
                decay_lr=self._decay_lr(group),
                weight_decay=group.get("weight_decay", 0.0),
                wd_ratio=self._wd_ratio,
                norm=self._norm,
                stochastic_rounding=False,
                foreach=True,
            )

    def _decay_lr(self, group: dict[str, Any]) -> float | Tensor:
        """What λ is multiplied by: η, or for SGD the η/(1 − μ) that L2 through its buffer is."""
        lr: float | Tensor = group["lr"]
        if isinstance(self.optimizer, torch.optim.SGD):
            lr = lr / (1 - group["momentum"])
        return lr


def tangential(
    optimizer: Optimizer,
    views: Views,
    *,
    wd_ratio: float = 1.0,
    norm: Literal["free", "fixed"] = "free",
) -> Tangential:
    r"""Remove the radial part from every step of any torch optimizer.

    After the wrapped optimizer has moved a weight from w to w + Δ, the weight is put to

    .. math::
        (1 - \eta\lambda\rho)\, w + \Delta - \hat w \langle \hat w, \Delta \rangle

    slice by slice, as AdamP and SGDP do (arXiv 2006.08217, Algorithms 1 and 2). The decay is set
    apart: the wrapped optimizer does not see the ``weight_decay`` of weights that have a view, and
    it is applied decoupled, with ρ = ``wd_ratio``. For ``torch.optim.SGD``, whose L2 passes
    through the momentum buffer, it is ηλρ/(1 − μ), as in SGDP. So ``tangential(SGD)`` is SGDP with
    an explicit view, and ``tangential(AdamW)`` is AdamP with ``wd_ratio=1``.

    The wrapped optimizer's own multi-tensor or fused step is used. The cost in memory, for the time
    of a step, is two copies of the weights that have a view.

    Args:
        optimizer: any torch optimizer; the result shares its groups and its state.
        views: a :class:`normwise.View`, or its spelling, for all weights of two dimensions or more;
            or a mapping from parameters to views; or from names, if ``optimizer`` was made from
            named parameters; or a report of :func:`normwise.analyze`, of which weights with fewer
            than two dimensions are passed over.
        wd_ratio: ρ, the factor on the decay of weights that have a view (default: 1).
        norm: ``"fixed"`` puts each slice back on the norm it had before the step, in place of
            decay (default: ``"free"``).

    Returns:
        An optimizer to use instead of the wrapped one, with schedulers and scalers too.

    Raises:
        ValueError: if a view does not fit its weight, if a weight is not one of the optimizer's or
            has fewer than two dimensions, or if no weight is left to project.
    """
    check_number("wd_ratio", wd_ratio)
    resolved = resolve_views(optimizer, views, "tangential")
    for view in resolved.values():
        check_norm_option(norm, view)
    return Tangential(optimizer, resolved, wd_ratio=wd_ratio, norm=norm)
