"""What a wrapped optimizer did to weights, turned into what a wrapper makes of it, slice by slice.

The wrapper keeps a copy w of each weight from before the step; the weight then holds w + d, or d
where the wrapped optimizer stepped from zero. Sums over slices give a and b of a·w + b·d
(:mod:`normwise.optim.motion`); of slices that are split over ranks they are exchanged, those of all
weights together. Dense weights on the CPU whose norms are fixed, or whose steps only lose their
radial part, go through one fused kernel; all others, and all where norms change, rounding is
stochastic or slices are split, take the plain way here, which is the ground truth.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from normwise.geometry import View
from normwise.optim.kernels import use_fused
from normwise.optim.kernels._layout import memory_layout
from normwise.optim.motion import Row
from normwise.optim.projection import BATCHED_ENTRIES, batch, is_alias, unbatch_
from normwise.optim.step import for_computing, real_alias, round_back_
from normwise.optim.sums import channel_sums
from normwise.sharding import Layout, is_sharded, lay_out, lay_out_channels, local, sum_over_ranks_

__all__ = ["Batch", "Displacements", "Item", "Message", "Place", "count", "find_place"]

_PAIRS = [(0, 0), (0, 1), (1, 1), (0, 2)]  # of w, d and g: see motion.WW and following
_KEPT_PLANS = 8

Group = dict[str, Any]
# What is to be summed over ranks: where in the order of all ranks, the sums, whose they are.
Message = tuple[int, Tensor, Layout]


@dataclass(frozen=True, eq=False)
class Place:
    """Where the slices of a weight live, and which of the weight's radii are theirs.

    Attributes:
        layout: of the slices whose sums are made.
        numbers: their numbers among the slices of the whole weight; None if they are all.
    """

    layout: Layout
    numbers: Tensor | None

    def of_these(self, values: Tensor) -> Tensor:
        """Of values of all slices of the weight those of these slices."""
        return values if self.numbers is None else values[self.numbers]


@dataclass(frozen=True)
class Item:
    """A weight that the wrapped optimizer has stepped.

    Attributes:
        p: the parameter, which holds w + d, or d.
        group: its parameter group.
        view: its slices.
        before: w, the shard of this rank.
        from_zero: whether the parameter holds d.
    """

    p: Tensor
    group: Group
    view: View
    before: Tensor
    from_zero: bool


@dataclass
class Batch:
    """Weights of one place, dtype and group, moved together.

    Attributes:
        place: theirs.
        group: theirs.
        params: the parameters.
        moved: the displacement d of each, shards.
        before: the weights before the step, shards.
        sums: of shape ``(slices, members, 3 or 4)``, see :mod:`normwise.optim.motion`.
    """

    place: Place
    group: Group
    params: list[Tensor]
    moved: list[Tensor]
    before: list[Tensor]
    sums: Tensor


class Others(Protocol):
    """Weights whose slices lie in several of them, and which share the exchange."""

    def messages(self, first: int) -> list[Message]: ...

    def finish_(self) -> None: ...


class Displacements:
    """Turns the steps of a wrapped optimizer into others; what it keeps is found again when lost.

    Args:
        everywhere: whether every rank must know the sums over all slices, as where radii change.
        with_gradients: whether ⟨w, g⟩ is summed too.
        stochastic_rounding: of half-precision weights.
    """

    def __init__(
        self, *, everywhere: bool = False, with_gradients: bool = False, stochastic_rounding: bool
    ) -> None:
        self._everywhere = everywhere
        self._with_gradients = with_gradients
        self._stochastic_rounding = stochastic_rounding
        self._places: dict[Any, Place | None] = {}
        self._kept: dict[Tensor, Tensor] = {}
        self._plans: dict[Any, Any] = {}

    def keep(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Copies of what parameters hold on this rank, in memory that is used again."""
        shards = [local(p) for p in params]
        for p, shard in zip(params, shards, strict=True):
            kept = self._kept.get(p)
            if kept is None or not _are_alike(kept, shard):
                self._kept[p] = torch.empty_like(shard, memory_format=torch.preserve_format)
        copies = [self._kept[p] for p in params]
        if copies:
            torch._foreach_copy_(copies, shards)
        return copies

    def end_(
        self,
        items: Sequence[Item],
        coefficients: Callable[[Batch], tuple[Tensor, Tensor]],
        row: Callable[[Item], Row] | None,
        radius: Callable[[Tensor], Tensor] | None = None,
        others: Others | None = None,
    ) -> None:
        """Put every slice where its displacement leads.

        Args:
            items: weights that were stepped.
            coefficients: gives a and b of a·w + b·d, of the shape of sums without their last
                dimension.
            row: the same in numbers, for kernels; None where they do not know how.
            radius: gives the radii of all slices of a weight, for kernels.
            others: whose sums are exchanged with these.
        """
        fused = self._fused(items) if row is not None else []
        if fused:
            assert row is not None
            self._end_fused_([items[i] for i in fused], row, radius)
        taken = set(fused)
        buckets: dict[Any, tuple[Place, list[int]]] = {}
        for i, item in enumerate(items):
            place = self._place(item.p, item.view)
            if place is None or i in taken:
                continue
            alone = i if item.before.numel() > BATCHED_ENTRIES else -1
            key = (place, id(item.group), item.p.dtype, item.before.shape, item.from_zero, alone)
            buckets.setdefault(key, (place, []))[1].append(i)
        batches: list[Batch] = []
        messages: list[Message] = []
        for place, members in buckets.values():
            b = self._summed(place, [items[i] for i in members])
            batches.append(b)
            parts = zip(members, b.sums.unbind(1), strict=True)
            messages += [(i, sums, place.layout) for i, sums in parts]
        # In the order of parameters: other ranks may have other batches.
        messages.sort(key=lambda message: message[0])
        if others is not None:
            messages += others.messages(len(items))
        sum_over_ranks_([sums for _, sums, _ in messages], [layout for *_, layout in messages])
        for b in batches:
            self._finish_(b, *coefficients(b))
        if others is not None:
            others.finish_()

    def _summed(self, place: Place, items: list[Item]) -> Batch:
        moved = [for_computing(local(item.p)) for item in items]
        weights = [for_computing(item.before) for item in items]
        if not items[0].from_zero:
            torch._foreach_sub_(moved, weights)
        factors, pairs = [weights, moved], _PAIRS[:3]
        if self._with_gradients:
            factors.append(gradients(items))
            pairs = _PAIRS
        everyone = list(range(len(items)))
        batches = [batch(tensors, everyone, place.layout.channels) for tensors in factors]
        sums = place.layout.by_slice(channel_sums(batches, pairs))
        return Batch(place, items[0].group, [item.p for item in items], moved, weights, sums)

    def _finish_(self, b: Batch, a: Tensor, c: Tensor) -> None:
        view, everyone = b.place.layout.channels, list(range(len(b.params)))
        d, w = (batch(tensors, everyone, view) for tensors in (b.moved, b.before))
        shape = (*w.shape[:2], *(1 for _ in w.shape[2:]))
        # a is near 1: what it is more than that has more digits.
        a, c = (b.place.layout.by_channel(t).T.to(w.dtype).view(shape) for t in (a - 1, c))
        if is_alias(everyone):
            d.mul_(c).addcmul_(w, a).add_(w)
        else:
            unbatch_(b.moved, everyone, view, torch.addcmul(d * c, w, a) + w)
        shards = [real_alias(local(p)) for p in b.params]
        round_back_(shards, b.moved, self._stochastic_rounding)

    def _fused(self, items: Sequence[Item]) -> list[int]:
        """Which of the weights a kernel takes."""
        taken = []
        for i, item in enumerate(items):
            shard, place = local(item.p), self._place(item.p, item.view)
            if place is None or place.layout.whole is None or shard.device.type != "cpu":
                continue
            if shard.numel() == 0 or shard.is_neg() or shard.stride() != item.before.stride():
                continue
            if memory_layout(shard, place.layout.whole) is not None:
                taken.append(i)
        options = {
            "fused": None,
            "foreach": None,
            "differentiable": False,
            "stochastic_rounding": self._stochastic_rounding,
        }
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i in taken:
            by_dtype.setdefault(items[i].p.dtype, []).append(i)
        return [
            i
            for members in by_dtype.values()
            if use_fused(options, [local(items[i].p) for i in members])
            for i in members
        ]

    def _end_fused_(
        self,
        items: Sequence[Item],
        row: Callable[[Item], Row],
        radius: Callable[[Tensor], Tensor] | None,
    ) -> None:
        by_dtype: dict[torch.dtype, list[Item]] = {}
        for item in items:
            by_dtype.setdefault(item.p.dtype, []).append(item)
        for members in by_dtype.values():
            shards = [local(item.p) for item in members]
            rows = [row(item) for item in members]
            places = [self._place(item.p, item.view) for item in members]
            forms = [
                (p.shape, p.stride(), place.layout.whole, r.path, item.from_zero)
                for p, place, r, item in zip(shards, places, rows, members, strict=True)
                if place is not None
            ]
            key = (members[0].p.dtype, *forms)
            if key not in self._plans:
                if len(self._plans) >= _KEPT_PLANS:
                    del self._plans[next(iter(self._plans))]
                module: Any = importlib.import_module("normwise.optim.kernels.displaced")
                views, paths, zero = ([form[i] for form in forms] for i in (2, 3, 4))
                self._plans[key] = module.DisplacedPlan(shards, views, paths, zero)
            radii = None
            if radius is not None:
                radii = [
                    place.of_these(radius(item.p))
                    for place, item in zip(places, members, strict=True)
                    if place is not None
                ]
            self._plans[key].step_(shards, [item.before for item in members], rows, radii)

    def _place(self, p: Tensor, view: View) -> Place | None:
        """Where the slices of a weight live; None if this rank has no part in it."""
        key: Any = (p.shape, p.device, view)
        if is_sharded(p):
            key = (p.shape, p.placements, p.device_mesh, view)
        if key not in self._places:
            self._places[key] = find_place(p, view, everywhere=self._everywhere)
        return self._places[key]


def gradients(items: Sequence[Item]) -> list[Tensor]:
    """The gradients of weights, negated where the optimizer ascends, to compute with."""
    grads = [for_computing(local(item.p.grad)) for item in items if item.p.grad is not None]
    signs = [-1.0 if item.group.get("maximize") else 1.0 for item in items]
    return list(torch._foreach_mul(grads, signs))


def find_place(p: Any, view: View, *, everywhere: bool) -> Place | None:
    """Where the slices of a weight live; None if this rank has no part in it.

    Args:
        p: the weight.
        view: its slices.
        everywhere: whether every rank is to have the sums over all slices, as it must where radii
            change; else those of the slices of which it has a part.
    """
    dim = 0 if view.kind == "layer" else view.dim
    if not is_sharded(p):
        numbers = _slice_numbers(torch.arange(p.shape[dim], device=p.device), p, view)
        return Place(Layout(view, p.shape, view, (), dim, count(p, view), numbers), None)
    if p.device_mesh.get_coordinate() is None:
        return None
    channels = lay_out_channels(p, dim)
    numbers = _slice_numbers(channels.slots, p, view)
    if everywhere:
        return Place(replace(channels, view=view, count=count(p, view), slots=numbers), None)
    layout = lay_out(p, view)
    if layout.count == count(p, view):
        return Place(layout, None)
    return Place(layout, torch.unique_consecutive(numbers))


def _slice_numbers(channels: Tensor, p: Tensor, view: View) -> Tensor:
    """The number of the slice that each channel is of."""
    if view.kind == "channel":
        return channels
    return channels // (p.shape[0 if view.kind == "layer" else view.dim] // view.count)


def count(p: Tensor, view: View) -> int:
    """The number of slices of the whole of a weight."""
    return p.shape[view.dim] if view.kind == "channel" else view.count


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    ) and a.device == b.device
