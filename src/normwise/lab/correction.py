"""Learning rates corrected for the growth of norms: the hidden schedule, taken back.

Under an optimizer with learning rate η the direction of a scale-invariant slice w moves per step by
η/‖w‖² times the gradient at unit norm where the update is as long as the gradient (SGD), and by
η/‖w‖ times the normalized update where it is not (Adam): a growing norm is a falling learning rate.
Theorem 1 of arXiv 1911.05920 says which learning rates *without* decay give the directions of a run
with it. Read backwards, and with norms that are measured instead of known in advance,

    η_t = η (‖w_t‖/ρ_t)^k,    k = 2 for SGD, 1 for Adam,

gives the directions, to first order in η, of a run whose norms are ρ_t. Two such runs are of use:

- ``fixed``: ρ_t = ‖w₀‖, norms that never grow.
- ``projected``: ρ_{t+1}² = ρ_t²(1 + ‖Δ⊥‖²/‖w_t‖²), with Δ⊥ the tangential part of the step that is
  taken: norms that grow by what a projected optimizer's do, whose steps have no other part. So SGD
  corrected to these takes the directions of SGDP, and AdamW those of AdamP, if the projection does
  nothing but change this schedule.

What is in a buffer or a moment was measured at earlier norms, so that this holds as far as norms
stay the same over its memory: about 1/(1 − μ) steps of SGD's momentum, but 1/(1 − β₂), 1000 steps
by default, of Adam's second moment. ``rescaled`` is ``projected`` without that reserve: the
optimizer is given the gradient at norm ρ, which is ‖w‖/ρ times the one at w, and its step, made for
a slice of norm ρ, is taken ‖w‖/ρ times as long. The product of the two factors is the k = 2 of SGD;
Adam's update does not notice the first, so that one is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.geometry import View, at_least_float32, slice_norms, tangential
from normwise.updates import describe

__all__ = ["REFERENCES", "correct_for_norms"]

REFERENCES = ("fixed", "projected", "rescaled")


def correct_for_norms(optimizer: Optimizer, views: Mapping[Tensor, View], reference: str) -> None:
    """Multiply each step of each slice by (‖w_t‖/ρ_t)^k, from now on.

    The reference norms ρ go into the optimizer's state, and with it into checkpoints.

    Args:
        optimizer: without weight decay on these weights, which would be multiplied too.
        views: of the scale-invariant weights.
        reference: what ρ are, and whether gradients are rescaled too: ``fixed``, ``projected`` or
            ``rescaled``.

    Raises:
        ValueError: for another reference, or for weights that decay or that it does not train.
    """
    if reference not in REFERENCES:
        raise ValueError(f"Invalid reference: {reference!r}; must be {' or '.join(REFERENCES)}")
    rescaled = reference == "rescaled"
    exponents: dict[Tensor, int] = {}
    for group, rule in zip(optimizer.param_groups, describe(optimizer), strict=True):
        ours = [p for p in group["params"] if p in views]
        if ours and group.get("weight_decay", 0):
            raise ValueError(
                f"Invalid weight_decay of scale-invariant weights: {group['weight_decay']}; must "
                "be 0 where their steps are corrected for norms"
            )
        exponents |= dict.fromkeys(ours, 1 if rescaled else rule.update.exponent)
    if len(exponents) < len(views):
        raise ValueError(
            f"{len(views) - len(exponents)} of {len(views)} scale-invariant weights are in no "
            "group of the optimizer; give only those that it trains"
        )
    # Aliases: what is written into their slices is written into the weights.
    params = list(exponents)
    with torch.no_grad():
        references = [_norms(p, views[p]).clone() for p in params]
    before: list[Tensor] = []

    def ratio(w: Tensor, view: View, rho: Tensor) -> Tensor:
        return torch.where(rho > 0, _norms(w, view) / rho, 1.0)

    @torch.no_grad()
    def remember(*_: Any) -> None:
        before[:] = [p.detach().clone() for p in params]
        if rescaled:
            for p, rho in zip(params, references, strict=True):
                if p.grad is not None:
                    views[p].slices(p.grad).mul_(ratio(p, views[p], rho))

    @torch.no_grad()
    def correct(*_: Any) -> None:
        for p, old, rho in zip(params, before, references, strict=True):
            view = views[p]
            factor = ratio(old, view, rho) ** exponents[p]
            step = factor * view.slices(at_least_float32(p - old))
            view.slices(p).copy_(view.slices(old) + step)
            if reference != "fixed":
                norm = _norms(old, view)
                across = slice_norms(view.slices(at_least_float32(tangential(p - old, old, view))))
                rho.mul_((1 + torch.where(norm > 0, across / norm, 0.0).square()).sqrt())
        before.clear()

    def put(_: Optimizer, state: dict[str, Any]) -> None:
        state["reference_norms"] = [rho.clone() for rho in references]

    def take(_: Optimizer, state: dict[str, Any]) -> None:
        for rho, saved in zip(references, state["reference_norms"], strict=True):
            rho.copy_(saved)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(correct)
    optimizer.register_state_dict_post_hook(put)
    optimizer.register_load_state_dict_pre_hook(take)


def _norms(w: Tensor, view: View) -> Tensor:
    """The norms of the slices, shaped to be multiplied with them."""
    return slice_norms(view.slices(at_least_float32(w)))
