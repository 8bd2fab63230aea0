"""Radii of spheres: where weights start, what is asked for, and radii that are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.geometry import View, computing_dtype
from normwise.optim.displaced import count, find_place
from normwise.optim.joint import Family, norms_of
from normwise.optim.motion import LearnedNorm
from normwise.optim.projection import batch
from normwise.optim.step import for_computing, real_alias, round_back_, scalar_dtype
from normwise.optim.sums import channel_sums, divisor
from normwise.sharding import Layout, local, sum_over_ranks_

__all__ = ["Radius", "joint_radii", "new_state", "radii_of", "step_radius_"]

Radius = str | float | Tensor


def new_state(radius: Tensor, norm: object) -> dict[str, Tensor]:
    """The state of a weight's radii, or a family's."""
    state = {"radius": radius}
    if isinstance(norm, LearnedNorm):
        state["radius_step"] = torch.zeros((), device=radius.device)
        state["radius_exp_avg"] = torch.zeros_like(radius)
        state["radius_exp_avg_sq"] = torch.zeros_like(radius)
    return state


def step_radius_(
    state: dict[str, Tensor], slope: Tensor, learned: LearnedNorm, lr: float | Tensor
) -> None:
    """A step of Adam on the radii of one weight; ``slope`` is ∂L/∂R."""
    beta1, beta2 = learned.betas
    mean, square, step = (state[f"radius_{k}"] for k in ("exp_avg", "exp_avg_sq", "step"))
    slope = slope.to(mean.dtype)
    step.add_(1)
    mean.lerp_(slope, 1 - beta1)
    square.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
    direction = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + learned.eps)
    lr = lr if learned.lr is None else learned.lr
    state["radius"].copy_(torch.maximum(state["radius"] - lr * direction, state["radius"] / 2))


def radii_of(
    views: Mapping[Tensor, View], radius: Radius | Mapping[Any, Radius], names: dict[Tensor, str]
) -> dict[Tensor, Tensor]:
    """The radius of each slice; weights that are not on theirs are put there.

    Raises:
        ValueError: for a radius that is not positive, or a slice without a norm to take it from.
    """
    asked = _radius_of_each(views, radius, names)
    norms = _norms(views)
    radii: dict[Tensor, Tensor] = {}
    zero = []
    for p, norm in norms.items():
        dtype, value = computing_dtype(p.dtype.to_real()), asked[p]
        if isinstance(value, str) and value == "initial":
            radii[p] = norm.to(dtype)
            if (radii[p] == 0).any():
                label = names.get(p, f"a weight of shape {tuple(p.shape)}")
                zero.append(f"{int((radii[p] == 0).sum())} of {label}")
            continue
        given = torch.as_tensor(1.0 if value == "unit" else value, device=p.device)
        radii[p] = given.to(dtype).expand(norm.shape).clone()
        off = norm.sub(radii[p]).abs() > 2 * torch.finfo(p.dtype).eps * radii[p]
        _rescale_(p, views[p], torch.where(off & (norm > 0), radii[p] / divisor(norm), 1))
    if zero:
        raise ValueError(
            f"slices with norm 0 have no initial radius: {', '.join(zero)}; give radius= a number, "
            "or a mapping with one for each of these weights, or leave them out of the views"
        )
    return radii


def _radius_of_each(
    views: Mapping[Tensor, View], radius: Radius | Mapping[Any, Radius], names: dict[Tensor, str]
) -> dict[Tensor, Radius]:
    asked: dict[Tensor, Radius] = {}
    given = dict(radius) if isinstance(radius, Mapping) else {}
    for p, view in views.items():
        value: Radius = "initial"
        if not isinstance(radius, Mapping):
            value = radius
        elif p in given:
            value = given.pop(p)
        elif p in names and names[p] in given:
            value = given.pop(names[p])
        if isinstance(value, str):
            if value not in ("initial", "unit"):
                raise ValueError(
                    f"Invalid radius: {value!r}; must be 'initial', 'unit' or a positive number"
                )
        elif isinstance(value, Tensor):
            if value.shape not in ((), (count(p, view),)):
                raise ValueError(
                    f"Invalid radius: a tensor of shape {tuple(value.shape)} for a weight of "
                    f"{count(p, view)} slices"
                )
        elif not 0 < value < math.inf:
            raise ValueError(f"Invalid radius: {value}; must be positive and finite")
        asked[p] = value
    if given:
        key = next(iter(given))
        label = repr(key) if isinstance(key, str) else f"a weight of shape {tuple(key.shape)}"
        raise ValueError(f"radius names {label}, which is not on a sphere")
    return asked


def _norms(views: Mapping[Tensor, View]) -> dict[Tensor, Tensor]:
    """The norms of all slices of weights, on every rank, in float64 where the device has it."""
    sums: dict[Tensor, Tensor] = {}
    placed: list[Tensor] = []
    layouts: list[Layout] = []
    for p, view in views.items():
        if p.is_meta:
            raise ValueError(
                f"a weight of shape {tuple(p.shape)} is on the meta device and has no norm yet; "
                "initialize the model before sphere()"
            )
        place = find_place(p, view, everywhere=True)
        if place is None:
            sums[p] = torch.ones(count(p, view), dtype=scalar_dtype(p.device), device=p.device)
            continue
        w = batch([for_computing(local(p))], [0], place.layout.channels)
        sums[p] = place.layout.by_slice(channel_sums([w], [(0, 0)])[:, 0, 0]).contiguous()
        layouts.append(place.layout)
        placed.append(sums[p])
    sum_over_ranks_(placed, layouts)
    return {p: t.sqrt() for p, t in sums.items()}


def _rescale_(p: Tensor, view: View, factors: Tensor) -> None:
    """Multiply slices of a weight by factors, shape ``(slices,)``."""
    place = find_place(p, view, everywhere=True)
    if place is None:
        return
    weight = for_computing(local(p))
    slices = place.layout.channels.slices(weight)
    of_channels = place.layout.by_channel(factors).to(slices.dtype)
    slices.mul_(of_channels.view(-1, *(1 for _ in slices.shape[1:])))
    round_back_([real_alias(local(p))], [weight], stochastic_rounding=False)


def joint_radii(families: Sequence[Family], radius: object) -> list[Tensor]:
    """The radius √Σ‖wₛ‖² of each unit of each family, as its weights are now.

    Raises:
        ValueError: for units without a norm, or radii that are asked for.
    """
    if families and radius != "initial":
        raise ValueError(
            f"Invalid radius: {radius!r}; units of several weights keep the radius 'initial'"
        )
    radii = []
    for family, norm in zip(families, norms_of(families), strict=True):
        if (norm == 0).any():
            raise ValueError(
                f"{int((norm == 0).sum())} units of {family.name} have norm 0 and no initial "
                "radius; leave this symmetry out"
            )
        dtypes = [computing_dtype(p.dtype) for p in family.params]
        radii.append(norm.to(max(dtypes, key=lambda dtype: dtype.itemsize)))
    return radii
