"""The remedy of AdamP and SGDP around any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from normwise.geometry import View
from normwise.optim.groups import (
    check_norm_option,
    check_number,
)
from normwise.optim.projection import ViewOption
from normwise.optim.sharded import Exchange
from normwise.optim.step import Ending, SGDRule, Step, by_device_and_dtype, for_computing
from normwise.optim.wrapping import Wrapper, resolve_views
from normwise.protocols import Views
from normwise.sharding import local
from normwise.updates import Coupling, Update, UpdateRule, own_rule, rule_of

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
                for members, shards, view, ending in exchange.located(params, views):
                    olds = [local(before[params[i]]) for i in members]
                    self._remove_radial_part_(self._options(group, view), shards, olds, ending)
            exchange.finish_()
        return loss

    def _options(self, group: dict[str, Any], view: ViewOption) -> Step:
        return Step(
            SGDRule(momentum=0.0, dampening=0.0, nesterov=False),
            self._decay_lr(group),
            group.get("weight_decay", 0.0),
            wd_ratio=0.0 if self._norm == "fixed" else self._wd_ratio,
            view=view,
            norm=self._norm,
        )

    def _remove_radial_part_(
        self, step: Step, params: list[Tensor], before: list[Tensor], ending: Ending
    ) -> None:
        for ps, olds in by_device_and_dtype(params, before):
            moves = torch._foreach_sub(
                [for_computing(w) for w in olds], [for_computing(p) for p in ps]
            )
            torch._foreach_copy_(ps, olds)
            weights = [for_computing(p) for p in ps]
            ending.end_(ps, weights, moves, moves, [1.0] * len(ps), step, foreach=True)

    def _decay_lr(self, group: dict[str, Any]) -> float | Tensor:
        """What λ is multiplied by: η, or for SGD the η/(1 − μ) that L2 through its buffer is."""
        lr: float | Tensor = group["lr"]
        return lr * _decay_rate(own_rule(self.optimizer, group))

    def update_rule(self, group: dict[str, Any], p: Tensor | None = None) -> UpdateRule:
        """What a step does to the weights of a group that have a view, or to one weight of it.

        For :func:`normwise.describe`.
        """
        members = group["params"] if p is None else [p]
        view = next((self._views[q] for q in members if q in self._views), None)
        if view is None:
            return rule_of(self.optimizer, group, p)
        rule = own_rule(self.optimizer, group, p)
        rate = _decay_rate(rule)
        decay = group.get("weight_decay", 0.0) * rate
        return replace(
            rule,
            coupling=Coupling.DECOUPLED if "weight_decay" in group else Coupling.NONE,
            weight_decay=decay,
            rate=rate,
            decay_per_step=group["lr"] * decay,
            is_switch=False,
            view=view,
            wd_ratio=self._wd_ratio,
            norm=self._norm,
            changed_by=(*rule.changed_by, "tangential"),
        )


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


def _decay_rate(rule: UpdateRule) -> float:
    """What ηλ is multiplied by: 1/(1 − μ) where λ would pass through a buffer of gradients."""
    if rule.update is Update.GRADIENT and rule.coupling is Coupling.L2:
        return float(1 / (1 - rule.momentum))
    return rule.rate
