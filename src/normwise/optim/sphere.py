r"""Steps on spheres around any torch optimizer: norms are fixed, the learning rate is an angle.

A slice w of radius R, which the wrapped optimizer would move by d, ends at a·w + b·d. The numbers a
and b follow from ‖w‖², ⟨w, d⟩ and ‖d‖² alone, whichever path is taken; so the weights are read once
for these sums and once for the result, and of a slice that is split over ranks only sums are
exchanged.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from normwise.geometry import View, computing_dtype
from normwise.optim.groups import check_number
from normwise.optim.projection import BATCHED_ENTRIES, batch, is_alias, unbatch_
from normwise.optim.step import (
    for_computing,
    is_nonzero,
    real_alias,
    round_back_,
    scalar_dtype,
)
from normwise.optim.sums import channel_sums, divisor
from normwise.optim.wrapping import Wrapper, names_of, resolve_views
from normwise.protocols import Views
from normwise.sharding import Layout, is_sharded, lay_out, lay_out_channels, local, sum_over_ranks_
from normwise.updates import Coupling, UpdateRule, attached_to, own_rule, rule_of

__all__ = ["LearnedNorm", "RadialBrake", "Sphere", "sphere"]

Update = Literal["relative", "raw"]
Path = Literal["retract", "geodesic"]
Radius = Literal["initial", "unit"] | float | Tensor

# Sums over a slice: ‖w‖², ⟨w, d⟩, ‖d‖², and for learned norms ⟨w, g⟩.
WW, WD, DD, WG = range(4)
_PAIRS = [(0, 0), (0, 1), (1, 1), (0, 2)]  # of w, d and g


@dataclass(frozen=True)
class RadialBrake:
    """Radii that change by a part of what the step would change them by.

    Source: https://nilin.github.io/radial-brake, ‖w‖ ← ‖w‖ + s·(‖w + d‖ − ‖w‖).

    Args:
        outward: s of steps that lengthen a slice (default: 0.5).
        inward: s of steps that shorten it (default: 1).
    """

    outward: float = 0.5
    inward: float = 1.0

    def __post_init__(self) -> None:
        for name in ("outward", "inward"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Invalid {name}: {getattr(self, name)}; must be from 0 to 1")


@dataclass(frozen=True)
class LearnedNorm:
    r"""Radii that are trained: a step of Adam along ∂L/∂R = ⟨ŵ, g⟩ for each slice.

    With rows for slices these are the row magnitudes of Muown (arXiv 2605.10797). A radius never
    falls by more than half in a step, so it stays positive.

    Args:
        lr: of the radii, in units of the weights (default: the group's).
        betas: of Adam's averages (default: (0.9, 0.95)).
        eps: of Adam's denominator (default: 1e-8).
    """

    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        for beta in self.betas:
            check_number("beta", beta, below=1)


@dataclass(frozen=True)
class Motion:
    """How slices move.

    Attributes:
        update: ``"relative"`` or ``"raw"``: how far.
        path: ``"retract"`` or ``"geodesic"``.
        norm: what becomes of radii.
        floor: the least length of a raw update, in radii.
    """

    update: Update
    path: Path
    norm: Literal["fixed"] | RadialBrake | LearnedNorm = "fixed"
    floor: float = 0.0

    @property
    def fixes_norms(self) -> bool:
        """Whether no radius ever changes."""
        return self.norm == "fixed"


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the slices of a weight live, and which of the weight's radii are theirs.

    Attributes:
        layout: of the slices whose sums are made.
        numbers: their numbers among the slices of the whole weight; None if they are all.
    """

    layout: Layout
    numbers: Tensor | None


@dataclass
class _Batch:
    """Weights of one place, dtype and learning rate, moved together.

    Attributes:
        place: theirs.
        lr: θ.
        params: the parameters.
        moved: what they hold, shards: the displacement d.
        before: the weights before the step, shards.
        sums: of shape ``(slices, members, 3 or 4)``, see ``WW`` and following.
    """

    place: _Place
    lr: float | Tensor
    params: list[Tensor]
    moved: list[Tensor]
    before: list[Tensor]
    sums: Tensor


class Sphere(Wrapper):
    """An optimizer whose steps keep the norms of slices, made by :func:`sphere`.

    It shares groups, state and defaults with the optimizer that it wraps. Its ``state_dict()`` is
    the wrapped one's, with the radii in the state of each weight on a sphere.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        views: Mapping[Tensor, View],
        radii: Mapping[Tensor, Tensor],
        motion: Motion,
        *,
        stochastic_rounding: bool,
    ) -> None:
        super().__init__(optimizer, views)
        self._motion = motion
        self._stochastic_rounding = stochastic_rounding
        self._norms = {p: {"radius": radius} for p, radius in radii.items()}
        if isinstance(motion.norm, LearnedNorm):
            for state in self._norms.values():
                state["radius_step"] = torch.zeros((), device=state["radius"].device)
                state["radius_exp_avg"] = torch.zeros_like(state["radius"])
                state["radius_exp_avg_sq"] = torch.zeros_like(state["radius"])
        self._own |= {"_motion", "_stochastic_rounding", "_norms"}

    @property
    def radii(self) -> dict[Tensor, Tensor]:
        """The radius of each slice of each weight on a sphere, shape ``(slices,)``.

        Of a sharded weight all ranks have the radii of the whole.
        """
        return {p: state["radius"] for p, state in self._norms.items()}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer step, and move slices along their spheres instead.

        Weights without a gradient are left alone, and so are slices that the wrapped optimizer
        does not move.

        Args:
            closure: reevaluates the model, computes the gradients and returns the loss. It is
                called once, before the wrapped optimizer's step.

        Returns:
            What ``closure`` returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            work = [
                (group, p)
                for group in self.param_groups
                for p in group["params"]
                if p in self._views and p.grad is not None
            ]
            before = [local(p).clone() for _, p in work]
            starts_from_zero = [local(p) for _, p in work if self._starts_from_zero(p)]
            if starts_from_zero:
                torch._foreach_zero_(starts_from_zero)
            try:
                with self._without_decay():
                    self.optimizer.step()
            except BaseException:
                for (_, p), w in zip(work, before, strict=True):
                    local(p).copy_(w)
                raise
            others = [
                (local(p), w)
                for (_, p), w in zip(work, before, strict=True)
                if not self._starts_from_zero(p)
            ]
            if others:
                torch._foreach_sub_([p for p, _ in others], [w for _, w in others])
            self._move_(work, before)
        return loss

    def _starts_from_zero(self, p: Tensor) -> bool:
        """Whether the wrapped optimizer steps from zero, so that it writes d itself.

        What it writes is then not rounded to the spacing of numbers near w. That matters where
        only its direction counts, and in half precision. Raw updates otherwise start from the
        weights, for optimizers whose steps are as long as those.
        """
        return self._motion.update == "relative" or computing_dtype(p.dtype) != p.dtype

    def _move_(self, work: Sequence[tuple[dict[str, Any], Tensor]], before: list[Tensor]) -> None:
        """Put every slice where its displacement leads; parameters hold the displacements."""
        buckets: dict[Any, tuple[_Place, float | Tensor, list[int]]] = {}
        for i, (group, p) in enumerate(work):
            place = self._place(p, self._views[p])
            if place is None:
                continue
            alone = i if before[i].numel() > BATCHED_ENTRIES else -1
            key = (place, id(group), p.dtype, before[i].shape, alone)
            lr = group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
            buckets.setdefault(key, (place, lr, []))[2].append(i)
        batches: list[_Batch] = []
        messages: list[tuple[int, Tensor, Layout]] = []
        for place, lr, members in buckets.values():
            b = self._summed(place, lr, [work[i] for i in members], [before[i] for i in members])
            batches.append(b)
            parts = zip(members, b.sums.unbind(1), strict=True)
            messages += [(i, sums, place.layout) for i, sums in parts]
        # In the order of parameters: other ranks may have other batches.
        messages.sort(key=lambda message: message[0])
        sum_over_ranks_([sums for _, sums, _ in messages], [layout for *_, layout in messages])
        for b in batches:
            self._finish_(b)

    def _summed(
        self,
        place: _Place,
        lr: float | Tensor,
        work: list[tuple[dict[str, Any], Tensor]],
        before: list[Tensor],
    ) -> _Batch:
        moved = [for_computing(local(p)) for _, p in work]
        weights = [for_computing(w) for w in before]
        factors, pairs = [weights, moved], _PAIRS[:3]
        if isinstance(self._motion.norm, LearnedNorm):
            grads = [for_computing(local(p.grad)) for _, p in work if p.grad is not None]
            signs = [-1.0 if group.get("maximize") else 1.0 for group, _ in work]
            factors.append(list(torch._foreach_mul(grads, signs)))
            pairs = _PAIRS
        everyone = list(range(len(work)))
        batches = [batch(tensors, everyone, place.layout.channels) for tensors in factors]
        sums = place.layout.by_slice(channel_sums(batches, pairs))
        return _Batch(place, lr, [p for _, p in work], moved, weights, sums)

    def _finish_(self, b: _Batch) -> None:
        states = [self._norms[p] for p in b.params]
        here = ... if b.place.numbers is None else b.place.numbers
        radii = torch.stack([state["radius"][here] for state in states], 1).to(b.sums.dtype)
        if isinstance(self._motion.norm, LearnedNorm):
            learned = self._motion.norm
            slopes = b.sums[..., WG] / divisor(b.sums[..., WW].sqrt())
            for state, slope in zip(states, slopes.unbind(1), strict=True):
                _step_radius_(state, slope, learned, b.lr)
            ends = torch.stack([state["radius"] for state in states], 1).to(b.sums.dtype)
        else:
            ends = None
        noise = torch.finfo(b.params[0].dtype).eps
        a, c, ends = coefficients(b.sums, radii, b.lr, self._motion, noise, ends)
        if isinstance(self._motion.norm, RadialBrake):
            for state, radius in zip(states, ends.unbind(1), strict=True):
                state["radius"].copy_(radius)
        view, everyone = b.place.layout.channels, list(range(len(b.params)))
        d, w = (batch(tensors, everyone, view) for tensors in (b.moved, b.before))
        shape = (*w.shape[:2], *(1 for _ in w.shape[2:]))
        a, c = (b.place.layout.by_channel(t).T.to(w.dtype).view(shape) for t in (a, c))
        if is_alias(everyone):
            d.mul_(c).addcmul_(w, a)
        else:
            unbatch_(b.moved, everyone, view, torch.addcmul(d * c, w, a))
        shards = [real_alias(local(p)) for p in b.params]
        round_back_(shards, b.moved, self._stochastic_rounding)

    def _place(self, p: Tensor, view: View) -> _Place | None:
        """Where the slices of a weight live; None if this rank has no part in it."""
        known: dict[Any, _Place | None] = self.__dict__.setdefault("_places", {})
        key: Any = (p.shape, p.device, view)
        if is_sharded(p):
            key = (p.shape, p.placements, p.device_mesh, view)
        if key not in known:
            known[key] = _find_place(p, view, everywhere=not self._motion.fixes_norms)
        return known[key]

    def update_rule(self, group: dict[str, Any], p: Tensor | None = None) -> UpdateRule:
        """What a step does to the weights of a group that are on spheres, or to one weight of it.

        For :func:`normwise.describe`. Of relative updates the length is no constant's multiple.
        """
        members = group["params"] if p is None else [p]
        view = next((self._views[q] for q in members if q in self._views), None)
        if view is None:
            return rule_of(self.optimizer, group, p)
        rule = own_rule(self.optimizer, group, p)
        return replace(
            rule,
            scale=math.nan if self._motion.update == "relative" else rule.scale,
            coupling=Coupling.NONE,
            weight_decay=0.0,
            rate=1.0,
            decay_per_step=0.0,
            is_switch=False,
            view=view,
            norm="fixed" if self._motion.fixes_norms else "free",
            changed_by=(*rule.changed_by, "sphere"),
        )

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with the radii beside the state of each weight on a sphere."""
        state_dict = self.optimizer.state_dict()
        saved = dict(state_dict["state"])
        for index, p in self._numbered(state_dict):
            if p in self._norms:
                saved[index] = {**saved.get(index, {}), **self._norms[p]}
        return {**state_dict, "state": saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` has saved.

        Raises:
            ValueError: if it has no radii, or those of other slices. A state dict of the wrapped
                optimizer alone is to be loaded into it before it is wrapped.
        """
        saved = {key: dict(value) for key, value in state_dict["state"].items()}
        names = names_of(self.optimizer)
        loaded: dict[Tensor, dict[str, Any]] = {}
        for index, p in self._numbered(state_dict):
            if p not in self._norms:
                continue
            of_p = saved.get(index, {})
            label = names.get(p, f"a parameter of shape {tuple(p.shape)}")
            loaded[p] = {}
            for key, value in self._norms[p].items():
                if key not in of_p:
                    raise ValueError(
                        f"the state dict has no {key} for {label}: it is not of this sphere. Load "
                        f"one of {type(self.optimizer).__name__} into that, before sphere()"
                    )
                loaded[p][key] = of_p.pop(key)
                if loaded[p][key].shape != value.shape:
                    raise ValueError(
                        f"the {key} of {label} in the state dict has shape "
                        f"{tuple(loaded[p][key].shape)}, but its view has {tuple(value.shape)}"
                    )
        kept = {key: value for key, value in saved.items() if value}
        self.optimizer.load_state_dict({**state_dict, "state": kept})
        for p, values in loaded.items():
            for key, value in values.items():
                self._norms[p][key].copy_(value.to(self._norms[p][key].dtype))

    def _numbered(self, state_dict: dict[str, Any]) -> list[tuple[Any, Tensor]]:
        """The parameters with the keys under which a state dict has their states."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        return list(zip(keys, params, strict=False))  # torch tells of another number of them


def sphere(
    optimizer: Optimizer,
    views_or_report: Views,
    *,
    radius: Radius | Mapping[Any, Radius] = "initial",
    update: Update = "relative",
    path: Path = "retract",
    gains: Iterable[Tensor] | Mapping[str, Any] | None = None,
    norm: Literal["fixed"] | RadialBrake | LearnedNorm = "fixed",
    floor: float = 0.0,
    stochastic_rounding: bool = False,
) -> Sphere:
    r"""Fix the norms of slices, so that the learning rate of any torch optimizer is an angle.

    Where the wrapped optimizer, without its decay, would move a slice w by d, the slice of radius R
    and direction ŵ moves by a step s and stays on its sphere:

    ======================== =============================== ===================================
    \                        ``path="retract"``              ``path="geodesic"``
    ======================== =============================== ===================================
    ``update="relative"``    R·unit(ŵ + θ d/‖d‖):            R(cos θ ŵ + sin θ t/‖t‖): the angle
                             hyperball, arXiv 2606.16899     is θ exactly
    ``update="raw"``         R·unit(Rŵ + d)                  the same with θ = ‖t‖/R
    ======================== =============================== ===================================

    with θ the learning rate of the group, in radians per step, and t = d − ŵ⟨ŵ, d⟩. A slice that
    does not move, or in ``"geodesic"`` only along ŵ, is left where it is.

    Radii are state, in float32 or better, saved and loaded with it: half precision lets no norm
    drift, and a resumed run takes none anew. With ``update="relative"``, and in half precision, the
    wrapped optimizer sees weights of zero while it steps, so that what it writes is d and no small
    step is lost to rounding; use it for optimizers whose direction depends on gradients alone, as
    it is with SGD, Adam, Lion, Muon, Shampoo and their kin, not with averages of weights.

    Weight decay is refused: on a fixed norm it could only turn up the step size. A
    ``weight_decay`` that is the default of the optimizer's class, 0.1 of ``torch.optim.Muon`` for
    example, is left out for weights on spheres and acts on the others.

    Args:
        optimizer: any torch optimizer; the result shares its groups and its state.
        views_or_report: which weights, and their slices: a :class:`normwise.View`, or its
            spelling, for all weights of two dimensions or more; or a mapping from parameters, or
            from names if ``optimizer`` was made from named parameters; or a report of
            :func:`normwise.analyze`.
        radius: ``"initial"`` (the norms that slices have now), ``"unit"``, a number, or a mapping
            from parameters or names to one of these or to a tensor of shape ``(slices,)``. Slices
            are put on a radius that is not their own at once (default: ``"initial"``).
        update: ``"relative"``: steps of length θR; ``"raw"``: as the wrapped optimizer makes them
            (default: ``"relative"``).
        path: ``"retract"`` or ``"geodesic"`` (default: ``"retract"``).
        gains: parameters with a length to be learned, such as :func:`normwise.add_gains` returns,
            or a group of them with a learning rate of its own. They are added to the wrapped
            optimizer, unless it has them (default: None).
        norm: ``"fixed"``, or what else becomes of radii: :class:`RadialBrake` or
            :class:`LearnedNorm` (default: ``"fixed"``).
        floor: the least length of a raw update that is not zero, over R (default: 0).
        stochastic_rounding: round bfloat16 and float16 weights up or down at random, so that small
            steps count on average (default: False).

    Returns:
        An optimizer to use instead of the wrapped one, with schedulers and scalers too.

    Raises:
        ValueError: for an option out of its range, views that do not fit, slices that are zero and
            have no radius given, decay of weights on spheres, or an optimizer that needs a closure.
    """
    for name, value, known in (
        ("update", update, ("relative", "raw")),
        ("path", path, ("retract", "geodesic")),
    ):
        if value not in known:
            raise ValueError(f"Invalid {name}: {value!r}; must be {known[0]!r} or {known[1]!r}")
    if norm != "fixed" and not isinstance(norm, RadialBrake | LearnedNorm):
        raise ValueError(f"Invalid norm: {norm!r}; must be 'fixed', a RadialBrake or a LearnedNorm")
    check_number("floor", floor)
    if floor and update == "relative":
        raise ValueError("floor is for update='raw': a relative update is as long as lr says")
    _check_step(optimizer)
    if gains is not None:
        _add_gains(optimizer, gains)
    views = resolve_views(optimizer, views_or_report, "sphere")
    _check_no_decay(optimizer, views)
    with torch.no_grad():
        radii = _radii(optimizer, views, radius)
    motion = Motion(update, path, norm, floor)
    return Sphere(optimizer, views, radii, motion, stochastic_rounding=stochastic_rounding)


def coefficients(
    sums: Tensor,
    radii: Tensor,
    lr: float | Tensor,
    motion: Motion,
    noise: float,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The a and b of a·w + b·d, and the radii after the step; see :func:`sphere`.

    Args:
        sums: ‖w‖², ⟨w, d⟩ and ‖d‖², shape ``(..., 3 or more)``.
        radii: R, shape ``(...)``.
        lr: θ; of raw updates nothing but ``path`` is asked.
        motion: how slices move.
        noise: the resolution of d: a tangential part of less than this share of it is rounding.
        ends: the radii to end on (default: as ``motion`` says).
    """
    norm, length = sums[..., WW].sqrt(), sums[..., DD].sqrt()
    radial = sums[..., WD] / divisor(norm)
    tangential = (sums[..., DD] - radial.square()).clamp_min(0).sqrt()
    if motion.update == "relative":
        scale = lr * radii / divisor(length)
    elif motion.floor:
        scale = (motion.floor * radii / divisor(length)).clamp_min(1)
    else:
        scale = torch.ones_like(length)
    to_sphere = radii / divisor(norm)  # times w this is Rŵ, and zero of a slice that is zero
    along = torch.where(norm > 0, radii, 0) + scale * radial
    if motion.path == "retract":
        reached = torch.hypot(along, scale * tangential)
        ends = _radii_after(radii, reached, motion) if ends is None else ends
        a, b = to_sphere / divisor(reached), scale / divisor(reached)
        moves = length > 0
    else:
        ends = _radii_after(radii, along, motion) if ends is None else ends
        angle = lr if motion.update == "relative" else scale * tangential / radii
        cos, sin = (
            (torch.cos(angle), torch.sin(angle))
            if isinstance(angle, Tensor)
            else (math.cos(angle), math.sin(angle))
        )
        b = sin / divisor(tangential)
        a = (cos - b * radial) / divisor(norm)
        moves = tangential > noise * length
    changed = moves | (ends != radii)
    a = torch.where(moves, ends * a, torch.where(changed, ends / divisor(norm), 1))
    b = torch.where(moves, ends * b, 0)
    return a, b, torch.where(changed, ends, radii)


def _radii_after(radii: Tensor, reached: Tensor, motion: Motion) -> Tensor:
    """The radii on which slices end that would end at the norms ``reached``."""
    if not isinstance(motion.norm, RadialBrake):
        return radii
    change = reached - radii
    return radii + torch.where(change > 0, motion.norm.outward, motion.norm.inward) * change


def _step_radius_(
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


def _find_place(p: Any, view: View, *, everywhere: bool) -> _Place | None:
    """Where the slices of a weight live.

    Args:
        everywhere: whether every rank is to have the sums over all slices, as it must where radii
            change; else those of the slices of which it has a part.
    """
    dim = 0 if view.kind == "layer" else view.dim
    if not is_sharded(p):
        numbers = _slice_numbers(torch.arange(p.shape[dim], device=p.device), p, view)
        return _Place(Layout(view, p.shape, view, (), dim, _count(p, view), numbers), None)
    if p.device_mesh.get_coordinate() is None:
        return None
    channels = lay_out_channels(p, dim)
    numbers = _slice_numbers(channels.slots, p, view)
    if everywhere:
        return _Place(replace(channels, view=view, count=_count(p, view), slots=numbers), None)
    layout = lay_out(p, view)
    if layout.count == _count(p, view):
        return _Place(layout, None)
    return _Place(layout, torch.unique_consecutive(numbers))


def _slice_numbers(channels: Tensor, p: Tensor, view: View) -> Tensor:
    """The number of the slice that each channel is of."""
    if view.kind == "channel":
        return channels
    return channels // (p.shape[0 if view.kind == "layer" else view.dim] // view.count)


def _count(p: Tensor, view: View) -> int:
    return p.shape[view.dim] if view.kind == "channel" else view.count


def _radii(
    optimizer: Optimizer,
    views: Mapping[Tensor, View],
    radius: Radius | Mapping[Any, Radius],
) -> dict[Tensor, Tensor]:
    """The radius of each slice; weights that are not on theirs are put there.

    Raises:
        ValueError: for a radius that is not positive, or a slice without a norm to take it from.
    """
    names = names_of(optimizer)
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
            if value.shape not in ((), (_count(p, view),)):
                raise ValueError(
                    f"Invalid radius: a tensor of shape {tuple(value.shape)} for a weight of "
                    f"{_count(p, view)} slices"
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
        place = _find_place(p, view, everywhere=True)
        if place is None:
            sums[p] = torch.ones(_count(p, view), dtype=scalar_dtype(p.device), device=p.device)
            continue
        w = batch([for_computing(local(p))], [0], place.layout.channels)
        sums[p] = place.layout.by_slice(channel_sums([w], _PAIRS[:1])[:, 0, 0]).contiguous()
        layouts.append(place.layout)
        placed.append(sums[p])
    sum_over_ranks_(placed, layouts)
    return {p: t.sqrt() for p, t in sums.items()}


def _rescale_(p: Tensor, view: View, factors: Tensor) -> None:
    """Multiply slices of a weight by factors, shape ``(slices,)``."""
    place = _find_place(p, view, everywhere=True)
    if place is None:
        return
    weight = for_computing(local(p))
    slices = place.layout.channels.slices(weight)
    of_channels = place.layout.by_channel(factors).to(slices.dtype)
    slices.mul_(of_channels.view(-1, *(1 for _ in slices.shape[1:])))
    round_back_([real_alias(local(p))], [weight], stochastic_rounding=False)


def _check_step(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer that evaluates a closure several times in a step."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss at several points in a step, which are "
            "not on the sphere; wrap an optimizer whose step needs no closure"
        )


def _check_no_decay(optimizer: Optimizer, views: Mapping[Tensor, View]) -> None:
    """Raise ValueError for decay of a weight on a sphere that somebody asked for."""
    parameter = inspect.signature(type(optimizer).__init__).parameters.get("weight_decay")
    default = None if parameter is None else parameter.default
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0.0)
        asked_for = is_nonzero(decay) and (isinstance(decay, Tensor) or decay != default)
        if asked_for and any(p in views for p in group["params"]):
            raise ValueError(
                f"weight_decay={decay} on weights whose norms are fixed: decay could not shorten "
                "them, it would only turn up their step size; put them in a group with "
                "weight_decay=0, and give a smaller lr if they are to turn more slowly"
            )
    for policy in attached_to(optimizer):
        if any(p in views for p in policy.params):
            raise ValueError(
                f"{policy.label} acts on weights whose norms are fixed, which it cannot change; "
                "attach it to others only"
            )


def _add_gains(optimizer: Optimizer, gains: Iterable[Tensor] | Mapping[str, Any]) -> None:
    """Let the wrapped optimizer step gains, unless it does so already."""
    group = dict(gains) if isinstance(gains, Mapping) else {"params": gains}
    known = {p for other in optimizer.param_groups for p in other["params"]}
    params = [p for p in group["params"] if p not in known]
    if not params:
        return
    if type(optimizer).__name__ == "Muon":
        raise ValueError(
            "Muon steps matrices alone; give the gains to another optimizer, such as "
            "torch.optim.Adam(gains, lr=...), which is stepped beside this one"
        )
    if "weight_decay" in optimizer.defaults:
        group.setdefault("weight_decay", 0.0)
    if names_of(optimizer):
        group["params"] = [(f"gain.{i}", p) for i, p in enumerate(params)]
    else:
        group["params"] = params
    optimizer.add_param_group(group)
