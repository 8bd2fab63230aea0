"""What a wrapped optimizer did to weights, turned into what a wrapper makes of it, slice by slice.

For the step of the wrapped optimizer a weight w either stays where it is, and a copy is made, so
that it holds w + d afterwards; or the optimizer is handed a buffer of zeros in its place, which
then holds d. Sums over slices give a and b of a·w + b·d (:mod:`normwise.optim.motion`); of slices
that are split over ranks they are exchanged, those of all weights together. Dense weights whose
norms are fixed, or whose steps only lose their radial part, go through fused kernels where there
are some; all others, and all where norms change or slices are split, take the plain way here, which
is the ground truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from normwise.geometry import View
from normwise.optim.kernels import displaced_plan, moves_displaced, use_fused
from normwise.optim.kernels._layout import memory_layout
from normwise.optim.motion import Form, KernelStep, Outcome
from normwise.optim.projection import BATCHED_ENTRIES, batch, is_alias, unbatch_
from normwise.optim.step import for_computing, real_alias, round_back_
from normwise.optim.sums import channel_sums
from normwise.sharding import Layout, is_sharded, lay_out, lay_out_channels, local, sum_over_ranks_

__all__ = ["Batch", "Displaced", "Displacements", "Item", "Message", "Place", "count", "find_place"]

_PAIRS = [(0, 0), (0, 1), (1, 1), (0, 2)]  # of w, d and g: see motion.WW and following
_KEPT_PLANS = 8

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
class Displaced:
    """A weight that a wrapped optimizer has stepped, on this rank.

    Attributes:
        p: the parameter.
        group: its parameter group.
        before: w; where the parameter was kept out of the step, its own memory.
        after: w + d, or d.
        outcome: what that is.
    """

    p: Tensor
    group: Mapping[str, Any]
    before: Tensor
    after: Tensor
    outcome: Outcome

    @property
    def from_zero(self) -> bool:
        """Whether the wrapped optimizer stepped from zero, so that it has written d."""
        return self.outcome is not Outcome.MOVED

    @property
    def displacement(self) -> Tensor:
        """d, real and in float32 or better."""
        d = for_computing(self.after)
        return d if self.from_zero else d - for_computing(self.before)

    def write_(self, new: Tensor, stochastic_rounding: bool) -> None:
        """Put a new weight, real and in float32 or better, into the parameter."""
        shard = real_alias(local(self.p))
        if new.dtype == shard.dtype:
            shard.copy_(new)
        round_back_([shard], [new], stochastic_rounding)


@dataclass(frozen=True)
class Item:
    """A weight that was stepped, and its slices."""

    of: Displaced
    view: View


@dataclass(frozen=True, eq=False)
class _Known:
    """What was found of a weight, and holds while its form and its place are the same.

    Attributes:
        form: shape, strides and where it is.
        view: its slices.
        place: where these live; None if this rank has no part in the weight.
        whole: the view for kernels; None if there are none for such a weight.
    """

    form: Any
    view: View
    place: Place | None
    whole: View | None


@dataclass
class Batch:
    """Weights of one place, dtype and group, moved together.

    Attributes:
        place: theirs.
        group: theirs.
        members: the weights.
        moved: the displacement d of each.
        before: w of each.
        sums: of shape ``(slices, members, 3 or 4)``, see :mod:`normwise.optim.motion`.
    """

    place: Place
    group: Mapping[str, Any]
    members: list[Displaced]
    moved: list[Tensor]
    before: list[Tensor]
    sums: Tensor

    @property
    def params(self) -> list[Tensor]:
        """The parameters."""
        return [member.p for member in self.members]


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
        self._zero: set[Tensor] = set()  # the parameters whose buffer is zero
        self._kept_forms: dict[Tensor, _Known] = {}
        self._plans: dict[Any, Any] = {}

    @contextmanager
    def stepping(
        self,
        params: Sequence[tuple[Tensor, Mapping[str, Any]]],
        from_zero: Callable[[Tensor], bool],
    ) -> Iterator[dict[Tensor, Displaced]]:
        """While a wrapped optimizer steps: copies are made, or buffers put in place.

        Args:
            params: parameters with their groups.
            from_zero: whether the optimizer is to step a parameter from zero.

        Yields:
            A dictionary that is empty until the step is done.
        """
        zero = [p for p, _ in params if from_zero(p)]
        buffers = {p: self._buffer(p) for p, _ in params}
        swapped = {p: p.data for p in zero if _may_be_swapped(p, buffers[p])}
        copied = [p for p, _ in params if p not in swapped]
        shards = {p: local(p) for p in copied}
        if copied:
            torch._foreach_copy_([buffers[p] for p in copied], [shards[p] for p in copied])
            self._zero.difference_update(copied)
        to_zero = [buffers[p] for p in swapped if p not in self._zero]
        to_zero += [shards[p] for p in zero if p not in swapped]
        if to_zero:
            torch._foreach_zero_(to_zero)
        self._zero.difference_update(swapped)
        stepped: dict[Tensor, Displaced] = {}
        try:
            for p in swapped:
                p.data = buffers[p]
            yield stepped
        except BaseException:
            for p in copied:
                shards[p].copy_(buffers[p])
            raise
        finally:
            for p, own in swapped.items():
                p.data = own
        known = set(zero)
        for p, group in params:
            if p in swapped:
                stepped[p] = Displaced(p, group, p.data, buffers[p], Outcome.IN_PLACE)
            else:
                result = Outcome.FROM_ZERO if p in known else Outcome.MOVED
                stepped[p] = Displaced(p, group, buffers[p], local(p), result)

    def _buffer(self, p: Tensor) -> Tensor:
        """Memory of the form of a parameter on this rank, the same in every step."""
        shard, kept = local(p), self._kept.get(p)
        if kept is None or not _are_alike(kept, shard):
            self._zero.discard(p)
            kept = torch.empty_like(shard, memory_format=torch.preserve_format).detach()
            self._kept[p] = kept
        return kept

    def end_(
        self,
        items: Sequence[Item],
        coefficients: Callable[[Batch], tuple[Tensor, Tensor]],
        row: Callable[[Mapping[str, Any]], KernelStep] | None,
        radius: Callable[[Tensor], Tensor] | None = None,
        others: Others | None = None,
    ) -> None:
        """Put every slice where its displacement leads.

        Args:
            items: weights that were stepped.
            coefficients: gives a and b of a·w + b·d, of the shape of sums without their last
                dimension.
            row: the same of a group in numbers, for kernels; None where they do not know how.
            radius: gives the radii of all slices of a weight, for kernels.
            others: whose sums are exchanged with these.
        """
        known = [self._known(item) for item in items]
        fused = self._fused(items, known) if row is not None else []
        if fused:
            assert row is not None
            self._end_fused_([items[i] for i in fused], [known[i] for i in fused], row, radius)
        taken = set(fused)
        buckets: dict[Any, tuple[Place, list[int]]] = {}
        for i, item in enumerate(items):
            place, of = known[i].place, item.of
            if place is None or i in taken:
                continue
            alone = i if of.before.numel() > BATCHED_ENTRIES else -1
            key = (place, id(of.group), of.p.dtype, of.before.shape, of.from_zero, alone)
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
        members = [item.of for item in items]
        moved = [for_computing(of.after) for of in members]
        weights = [for_computing(of.before) for of in members]
        if not members[0].from_zero:
            torch._foreach_sub_(moved, weights)
        factors, pairs = [weights, moved], _PAIRS[:3]
        if self._with_gradients:
            factors.append([gradient(of) for of in members])
            pairs = _PAIRS
        everyone = list(range(len(items)))
        batches = [batch(tensors, everyone, place.layout.channels) for tensors in factors]
        sums = place.layout.by_slice(channel_sums(batches, pairs))
        return Batch(place, members[0].group, members, moved, weights, sums)

    def _finish_(self, b: Batch, a: Tensor, c: Tensor) -> None:
        view, everyone = b.place.layout.channels, list(range(len(b.members)))
        d, w = (batch(tensors, everyone, view) for tensors in (b.moved, b.before))
        shape = (*w.shape[:2], *(1 for _ in w.shape[2:]))
        # a is near 1: what it is more than that has more digits.
        a, c = (b.place.layout.by_channel(t).T.to(w.dtype).view(shape) for t in (a - 1, c))
        if is_alias(everyone):
            d.mul_(c).addcmul_(w, a).add_(w)
        else:
            unbatch_(b.moved, everyone, view, torch.addcmul(d * c, w, a) + w)
        for of, new in zip(b.members, b.moved, strict=True):
            if new is not local(of.p):
                of.write_(new, self._stochastic_rounding)

    def _known(self, item: Item) -> _Known:
        """What is known of a weight; the same object as long as its form and its place are."""
        p, w, view = item.of.p, item.of.after, item.view
        where = (p.placements, p.device_mesh) if is_sharded(p) else p.device
        form = (w.shape, w.stride(), where)
        known = self._kept_forms.get(p)
        if known is None or known.view is not view or known.form != form:
            place = self._place(p, view)
            whole = None if place is None else place.layout.whole
            fits = whole is not None and w.numel() > 0 and memory_layout(w, whole) is not None
            known = _Known(form, view, place, whole if fits else None)
            self._kept_forms[p] = known
        return known

    def _fused(self, items: Sequence[Item], known: Sequence[_Known]) -> list[int]:
        """Which of the weights a kernel takes."""
        by_kind: dict[Any, list[int]] = {}
        for i, (item, of_weight) in enumerate(zip(items, known, strict=True)):
            w = item.of.after
            if of_weight.whole is None or w.is_neg() or w.stride() != item.of.before.stride():
                continue
            by_kind.setdefault((w.dtype, w.device), []).append(i)
        options = {
            "fused": None,
            "foreach": None,
            "differentiable": False,
            "stochastic_rounding": self._stochastic_rounding,
        }
        return [
            i
            for (_, device), members in by_kind.items()
            if moves_displaced(device.type)
            and use_fused(options, [items[i].of.after for i in members])
            for i in members
        ]

    def _end_fused_(
        self,
        items: Sequence[Item],
        known: Sequence[_Known],
        row: Callable[[Mapping[str, Any]], KernelStep],
        radius: Callable[[Tensor], Tensor] | None,
    ) -> None:
        by_kind: dict[Any, list[int]] = {}
        for i, item in enumerate(items):
            by_kind.setdefault((item.of.after.dtype, item.of.after.device), []).append(i)
        for kind, members in by_kind.items():
            stepped, of_weights = [items[i].of for i in members], [known[i] for i in members]
            groups = list({id(of.group): of.group for of in stepped}.values())
            numbers = {id(group): number for number, group in enumerate(groups)}
            of_groups = [numbers[id(of.group)] for of in stepped]
            rows = [row(group) for group in groups]
            path = rows[0].path
            after, before = [of.after for of in stepped], [of.before for of in stepped]
            outcomes = [of.outcome.value for of in stepped]
            key = (*kind, path, *of_weights, *outcomes, *of_groups)
            if key not in self._plans:
                if len(self._plans) >= _KEPT_PLANS:
                    del self._plans[next(iter(self._plans))]
                parts = zip(stepped, of_weights, of_groups, strict=True)
                forms = [
                    Form(of.after.shape, of.after.stride(), about.whole, path, of.outcome, group)
                    for of, about, group in parts
                    if about.whole is not None
                ]
                self._plans[key] = displaced_plan(after, forms)
            radii = None
            if radius is not None:
                radii = [
                    about.place.of_these(radius(of.p))
                    for of, about in zip(stepped, of_weights, strict=True)
                    if about.place is not None
                ]
            self._plans[key].step_(
                after, before, rows, radii, stochastic_rounding=self._stochastic_rounding
            )
            self._zero.update(of.p for of in stepped if of.outcome is Outcome.IN_PLACE)
            torch.autograd.graph.increment_version([local(of.p) for of in stepped])

    def _place(self, p: Tensor, view: View) -> Place | None:
        """Where the slices of a weight live; None if this rank has no part in it."""
        key: Any = (p.shape, p.device, view)
        if is_sharded(p):
            key = (p.shape, p.placements, p.device_mesh, view)
        if key not in self._places:
            self._places[key] = find_place(p, view, everywhere=self._everywhere)
        return self._places[key]


def gradient(of: Displaced) -> Tensor:
    """The gradient of a weight, negated where the optimizer ascends, to compute with."""
    assert of.p.grad is not None
    grad = for_computing(local(of.p.grad))
    return -grad if of.group.get("maximize") else grad


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


def _may_be_swapped(p: Tensor, buffer: Tensor) -> bool:
    """Whether a buffer can take the place of a parameter: of a plain tensor, with its strides.

    Of what is compiled together with the step it cannot: nothing tells it of the other memory.
    """
    if is_sharded(p) or torch.compiler.is_compiling() or p.is_neg() or p.is_conj():
        return False
    return buffer.stride() == p.stride()


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    ) and a.device == b.device
