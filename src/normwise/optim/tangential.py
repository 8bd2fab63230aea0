"""The remedy of AdamP and SGDP around any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from normwise.checks import check_number
from normwise.geometry import View
from normwise.optim.displaced import Batch, Displaced, Displacements, Item, Others
from normwise.optim.groups import check_norm_option
from normwise.optim.joint import Family, Moves, Removal, Symmetries, check_fixable
from normwise.optim.motion import KernelStep, projected
from normwise.optim.step import for_computing, is_nonzero
from normwise.optim.wrapping import Wrapper, resolve
from normwise.protocols import Views
from normwise.updates import Coupling, Update, UpdateRule, attached_to, own_rule, rule_of

__all__ = ["Tangential", "tangential"]

# Of torch's optimizers: given no decay, their step is made of gradients and moments.
_OF_GRADIENTS = frozenset(
    {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Muon"}
)


class Tangential(Wrapper):
    r"""An optimizer whose steps have lost their radial part, made by :func:`tangential`.

    It shares groups, state and defaults with the optimizer that it wraps, so schedulers, gradient
    scalers and checkpoints see the wrapped one: ``state_dict()`` is that one's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        views: Mapping[Tensor, View],
        families: Sequence[Family],
        *,
        wd_ratio: float,
        norm: Literal["free", "fixed"],
    ) -> None:
        super().__init__(optimizer, views, families)
        self._wd_ratio = wd_ratio
        self._norm = norm
        self._own |= {"_wd_ratio", "_norm"}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer step, then take the radial part out of what it did.

        Weights without a gradient are left alone, whatever the wrapped optimizer does to them, and
        so are families that have one.

        Args:
            closure: reevaluates the model, computes the gradients and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.
        """
        engine: Displacements = self.__dict__.setdefault(
            "_displacements", Displacements(stochastic_rounding=False)
        )
        with torch.no_grad():
            work = [
                (p, group)
                for group in self.param_groups
                for p in group["params"]
                if p in self._changed and (closure is not None or p.grad is not None)
            ]
            starts_from_zero = closure is None and _takes_gradients_alone(self.optimizer)
            steps = engine.stepping(work, lambda _: starts_from_zero)
            with steps as stepped, self._without_decay():
                loss = self.optimizer.step(closure)
            stepped = {p: of for p, of in stepped.items() if p.grad is not None}
            items = [Item(of, self._views[p]) for p, of in stepped.items() if p in self._views]
            taking = self._joint.taking(lambda p: p in stepped)
            together = self._together(taking, stepped) if taking else None
            engine.end_(items, self._coefficients, self._row, others=together)
            taken = {p for i in taking for p in self._families[i].params}
            for p, of in stepped.items():
                if p not in self._views and p not in taken:  # of a family that is left alone
                    w = for_computing(of.before)
                    of.write_(w * self._keep(of.group) + of.displacement, False)
        return loss

    def _coefficients(self, b: Batch) -> tuple[Tensor, Tensor]:
        return projected(b.sums, self._keep(b.group), self._norm)

    def _row(self, group: Mapping[str, Any]) -> KernelStep:
        return KernelStep(self._norm, keep=self._keep(group))

    def _together(self, taking: Sequence[int], stepped: Mapping[Tensor, Displaced]) -> Others:
        """What is to be done to some families."""
        plan = self._joint.plan(taking)
        if self._norm == "fixed":
            return Moves(plan, stepped, lambda _, sums: projected(sums, 1.0, "fixed"))
        return Removal(plan, stepped, self._keep)

    def _keep(self, group: Mapping[str, Any]) -> float | Tensor:
        """1 − ηλρ: what decay leaves of a weight in a step."""
        decay = group.get("weight_decay", 0.0)
        if self._norm == "fixed" or not is_nonzero(decay):
            return 1.0
        keep: float | Tensor = 1 - self._decay_lr(dict(group)) * decay * self._wd_ratio
        return keep

    def _decay_lr(self, group: dict[str, Any]) -> float | Tensor:
        """What λ is multiplied by: η, or for SGD the η/(1 − μ) that L2 through its buffer is."""
        lr: float | Tensor = group["lr"]
        return lr * _decay_rate(own_rule(self.optimizer, group))

    def update_rule(self, group: dict[str, Any], p: Tensor | None = None) -> UpdateRule:
        """What a step does to the weights of a group that have a view, or to one weight of it.

        For :func:`normwise.describe`.
        """
        members = group["params"] if p is None else [p]
        member = next((q for q in members if q in self._changed), None)
        if member is None:
            return rule_of(self.optimizer, group, p)
        rule = own_rule(self.optimizer, group, p)
        rate = _decay_rate(rule)
        view, wd_ratio = self._changed[member], self._wd_ratio
        if view is None:  # of a family, whose joint direction is not the weight's own
            rate, wd_ratio = rate * wd_ratio, 1.0
        decay = group.get("weight_decay", 0.0) * rate
        return replace(
            rule,
            coupling=Coupling.DECOUPLED if "weight_decay" in group else Coupling.NONE,
            weight_decay=decay,
            rate=rate,
            decay_per_step=group["lr"] * decay,
            is_switch=False,
            view=view,
            wd_ratio=wd_ratio,
            norm=self._norm,
            changed_by=(*rule.changed_by, "tangential"),
        )


def tangential(
    optimizer: Optimizer,
    views: Views | None,
    *,
    symmetries: Symmetries | None = None,
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

    With ``symmetries`` the part of Δ along each of them is removed over all its weights at once:
    of slices wₛ with exponents aₛ the multiple Σ aₛ⟨wₛ, Δₛ⟩ / Σ aₛ²‖wₛ‖² of (aₛwₛ)ₛ. Units that
    share entries are projected out together, by their Gram matrix; see
    :mod:`normwise.optim.joint`. The projection is Euclidean, whatever made Δ: to first order the
    network computes what it would have computed, at the shortest step that does so. Of plain SGD
    there is nothing to remove; of momentum, and of steps that an adaptive method has
    preconditioned, there is.

    The wrapped optimizer's own multi-tensor or fused step is used. The cost in memory is one copy
    of the weights.

    Args:
        optimizer: any torch optimizer; the result shares its groups and its state.
        views: a :class:`normwise.View`, or its spelling, for all weights of two dimensions or more;
            or a mapping from parameters to views; or from names, if ``optimizer`` was made from
            named parameters; or a report of :func:`normwise.analyze`, of which weights with fewer
            than two dimensions are passed over; or None, for symmetries alone.
        symmetries: a report of :func:`normwise.analyze`, of which all families count whose weights
            the optimizer steps, or some of its ``symmetries``, if ``optimizer`` was made from named
            parameters (default: None).
        wd_ratio: ρ, the factor on the decay of weights that have a view or a symmetry (default: 1).
        norm: ``"fixed"`` puts each slice back on the norm it had before the step, in place of
            decay (default: ``"free"``).

    Returns:
        An optimizer to use instead of the wrapped one, with schedulers and scalers too.

    Raises:
        ValueError: if a view does not fit its weight, if a weight is not one of the optimizer's or
            has fewer than two dimensions, if no weight is left to project, or if a decay policy is
            attached to the wrapped optimizer already.
    """
    check_number("wd_ratio", wd_ratio)
    resolved, families = resolve(optimizer, views, symmetries, "tangential")
    changed = {*resolved, *(p for family in families for p in family.params)}
    for policy in attached_to(optimizer):
        if not changed.isdisjoint(policy.params):
            raise ValueError(
                f"{policy.label} is attached to {type(optimizer).__name__}, on weights whose decay "
                "tangential sets apart; attach it to the optimizer that tangential returns"
            )
    check_norm_option(norm, View.layer())
    if norm == "fixed":
        check_fixable(families, "tangential")
    return Tangential(optimizer, resolved, families, wd_ratio=wd_ratio, norm=norm)


def _decay_rate(rule: UpdateRule) -> float:
    """What ηλ is multiplied by: 1/(1 − μ) where λ would pass through a buffer of gradients."""
    if rule.update is Update.GRADIENT and rule.coupling is Coupling.L2:
        return float(1 / (1 - rule.momentum))
    return rule.rate


def _takes_gradients_alone(optimizer: Optimizer) -> bool:
    """Whether what an optimizer makes of gradients does not depend on where the weights are.

    Then it may step from zero, which saves a copy, and no step is rounded to the spacing of numbers
    near a weight. Hooks see the weights in between, so that there must be none.
    """
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    is_torchs = type(optimizer).__module__.startswith("torch.optim.")
    return is_torchs and type(optimizer).__name__ in _OF_GRADIENTS and not hooks
