"""Steps of weights that are DTensors: FSDP2, HSDP, tensor parallelism, and their combinations.

A rank steps its own shards. Weights whose slices lie whole on ranks take the step of any other
weight, fused kernels included. For the others the end of the step is put off: each rank sums
⟨w, u⟩, ‖w‖², … over its pieces of slices, in float64, where neither overflows nor underflows for
norms from 1e-30 to 1e30; the sums of all weights of the model are added up together; and then what
is removed is a multiple of the weight, ``u -= coefficient * w``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normwise.geometry import View, computing_dtype
from normwise.optim.displaced import Others
from normwise.optim.kernels import takes_split
from normwise.optim.projection import (
    BATCHED_ENTRIES,
    ViewOption,
    batch,
    is_alias,
    unbatch_,
)
from normwise.optim.step import (
    AT_ONCE,
    Ending,
    Part,
    Step,
    Tensors,
    descend_,
    round_back_,
)
from normwise.optim.sums import (
    GG,
    SHUT,
    WU,
    WW,
    channel_sums,
    cosine,
    divisor,
    retraction_from_sums,
    shrunk,
)
from normwise.sharding import Layout, is_sharded, lay_out, lay_out_channels, local, sum_over_ranks_

if TYPE_CHECKING:
    from normwise.optim.kernels import cpu, cuda

    KernelPlan = cpu.CPUPlan | cuda.CUDAPlan

__all__ = ["Exchange"]

_CHANNEL, _LAYER = View.channel(), View.layer()


@dataclass
class _Batch:
    """Weights of one layout, handled together.

    Attributes:
        layout: theirs.
        members: which they are of those in a call.
        entries: the number of entries of a channel of the whole weight.
        channel_sums: sums over channels of the shard, shape ``(channels, members, k)``.
        sums: what is exchanged of each, shape ``(count, k)``. Of a weight in ``"auto"`` whose
            channels are whole, a last column says whether those of this rank shut the gate.
    """

    layout: Layout
    members: list[int]
    entries: int
    channel_sums: Tensor
    sums: list[Tensor]


@dataclass
class _DeferredPlan:
    """A fused step that was put off.

    Attributes:
        plan, params: what :meth:`~CPUPlan.finish_` is called with.
        layouts: of the weights.
        pieces: sums over what this rank has of their slices, if those are split.
        sums: what is exchanged of each weight.
    """

    plan: KernelPlan
    params: Sequence[Tensor]
    layouts: list[Layout]
    pieces: list[Tensor]
    sums: list[Tensor]


@dataclass
class _Deferred:
    """The arguments of an ``end_`` that was put off, and the sums that it needs."""

    params: Tensors
    weights: Tensors
    updates: Tensors
    step_sizes: Sequence[float | Tensor]
    step: Step
    foreach: bool
    batches: list[_Batch]


class Exchange:
    """One step of an optimizer that may have parameters which are DTensors.

    Args:
        layouts: those that earlier steps have found; new ones are added.
    """

    def __init__(self, layouts: dict[Any, Layout]) -> None:
        self._known = layouts
        self._order: dict[Tensor, int] = {}
        self._deferred: list[_Deferred] = []
        self._plans: list[_DeferredPlan] = []

    def parts(self, part: Part, grads: Sequence[Tensor]) -> Iterator[Part]:
        """Split a part into parts of local tensors, to be updated one after the other.

        Args:
            part: of a group, with DTensors.
            grads: its gradients, placed as their parameters are.
        """
        views = [part.step.view] * len(part.params)
        for members, shards, view, ending in self.located(part.params, views):
            if isinstance(ending, _AfterExchange):
                view = ending.view_of_pieces
            yield Part(
                shards,
                [local(grads[i]) for i in members],
                tuple(
                    [None if s[i] is None else local(s[i]) for i in members] for s in part.states
                ),
                replace(part.step, view=view),
                part.group,
                ending,
            )

    def located(
        self, params: Sequence[Tensor], views: Sequence[ViewOption]
    ) -> Iterator[tuple[list[int], list[Tensor], ViewOption, Ending]]:
        """Split parameters by the view of their shards, and by whether slices are on other ranks.

        Yields:
            The indices of some; their shards; the view of those; and what ends a step of them.
        """
        parts: dict[tuple[bool, bool, bool, ViewOption], list[int]] = {}
        shards = [local(p) for p in params]
        layouts: dict[Tensor, Layout] = {}
        for i, (p, view) in enumerate(zip(params, views, strict=True)):
            layout = self._layout(p, view)
            split = layout is not None and layout.whole is None
            if layout is not None and layout.whole is None:
                layouts[shards[i]] = layout
                self._order[shards[i]] = len(self._order)
            elif layout is not None and view != "auto":
                view = layout.whole
            empty = split and shards[i].numel() == 0
            of_layers = layout is not None and layout.view == _LAYER
            parts.setdefault((split, empty, split and of_layers, view), []).append(i)
        for (split, _, _, view), members in parts.items():
            ours = [shards[i] for i in members]
            ending: Ending = AT_ONCE
            if split:
                ending = _AfterExchange(self, {p: layouts[p] for p in ours}, view)
            yield members, ours, view, ending

    def _layout(self, p: Tensor, view: ViewOption) -> Layout | None:
        """Where the slices of a weight live; None for one of which nothing need be known."""
        if view is None or p.ndim < 2 or p.numel() == 0 or not is_sharded(p):
            return None
        key = (p.shape, p.placements, p.device_mesh, view)
        if key not in self._known:
            self._known[key] = _lay_out(p, view)
        return self._known[key]

    def defer_(
        self,
        layouts: Mapping[Tensor, Layout],
        params: Tensors,
        weights: Tensors,
        updates: Tensors,
        grads: Tensors,
        step_sizes: Sequence[float | Tensor],
        step: Step,
        *,
        foreach: bool,
    ) -> None:
        """Put off an ``end_``, whose arguments these are, until :meth:`finish_`."""
        buckets: dict[tuple[Layout, int], list[int]] = {}
        for i, (p, w) in enumerate(zip(params, weights, strict=True)):
            alone = i if w.numel() > BATCHED_ENTRIES else -1
            buckets.setdefault((layouts[p], alone), []).append(i)
        batches = []
        for (layout, _), members in buckets.items():
            u, w, g = (
                batch(tensors, members, layout.channels) for tensors in (updates, weights, grads)
            )
            other = g if step.view == "auto" else u if step.norm == "fixed" else None
            sums = _channel_sums(u, w, other)
            exchanged = layout.by_slice(sums)
            entries = layout.entries * (2 if params[members[0]].is_complex() else 1)
            if step.view == "auto" and layout.view == _LAYER:
                shut = _shut(sums, entries, w.dtype, step.delta, step.eps)
                exchanged = torch.cat([exchanged, shut[None, :, None].to(sums.dtype)], 2)
            batches.append(_Batch(layout, members, entries, sums, list(exchanged.unbind(1))))
        self._deferred.append(
            _Deferred(params, weights, updates, step_sizes, step, foreach, batches)
        )

    def defer_plan_(
        self,
        layouts: Mapping[Tensor, Layout],
        plan: KernelPlan,
        params: Sequence[Tensor],
    ) -> None:
        """Put off the end of a fused step until :meth:`finish_`."""
        of_params = [layouts[p] for p in params]
        if plan.split:
            pieces = plan.sum_pieces()
            sums = [
                piece if _are_slices(piece, layout) else layout.by_slice(piece)
                for piece, layout in zip(pieces, of_params, strict=True)
            ]
        else:
            pieces, sums = [], list(torch.split(plan.totals(), 1))
        self._plans.append(_DeferredPlan(plan, params, of_params, pieces, sums))

    def finish_(self, others: Others | None = None) -> None:
        """Exchange the sums of all steps that were put off, and end them.

        Args:
            others: whose sums are exchanged with these, and which end then too (default: none).
        """
        # In the order of parameters: another rank may have other batches, or no fused step.
        messages = [
            (self._order[step.params[i]], b.sums[j], b.layout)
            for step in self._deferred
            for b in step.batches
            for j, i in enumerate(b.members)
        ]
        for fused in self._plans:
            rows = zip(fused.params, fused.sums, fused.layouts, strict=True)
            messages += [(self._order[p], sums, layout) for p, sums, layout in rows]
        messages.sort(key=lambda message: message[0])
        if others is not None:
            messages += others.messages(len(messages))
        sum_over_ranks_([m for _, m, _ in messages], [layout for _, _, layout in messages])
        for step in self._deferred:
            _finish_(step)
        for fused in self._plans:
            _finish_plan_(fused)
        if others is not None:
            others.finish_()


@dataclass(frozen=True)
class _AfterExchange:
    """Ends a step of shards when sums have been exchanged."""

    exchange: Exchange
    layouts: Mapping[Tensor, Layout]
    view: ViewOption

    def end_(self, *tensors: Any, foreach: bool) -> None:
        self.exchange.defer_(self.layouts, *tensors, foreach=foreach)

    def end_plan_(self, plan: KernelPlan, params: Sequence[Tensor]) -> None:
        self.exchange.defer_plan_(self.layouts, plan, params)

    @property
    def split(self) -> bool:
        """In ``"auto"`` the kernel sums over channels, which may be whole where layers are not."""
        of_layers = all(layout.view == _LAYER for layout in self.layouts.values())
        return not (self.view == "auto" and of_layers)

    @property
    def view_of_pieces(self) -> ViewOption:
        """How the shards split into what the kernel sums: a block may begin anywhere in them."""
        view = self.view
        return View.channel(view.dim) if isinstance(view, View) and view.kind == "blocks" else view

    def may_be_fused(self, params: Sequence[Tensor]) -> bool:
        """Whether the kernels for these shards, none of them empty, wait for an exchange."""
        return all(p.numel() > 0 and takes_split(p) for p in params)


def _lay_out(p: Any, view: ViewOption) -> Layout:
    if isinstance(view, View):
        return lay_out(p, view)
    layer = lay_out(p, _LAYER)
    if layer.whole is not None or lay_out(p, _CHANNEL).whole is not None:
        return layer
    return lay_out_channels(p)


def _finish_plan_(step: _DeferredPlan) -> None:
    if step.plan.split and step.plan.gated:
        _replace_gate_(step)
    elif not step.plan.split:
        step.plan.replace_totals(
            torch.cat(step.sums), [layout.shape.numel() for layout in step.layouts]
        )
    else:
        for here, sums, layout in zip(step.pieces, step.sums, step.layouts, strict=True):
            if here is not sums:
                here.copy_(layout.by_channel(sums))
    step.plan.finish_(step.params)


def _are_slices(sums: Tensor, layout: Layout) -> bool:
    """Whether what a plan summed over is what is exchanged: not blocks, nor channels of which other
    ranks have others."""
    return layout.view.kind != "blocks" and layout.count == len(sums)


def _replace_gate_(step: _DeferredPlan) -> None:
    """Decide the gate of weights whose channels are split, and hand the plan the coefficients."""
    plan = step.plan
    delta, eps = plan.gate
    coefficients: list[Any] = [None] * len(step.params)
    opened: list[Any] = [None] * len(step.params)
    members: dict[Layout, list[int]] = {}
    for i, layout in enumerate(step.layouts):
        members.setdefault(layout, []).append(i)
    for layout, indices in members.items():
        sums = torch.stack([step.sums[i] for i in indices], 1)
        b = _Batch(layout, indices, layout.entries, sums, [])
        by_channel, gates = _gated_coefficients(b, sums, computing_dtype(plan.dtype), delta, eps)
        for j, i in enumerate(indices):
            coefficients[i], opened[i] = by_channel[:, j], gates[j]
    plan.replace_gate(coefficients, torch.stack(opened))


def _finish_(deferred: _Deferred) -> None:
    step = deferred.step
    projected: list[Tensor | bool] = [True] * len(deferred.params)
    for b in deferred.batches:
        view = b.layout.channels
        u, w = (batch(tensors, b.members, view) for tensors in (deferred.updates, deferred.weights))
        sums = torch.stack(b.sums, 1)
        if step.view == "auto":
            coefficients, open_ = _gated_coefficients(b, sums, w.dtype, step.delta, step.eps)
            for i, gate in zip(b.members, open_.unbind(), strict=True):
                projected[i] = gate
        else:
            coefficients = b.layout.by_channel(sums[..., WU] / divisor(sums[..., WW]))
        coefficients = coefficients.T.to(w.dtype).view(*w.shape[:2], *(1 for _ in w.shape[2:]))
        if is_alias(b.members):
            u.addcmul_(w, coefficients, value=-1)
        else:
            unbatch_(deferred.updates, b.members, view, u - w * coefficients)
    descend_(
        deferred.weights,
        deferred.updates,
        projected,
        deferred.step_sizes,
        step,
        foreach=deferred.foreach,
    )
    if step.norm == "fixed":
        for b in deferred.batches:
            for i, sums in zip(b.members, b.sums, strict=True):
                factors = b.layout.by_channel(retraction_from_sums(sums, deferred.step_sizes[i]))
                slices = b.layout.channels.slices(deferred.weights[i])
                slices.mul_(factors.to(slices.dtype).view(-1, *(1 for _ in slices.shape[1:])))
    round_back_(deferred.params, deferred.weights, step.stochastic_rounding)


def _channel_sums(u: Tensor, w: Tensor, other: Tensor | None) -> Tensor:
    """⟨w, u⟩, ‖w‖² and, if there is another, ⟨w, other⟩, ‖other‖² of each channel."""
    pairs = [(1, 0), (1, 1), (1, 2), (2, 2)][: 2 if other is None else 4]
    return channel_sums([t for t in (u, w, other) if t is not None], pairs)


def _shut(sums: Tensor, entries: int, dtype: torch.dtype, delta: float, eps: float) -> Tensor:
    """Whether a channel's cosine shuts the gate of the channel view, for each weight."""
    return ~(cosine(sums, dtype, eps) < delta / math.sqrt(entries)).all(0)


def _gated_coefficients(
    b: _Batch, sums: Tensor, dtype: torch.dtype, delta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """What projection.gated_radial decides, from sums over ranks, shape ``(count, members, k)``.

    Returns:
        The multiple of each channel of ``w`` to subtract, shape ``(channels, members)``; and
        whether the gate is open, shape ``(members,)``.
    """
    by_channel = shrunk(sums if b.layout.view == _CHANNEL else b.channel_sums, eps)
    if b.layout.view == _CHANNEL:
        by_channel = b.layout.by_channel(by_channel)
        shut = _shut(sums, b.entries, dtype, delta, eps)
        total = sums.sum(0)
    else:
        total, shut = sums[0], sums[0, :, SHUT] > 0
    evidence = total[:, GG] > 0
    channel_open = evidence & ~shut
    layer_gate = delta / math.sqrt(b.entries * b.layout.shape[0])
    layer_open = evidence & (cosine(total, dtype, eps) < layer_gate)
    by_layer = torch.where(layer_open, shrunk(total, eps), 0)
    return torch.where(channel_open, by_channel, by_layer), channel_open | layer_open
